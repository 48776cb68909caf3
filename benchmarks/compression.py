"""
What a smaller cache costs: a Llama trained from scratch, converted to smaller caches, before and after healing.

    python benchmarks/compression.py prepare WORK --sources DIR [DIR ...]    texts and a tokenizer
    torchrun --nproc-per-node N benchmarks/compression.py train WORK         the Llama, with 8 key/value heads
    python benchmarks/compression.py convert WORK                            every method and size, side by side on the GPUs
    python benchmarks/compression.py report WORK [--output DIR]              table, JSON and picture

Each conversion is a call of `python -m conversion hf`, healed on at most a twentieth of the tokens of the training. A run is called
METHOD-RATIO: `fit-4` may have rows of 16, 8 or 4 bits, `rows16-4` and `rows8-8` have those. `rows16-4-long` is one more of the first,
with the options that `--variant long OPTIONS` adds.

A model that finds what it has read needs texts that ask for it: `prepare --retrieval-windows`, and parts of the training for these
and for repeated text. Its conversions are healed on the first twentieth of the windows of which it was trained, whatever the method.
`convert` needs llama/, training.json, held_out.txt, heal.npy and calibration.txt of WORK, and no more. About 66M parameters, 400M tokens,
in sittings of some minutes, each the same command; one H200 trains on about 0.7M tokens a second:

    python benchmarks/compression.py prepare WORK --sources DIR --retrieval-windows 40000 --passes 2
    python benchmarks/compression.py train WORK --hidden-size 768 --layers 9 --heads 12 --learning-rate 1e-3 --steps 6100 \\
        --retrieval-part 0.25 --repeated-part 0.15 --sitting-minutes 8
    python benchmarks/compression.py convert WORK --processes 4 --runs rows16-4 rows8-8 mean-pool-4 --options --heal-optimizer muon \\
        --heal-learning-rate 4e-4 --retrieval-samples 24
"""

import argparse
import re
from pathlib import Path

from options import describe


def read_name(text: str) -> tuple[str, int, str]:
    """Method, ratio and variant of METHOD-RATIO[-VARIANT]."""
    match = re.fullmatch(r"([a-z]\S*?)-(\d+)(?:-(\S+))?", text)
    if match is None:
        raise ValueError
    return match[1], int(match[2]), match[3] or ""


def name_of(run: tuple[str, int, str]) -> str:
    return "-".join(map(str, filter(None, run)))


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare, train, convert, report = (commands.add_parser(name) for name in ("prepare", "train", "convert", "report"))
    for command in (prepare, train, convert, report):
        command.add_argument("work", type=Path, metavar="WORK")

    prepare.add_argument("--sources", nargs="+", type=Path, required=True, metavar="DIR")
    prepare.add_argument("--vocab-size", type=int, default=4096)
    prepare.add_argument("--passes", type=float, default=3, help="over the text that `train` will make")
    prepare.add_argument("--held-out-characters", type=int, default=2_000_000)
    prepare.add_argument("--retrieval-windows", type=int, default=0, help="of tasks that ask for what was read")

    train.add_argument("--hidden-size", type=int, default=512)
    train.add_argument("--layers", type=int, default=8)
    train.add_argument("--heads", type=int, default=8)
    train.add_argument("--steps", type=int, default=2000, help="the most, with --max-minutes")
    time_limit = train.add_mutually_exclusive_group()
    time_limit.add_argument("--max-minutes", type=float, help="fewer steps if these do not fit")
    train.add_argument("--batch-size", type=int, default=64, help="windows of 1024 tokens a device")
    train.add_argument("--learning-rate", type=float, default=1e-3)
    train.add_argument("--retrieval-part", type=float, default=0.0, help="of the windows, of those that ask")
    train.add_argument("--repeated-part", type=float, default=0.0, help="of the windows, of repeated text")
    time_limit.add_argument(
        "--sitting-minutes", type=float, help="a checkpoint then, from which the same command goes on"
    )

    convert.add_argument("--runs", nargs="+", type=read_name, metavar="METHOD-RATIO[-VARIANT]")
    convert.add_argument(
        "--variant", nargs=2, action="append", default=[], metavar=("VARIANT", "OPTIONS"),
        help="what its runs add to --options, as one word",
    )  # fmt: skip
    for part in ("retrieval", "repeated"):
        convert.add_argument(f"--{part}-part", type=float, help="of the windows (as training.json says)")
    convert.add_argument("--processes", type=int, default=1, help="at a time on each GPU")
    convert.add_argument("--heal-windows", type=int, default=8, help="windows of 1024 tokens in a step")
    convert.add_argument("--passes", type=int, default=1, help="of healing through its tokens")
    convert.add_argument(
        "--cross-entropy", type=float, default=0.0,
        help="weight of the loss on the text; then, the source is trained on, too",
    )  # fmt: skip
    convert.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of `python -m conversion hf`")

    report.add_argument("--output", type=Path, default=Path("docs"), metavar="DIR")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import hashlib
