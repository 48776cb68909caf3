"""
Pretrains any architecture of `configuration/` with the recipe of "Tensor Product Attention Is All You Need".

    torchrun --nproc-per-node 8 examples/pretrain.py --architecture t6-medium --batch-size 20 --output-dir runs/t6-medium

The defaults are those of the paper's runs: FineWeb-Edu, streamed from the Hub, as one stream of tokens in sequences of
1024, 480 of them a step, 100,000 steps (49B tokens), AdamW (0.9, 0.95), weight decay 0.1, gradients clipped at 1, 2000
steps of warm-up, then a cosine; the learning rate is that of the size (paper, appendix H.1). `--data` takes a folder of
`prepare.py` instead. `accelerate launch` and `torchrun` start it on several devices, with DDP or, with `--fsdp`, FSDP2.

A run that was stopped goes on with `--resume`, as if it had never stopped: the same batches, the same losses. SIGTERM
and `--max-minutes` save a checkpoint and end with exit code 75. `CHECKPOINT_DIR/log.jsonl` has the losses.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import modeling_t6  # noqa: F401  (registers T6 with the Auto classes)
from configuration.make_configs import DIRECTORY, SIZES
from conversion.files.folders import replace_folder
from language_modeling import (
    TRAINING,
    InputError,
    RandomWindows,
    add_folder_arguments,
    check_folders,
    collate,
    complete_folders,
    encode,
    field_and_value,
    held_out_windows,
    load_tokenizer,
    loss_report,
    number,
    one_line,
    read_text,
    text_size,
    window_losses,
)


STOPPED = 75  # exit code of a run that has more to do: EX_TEMPFAIL of sysexits.h

# Learning rates, highest and last. The paper's text has 3e-4 and 6e-5 for the medium size, its main tables 6e-4.
LEARNING_RATES = {"small": (6e-4, 3e-5), "medium": (6e-4, 3e-5), "large": (2e-4, 1e-5), "xl": (1e-4, 1e-5)}

# Dense bf16 products of one device by its vendor's data sheet, in FLOP/s; the first name that matches counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}

DOCUMENTS = 256  # of a stream that are tokenized at once


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    count = number(int, 1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--architecture", default="t6-small", metavar="NAME", help="folder of configuration/, or path (%(default)s)"
    )
    parser.add_argument(
        "--set", nargs="+", type=field_and_value, default=[], metavar="FIELD=VALUE", help="of config.json, replaced"
    )

    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, metavar="DIR", help="a folder of prepare.py, instead of a stream")
    data.add_argument(
        "--dataset", default="HuggingFaceFW/fineweb-edu", metavar="HUB_ID", help="streamed; or a path (%(default)s)"
    )
    data.add_argument("--dataset-config", metavar="NAME", help="(sample-100BT of FineWeb-Edu)")
    data.add_argument("--split", default="train", help="(%(default)s)")
    data.add_argument("--text-column", default="text", metavar="NAME", help="(%(default)s)")
    data.add_argument("--tokenizer", default="openai-community/gpt2", metavar="PATH", help="of a stream (%(default)s)")
    data.add_argument(
        "--held-out-documents", type=count, default=500, metavar="N", help="first ones of a stream (%(default)s)"
    )
    data.add_argument("--block-length", type=number(int, 2), metavar="N", help="tokens (max_position_embeddings)")

    training = parser.add_argument_group("training")
    training.add_argument("--max-steps", type=count, default=100_000, metavar="N", help="(%(default)s)")
    training.add_argument("--sequences-per-step", type=count, default=480, metavar="N", help="in all (%(default)s)")
    training.add_argument("--batch-size", type=count, default=10, metavar="N", help="sequences a device (%(default)s)")
    training.add_argument("--learning-rate", type=number(float, 0), metavar="X", help="the highest (the size's)")
    training.add_argument("--min-learning-rate", type=number(float, 0), metavar="X", help="the last (the size's)")
    training.add_argument("--warmup-steps", type=number(int, 0), default=2000, metavar="N", help="(%(default)s)")
    training.add_argument("--weight-decay", type=number(float, 0), default=0.1, metavar="X", help="(%(default)s)")
    training.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, metavar="N", help="(%(default)s)")
    training.add_argument(
        "--data-seed", type=number(int, 0, 2**31 - 1), default=0, metavar="N", help="order of --data (%(default)s)"
    )
    training.add_argument("--attention", default="sdpa", metavar="NAME", help="attention implementation (%(default)s)")
    training.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    training.add_argument("--fsdp", action="store_true", help="shard with FSDP2 instead of DDP (GPUs only)")
    training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more work")
    training.add_argument("--cpu", action="store_true", help="do not use a GPU")

    logs = parser.add_argument_group("evaluation, checkpoints and logs")
    logs.add_argument("--eval-steps", type=count, default=1000, metavar="N", help="(%(default)s)")
    logs.add_argument("--save-steps", type=count, metavar="N", help="steps between checkpoints (EVAL_STEPS)")
    logs.add_argument("--logging-steps", type=count, default=10, metavar="N", help="(%(default)s)")
    logs.add_argument("--report-to", nargs="+", default=["none"], metavar="NAME", help="wandb, tensorboard, ...")
    logs.add_argument("--run-name", metavar="NAME", help="what --report-to calls the run (OUTPUT_DIR's name)")
    logs.add_argument("--max-minutes", type=number(float, 0), metavar="X", help="stop then, with a checkpoint")
    logs.add_argument("--peak-tflops", type=number(float, 1e-9), metavar="X", help="of one device, for utilisation")
    add_folder_arguments(logs)

    args = parser.parse_args(argv)
    if args.dataset == parser.get_default("dataset") and args.dataset_config is None:
        args.dataset_config = "sample-100BT"
    complete_folders(args)
    return args


# Model


def make_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    folder = DIRECTORY / args.architecture if (DIRECTORY / args.architecture).is_dir() else Path(args.architecture)
    path = folder / "config.json" if folder.is_dir() else folder
    if not path.is_file():
        names = ", ".join(sorted(path.parent.name for path in DIRECTORY.glob("*/config.json")))
        raise InputError(f"--architecture {args.architecture}: no such file or folder; configuration/ has {names}")
    try:
        fields = json.loads(read_text(path))
        model_type = fields.pop("model_type")
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is no config.json of Transformers: {error!r}") from error
    given = dict(args.set)
    if "hidden_size" in given:
        fields["intermediate_size"] = 8 * given["hidden_size"] // 3  # SwiGLU's, as in the paper
    # A multiple of 64, as the paper's 50304 for GPT-2's 50257 tokens: products of such sizes are faster.
    fields["vocab_size"] = -(-len(tokenizer) // 64) * 64
    fields |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        config = AutoConfig.for_model(model_type, **(fields | given))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(f"no such architecture: {one_line(error)}") from error
    # A configuration takes any name without complaint.
    if unknown := sorted(set(given) - {*vars(type(config)()), *fields}):
        raise InputError(f"{type(config).__name__} has no field {', '.join(unknown)}")
    if config.vocab_size < len(tokenizer):
        raise InputError(f"vocab_size={config.vocab_size} is less than the {len(tokenizer)} tokens of the tokenizer")
    return config


def make_model(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """
    A new model. The projections that write to the residual stream start at zero, in the baselines as in T6: the paper's
    research code does so in all of its models.
    """
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    for name, module in model.named_modules():
        if name.endswith((".o_proj", ".down_proj")):
            nn.init.zeros_(module.weight)
    return model


def training_flops(config: PreTrainedConfig, block_length: int) -> float:
    """
    Operations of one training token: thrice those of the forward pass's matrix products, attention over the whole square
    of positions (the usual convention, PaLM's appendix B). Recomputed activations do not count.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        # A mask that is made already: making one reads numbers, which meta tensors do not have.
        mask = torch.zeros(1, 1, block_length, block_length)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, block_length, dtype=torch.long), attention_mask=mask, use_cache=False)
    return 3 * counter.get_total_flops() / block_length


