"""
What a smaller cache leaves of long contexts, on a real model: which heads look facts up, what each layer's keys are worth to
them, and the retrieval and perplexity of smaller caches beside the source's own in 16, 8 and 4 bits.

    python benchmarks/long_context.py MODEL --text CALIBRATION --held-out TEXT --work runs/long_context

MODEL is a GGUF file or a folder. The figures go into WORK/results.json after every step: where `--minutes` end the run, those
that are missing are the last. A second run goes on with the models that WORK holds.
"""

import argparse
from pathlib import Path

from options import describe


STEPS = (
    "source", "new-4", "old-2", "new-2", "healed-4", "source in 4 bits", "exact in int4", "heads", "float8-4", "rows16-2",
    "fit-only-2", "sensitivity", "new-8", "new-3", "exact in float8", "source in 8 bits",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, help="for calibration and healing")
    parser.add_argument("--held-out", type=Path, required=True, help="for perplexity, and between facts")
    parser.add_argument("--work", type=Path, default=Path("runs/long_context"))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 3000])
    parser.add_argument("--samples", type=int, default=24, help="of the needle; of other tasks a sixth")
    parser.add_argument("--windows", type=int, default=64, help="of 1024 tokens, for perplexity")
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--reconstruct-steps", type=int, default=500)
    parser.add_argument("--heal-steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--device", help="(cuda if there is one, else cpu)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import shutil
import subprocess
import sys
import time

import torch
from options import ROOT, save
from transformers import PreTrainedModel

from conversion.evaluate import order as evaluation
from conversion.evaluate import report
from conversion.evaluate.tasks import TASKS, Sample, make_samples
from conversion.files.devices import find_device
from conversion.files.tokenizer import load_tokenizer
from conversion.smaller import moments
from conversion.smaller import text as texts
from conversion.smaller.compress import TRIAL_ITERATIONS, compress
from conversion.smaller.fits import HeadFits
from conversion.smaller.heal import heal
from conversion.smaller.languages import Sentences
from conversion.smaller.moments import attention_hooks, collect_moments
from conversion.smaller.probe import Probe
from conversion.smaller.questions import make_questions
from conversion.smaller.reconstruct import reconstruct
from conversion.smaller.weights import compressed_attention
from conversion.sources.gguf import GgufFile, is_gguf
from modeling_t6 import T6ForCausalLM
from modeling_t6.factors_t6 import apply_rotary_pos_emb, form_heads


POWER = 1e6  # of whole keys beside keys less their mean: the fit by power, as it was before


class Study:
    """The models and texts that all steps share, and what they have found so far."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.start = args, time.time()
        self.device = find_device(args.device)
        args.work.mkdir(parents=True, exist_ok=True)
        self.results = {"model": args.model.name, "rows": [], "seconds": {}}
        self.source = self.make_source().resolve()
        self.exact = args.work.resolve() / "exact"
        if not self.exact.exists():
            words = ["hf", str(self.source), str(self.exact), "--no-verify", "--dtype", "bfloat16"]
            subprocess.run([sys.executable, "-m", "conversion", *words], check=True, cwd=ROOT)
        tokenizer = load_tokenizer(self.exact)
        self.language = Sentences(tokenizer, args.held_out.read_text(encoding="utf-8"))
        count = {task: args.samples if task == "needle" else max(1, args.samples // 6) for task in TASKS}
        self.samples = {
            (task, length): make_samples(self.language, task, length, count[task])
            for length in args.lengths
            for task in TASKS
        }
        held_out = texts.windows(tokenizer, args.held_out.read_text(encoding="utf-8"), 1024, "held-out")
        self.windows = held_out[torch.linspace(0, len(held_out) - 1, min(len(held_out), args.windows)).long()]
        calibration = args.text.read_text(encoding="utf-8")
        self.text = texts.windows(tokenizer, calibration, 1024, "calibration")
        some = torch.linspace(0, len(self.text) - 1, max(1, args.calibration_tokens // 1024)).long()
        self.calibration = self.text[some].to(self.device)
        self.calibration_language = Sentences(tokenizer, calibration)
        count = max(2, args.calibration_tokens // 4 // 2048)
        self.questions = make_questions(self.calibration_language, 2048, count).to(self.device)
        self.took("preparing", self.start)

    def make_source(self) -> Path:
        if not is_gguf(self.args.model):
            return self.args.model
        folder = self.args.work / "source"
        if not folder.exists():
            file = GgufFile(self.args.model)
            unfinished = self.args.work / "source.unfinished"
            file.write_config(unfinished)
            file.write_weights(unfinished, 2**40)
            file.write_tokenizer(self.args.work / "tokenizer")
            for path in (self.args.work / "tokenizer").iterdir():
                path.replace(unfinished / path.name)
            unfinished.replace(folder)
        return folder

    def took(self, name: str, start: float) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.results["seconds"][name] = time.time() - start
        print(f"== {name}: {time.time() - start:.1f} s, {time.time() - self.start:.0f} s in all", flush=True)
        save(self.results, self.args.work / "results.json")

    def t6(self, folder: Path | None = None) -> T6ForCausalLM:
        model = T6ForCausalLM.from_pretrained(folder or self.exact, dtype=torch.float32)
        return model.eval().to(self.device).requires_grad_(False)

    def measure(self, model: PreTrainedModel, kind: str, name: str, source: PreTrainedModel) -> None:
        """A row of the table, its bytes those of a model in 16 bits."""
        start = time.time()
        row = evaluation.score_all(model, kind, name, self.language, self.samples, self.args.batch_size)
        row["cache_bytes_per_token"] = evaluation.bytes_per_token(model, kind, torch.bfloat16)
        row |= evaluation.measure_windows(model, kind, name, self.windows, self.args.batch_size, source)
        self.results["rows"].append(row)
        for length in self.args.lengths:
            needle = next(s for s in row["scores"] if s["task"] == "needle" and s["length"] == length)
            print(f"{name}: {needle['exact'] * needle['count']:.0f} of {needle['count']} needles at {length} tokens")
        print(report.table(self.results["rows"]), flush=True)
        self.took(f"measuring {name}", start)

    def smaller(self, name: str, ratio: float, new: bool, steps: int, cache_dtypes: list[str | None]) -> T6ForCausalLM:
        """A smaller cache by the method as it is, or without questions, rows of 8 bits and keys less their mean."""
        start, model = time.time(), self.t6()
        old, moments.WHOLE_KEYS = moments.WHOLE_KEYS, moments.WHOLE_KEYS if new else POWER
        questions = self.questions if new else None
        result = compress(
            model, self.calibration, cache_ratio=ratio, questions=questions, cache_dtypes=cache_dtypes
        )  # fmt: skip
        moments.WHOLE_KEYS = old
        if steps and (result.config.k_rank, result.config.v_rank) != (model.config.k_rank, model.config.v_rank):
            errors = reconstruct(result, model, self.calibration, steps, questions=questions)
            self.results[f"errors {name}"] = errors
            print("errors of attentions: " + ", ".join(f"{old:.1%} to {new:.1%}" for old, new in errors))
        config = result.config
        ranks = {"keys": config.k_rank, "values": config.v_rank, "cache_dtype": config.cache_dtype}
        self.results[f"ranks {name}"] = ranks
        print(f"{name}: {ranks}")
        result.bfloat16().save_pretrained(self.args.work / name)
        shutil.rmtree(self.args.work / "checkpoints", ignore_errors=True)  # of what was healed before
        self.took(f"compressing {name}", start)
        return self.t6(self.args.work / name)


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


def healed(study: Study, source: PreTrainedModel, folder: Path) -> T6ForCausalLM:
    """The model in `folder`, healed on the calibration text and questions, windows of 1024 tokens."""
    args, start = study.args, time.time()
    wanted = 8 * args.heal_steps
    text = study.text.repeat(1 + wanted // len(study.text), 1)[: wanted * 7 // 8]
    ids = torch.cat([text, make_questions(study.calibration_language, 1024, wanted - len(text), seed=1).ids])
    model = study.t6(folder).requires_grad_(True)
    heal(
        model, source, ids, args.work / "checkpoints", args.heal_steps, 8, 1, "muon", 3e-4, 0.0, 0, study.device
    )  # fmt: skip
    study.took("healing", start)
    return model.requires_grad_(False)


def main() -> None:
    args = parse_args()
    torch.set_float32_matmul_precision("high")
    study = Study(args)
    source, _ = evaluation.load_model(study.source, torch.float32, study.device)

    def heads() -> None:
        for task in ("needle", "copying"):
            length = args.lengths[0]
            scores = head_scores(study.t6(), study.samples[task, length][: args.batch_size])
            study.results[f"heads {task}"] = scores
            best = sorted(
                ((s, layer, head) for layer, row in enumerate(scores) for head, s in enumerate(row)), reverse=True
            )
            print(f"{task}: " + ", ".join(f"layer {layer} head {head} {s:.2f}" for s, layer, head in best[:16]))

    def smaller(name, ratio, new=True, steps=args.reconstruct_steps, cache_dtypes=(None, "float8_e4m3fn", "int4")):
        model = study.smaller(name, ratio, new, steps, cache_dtypes)
        study.measure(model, "model", name, source)

    actions = {
        "source": lambda: study.measure(source, "model", "source", source),
        "source in 8 bits": lambda: study.measure(source, "8", "source in 8 bits", source),
        "source in 4 bits": lambda: study.measure(source, "4", "source in 4 bits", source),
        "exact in float8": lambda: study.measure(study.t6(), "float8_e4m3fn", "exact in float8", source),
        "exact in int4": lambda: study.measure(study.t6(), "int4", "exact in int4", source),
        "heads": heads,
        "new-4": lambda: smaller("new-4", 4),
        "healed-4": lambda: study.measure(healed(study, source, args.work / "new-4"), "model", "healed-4", source),
        "float8-4": lambda: smaller("float8-4", 4, cache_dtypes=["float8_e4m3fn"]),
        "sensitivity": lambda: study.results.update(sensitivity=sensitivity(study)),
        "new-8": lambda: smaller("new-8", 8),
        "new-3": lambda: smaller("new-3", 3),
        "new-2": lambda: smaller("new-2", 2),
        "rows16-2": lambda: smaller("rows16-2", 2, cache_dtypes=[None]),
        "old-2": lambda: smaller("old-2", 2, new=False, cache_dtypes=[None]),
        "fit-only-2": lambda: smaller("fit-only-2", 2, steps=0, cache_dtypes=[None]),
    }
    for name in args.steps:
        if time.time() - study.start > 60 * args.minutes:
            print(f"== no time for {name}", flush=True)
            continue
        start = time.time()
        actions[name]()
        study.took(name, start)


if __name__ == "__main__":
    main()