import json
import math
import multiprocessing
import os
import random
import shlex
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from conversion.evaluate.tasks import TASKS, make_samples
from conversion.files.folders import last_checkpoint
from conversion.smaller.languages import Sentences
from conversion.smaller.questions import make_questions


SUFFIXES = (".py", ".pyi", ".txt", ".md", ".rst")
WINDOW = 1024
REPEATED = (32, 512)  # tokens of text that is repeated
SAMPLE_LENGTHS = (300, 400, 500, 1000)  # of tasks in training
PORTION, FILLER = 500, 4_000_000  # windows that a process makes at a time, characters of the text between facts
STOPPED = 75  # exit code of a training that has more to do: EX_TEMPFAIL of sysexits.h
HEALED_PART = 0.05
ROWS = {"fit": [], "rows16": ["--cache-dtype", "model"], "rows8": ["--cache-dtype", "float8_e4m3fn"]}
RUNS = [(method, ratio, "") for ratio in (4, 2, 8) for method in ("fit", "mean-pool")]
CONTROL = ("fit", 1, "")  # the whole cache: what the loss on the text does to the source itself
FINAL_RATE = 0.1  # of the highest
LOOKED_AT = 20  # steps after which it is looked at again how many fit into the time
TRIES = 3  # several processes on a GPU met faults of it in Muon's steps; a conversion goes on from its checkpoint


def retrieval_windows(tokenizer: Path, text: str, count: int, seed: int) -> np.ndarray:
    """
    Windows [count, WINDOW] of token ids: every other one of questions for made-up facts, the rest of tasks of the evaluation, in
    short texts one after the other. Values are random: what is asked later was not seen.
    """
    language = Sentences(PreTrainedTokenizerFast.from_pretrained(tokenizer), text)
    generator, windows = random.Random(seed), []
    for index in range(count):
        if index % 2:
            windows.append(make_questions(language, WINDOW, 1, seed * count + index).ids[0].tolist())
            continue
        ids: list[int] = []
        while len(ids) < WINDOW:
            task, length = generator.choice(sorted(TASKS)), generator.choice(SAMPLE_LENGTHS)
            (sample,) = make_samples(language, task, length, 1, generator.randrange(2**40))
            ids += sample.prompt + sample.answer + [0]
        windows.append(ids[:WINDOW])
    return np.array(windows, dtype=np.uint16)


def prepare_retrieval(args: argparse.Namespace, text: str) -> None:
    """In processes of their own: tokenising many short texts takes one of them minutes."""
    count = max(1, args.retrieval_windows // PORTION)
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(count, len(os.sched_getaffinity(0))), context) as pool:
        parts = [pool.submit(retrieval_windows, args.work / "tokenizer", text, PORTION, seed) for seed in range(count)]
        with open(args.work / "retrieval.bin", "wb") as file:
            for part in tqdm(parts, desc="retrieval", unit="portion"):
                file.write(part.result().tobytes())
    if threads is None:
        del os.environ["TOKENIZERS_PARALLELISM"]


