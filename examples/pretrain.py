"""
Pretrains any architecture of `configuration/` with the data and the schedule of "Tensor Product Attention Is All You Need".

    torchrun --nproc-per-node 8 examples/pretrain.py --architecture t6-medium --batch-size 20 --output-dir runs/t6-medium

The defaults are those of the paper's runs: FineWeb-Edu, streamed from the Hub, as one stream of tokens in sequences of
1024, 480 of them a step, 100,000 steps (49B tokens), AdamW (0.9, 0.95), weight decay 0.1, gradients clipped at 1, 2000
steps of warm-up, then a cosine; the learning rate is that of the size (paper, appendix H.1). `--data` takes a folder of
`prepare.py` instead. `accelerate launch` and `torchrun` start it on several devices, with DDP or, with `--fsdp`, FSDP2.

A T6 is started as `recipe.py` says, and unless `--set` gives heads or the width of the MLP, it has as many heads as MHA and a wider MLP;
`--paper` is the paper's T6, with its heads and first weights.

A run that was stopped goes on with `--resume`, as if it had never stopped: the same batches, the same losses. SIGTERM
and `--max-minutes` save a checkpoint and end with exit code 75. `CHECKPOINT_DIR/log.jsonl` has the losses.
"""

import argparse
import contextlib
import functools
import json
import math
import shutil
import signal
import sys
import time
import types
from pathlib import Path