def peak_flops(args: argparse.Namespace) -> float | None:
    """Of one device; `None` if it is not known."""
    if args.peak_tflops:
        return 1e12 * args.peak_tflops
    name = torch.cuda.get_device_name() if torch.cuda.is_available() and not args.cpu else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


# Data


class PreparedWindows(IterableDataset):
    """This process's share of the windows of a run, in batches side by side with those of the other processes."""

    def __init__(self, windows: RandomWindows, batch_size: int, rank: int, world_size: int):
        self.windows, self.batch_size, self.rank, self.world_size = windows, batch_size, rank, world_size
        self.taken = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            batch, place = divmod(self.taken, self.batch_size)
            index = (batch * self.world_size + self.rank) * self.batch_size + place
            if index >= len(self.windows):
                return
            self.taken += 1
            yield self.windows[index]

    def state_dict(self) -> dict:
        return {"windows": self.taken * self.world_size}

    def load_state_dict(self, state: dict) -> None:
        self.taken = state["windows"] // self.world_size


class StreamedWindows(IterableDataset):
    """
    Consecutive windows of a stream of documents, which starts again at its end.

    The next documents are read and tokenized while the model works. The state is that of the stream before the
    documents whose tokens are being used, the tokens left over from those before them, and the windows taken since.

    Args:
        make_stream: makes this process's share of the data set, a `datasets.IterableDataset` with a column "text".
        held_out: hashes of documents to leave out.
    """

    def __init__(
        self,
        make_stream: Callable,
        tokenizer: PreTrainedTokenizerBase,
        block_length: int,
        held_out: set[bytes],
    ):
        self.make_stream, self.tokenizer, self.block_length = make_stream, tokenizer, block_length
        self.held_out = held_out
        self.state = {"stream": None, "tokens": [], "taken": 0}

    def _portions(self, stream_state: dict | None, tokens: list[int]) -> Iterator[tuple[dict, torch.Tensor]]:
        rest = torch.tensor(tokens, dtype=torch.long)
        while True:
            stream, found = self.make_stream(), False
            if stream_state:
                stream.load_state_dict(stream_state)
            documents = iter(stream)
            state = stream_state
            while portion := list(itertools.islice(documents, DOCUMENTS)):
                texts = [row["text"] for row in portion if row["text"]]
                texts = [text for text in texts if document_hash(text) not in self.held_out]
                before = {"stream": state, "tokens": rest.tolist()}
                state = stream.state_dict()
                if not texts:
                    continue
                found = True
                rest = torch.cat([rest, encode(self.tokenizer, texts)])
                used = len(rest) // self.block_length * self.block_length
                yield before, rest[:used].view(-1, self.block_length)
                rest = rest[used:]
            if not found and stream_state is None:
                raise InputError("the data set has no training documents for each process")
            stream_state = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        portions, taken = self._portions(self.state["stream"], self.state["tokens"]), self.state["taken"]
        with ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(next, portions)
            while True:
                before, windows = upcoming.result()
                upcoming = pool.submit(next, portions)
                for index in range(taken, len(windows)):
                    self.state = {**before, "taken": index + 1}
                    yield windows[index].clone()
                taken = 0

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def document_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


