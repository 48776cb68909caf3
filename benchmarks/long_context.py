"""
What a smaller cache leaves of long contexts, on a real model: which heads look facts up, what each layer's keys are worth to
them, and the retrieval and perplexity of smaller caches beside the source's own in 16, 8, 4 and 2 bits and beside plainer ways.

    python benchmarks/long_context.py MODEL --text CALIBRATION --held-out TEXT --work runs/long_context

MODEL is a GGUF file or a folder. Each step leaves WORK/results/STEP.json, and is not done again while that is there; where `--minutes`
end the run, those that are missing are the last. Steps of several `--steps` run side by side, each list in a process of its own
that writes WORK/LIST.log: much of what a step does leaves a GPU waiting. The table is of all results in WORK.

Steps, and about how many minutes each takes by itself for SmolLM2-135M on an H200:

    source, source in 8 bits, source in 4 bits, source in 2 bits    0.4 each, measuring alone
    exact in float8, exact in int4                                  0.6 each, measuring alone
    new-R, R of 2, 3, 4, 8                                          1.5: the method as it is, R times smaller than 16 bits
    healed-R, adamw-R                                              0.7, and --heal-minutes: new-R healed by Muon, and by AdamW
    old-2, rows16-2, fit-only-2, float8-4                           1.5: parts of the method left out
    mean-pool-3, mean-pool-8                                        0.7: one mean of all heads, rows of 16 and of 4 bits
    svd-R, pca-R, R of 2, 4, 8                                      0.5: projections of keys and of values of a lower rank, by their
                                                                    singular values, and by what they make of the text
    window-R, R of 2, 4, 8                                          0.5: all heads of the most recent tokens alone
    heads, sensitivity                                              0.2, 4: which heads and layers find facts
"""

import argparse
from pathlib import Path

from options import describe