def prepare(args: argparse.Namespace) -> None:
    """Distinct files, one in a hundred held out by the hash of its content; tokens of the rest."""
    seen, training, held_out = set(), [], []
    paths = sorted(path for source in args.sources for path in source.rglob("*") if path.suffix in SUFFIXES)
    for path in tqdm(paths, desc="reading", unit="file"):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256("".join(text.split()).encode()).digest()  # files that differ in blanks are the same
        if digest not in seen and 200 <= len(text) <= 1_000_000:
            (held_out if digest[0] == 0 else training).append(text)
        seen.add(digest)
    if not training or not held_out:
        sys.exit(
            f"compression.py: error: {len(training) + len(held_out)} texts are too few: expected some hundred files"
        )
    random.Random(0).shuffle(training)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(training[: max(1, len(training) // 10)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "train.bin").unlink(missing_ok=True)  # of another tokenizer
    fast.save_pretrained(args.work / "tokenizer")
    unfinished = args.work / "train.bin.unfinished"
    with open(unfinished, "wb") as file:
        for start in tqdm(range(0, len(training), 1000), desc="tokens", unit="thousand files"):
            for encoding in tokenizer.encode_batch(training[start : start + 1000]):
                file.write(np.array([0, *encoding.ids], dtype=np.uint16).tobytes())
    if args.retrieval_windows:
        prepare_retrieval(args, "\n".join(training)[:FILLER])
    count = unfinished.stat().st_size // 2
    size = sum(map(len, training))
    healing = training[: max(1, int(1.2 * HEALED_PART * args.passes * len(training)))]
    (args.work / "heal.txt").write_text("\n".join(healing), encoding="utf-8")
    (args.work / "held_out.txt").write_text("\n".join(held_out)[: args.held_out_characters], encoding="utf-8")
    unfinished.replace(args.work / "train.bin")  # last: `train` is told that all is there
    print(
        f"{len(training):,} files, {size:,} characters, {count:,} tokens to train on; {len(held_out):,} files held out"
    )


class SampledWindows(Dataset):
    """
    Windows at random places of the tokens in a folder of `prepare`; which, the index says.

    Args:
        tokens: the file of these, of 16 bits each.
        retrieval: the part of the windows that are of those that ask for what was read.
        repeated: the part of the windows of a short text said again and again.
    """

    def __init__(self, tokens: Path, count: int, retrieval: float = 0.0, repeated: float = 0.0):
        self.tokens, self.count = np.memmap(tokens, dtype=np.uint16, mode="r"), count
        self.parts = retrieval, repeated
        self.asking = None
        if retrieval:
            path = tokens.with_name("retrieval.bin")
            self.asking = np.memmap(path, dtype=np.uint16, mode="r").reshape(-1, WINDOW)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator, (retrieval, repeated) = random.Random(index), self.parts
        kind = generator.random()
        if kind < retrieval:
            ids = self.asking[generator.randrange(len(self.asking))]
        else:
            start = generator.randrange(len(self.tokens) - WINDOW)
            ids = self.tokens[start : start + WINDOW]
            if kind < retrieval + repeated:
                ids = np.resize(ids[: generator.randint(*REPEATED)], WINDOW)
        ids = torch.from_numpy(ids.astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class Sitting(TrainerCallback):
    """Ends a training with a checkpoint when its time is over."""

    def __init__(self, end: float):
        self.end = end

    def on_step_end(self, args, state, control, **kwargs):
        if time.time() > self.end and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class Deadline(TrainerCallback):
    """
    Fits the number of steps into a time: again and again, the speed of the last `LOOKED_AT` steps says how many there are to be, and the
    schedule of the learning rate becomes that of so many steps. What else runs on a GPU comes and goes.

    Args:
        end: of the training, as `time.time()` counts.
        final: the part of the learning rate that the last step has.
    """

    def __init__(self, end: float, final: float = FINAL_RATE):
        self.end, self.final, self.looked = end, final, None

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        if state.global_step % LOOKED_AT:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        before, self.looked = self.looked, time.time()
        if before is None:  # the first steps take longer
            return
        seconds = (self.looked - before) / LOOKED_AT
        steps = [state.global_step + max(0, int((self.end - self.looked) / seconds))]
        if args.world_size > 1:
            torch.distributed.broadcast_object_list(steps)  # as the first process counts them
        state.max_steps = max(state.global_step + 1, min(args.max_steps, steps[0]))
        lr_scheduler.lr_lambdas = [schedule(state.max_steps, self.final)] * len(lr_scheduler.lr_lambdas)
        if state.is_world_process_zero and state.global_step == 2 * LOOKED_AT:
            print(f"{seconds:.3f} s a step: {state.max_steps} steps", flush=True)


def schedule(steps: int, final: float = FINAL_RATE):
    """Of the learning rate: a twentieth of the steps of warm-up, then half a cosine, down to a part of it."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


class ScheduledTrainer(Trainer):
    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, schedule(num_training_steps)
        )
        return self.lr_scheduler


def train(args: argparse.Namespace) -> None:
    """A Llama with as many key/value heads as heads."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden_size, intermediate_size=round(args.hidden_size / 24) * 64,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.heads,
        max_position_embeddings=WINDOW, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    on_gpu = torch.cuda.is_available()
    training = TrainingArguments(
        output_dir=str(args.work / "trainer"), max_steps=args.steps, per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate, weight_decay=0.1, adam_beta2=0.95, bf16=on_gpu, torch_compile=on_gpu,
        optim="adamw_torch_fused", logging_steps=max(1, args.steps // 20), save_strategy="no", report_to="none",
        dataloader_num_workers=4 if on_gpu else 0, dataloader_drop_last=True, remove_unused_columns=False,
        tf32=on_gpu or None, use_cpu=not on_gpu, ddp_find_unused_parameters=False,
    )  # fmt: skip
    world = training.world_size
    count = args.steps * args.batch_size * world
    parts = args.retrieval_part, args.repeated_part
    data = SampledWindows(args.work / "train.bin", count, *parts)
    trainer = ScheduledTrainer(model=model, args=training, train_dataset=data)
    start = time.time()
    if args.max_minutes is not None:
        trainer.add_callback(Deadline(start + 60 * args.max_minutes))
    if args.sitting_minutes is not None:
        trainer.add_callback(Sitting(start + 60 * args.sitting_minutes))
    checkpoint = last_checkpoint(args.work / "trainer") if args.sitting_minutes is not None else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    steps = trainer.state.global_step
    if args.sitting_minutes is not None and steps < args.steps:
        print(f"{steps} of {args.steps} steps: the same command goes on from there", flush=True)
        sys.exit(STOPPED)
    if trainer.is_world_process_zero():
        seconds = time.time() - start
        tokens = steps * args.batch_size * world * WINDOW
        model.config.use_cache = True  # Trainer turns it off
        model.to(torch.bfloat16).save_pretrained(args.work / "llama")
        tokenizer.save_pretrained(args.work / "llama")
        facts = {
            "parameters": model.num_parameters(), "tokens": tokens, "steps": steps, "seconds": seconds,
            "distinct_tokens": len(data.tokens), "devices": world,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu", "learning_rate": args.learning_rate,
            "retrieval_part": args.retrieval_part, "repeated_part": args.repeated_part,
        }  # fmt: skip
        if any(parts):
            write_mix(args.work, tokens, *parts)
        (args.work / "training.json").write_text(json.dumps(facts, indent=2))
        print(json.dumps(facts))


def write_mix(work: Path, trained: int, retrieval: float, repeated: float) -> None:
    """
    WORK/heal.npy, the first twentieth of the windows of a training on so many tokens, and a text for calibration. Where the tokens
    of the training's text were not kept, those of heal.txt, which is a part of it, take their place.
    """
    text, tokens = (work / "heal.txt").read_text(encoding="utf-8"), work / "train.bin"
    if not tokens.exists():
        tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
        tokens, files = work / "heal.bin", text.split("\n\n")
        encodings = tokenizer.encode_batch([f"{file}\n\n" for file in files])
        np.concatenate([np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]).tofile(tokens)
    data = SampledWindows(tokens, int(HEALED_PART * trained) // WINDOW, retrieval, repeated)
    windows = torch.stack([data[index]["input_ids"] for index in range(len(data))])
    (work / "calibration.txt").write_text(text[:FILLER], encoding="utf-8")
    np.save(work / "heal.npy", windows.numpy().astype(np.uint16))


def convert(args: argparse.Namespace) -> None:
    """Every run in a process of its own, `--processes` at a time on each GPU."""
    facts = json.loads((args.work / "training.json").read_text())
    tokens = int(HEALED_PART * facts["tokens"])
    names = ("retrieval_part", "repeated_part")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    parts = [(facts | given).get(name, 0.0) for name in names]
    healing, calibration = args.work / "heal.txt", args.work / "heal.txt"
    if any(parts):
        healing, calibration = args.work / "heal.npy", args.work / "calibration.txt"
        if given or not healing.exists():
            write_mix(args.work, facts["tokens"], *parts)
    steps = max(1, args.passes * tokens // (args.heal_windows * WINDOW))
    config = json.loads((args.work / "llama" / "config.json").read_text())
    waiting, running = list(args.runs or RUNS + [CONTROL] * (args.cross_entropy > 0)), {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else list(map(str, range(max(1, torch.cuda.device_count()))))
    free = [(device, n) for n in range(args.processes) for device in devices]
    failures: Counter[tuple[str, int, str]] = Counter()
    variants = {"": [], **{name: shlex.split(options) for name, options in args.variant}}
    for run in waiting:
        if run[2] not in variants:
            sys.exit(f"compression.py: error: --runs {name_of(run)}: expected --variant {run[2]} OPTIONS")
    threads = str(max(1, len(os.sched_getaffinity(0)) // min(len(free), len(waiting))))
    # Of torch, tokenizers and torch.compile.
    limits = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), threads)
    while waiting or running:
        while waiting and free:
            run = method, ratio, variant = waiting.pop(0)
            rank = max(1, round(config["num_key_value_heads"] / ratio))
            ranks = ["--k-rank", str(rank), "--v-rank", str(rank), "--method", method]
            if method in ROWS:
                ranks = ["--cache-ratio", str(ratio), *ROWS[method]]
            place, target = free.pop(0), args.work / name_of(run)
            command = [
                sys.executable, "-m", "conversion", "hf", str(args.work / "llama"), str(target),
                *["--overwrite"] * target.exists(),  # which begins anew: a run that failed goes on without
                *ranks, "--calibration", str(calibration),
                "--held-out", str(args.work / "held_out.txt"), "--heal", str(healing),
                "--heal-tokens", str(tokens), "--heal-steps", str(steps), "--batch-size", str(args.heal_windows),
                "--heal-cross-entropy", str(args.cross_entropy), *args.options, *variants[variant],
            ]  # fmt: skip
            mode = "a" if failures[run] else "w"
            log = open(args.work / f"{target.name}.log", mode)  # noqa: SIM115  the process writes to it
            environment = limits | os.environ | {"CUDA_VISIBLE_DEVICES": place[0]}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            running[place] = run, target, time.time(), process
        for place, (run, target, start, process) in list(running.items()):
            if process.poll() is not None:
                del running[place]
                free.append(place)
                print(f"{target.name}: exit code {process.returncode} after {time.time() - start:.0f} s", flush=True)
                print(f"    {stage_times(args.work / f'{target.name}.log')}", flush=True)
                failures[run] += process.returncode != 0
                if process.returncode and failures[run] < TRIES:
                    waiting.insert(0, run)
        time.sleep(0.5)


def stage_times(log: Path) -> str:
    """The seconds of each stage of a run, and the perplexities, as its log has them."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    seconds: dict[str, float] = {}
    for match in filter(None, (re.fullmatch(r"([a-z ]+): ([\d.]+) s", line) for line in lines)):
        seconds[match[1]] = seconds.get(match[1], 0.0) + float(match[2])
    found = [f"{name} {total:.1f} s" for name, total in seconds.items()]
    return ", ".join(found + [line for line in lines if re.fullmatch(r"perplexity, [a-z]+: [\d.]+", line)])


def found_parts(retrieval: list[dict]) -> str:
    """What a result finds of what its source does, in all and by task."""
    if not retrieval:
        return ""
    source, result = retrieval
    tasks = [
        f"{old['task']} {new['found']:.0%} of {old['found']:.0%}"
        for old, new in zip(source["scores"], result["scores"])
    ]
    return f"{result['found']:>22.1%} of {source['found']:.1%} ({', '.join(tasks)})"


def percent_above(source: dict, row: dict) -> float:
    """By how much a perplexity is above the source's."""
    return 100 * (row["perplexity"] / source["perplexity"] - 1)


def report(args: argparse.Namespace) -> None:
    facts = json.loads((args.work / "training.json").read_text())
    results = {}
    for log in sorted(args.work.glob("*-*.log")):
        path = log.with_suffix("") / "conversion.json"
        if path.exists():
            results[log.stem] = json.loads(path.read_text())
        print(f"{log.stem}{'' if path.exists() else ', unfinished'}: {stage_times(log)}")
    if not results:
        raise SystemExit(f"{args.work} holds no finished conversion")
    rows = {name: {row["model"]: row for row in result["perplexity"]} for name, result in results.items()}
    source = next(iter(rows.values()))["source"]
    print(json.dumps(facts))
    found = {name: result.get("retrieval", ()) for name, result in results.items()}
    print(f"{'':<20}{'bytes per token':>16}{'compressed':>22}{'healed':>22}{'found, of the source':>30}")
    print(f"{'source':<20}{source['cache_bytes_per_token']:>16,.0f}{source['perplexity']:>13.4f}")
    control = rows.pop(name_of(CONTROL), {}).get("healed")
    if control is not None:
        print(
            f"{'  trained on':<20}{'':>16}{'':>22}{control['perplexity']:>13.4f} {percent_above(source, control):>+7.2f}%"
        )
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["compressed"]["cache_bytes_per_token"]):
        columns = "".join(
            f"{row[stage]['perplexity']:>13.4f} {percent_above(source, row[stage]):>+7.2f}%"
            for stage in ("compressed", "healed")
        )
        print(f"{name:<20}{row['compressed']['cache_bytes_per_token']:>16,.0f}{columns}{found_parts(found[name])}")
    args.output.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"training": facts, "conversions": results}, indent=2)
    (args.output / "compression.json").write_text(content + "\n", encoding="utf-8")
    plot(rows, source, control, args.output / "compression.png")


def plot(rows: dict[str, dict[str, dict]], source: dict, control: dict | None, path: Path) -> None:
    """Perplexity against the bytes of the cache, of each method at once and healed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = sorted({(method, variant) for method, _, variant in map(read_name, rows)})
    for index, line in enumerate(lines):
        method, color = "-".join(filter(None, line)), "C0 C1 C3 C4 C5 C6 C7 C8 C9".split()[index % 9]
        for stage, style in (("compressed", "--"), ("healed", "-")):
            points = sorted(
                (row[stage]["cache_bytes_per_token"], percent_above(source, row[stage]))
                for name, row in rows.items()
                if read_name(name)[::2] == line
            )
            axes.plot(*zip(*points), f"o{style}", color=color, label=f"{method}, {stage}") if points else None
    if control is not None:
        point = control["cache_bytes_per_token"], percent_above(source, control)
        axes.plot(*point, "*", color="C2", markersize=12, label="source, trained on")
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter("{x:,g}")
    if axes.dataLim.ymin >= 0:
        axes.set_ylim(bottom=0)
    measured = [*(row["compressed"] for row in rows.values()), *([control] if control is not None else ())]
    sizes = sorted({row["cache_bytes_per_token"] for row in measured})
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axes.set_xlabel(f"cache, bytes per token (source: {source['cache_bytes_per_token']:,.0f})")
    axes.set_ylabel(f"held-out perplexity above the source's {source['perplexity']:.3f}, %")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    args = parse_args()
    try:
        {"prepare": prepare, "train": train, "convert": convert, "report": report}[args.command](args)
    except FileNotFoundError as error:
        sys.exit(
            f"compression.py: error: there is no {error.filename}: prepare, train, convert, report come one after another"
        )


if __name__ == "__main__":
    main()