class Data:
    """
    What a run trains and is evaluated on.

    Attributes:
        description: what must be the same when the run goes on.
        held_out: token ids, `characters` and `bytes` of the held-out text.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        if args.data:
            path = args.data / "data.json"
            self.tokenizer = load_tokenizer(args.data)
            try:
                facts = json.loads(read_text(path))
                # Copy on write: PyTorch has no tensors that cannot be written.
                train, held_out = (
                    np.memmap(args.data / f"{name}.bin", dtype=facts["dtype"], mode="c")
                    for name in ("train", "held_out")
                )
                self.description = {"sha256": facts["sha256"], "data_seed": args.data_seed}
            except (OSError, ValueError, KeyError, TypeError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{args.data} is no folder of prepare.py: {one_line(error)}") from error
            if [len(train), len(held_out)] != [facts["train_tokens"], facts["held_out_tokens"]]:
                raise InputError(f"{args.data}: the sizes of its files are not those that data.json states")
            self.tokens, self.held_out = train, torch.as_tensor(held_out, dtype=torch.long)
            self.characters, self.bytes = facts["held_out_characters"], facts["held_out_bytes"]
        else:
            self.tokenizer = load_tokenizer(args.tokenizer)
            texts = [row["text"] for row in itertools.islice(self._stream(), args.held_out_documents) if row["text"]]
            if not texts:
                raise InputError(f"the data set {args.dataset} has no documents")
            self.hashes = {document_hash(text) for text in texts}
            self.held_out = encode(self.tokenizer, texts)
            self.characters, self.bytes = text_size(texts)
            self.description = {
                "dataset": [args.dataset, args.dataset_config, args.split],
                "held_out_documents": args.held_out_documents,
                "tokenizer": args.tokenizer,
            }

    def _stream(self, rank: int = 0, world_size: int = 1):
        args = self.args
        try:
            from datasets import load_dataset
            from datasets.distributed import split_dataset_by_node
        except ImportError as error:
            raise InputError("--dataset needs the package `datasets`; folders of prepare.py go to --data") from error
        try:
            stream = load_dataset(args.dataset, args.dataset_config, split=args.split, streaming=True)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot stream the data set {args.dataset}: {one_line(error)}") from error
        if stream.column_names is not None and args.text_column not in stream.column_names:
            raise InputError(f"the data set has no column {args.text_column!r}, only {', '.join(stream.column_names)}")
        stream = stream.select_columns([args.text_column])
        if args.text_column != "text":
            stream = stream.rename_column(args.text_column, "text")
        return split_dataset_by_node(stream, rank, world_size) if world_size > 1 else stream

    def training(self, block_length: int, num_windows: int, rank: int, world_size: int) -> IterableDataset:
        args = self.args
        if not args.data:
            return StreamedWindows(lambda: self._stream(rank, world_size), self.tokenizer, block_length, self.hashes)
        if len(self.tokens) < block_length:
            raise InputError(f"{args.data} has {len(self.tokens)} tokens, less than one block of {block_length}")
        windows = RandomWindows(self.tokens, block_length, num_windows, args.data_seed)
        return PreparedWindows(windows, args.batch_size, rank, world_size)


# Training


class Arguments(TrainingArguments):
    @property
    def device(self) -> torch.device:
        # In several processes it is "cpu:0", onto which PyTorch loads nothing; Transformers 5.17 asks it to.
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


class Stopping(TrainerCallback):
    """Stops all processes at the same step, and puts the state of the data beside each checkpoint."""

    def __init__(self, data: IterableDataset, max_minutes: float | None):
        self.data = data
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes is not None else math.inf
        self.terminated = False
        self.stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log and state.global_step < state.max_steps:
            stop = torch.tensor(self.terminated or time.monotonic() > self.deadline, dtype=torch.int32)
            if args.world_size > 1:  # clocks and signals differ
                stop = stop.to(args.device)
                torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX)
            if stop.item():
                self.stopped = control.should_save = control.should_training_stop = True
        if control.should_save:
            # Before the rest of the checkpoint, whose last file makes it complete.
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            data_state_file(folder, args).write_text(json.dumps(self.data.state_dict()))
            if args.world_size > 1:
                torch.distributed.barrier()


def data_state_file(checkpoint: Path, args: TrainingArguments) -> Path:
    return checkpoint / f"data-{args.process_index}-of-{args.world_size}.json"


def load_data_state(data: IterableDataset, checkpoint: Path, args: TrainingArguments) -> None:
    path = data_state_file(checkpoint, args)
    if not path.exists() and isinstance(data, PreparedWindows):  # its state is the same in all processes
        path = next(checkpoint.glob("data-0-of-*.json"), path)
    if not path.exists():
        found = ", ".join(sorted(path.name for path in checkpoint.glob("data-*-of-*.json"))) or "none"
        raise InputError(
            f"--resume: {checkpoint} has no {path.name} (found: {found}); a stream goes on with as many processes"
        )
    data.load_state_dict(json.loads(read_text(path)))


class PackedTrainer(Trainer):
    """`Trainer` on windows that come in order already, with throughput in its logs and a log file of its own."""

    def __init__(self, *args, flops_per_token: float, peak: float | None, tokens_per_step: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_file = Path(self.args.output_dir) / "log.jsonl"
        self.flops_per_token, self.peak, self.tokens_per_step = flops_per_token, peak, tokens_per_step
        self.start_clock()

    def start_clock(self) -> None:
        self.clock, self.clock_step = time.perf_counter(), self.state.global_step

    def get_train_dataloader(self) -> DataLoader:
        # No workers: the state of the data is then that of the batches which the model has seen.
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            drop_last=True,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The first step compiles and tunes: it does not count.
        steps, seconds = self.state.global_step - self.clock_step, time.perf_counter() - self.clock
        if "loss" in logs:
            logs["tokens"] = self.state.global_step * self.tokens_per_step
            if steps > 0:
                speed = steps * self.tokens_per_step / seconds
                logs["tokens_per_second"], logs["step_seconds"] = speed, seconds / steps
                if self.peak:
                    logs["mfu"] = speed * self.flops_per_token / self.peak / self.args.world_size
            if torch.cuda.is_available() and not self.args.use_cpu:
                logs["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        logs.pop("eval_loss", None)  # a mean over batches, the last of which is smaller; ours is over tokens
        super().log(logs, start_time)
        if self.is_world_process_zero() and ("loss" in logs or "eval_loss_per_token" in logs):
            with self.log_file.open("a") as file:
                file.write(json.dumps({"step": self.state.global_step, **logs}) + "\n")


class Clock(TrainerCallback):
    """Throughput is that of training steps: the clock starts again after all that is not one."""

    trainer: PackedTrainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.first_step:
            self.first_step = False
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.trainer.start_clock()

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = True

    def on_log(self, args, state, control, **kwargs):
        self.trainer.start_clock()

    on_evaluate = on_save = on_log


class FiniteLoss(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} at step {state.global_step}: lower --learning-rate")


def cut_log(path: Path, last_step: int) -> None:
    """Removes what a run logged after the checkpoint from which it goes on."""
    lines = read_text(path).splitlines() if path.exists() else []
    kept = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the last line, if the run was killed while writing it
            if json.loads(line)["step"] <= last_step:
                kept.append(f"{line}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(kept))


def read_log(checkpoint_dir: Path) -> list[dict]:
    return [json.loads(line) for line in read_text(checkpoint_dir / "log.jsonl").splitlines()]


def check_same_run(old: dict, new: dict) -> None:
    """Names the first setting that would let a resumed run go another way."""
    for name in new:
        if isinstance(new[name], dict) and isinstance(old.get(name), dict):
            check_same_run(old[name], new[name])
        elif old.get(name) != new[name]:
            raise InputError(
                f"--resume: the run was started with {name}={old.get(name)}, this command has {new[name]}"
            )


def pretrain(args: argparse.Namespace) -> dict | None:
    """Trains and writes the model folder; returns what was measured, or `None` if the run stopped before its end."""
    checkpoint = check_folders(args)
    data = Data(args)
    config = make_config(args, data.tokenizer)
    block_length = args.block_length or config.max_position_embeddings
    if block_length > config.max_position_embeddings:
        raise InputError(
            f"--block-length {block_length} exceeds max_position_embeddings={config.max_position_embeddings}"
        )
    rates = next((rates for size, rates in LEARNING_RATES.items() if size in args.architecture.split("-")), None)
    if rates is None and args.learning_rate is None:
        raise InputError(f"--learning-rate is needed: {args.architecture} is none of the sizes {', '.join(SIZES)}")
    learning_rate = rates[0] if args.learning_rate is None else args.learning_rate
    # With a learning rate of one's own, the cosine ends at a tenth of it.
    default_end = rates[1] if args.learning_rate is None else learning_rate / 10
    min_learning_rate = default_end if args.min_learning_rate is None else args.min_learning_rate
    if min_learning_rate > learning_rate:
        raise InputError(f"--min-learning-rate {min_learning_rate} exceeds the learning rate {learning_rate}")

    on_gpu = torch.cuda.is_available() and not args.cpu
    training_args = Arguments(
        **TRAINING,
        output_dir=str(args.checkpoint_dir),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        max_steps=args.max_steps,
        learning_rate=learning_rate,
        lr_scheduler_kwargs={"min_lr": min_learning_rate},
        warmup_steps=args.warmup_steps,
        weight_decay=args.weight_decay,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=args.cpu,
        fsdp=True if args.fsdp else None,
        torch_compile=args.compile,
        eval_steps=args.eval_steps,
        save_steps=args.save_steps or args.eval_steps,
        logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        ignore_data_skip=True,  # the data know their own state
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
        seed=args.seed,
        report_to=args.report_to,
        run_name=args.run_name or args.output_dir.name,
    )
    per_pass = args.batch_size * training_args.world_size
    if training_args.n_gpu > 1:
        raise InputError(f"{training_args.n_gpu} GPUs: start with torchrun or accelerate launch, one process each")
    if args.sequences_per_step % per_pass:
        raise InputError(
            f"--sequences-per-step {args.sequences_per_step} is no multiple of --batch-size {args.batch_size} times "
            f"{training_args.world_size} processes"
        )
    training_args.gradient_accumulation_steps = args.sequences_per_step // per_pass

    settings = {
        "config": json.loads(config.to_json_string(use_diff=False)),
        "data": data.description,
        "block_length": block_length,
        "max_steps": args.max_steps,
        "sequences_per_step": args.sequences_per_step,
        "learning_rate": learning_rate,
        "min_learning_rate": min_learning_rate,
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
    }
    settings_file = args.checkpoint_dir / "settings.json"
    if checkpoint:
        check_same_run(json.loads(read_text(settings_file)), json.loads(json.dumps(settings)))

    num_windows = args.max_steps * args.sequences_per_step
    windows = data.training(block_length, num_windows, training_args.process_index, training_args.world_size)
    if checkpoint:
        load_data_state(windows, checkpoint, training_args)
    num_predicted = len(data.held_out) - 1

    set_seed(args.seed)
    model = make_model(config, args.attention)
    model.config.use_cache = False
    if args.gradient_checkpointing:  # the option of `TrainingArguments` changes its name between versions
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = model.num_parameters()
    embedding = model.get_input_embeddings().weight.numel()

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        nats = prediction.predictions.astype("float64").sum()
        return loss_report(nats, num_predicted, data.characters, data.bytes)

    flops, peak = training_flops(config, block_length), peak_flops(args)
    clock, stopping = Clock(), Stopping(windows, args.max_minutes)
    trainer = PackedTrainer(
        model=model,
        args=training_args,
        train_dataset=windows,
        eval_dataset=held_out_windows(data.held_out, block_length),
        data_collator=collate,
        processing_class=data.tokenizer,
        preprocess_logits_for_metrics=window_losses,  # sums per window instead of all logits: exact, and small
        compute_metrics=metrics,
        callbacks=[clock, FiniteLoss(), stopping],
        flops_per_token=flops,
        peak=peak,
        tokens_per_step=args.sequences_per_step * block_length,
    )
    clock.trainer = trainer
    if trainer.is_world_process_zero():
        print(
            f"{args.architecture}: {parameters:,} parameters, {parameters - embedding:,} of them outside of the embedding; "
            f"{flops / 1e9:.3f} GFLOP a token; {num_windows * block_length:,} tokens to train on, in "
            f"{args.max_steps:,} steps of {args.sequences_per_step} sequences of {block_length} on "
            f"{training_args.world_size} x {args.batch_size} x {training_args.gradient_accumulation_steps}"
        )
        if checkpoint is None:
            for path in args.checkpoint_dir.glob("checkpoint-*"):  # of an older run, by --overwrite
                shutil.rmtree(path)
        step = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
        cut_log(trainer.log_file, step)
        settings_file.write_text(json.dumps(settings, indent=2) + "\n")

    def terminate(*_) -> None:
        stopping.terminated = True

    old_handler = signal.signal(signal.SIGTERM, terminate)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        signal.signal(signal.SIGTERM, old_handler)
    if stopping.stopped:
        if trainer.is_world_process_zero():
            print(f"stopped at step {trainer.state.global_step:,} of {args.max_steps:,}: --resume goes on")
        return None
    if not any("eval_loss_per_token" in entry for entry in trainer.state.log_history[-2:]):
        trainer.evaluate()  # versions of Trainer differ in whether they evaluate at the end

    model.config.use_cache = True
    # All processes take part in gathering sharded weights, and must agree on the name.
    new_folder = args.output_dir.with_name(f".{args.output_dir.name}.partial")
    trainer.save_model(str(new_folder))
    if not trainer.is_world_process_zero():
        return {}
    log = read_log(args.checkpoint_dir)
    steps = [entry for entry in log if "step_seconds" in entry]
    final = [entry for entry in log if "eval_loss_per_token" in entry][-1]
    measured = {
        "architecture": args.architecture,
        "parameters": parameters,
        "non_embedding_parameters": parameters - embedding,
        "training_flops_per_token": flops,
        **{name.removeprefix("eval_"): final[name] for name in final if name.startswith("eval_loss_per_")},
        "bits_per_byte": final["eval_bits_per_byte"],
        "perplexity": math.exp(final["eval_loss_per_token"]),
        "tokens": num_windows * block_length,
        **{
            name: float(np.median([entry[name] for entry in steps]))
            for name in ("tokens_per_second", "step_seconds", "mfu")
            if any(name in entry for entry in steps)
        },
        "memory_gib": max((entry.get("memory_gib", 0.0) for entry in log), default=0.0) or None,
        "processes": training_args.world_size,
        "batch_size": args.batch_size,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **settings,
    }
    # Beside the checkpoints: a model folder holds what the Hub's models hold.
    (args.checkpoint_dir / "training.json").write_text(json.dumps(measured, indent=2) + "\n")
    (new_folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which the Hub warns of
    replace_folder(new_folder, args.output_dir)
    speed = f", {measured['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in measured else ""
    utilisation = f", {measured['mfu']:.1%} of the peak FLOP/s" if "mfu" in measured else ""
    print(
        f"{args.output_dir}: held-out loss {measured['loss_per_token']:.4f}, "
        f"{measured['bits_per_byte']:.4f} bits per byte{speed}{utilisation}"
    )
    return measured


def main(argv: list[str] | None = None) -> dict | None:
    try:
        measured = pretrain(parse_args(argv))
    except InputError as error:
        sys.exit(f"pretrain.py: error: {error}")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if measured is None:
        sys.exit(STOPPED)
    return measured


if __name__ == "__main__":
    main()