STEPS = (
    "source", "new-4", "healed-4", "source in 4 bits", "exact in int4", "new-2", "healed-2", "source in 8 bits", "exact in float8",
    "new-8", "healed-8", "source in 2 bits", "new-3", "healed-3", "mean-pool-3", "mean-pool-8", "svd-2", "svd-4", "svd-8", "pca-2", "pca-4", "pca-8",
    "window-2", "window-4", "window-8", "old-2", "heads", "float8-4", "rows16-2", "fit-only-2", "sensitivity",
    "adamw-2", "adamw-4", "adamw-8",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, help="for calibration and healing")
    parser.add_argument(
        "--heal-text", type=Path, nargs="*", default=[], help="files, which are read as one, for healing beside --text"
    )
    parser.add_argument("--held-out", type=Path, required=True, help="for perplexity, and between facts")
    parser.add_argument("--work", type=Path, default=Path("runs/long_context"))
    parser.add_argument(
        "--steps", nargs="*", action="append", metavar="STEP", help="(all, one by one; none: the table)"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 3000])
    parser.add_argument("--samples", type=int, default=24, help="of the needle; of other tasks a sixth")
    parser.add_argument("--windows", type=int, default=64, help="of 1024 tokens, for perplexity")
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--reconstruct-steps", type=int, default=500)
    parser.add_argument("--heal-minutes", type=float, default=2.0, help="as many steps as fit into them")
    parser.add_argument("--heal-steps", type=int, help="so many, whatever time they take")
    parser.add_argument("--heal-windows", type=int, default=4, help="in a step")
    parser.add_argument("--heal-window", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--heal-learning-rate", type=float, default=3e-4, help="of Muon; AdamW has a third")
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no step begins")
    parser.add_argument("--device", help="(cuda if there is one, else cpu)")
    args = parser.parse_args()
    for step in sum(args.steps or [], []):
        if step not in STEPS:
            parser.error(f"--steps {step}: expected some of {', '.join(STEPS)}")
    return args


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import copy
import json
import math
import shutil
import subprocess
import sys
import time

import torch
from compression import Deadline
from options import ROOT, save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conversion.evaluate import evaluation, report
from conversion.evaluate.tasks import TASKS, Sample, make_samples
from conversion.files.devices import find_device
from conversion.files.signals import stoppable
from conversion.files.tokenizer import load_tokenizer
from conversion.smaller import moments
from conversion.smaller import text as texts
from conversion.smaller.compress import TRIAL_ITERATIONS, compress
from conversion.smaller.fits import HeadFits
from conversion.smaller.heal import healed
from conversion.smaller.languages import Sentences
from conversion.smaller.moments import attention_hooks, collect_moments
from conversion.smaller.pipeline import HEALED_QUESTIONS, changes_cache
from conversion.smaller.probe import Probe
from conversion.smaller.questions import make_questions
from conversion.smaller.reconstruct import reconstruct
from conversion.smaller.stages import fast_products
from conversion.smaller.weights import compressed_attention
from conversion.sources.gguf import GgufFile, is_gguf
from modeling_t6 import T6ForCausalLM
from modeling_t6.factors_t6 import apply_rotary_pos_emb, form_heads


POWER = 1e6  # of whole keys beside keys less their mean: the fit by power, as it was before
HEALED_TOKENS = 20_000_000  # at most
QUESTIONS = 1024  # different windows of questions in healing, at most: each takes a tokenizer some milliseconds
COMPILED_MINUTES = 4  # of healing from which on layers are compiled, which takes one
# Options of all results of a folder.
SHARED = ("model", "text", "held_out", "lengths", "samples", "windows", "calibration_tokens", "reconstruct_steps")
TRIES = 2  # of a process: several on one GPU met faults of it
CACHE_DTYPES = (None, "float8_e4m3fn", "int4")
# The method as it is, and with parts left out: options of `Study.smaller`.
METHODS = {
    "new": {},
    "old": {"with_questions": False, "cache_dtypes": (None,)},
    "rows16": {"cache_dtypes": (None,)},
    "float8": {"cache_dtypes": ("float8_e4m3fn",)},
    "fit-only": {"cache_dtypes": (None,), "steps": 0},
}


def check_work(args: argparse.Namespace) -> None:
    """Ends a call for another model than that of WORK, or with other options that all its results share."""
    path, options = args.work / "options.json", {name: str(getattr(args, name)) for name in SHARED}
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else options
    for name, value in options.items():
        if value != known[name]:
            option = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            sys.exit(
                f"long_context.py: error: {args.work} has results with {option} {known[name]}, not {value}: expected another --work"
            )
    save(options, path)


def prepare(args: argparse.Namespace) -> None:
    """Makes WORK/source of a GGUF file, and WORK/exact."""
    args.work.mkdir(parents=True, exist_ok=True)
    source, exact = source_of(args), args.work / "exact"
    if not source.exists():
        file = GgufFile(args.model)
        unfinished = args.work / "source.unfinished"
        for folder in (unfinished, args.work / "tokenizer"):  # of a run that was killed
            shutil.rmtree(folder, ignore_errors=True)
        file.write_config(unfinished)
        file.write_weights(unfinished, 2**40)
        file.write_tokenizer(args.work / "tokenizer")
        for path in (args.work / "tokenizer").iterdir():
            path.replace(unfinished / path.name)
        unfinished.replace(source)
    if not exact.exists():
        words = ["hf", str(source.resolve()), str(exact.resolve()), "--no-verify", "--dtype", "bfloat16"]
        subprocess.run([sys.executable, "-m", "conversion", *words], check=True, cwd=ROOT)


def source_of(args: argparse.Namespace) -> Path:
    return args.work / "source" if is_gguf(args.model) else args.model


def result_of(args: argparse.Namespace, step: str) -> Path:
    return args.work / "results" / f"{step}.json"


class Study:
    """The models and texts that all steps share, and what one step has found so far."""

    def __init__(self, args: argparse.Namespace, start: float):
        self.args, self.start = args, start
        self.device = find_device(args.device)
        self.found: dict = {"seconds": {}}
        self.exact = args.work / "exact"
        tokenizer = load_tokenizer(self.exact)
        self.language = Sentences(tokenizer, args.held_out.read_text(encoding="utf-8"))
        count = {task: args.samples if task == "needle" else max(1, args.samples // 6) for task in TASKS}
        self.samples = {
            (task, length): make_samples(self.language, task, length, count[task])
            for length in args.lengths
            for task in TASKS
        }
        held_out = texts.windows(
            tokenizer, args.held_out.read_text(encoding="utf-8"), 1024, f"--held-out {args.held_out}"
        )
        self.windows = texts.evenly_spaced(held_out, args.windows)
        calibration = args.text.read_text(encoding="utf-8")
        text = texts.windows(tokenizer, calibration, 1024, f"--text {args.text}")
        some = torch.linspace(0, len(text) - 1, max(1, args.calibration_tokens // 1024)).long()
        self.calibration = text[some].to(self.device)
        self.calibration_language = Sentences(tokenizer, calibration)
        count = max(2, args.calibration_tokens // 4 // 2048)
        self.questions = make_questions(self.calibration_language, 2048, count).to(self.device)
        self.source, _ = evaluation.load_model(source_of(args), torch.float32, self.device)
        self.took("preparing", start)

    def took(self, name: str, start: float) -> None:
        memory = ""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
            self.found["peak_bytes"] = torch.cuda.max_memory_allocated()
            memory = f", at most {self.found['peak_bytes'] / 2**30:.1f} GiB"
        self.found["seconds"][name] = time.time() - start
        print(f"== {name}: {time.time() - start:.1f} s, {time.time() - self.start:.0f} s in all{memory}", flush=True)

    def t6(self, folder: Path | None = None) -> T6ForCausalLM:
        model = T6ForCausalLM.from_pretrained(folder or self.exact, dtype=torch.float32)
        return model.eval().to(self.device).requires_grad_(False)

    def measure(self, model: PreTrainedModel, kind: str, name: str, size: float | None = None) -> None:
        """A row of the table, its bytes those of a model in 16 bits, or `size`."""
        start, batch_size = time.time(), self.args.batch_size
        row = evaluation.score_all(model, kind, name, self.language, self.samples, batch_size)
        row["cache_bytes_per_token"] = size or evaluation.bytes_per_token(model, kind, torch.bfloat16)
        row |= evaluation.measure_windows(model, kind, name, self.windows, batch_size, self.source)
        self.add(row)
        self.took(f"measuring {name}", start)

    def add(self, row: dict) -> None:
        self.found["row"] = row
        for length in self.args.lengths:
            needle = next(s for s in row["scores"] if s["task"] == "needle" and s["length"] == length)
            found = needle["exact"] * needle["count"]
            print(f"{row['model']}: {found:.0f} of {needle['count']} needles at {length} tokens")
        print(report.table([row]), flush=True)

    def smaller(
        self,
        name: str,
        with_questions: bool = True,
        steps: int | None = None,
        cache_dtypes: tuple[str | None, ...] = CACHE_DTYPES,
        **options,
    ) -> T6ForCausalLM:
        """A model with a smaller cache. Without questions, keys count whole, too, not less their mean."""
        start, model, steps = time.time(), self.t6(), self.args.reconstruct_steps if steps is None else steps
        old, moments.WHOLE_KEYS = moments.WHOLE_KEYS, moments.WHOLE_KEYS if with_questions else POWER
        questions = self.questions if with_questions else None
        with fast_products():
            result = compress(model, self.calibration, questions=questions, cache_dtypes=cache_dtypes, **options)
            moments.WHOLE_KEYS = old
            self.took("compressing", start)
            if steps and changes_cache(result.config, model.config):
                start = time.time()
                errors = reconstruct(result, model, self.calibration, steps, questions=questions)
                self.found["errors"] = errors
                print("errors of attentions: " + ", ".join(f"{old:.1%} to {new:.1%}" for old, new in errors))
                self.took("reconstructing", start)
        config = result.config
        self.found |= {"k_rank": config.k_rank, "v_rank": config.v_rank, "cache_dtype": config.cache_dtype}
        print(f"{name}: keys {config.k_rank}, values {config.v_rank}, rows {config.cache_dtype}")
        result.bfloat16().save_pretrained(self.args.work / name)
        for method in ("healed", "adamw"):  # what was healed before is of another model
            shutil.rmtree(self.args.work / f"checkpoints-{name.replace('new', method)}", ignore_errors=True)
        return self.t6(self.args.work / name)

    def healed(self, name: str, step: str, optimizer: str) -> T6ForCausalLM:
        """The model WORK/`name`, healed on text and questions."""
        args, start = self.args, time.time()
        length, tokens = args.heal_window, args.heal_windows * args.heal_window
        steps = args.heal_steps or HEALED_TOKENS // tokens
        count = steps * args.heal_windows
        asked = max(1, int(HEALED_QUESTIONS * count))
        tokenizer = load_tokenizer(self.exact)
        kept = healing_windows(tokenizer, args.text, args.heal_text, length, count)
        kept.append(
            repeat(make_questions(self.calibration_language, length, min(asked, QUESTIONS), seed=1).ids, asked)
        )
        ids = torch.cat(kept)
        if not args.heal_steps:  # of a checkpoint, nobody knows what was left of the minutes
            shutil.rmtree(args.work / f"checkpoints-{step}", ignore_errors=True)
        deadline = Deadline(time.time() + 60 * args.heal_minutes, final=0.0)
        model, done = healed(
            lambda: self.t6(args.work / name).requires_grad_(True), self.source, ids, args.work / f"checkpoints-{step}",
            steps=steps, batch_size=args.heal_windows, optimizer=optimizer,
            learning_rate=args.heal_learning_rate / (1 if optimizer == "muon" else 3), device=self.device,
            callbacks=[] if args.heal_steps else [deadline],
            compiled=self.device.startswith("cuda") and args.heal_minutes >= COMPILED_MINUTES,
        )  # fmt: skip
        self.found |= {"steps": done, "tokens": done * tokens}
        print(f"healed {name}: {done} steps, {done * tokens:,} tokens", flush=True)
        self.took("healing", start)
        return model.requires_grad_(False)


def healing_windows(
    tokenizer: PreTrainedTokenizerBase, text: Path, others: list[Path], length: int, count: int
) -> list[torch.Tensor]:
    """The part of `count` windows that is of text: as much of one text as of all others, which are read as one."""
    read = [(f"--text {text}", texts.read_text(text))]
    if others:
        read.append((f"--heal-text {' '.join(map(str, others))}", "\n".join(map(texts.read_text, others))))
    each = math.ceil(count * (1 - HEALED_QUESTIONS) / len(read))
    found = [texts.windows(tokenizer, whole, length, name, each) for name, whole in read]
    return [repeat(ids, each) for ids in found]


def repeat(ids: torch.Tensor, count: int) -> torch.Tensor:
    """`count` windows, the same ones again if there are fewer."""
    return ids.repeat(math.ceil(count / len(ids)), 1)[:count]


@torch.no_grad()
def of_low_rank(model: PreTrainedModel, ratio: float, ids: torch.Tensor | None) -> tuple[PreTrainedModel, float]:
    """
    A copy of a Llama whose projections to keys, before RoPE, and to values have a rank `ratio` times below their outputs, and the
    bytes in 16 bits of what would be cached of each token. They lose what has the smallest singular values or, with `ids`
    [n, seq], the least power in keys and values of that text.
    """
    model, size, moments = copy.deepcopy(model), 0, {}
    projections = [getattr(layer.self_attn, name) for layer in model.model.layers for name in ("k_proj", "v_proj")]

    def hook(projection, args, output) -> None:
        flat = output.flatten(0, 1).double()
        moments[projection] = moments.get(projection, 0) + flat.mT @ flat

    if ids is not None:
        hooks = [projection.register_forward_hook(hook) for projection in projections]
        for batch in ids.split(8):
            model.model(batch, use_cache=False)
        for handle in hooks:
            handle.remove()
    for projection in projections:
        rank, weight = int(projection.out_features / ratio), projection.weight.double()
        u = torch.linalg.svd(weight if ids is None else moments[projection])[0][:, :rank]
        projection.weight.copy_(u @ (u.mT @ weight))
        size += 2 * rank
    return model, size


def windowed(study: Study, name: str, ratio: float) -> None:
    """All heads of the last tokens alone, 1 / `ratio` of each length: of perplexity, those of 1024 tokens."""
    args, start = study.args, time.time()

    def model(length: int) -> T6ForCausalLM:
        result = T6ForCausalLM.from_pretrained(study.exact, dtype=torch.float32, sliding_window=int(length / ratio))
        return result.eval().to(study.device)

    row: dict = {"scores": []}
    for length in args.lengths:
        some = {key: samples for key, samples in study.samples.items() if key[1] == length}
        found = evaluation.score_all(model(length), "model", name, study.language, some, args.batch_size)
        row["scores"] += found["scores"]
    row |= {key: report.mean(row["scores"], key) for key in ("found", "exact", "log_probability")}
    size = evaluation.bytes_per_token(study.t6(), "model", torch.bfloat16) / ratio
    row |= {"model": name, "cache_bytes_per_token": size}
    windows = study.windows.shape[1]
    row |= evaluation.measure_windows(model(windows), "model", name, study.windows, args.batch_size, study.source)
    study.add(row)
    study.took(f"measuring {name}", start)


@torch.no_grad()
def head_scores(model: T6ForCausalLM, samples: list[Sample]) -> list[list[float]]:
    """
    For each layer and head, the attention of the tokens before an answer's tokens to these in the fact, the mean over all: that
    of a head which copies is near 1.
    """
    start, count = len(samples[0].prompt), min(len(sample.answer) for sample in samples)
    ids = torch.tensor([sample.prompt + sample.answer[:count] for sample in samples], device=model.device)
    places = []
    for sample in samples:
        fact = sample.prompt[sample.places[0] :]
        first = next(i for i in range(len(fact)) if fact[i : i + count] == sample.answer[:count])
        places.append([sample.places[0] + first + i for i in range(count)])
    places = torch.tensor(places, device=model.device)
    found: list[list[float]] = []

    def hook(attention, args, kwargs, output) -> None:
        states, (cos, sin) = args[0], kwargs["position_embeddings"]
        asking = slice(start - 1, start - 1 + count)
        query = attention.q_proj(states[:, asking]).unflatten(-1, (-1, attention.head_dim))
        query = apply_rotary_pos_emb(query, cos[:, asking], sin[:, asking])
        key = attention.k_b_proj(states).unflatten(-1, (-1, attention.head_dim))
        key = form_heads(attention.k_a, apply_rotary_pos_emb(key, cos, sin))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * attention.scaling
        seen = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool, device=states.device).tril()[asking]
        probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        at = places[:, None, :, None].expand(-1, probabilities.shape[1], -1, -1)
        found.append(probabilities.gather(-1, at).mean((0, 2, 3)).tolist())

    with attention_hooks(model, hook):
        model.model(ids, use_cache=False)
    return found


@torch.no_grad()
def answer_log_probability(model: T6ForCausalLM, samples: list[Sample]) -> float:
    start, count = len(samples[0].prompt), min(len(sample.answer) for sample in samples)
    ids = torch.tensor([sample.prompt + sample.answer[:count] for sample in samples], device=model.device)
    states = model.model(ids, use_cache=False).last_hidden_state[:, start - 1 : -1]
    log_probs = model.lm_head(states).float().log_softmax(-1)
    return log_probs.gather(-1, ids[:, start:, None]).mean().item()


@torch.no_grad()
def sensitivity(study: Study) -> list[dict]:
    """What one layer's keys of a lower rank do to the needle, and to predictions of text and answers."""
    model = study.t6()
    attentions = [layer.self_attn for layer in model.model.layers]
    fits = HeadFits(attentions, "fit")
    fits.use(collect_moments(model, [*study.calibration.split(8), *study.questions.ids.split(4)]))
    samples = study.samples["needle", study.args.lengths[0]][::3]
    text, both = Probe(model, study.calibration), Probe(model, study.calibration, study.questions)
    rows = [{"needle": answer_log_probability(model, samples)}]
    for side in "kv":
        for rank in range(model.config.k_rank - 1, 0, -1):
            for layer, fit in enumerate(fits(side, rank, TRIAL_ITERATIONS)):
                pair = (fit, None) if side == "k" else (None, fit)
                model.model.layers[layer].self_attn = compressed_attention(attentions[layer], *pair)
                rows.append({
                    "side": side, "rank": rank, "layer": layer, "needle": answer_log_probability(model, samples),
                    "text": text.divergence(model).item(), "both": both.divergence(model).item(),
                })  # fmt: skip
                model.model.layers[layer].self_attn = attentions[layer]
    print(
        f"needle, log-probability: {rows[0]['needle']:.3f}; with lower ranks in one layer (needle | KL of text, answers):"
    )
    for layer in range(len(attentions)):
        cells = [
            f"{row['side']} {row['rank']}: {row['needle']:7.3f} | {row['text']:.4f} {row['both'] - row['text']:.4f}"
            for row in rows[1:]
            if row["layer"] == layer
        ]
        print(f"layer {layer:>2}   " + "     ".join(cells))
    return rows


def run(study: Study, step: str) -> None:
    """Does one step."""
    method, _, ratio = step.rpartition("-")

    def smaller(**options) -> None:
        study.measure(study.smaller(step, **options), "model", step)

    if step == "heads":
        heads(study)
    elif step == "sensitivity":
        study.found["sensitivity"] = sensitivity(study)
    elif step.startswith("source"):
        kind = step.removeprefix("source").removeprefix(" in ").removesuffix(" bits")
        study.measure(study.source, kind or "model", step)
    elif step.startswith("exact in "):
        kind = {"float8": "float8_e4m3fn", "int4": "int4"}[step.removeprefix("exact in ")]
        study.measure(study.t6(), kind, step)
    elif method in ("healed", "adamw"):
        optimizer = "muon" if method == "healed" else "adamw"
        study.measure(study.healed(f"new-{ratio}", step, optimizer), "model", step)
    elif method in METHODS:
        smaller(cache_ratio=float(ratio), **METHODS[method])
    elif method == "mean-pool":
        rows = {"3": (None,), "8": ("int4",)}[ratio]
        smaller(method="mean-pool", k_ranks=[1], v_ranks=[1], cache_dtypes=rows, steps=0)
    elif method in ("svd", "pca"):
        model, size = of_low_rank(study.source, float(ratio), study.calibration if method == "pca" else None)
        study.measure(model, "model", step, size)
    elif method == "window":
        windowed(study, step, float(ratio))


def heads(study: Study) -> None:
    for task in ("needle", "copying"):
        length = study.args.lengths[0]
        scores = head_scores(study.t6(), study.samples[task, length][: study.args.batch_size])
        study.found[task] = scores
        best = sorted(
            ((s, layer, head) for layer, row in enumerate(scores) for head, s in enumerate(row)), reverse=True
        )
        print(f"{task}: " + ", ".join(f"layer {layer} head {head} {s:.2f}" for s, layer, head in best[:16]))


def side_by_side(args: argparse.Namespace) -> None:
    """A process for each list of steps; one that fails is begun again once, and does what is missing."""
    of_steps = argparse.ArgumentParser(add_help=False)
    of_steps.add_argument("--steps", nargs="*", action="append")
    _, words = of_steps.parse_known_args()
    running = {}

    def begin(steps: list[str], tries: int) -> None:
        log = open(args.work / f"{steps[0]}.log", "a")  # noqa: SIM115  the process writes to it
        command = [sys.executable, __file__, *words, "--steps", *steps]
        running[subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)] = steps, tries

    try:
        with stoppable():
            for steps in filter(None, args.steps):
                begin(steps, 1)
            while running:
                for process, (steps, tries) in list(running.items()):
                    if process.poll() is not None:
                        del running[process]
                        if process.returncode:
                            print(
                                f"== {steps[0]}: exit code {process.returncode}, see its log in {args.work}",
                                flush=True,
                            )
                        if process.returncode and tries < TRIES:
                            begin(steps, tries + 1)
                time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()


def print_table(args: argparse.Namespace) -> None:
    found = {step: json.loads(result_of(args, step).read_text()) for step in STEPS if result_of(args, step).exists()}
    rows = [
        x["row"] for x in found.values() if "row" in x and {s["length"] for s in x["row"]["scores"]} == {*args.lengths}
    ]
    rows.sort(key=lambda row: -row["cache_bytes_per_token"])
    save({"model": args.model.name, "rows": rows, "steps": found}, args.work / "results.json")
    if not rows:
        return
    first = found.get("source", {}).get("row", rows[0])
    print(report.table(rows))
    lengths = args.lengths
    print(f"\n{'':<18}{'bytes':>8}{'perplexity':>12}{'found':>9}" + "".join(f"{f'at {n:,}':>10}" for n in lengths))
    for row in rows:
        needles = [next(s for s in row["scores"] if (s["task"], s["length"]) == ("needle", n)) for n in lengths]
        cells = "".join(f"{s['exact'] * s['count']:>5.0f} of {s['count']:<2}" for s in needles)
        more, part = row["perplexity"] / first["perplexity"] - 1, row["found"] / max(first["found"], 1e-9)
        print(f"{row['model']:<18}{row['cache_bytes_per_token']:>8,.0f}{more:>+12.2%}{part:>9.1%}{cells}")


def main() -> None:
    start, args = time.time(), parse_args()
    result_of(args, "").parent.mkdir(parents=True, exist_ok=True)
    check_work(args)
    lists = args.steps or [list(STEPS)]
    if any(not result_of(args, step).exists() for steps in lists for step in steps):
        prepare(args)
    if args.steps is not None and len(args.steps) > 1:
        side_by_side(args)
        print_table(args)
        return
    waiting = [step for step in lists[0] if not result_of(args, step).exists()]
    study = Study(args, start) if waiting else None
    for step in waiting:
        if time.time() - start > 60 * args.minutes:
            print(f"== no time for {step}", flush=True)
            continue
        study.found, begun = {"seconds": {}}, time.time()
        run(study, step)
        study.took(step, begun)
        save(study.found, result_of(args, step))
    print_table(args)


if __name__ == "__main__":
    main()