from command_line import (
    InputError,
    add_folder_arguments,
    check_folders,
    check_target,
    complete_folders,
    field_and_value,
    input_errors,
    inputs,
    number,
    one_line,
    read_text,
    remove_checkpoints,
    replace_folder,
    write_json,
    write_whole,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    count = number(int, 1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--architecture", default="t6-small", metavar="NAME", help="folder of configuration/, or path (%(default)s)"
    )
    parser.add_argument(
        "--set", nargs="+", type=field_and_value, default=[], metavar="FIELD=VALUE", help="of config.json, replaced"
    )

    parser.add_argument(
        "--paper",
        action="store_true",
        help="a T6 with the paper's first weights and the folder's heads, not by recipe.py",
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
    training.add_argument("--compile", action="store_true", help="compile layers and loss with torch.compile")
    training.add_argument("--fsdp", action="store_true", help="shard with FSDP2 instead of DDP (GPUs only)")
    training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more work")
    training.add_argument("--cpu", action="store_true", help="do not use a GPU")

    logs = parser.add_argument_group("evaluation, checkpoints and logs")
    logs.add_argument("--eval-steps", type=count, default=1000, metavar="N", help="(%(default)s)")
    logs.add_argument("--save-steps", type=count, metavar="N", help="steps between checkpoints (EVAL_STEPS)")
    logs.add_argument("--logging-steps", type=count, default=10, metavar="N", help="(%(default)s)")
    logs.add_argument("--report-to", nargs="+", default=["none"], metavar="NAME", help="wandb, tensorboard, ...")
    logs.add_argument("--run-name", metavar="NAME", help="what --report-to calls the run (OUTPUT_DIR's name)")
    logs.add_argument(
        "--max-minutes",
        type=number(float, 0),
        metavar="X",
        help="stop then, where LOGGING_STEPS end, with a checkpoint",
    )
    logs.add_argument("--peak-tflops", type=number(float, 1e-9), metavar="X", help="of one device, for utilisation")
    add_folder_arguments(logs)

    args = parser.parse_args(argv)
    if args.dataset == parser.get_default("dataset") and args.dataset_config is None:
        args.dataset_config = "sample-100BT"
    complete_folders(args)
    return args


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.modeling_outputs import CausalLMOutputWithPast

import modeling_t6  # noqa: F401  (registers T6 with the Auto classes)
import recipe
from configuration.make_configs import DIRECTORY, SIZES
from conversion.files.bars import hide_bars_of_transformers
from language_modeling import held_out_windows, window_losses
from pretraining_data import Data, data_state_file, load_data_state
from throughput import Clock, PackedTrainer, peak_flops, training_flops
from training import check_settings, config_fields, evaluation_options, training_options, write_settings


STOPPED = 75  # exit code of a run that has more to do: EX_TEMPFAIL of sysexits.h

# Learning rates, highest and last. The paper's text has 3e-4 and 6e-5 for the medium size, its main tables 6e-4.
LEARNING_RATES = {"small": (6e-4, 3e-5), "medium": (6e-4, 3e-5), "large": (2e-4, 1e-5), "xl": (1e-4, 1e-5)}


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
    if fixed := sorted({"dtype", "use_cache"} & set(given)):
        raise InputError(f"--set {fixed[0]}: new models are trained in float32, and without a cache")
    model_type = given.pop("model_type", model_type)  # Qwen3 is Llama with QK norm
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
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if kv_heads and heads % kv_heads:
        raise InputError(f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
    if config.vocab_size < len(tokenizer):
        raise InputError(f"vocab_size={config.vocab_size} is less than the {len(tokenizer)} tokens of the tokenizer")
    return config


def make_model(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """
    A new model. The projections that write to the residual stream start at zero, in the baselines as in T6: the paper's
    research code does so in all of its models.
    """
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    except (ImportError, ValueError) as error:
        raise InputError(f"--attention {attention}: {one_line(error)}") from error
    for name, module in model.named_modules():
        if name.endswith((".o_proj", ".down_proj")):
            nn.init.zeros_(module.weight)
    return model


def compile_parts(model: PreTrainedModel) -> None:
    """
    Compiles the layers, which are all one program, the last norm, and the loss, which reads logits as they are. In training the
    model returns its loss alone: `Trainer` would make a float32 copy of the logits.

    A program of the whole model would take as many times longer to compile as there are layers.
    """
    # DDP's buckets are not much larger than layers, which would be cut at their borders: through what forms heads again, too.
    torch._dynamo.config.optimize_ddp = False
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    for module in (*layers, model.base_model.norm):
        module.compile(dynamic=False)
    model.loss_function = torch.compile(model.loss_function, dynamic=False)

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args, **kwargs) -> CausalLMOutputWithPast:
        output = type(self).forward(self, *args, **kwargs)
        return CausalLMOutputWithPast(loss=output.loss) if self.training else output

    model.forward = types.MethodType(forward, model)


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
    write_whole(path, "".join(kept))


def read_log(checkpoint_dir: Path) -> list[dict]:
    return [json.loads(line) for line in read_text(checkpoint_dir / "log.jsonl").splitlines()]


def by_recipe(args: argparse.Namespace, config: PreTrainedConfig) -> bool:
    """Whether the model is a T6 that is started by `recipe`."""
    return config.model_type == "t6" and not args.paper


def choose_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    config = make_config(args, tokenizer)
    if by_recipe(args, config):
        # Sizes that are given stay as they are.
        are_given = {"num_attention_heads", "intermediate_size"} & set(dict(args.set))
        new = recipe.extras(config) if are_given else recipe.fields(config)
        args = argparse.Namespace(**vars(args) | {"set": [*new.items(), *args.set]})
        config = make_config(args, tokenizer)
        if not config.attention_bias:
            raise InputError("--set attention_bias=false: the recipe starts A as biases; --paper does without")
    return config


def choose_block_length(args: argparse.Namespace, config: PreTrainedConfig) -> int:
    block_length = args.block_length or config.max_position_embeddings
    if block_length > config.max_position_embeddings:
        raise InputError(
            f"--block-length {block_length} exceeds max_position_embeddings={config.max_position_embeddings}"
        )
    return block_length


def choose_learning_rates(args: argparse.Namespace) -> tuple[float, float]:
    """The highest, and the last."""
    rates = next((rates for size, rates in LEARNING_RATES.items() if size in args.architecture.split("-")), None)
    if rates is None and args.learning_rate is None:
        raise InputError(f"--learning-rate is needed: {args.architecture} is none of the sizes {', '.join(SIZES)}")
    learning_rate = rates[0] if args.learning_rate is None else args.learning_rate
    # With a learning rate of one's own, the cosine ends at a tenth of it.
    default_end = rates[1] if args.learning_rate is None else learning_rate / 10
    min_learning_rate = default_end if args.min_learning_rate is None else args.min_learning_rate
    if min_learning_rate > learning_rate:
        raise InputError(f"--min-learning-rate {min_learning_rate} exceeds the learning rate {learning_rate}")
    return learning_rate, min_learning_rate


def run_settings(args: argparse.Namespace, data: Data) -> tuple[PreTrainedConfig, dict]:
    """The model's configuration, and what determines a run: one that goes on with it must have the same."""
    config = choose_config(args, data.tokenizer)
    block_length = choose_block_length(args, config)
    learning_rate, min_learning_rate = choose_learning_rates(args)
    return config, {
        "config": config_fields(config),
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


def make_training_arguments(args: argparse.Namespace, settings: dict) -> Arguments:
    training_args = Arguments(
        **training_options(args, on_gpu=runs_on_gpu(args)),
        learning_rate=settings["learning_rate"],
        lr_scheduler_kwargs={"min_lr": settings["min_learning_rate"]},
        use_cpu=args.cpu,
        fsdp=True if args.fsdp else None,
        save_steps=args.save_steps or args.eval_steps,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        ignore_data_skip=True,  # the data know their own state
        ddp_find_unused_parameters=False,
        report_to=args.report_to,
        run_name=args.run_name or args.output_dir.name,
    )
    there = get_available_reporting_integrations()
    if missing := sorted(set(training_args.report_to) - set(there)):
        raise InputError(
            f"--report-to {missing[0]}: no such package is installed; there are {', '.join(there) or 'none'}"
        )
    if training_args.n_gpu > 1:
        raise InputError(f"{training_args.n_gpu} GPUs: start with torchrun or accelerate launch, one process each")
    if args.sequences_per_step % (args.batch_size * training_args.world_size):
        raise InputError(
            f"--sequences-per-step {args.sequences_per_step} is no multiple of --batch-size {args.batch_size} times "
            f"{training_args.world_size} processes"
        )
    per_pass = args.batch_size * training_args.world_size
    training_args.gradient_accumulation_steps = args.sequences_per_step // per_pass
    return training_args


def runs_on_gpu(args: argparse.Namespace) -> bool:
    return torch.cuda.is_available() and not args.cpu


def figures_of_log(log: list[dict], first_step: int) -> dict:
    """What the log of a run has to say: held-out losses at the end; the median speed and the most memory since it last went on."""
    since = [entry for entry in log if entry["step"] > first_step]
    steps = [entry for entry in since if "step_seconds" in entry]
    final = [entry for entry in log if "eval_loss_per_token" in entry][-1]
    return {
        **{name.removeprefix("eval_"): final[name] for name in final if name.startswith("eval_loss_per_")},
        "bits_per_byte": final["eval_bits_per_byte"],
        "perplexity": math.exp(final["eval_loss_per_token"]),
        **{
            name: float(np.median([entry[name] for entry in steps]))
            for name in ("tokens_per_second", "step_seconds", "mfu")
            if any(name in entry for entry in steps)
        },
        "memory_gib": max((entry.get("memory_gib", 0.0) for entry in since), default=0.0) or None,
    }


def pretrain(args: argparse.Namespace) -> dict | None:
    """Trains and writes the model folder; returns what was measured, or `None` if the run stopped before its end."""
    checkpoint = check_folders(args)
    hide_bars_of_transformers()
    data = Data(args)
    config, settings = run_settings(args, data)
    block_length = settings["block_length"]
    training_args = make_training_arguments(args, settings)

    # All processes take part in gathering sharded weights, and must agree on the name.
    partial_folder = args.output_dir.with_name(f".{args.output_dir.name}.partial")
    if checkpoint:
        check_settings(args.checkpoint_dir, settings)

    num_windows = args.max_steps * args.sequences_per_step
    windows = data.training(block_length, num_windows, training_args.process_index, training_args.world_size)
    if checkpoint:
        load_data_state(windows, checkpoint, training_args)

    set_seed(args.seed)
    model = make_model(config, args.attention)
    if by_recipe(args, config):
        recipe.start(model)
    model.config.use_cache = False
    if args.gradient_checkpointing:  # the option of `TrainingArguments` changes its name between versions
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        compile_parts(model)
    parameters = model.num_parameters()
    embedding = model.get_input_embeddings().weight.numel()

    flops, peak = training_flops(config, block_length), peak_flops(args)
    clock, stopping = Clock(), Stopping(windows, args.max_minutes)
    trainer = PackedTrainer(
        model=model,
        args=training_args,
        train_dataset=windows,
        eval_dataset=held_out_windows(data.held_out, block_length),
        processing_class=data.tokenizer,
        preprocess_logits_for_metrics=window_losses,  # sums per window instead of all logits: exact, and small
        **evaluation_options(len(data.held_out) - 1, data.characters, data.bytes),
        callbacks=[clock, FiniteLoss(), stopping],
        flops_per_token=flops,
        peak=peak,
        tokens_per_step=args.sequences_per_step * block_length,
    )
    clock.trainer = trainer
    first_step = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
    if trainer.is_world_process_zero():
        print(
            f"{args.architecture}: {parameters:,} parameters, {parameters - embedding:,} of them outside of the embedding; "
            f"{flops / 1e9:.3f} GFLOP a token; {num_windows * block_length:,} tokens to train on, in "
            f"{args.max_steps:,} steps of {args.sequences_per_step} sequences of {block_length} on "
            f"{training_args.world_size} x {args.batch_size} x {training_args.gradient_accumulation_steps}"
        )
        if checkpoint is None:
            remove_checkpoints(args.checkpoint_dir)
        shutil.rmtree(partial_folder, ignore_errors=True)  # a killed run's, whose shards may be others
        cut_log(trainer.log_file, first_step)
        write_settings(args.checkpoint_dir, settings)

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
    trainer.save_model(str(partial_folder))
    if not trainer.is_world_process_zero():
        return {}
    measured = {
        "architecture": args.architecture,
        "parameters": parameters,
        "non_embedding_parameters": parameters - embedding,
        "training_flops_per_token": flops,
        "tokens": num_windows * block_length,
        **figures_of_log(read_log(args.checkpoint_dir), first_step),
        "processes": training_args.world_size,
        "batch_size": args.batch_size,
        "attention": model.config._attn_implementation,
        "compiled": args.compile,
        "device": torch.cuda.get_device_name() if runs_on_gpu(args) else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **settings,
    }
    # Beside the checkpoints: a model folder holds what the Hub's models hold.
    write_json(args.checkpoint_dir / "training.json", measured)
    (partial_folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which the Hub warns of
    check_target(args.output_dir, args.overwrite, inputs(args))  # again: it may have been filled since
    replace_folder(partial_folder, args.output_dir)
    speed = f", {measured['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in measured else ""
    utilisation = f", {measured['mfu']:.1%} of the peak FLOP/s" if "mfu" in measured else ""
    print(
        f"{args.output_dir}: held-out loss {measured['loss_per_token']:.4f}, "
        f"{measured['bits_per_byte']:.4f} bits per byte{speed}{utilisation}"
    )
    return measured


def main(argv: list[str] | None = None) -> dict | None:
    try:
        with input_errors("pretrain.py"):
            measured = pretrain(parse_args(argv))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if measured is None:
        sys.exit(STOPPED)
    return measured


if __name__ == "__main__":
    main()
