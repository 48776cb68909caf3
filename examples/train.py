# Copyright 2026 The T6 for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Train a T6 language model from scratch with Transformers' Trainer, on text files or a data set of the Hub.

    python examples/train.py --text shakespeare.txt --output-dir t6-shakespeare

The last tenth of the text is held out; a byte-level BPE tokenizer is trained on the rest. Checkpoints go to
`OUTPUT_DIR-checkpoints`, from which `--resume` goes on; the checkpoint with the lowest held-out loss becomes the model
folder, with tokenizer, modeling code and model card, that `AutoModelForCausalLM` loads with `trust_remote_code=True`.
"""

import argparse
import hashlib
import json
import math
import shlex
import sys
from pathlib import Path

from command_line import (
    InputError,
    add_folder_arguments,
    check_folders,
    complete_folders,
    field_and_value,
    input_errors,
    inputs,
    new_folder,
    number,
    one_line,
    read_text,
    remove_checkpoints,
    utf8,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    def rank_or_none(text: str) -> int | None:
        return None if text.lower() == "none" else count(text)

    count = number(int, 1)
    rank_or_none.__name__ = "rank"
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    data = parser.add_argument_group("data")
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="UTF-8 text files, one document each")
    source.add_argument("--dataset", metavar="HUB_ID", help="data set of the Hub, or a local one (needs `datasets`)")
    data.add_argument("--dataset-config", metavar="NAME", help="configuration of the data set")
    data.add_argument("--split", default="train", help="split of the data set (%(default)s)")
    data.add_argument("--text-column", default="text", metavar="NAME", help="its column of text (%(default)s)")
    data.add_argument("--validation-text", type=Path, metavar="FILE", help="held-out text, in place of a fraction")
    data.add_argument(
        "--validation-fraction",
        type=number(float, 1e-6, 0.9),
        default=0.1,
        metavar="F",
        help="part of the text, at its end, that is held out (%(default)s)",
    )
    data.add_argument("--tokenizer", metavar="PATH", help="use this tokenizer instead of training one")
    data.add_argument(
        "--vocab-size", type=number(int, 258), default=1024, metavar="N", help="of the trained tokenizer (%(default)s)"
    )

    architecture = parser.add_argument_group(
        "architecture", "`--config`, or else a model of about 5M parameters, with these fields replaced"
    )
    architecture.add_argument("--config", type=Path, metavar="PATH", help="config.json of a T6 model, or its folder")
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
        architecture.add_argument(f"--{field.replace('_', '-')}", type=count, metavar="N")
    architecture.add_argument("--q-rank", type=rank_or_none, default=argparse.SUPPRESS, metavar="N|none")
    for field in ("k_rank", "v_rank", "max_position_embeddings"):
        architecture.add_argument(f"--{field.replace('_', '-')}", type=count, metavar="N")
    architecture.add_argument(
        "--set",
        nargs="+",
        type=field_and_value,
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of T6Config, the value as JSON",
    )

    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--max-steps", type=count, default=2000, metavar="N", help="optimizer steps (%(default)s)")
    length.add_argument("--epochs", type=number(float, 1e-6), metavar="X", help="passes over the training text")
    training.add_argument(
        "--block-length", type=number(int, 2), metavar="N", help="tokens of an example (max_position_embeddings)"
    )
    training.add_argument("--batch-size", type=count, default=32, metavar="N", help="examples a device (%(default)s)")
    training.add_argument("--gradient-accumulation", type=count, default=1, metavar="N", help="batches a step (1)")
    training.add_argument("--learning-rate", type=number(float, 0), default=1e-3, metavar="X", help="(%(default)s)")
    training.add_argument("--warmup-steps", type=number(int, 0), default=100, metavar="N", help="(%(default)s)")
    training.add_argument(
        "--min-lr-ratio",
        type=number(float, 0, 1),
        default=0.1,
        metavar="X",
        help="where the cosine ends, as a part of the learning rate (%(default)s)",
    )
    training.add_argument("--weight-decay", type=number(float, 0), default=0.1, metavar="X", help="(%(default)s)")
    training.add_argument(
        "--dropout",
        type=number(float, 0, 0.99),
        default=0.0,
        metavar="P",
        help="of embeddings and of each block's two outputs, in training only; not part of the model (%(default)s)",
    )
    training.add_argument("--attention-dropout", type=number(float, 0, 0.99), metavar="P", help="of probabilities (0)")
    training.add_argument("--eval-steps", type=count, default=250, metavar="N", help="steps between checkpoints (250)")
    training.add_argument("--logging-steps", type=count, default=50, metavar="N", help="(%(default)s)")
    training.add_argument("--num-workers", type=number(int, 0), default=0, metavar="N", help="of the loader (0)")
    training.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    training.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, metavar="N", help="(%(default)s)")

    output = parser.add_argument_group("output")
    add_folder_arguments(output)
    output.add_argument(
        "--save-dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(%(default)s)"
    )
    output.add_argument(
        "--prompt", type=utf8, help="start of the model card's sample text (the held-out text's first line)"
    )
    output.add_argument("--data-description", metavar="TEXT", help="what the model card says of the data")
    output.add_argument("--license", default="apache-2.0", metavar="ID", help="of the weights (%(default)s)")

    args = parser.parse_args(argv)
    args.command = ["python", "examples/train.py", *(sys.argv[1:] if argv is None else argv)]
    complete_folders(args)
    return args


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from conversion.files.bars import hide_bars_of_transformers
from language_modeling import (
    RandomWindows,
    encode,
    held_out_windows,
    load_tokenizer,
    loss_report,
    text_size,
    total_loss,
    train_tokenizer,
    window_losses,
)
from modeling_t6 import T6Config, T6ForCausalLM
from modeling_t6.cache_t6 import factor_layouts
from training import (
    check_settings,
    config_fields,
    evaluation_options,
    load_dataset,
    training_options,
    write_settings,
)


# The model that is trained where neither `--config` nor the options say otherwise.
DEFAULT_ARCHITECTURE = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "head_dim": 32,
    "q_rank": 6,
    "k_rank": 2,
    "v_rank": 2,
    "max_position_embeddings": 512,
}


# Text


def read_dataset(args: argparse.Namespace) -> list[str]:
    dataset = load_dataset(args, "plain files go to --text")
    return [text for text in dataset[args.text_column] if text]


def split_documents(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """The documents up to the last `fraction` of all characters, and the rest; a document is cut between lines."""
    cut = round(sum(map(len, documents)) * (1 - fraction))
    for index, document in enumerate(documents):
        if cut < len(document):
            line_start = document.find("\n", cut) + 1
            if 0 < line_start < len(document):
                cut = line_start
            training, held_out = [*documents[:index], document[:cut]], [document[cut:], *documents[index + 1 :]]
            return [text for text in training if text], held_out
        cut -= len(document)
    return documents, []


def load_documents(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Training and held-out documents."""
    documents = [read_text(path) for path in args.text] if args.text else read_dataset(args)
    if args.validation_text:
        training, held_out = documents, [read_text(args.validation_text)]
    else:
        training, held_out = split_documents(documents, args.validation_fraction)
    for name, texts in (("training", training), ("held-out", held_out)):
        if not any(text.strip() for text in texts):
            raise InputError(f"the {name} text is empty")
    return training, held_out


# Model


def make_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> T6Config:
    fields = dict(DEFAULT_ARCHITECTURE)
    if args.config:
        path = args.config / "config.json" if args.config.is_dir() else args.config
        try:
            fields = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSON: {error}") from error
        if not isinstance(fields, dict) or fields.get("model_type") != T6Config.model_type:
            raise InputError(f"{path} does not describe a T6 model (its model_type is not 't6')")
        # What a saved model's file says beside its architecture is not true of a new model.
        for field in ("architectures", "auto_map", "dtype", "transformers_version"):
            fields.pop(field, None)

    known = vars(T6Config())
    given = {name: value for name, value in vars(args).items() if name in known and value is not None}
    if "q_rank" in vars(args):
        given["q_rank"] = args.q_rank  # None has a meaning
    if unknown := [field for field, _ in args.set if field not in known]:
        raise InputError(f"T6Config has no field {', '.join(unknown)}")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    if fixed := sorted({"vocab_size", *tokens, "dtype", "use_cache"} & set(dict(args.set))):
        raise InputError(
            f"--set {fixed[0]}: tokens are those of the tokenizer; new models are trained in float32, and without a cache"
        )
    given.update(args.set)
    if "hidden_size" in given and "intermediate_size" not in given:
        fields.pop("intermediate_size", None)  # follows hidden_size
    given["vocab_size"] = len(tokenizer)
    for token in tokens:
        given[token] = getattr(tokenizer, token)
    try:
        return T6Config(**{**fields, **given})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(f"no such architecture: {one_line(error)}") from error


def add_dropout(model: T6ForCausalLM, probability: float) -> None:
    """Dropout of the embeddings and of what a block adds to the residual stream; the saved model has none of it."""

    def drop(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(output, probability, module.training)

    for name, module in model.named_modules():
        if probability and name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


# Settings


def run_settings(
    args: argparse.Namespace,
    config: T6Config,
    texts: tuple[list[str], list[str]],
    windows_per_step: int,
    max_steps: int,
    block_length: int,
) -> dict:
    """What determines a run: one that goes on with it must have the same."""
    names = (
        "vocab_size",
        "eval_steps",
        "learning_rate",
        "warmup_steps",
        "min_lr_ratio",
        "weight_decay",
        "dropout",
        "seed",
    )
    digests = [hashlib.sha256() for _ in texts]
    for digest, documents in zip(digests, texts):
        for document in documents:
            digest.update(hashlib.sha256(document.encode()).digest())
    return {
        "config": config_fields(config),
        **dict(zip(("training_text_sha256", "held_out_text_sha256"), (digest.hexdigest() for digest in digests))),
        "tokenizer": args.tokenizer,
        "block_length": block_length,
        "windows_per_step": windows_per_step,
        "max_steps": max_steps,
        **{name: getattr(args, name) for name in names},
    }


# Model card


def model_card(args: argparse.Namespace, model: T6ForCausalLM, facts: dict) -> str:
    config, perplexity = model.config, math.exp(facts["loss_per_token"])
    itemsize = model.dtype.itemsize
    layers = range(config.num_hidden_layers)
    cache = sum(layout.width for layer in layers for layout in factor_layouts(config, layer)) * itemsize
    mha_cache = 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * itemsize
    # A resumed run equals the command without these.
    words = [shlex.quote(word) for word in args.command if word not in ("--resume", "--overwrite")]
    command = " ".join(words[:2]) + "".join(
        f" \\\n    {word}" if word.startswith("--") else f" {word}" for word in words[2:]
    )
    rows = {
        "parameters": f"{model.num_parameters():,}",
        "layers, hidden size, MLP": f"{config.num_hidden_layers}, {config.hidden_size}, {config.intermediate_size}",
        "heads, head size": f"{config.num_attention_heads}, {config.head_dim}",
        "ranks of Q, K, V": f"{config.q_rank or 'no factors'}, {config.k_rank}, {config.v_rank}",
        "context, vocabulary": f"{config.max_position_embeddings}, {config.vocab_size}",
        "weights": str(model.dtype).removeprefix("torch."),
        "held-out loss per token": f"{facts['loss_per_token']:.4f} nats (perplexity {perplexity:.2f})",
        "held-out loss per character": f"{facts['loss_per_character']:.4f} nats",
        "held-out bits per byte": f"{facts['bits_per_byte']:.4f}",
        "cache per token": f"{cache:,} bytes; MHA with the same heads: {mha_cache:,} bytes ({mha_cache / cache:.1f}x)",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: {args.license}
tags:
- t6
- tensor-product-attention
---

# {args.output_dir.name}

A small T6 language model, trained from scratch. T6 is a Llama-like decoder with tensor product attention
([arXiv 2501.06425](https://arxiv.org/abs/2501.06425)): queries, keys and values are products of low-rank factors that
depend on the token, and only the factors of keys and values are cached.

| | |
| --- | --- |
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{args.output_dir.name}"  # this folder, or its name on the Hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

inputs = tokenizer({json.dumps(facts["prompt"], ensure_ascii=False)}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0], skip_special_tokens=True))
```

A sample at temperature 0.8:

````text
{facts["sample"]}
````

## Data

{args.data_description or facts["data"]}

{facts["train_tokens"]:,} tokens were trained on, seen {facts["passes"]:.1f} times, and {facts["held_out_tokens"]:,}
held out ({facts["held_out"]}). The losses are those of the weights in this folder on all of the held-out text, in
windows of {facts["block_length"]} tokens; the same text chose the checkpoint.

## Training

The checkpoint with the lowest held-out loss, step {facts["best_step"]:,} of {facts["steps"]:,}, of this command, run
in the repository of the code:

```bash
{command}
```

## Limits

A model of this size and data imitates the style of its text; what it says is not to be relied on.
"""


def sample_text(model: T6ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int) -> str:
    set_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    output = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=max(1, min(250, room))
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def train(args: argparse.Namespace) -> dict[str, float]:
    """Trains and writes the model folder; returns the held-out losses of what was written."""
    checkpoint = check_folders(args)
    hide_bars_of_transformers()
    training, held_out = load_documents(args)
    if checkpoint or args.tokenizer:
        tokenizer = load_tokenizer(checkpoint or args.tokenizer)
    else:
        tokenizer = train_tokenizer(training, args.vocab_size)

    config = make_config(args, tokenizer)
    block_length = args.block_length or config.max_position_embeddings
    if block_length > config.max_position_embeddings:
        raise InputError(f"--block-length {block_length} exceeds the {config.max_position_embeddings} of the model")
    tokenizer.model_max_length = config.max_position_embeddings
    train_tokens, held_out_tokens = encode(tokenizer, training), encode(tokenizer, held_out)
    if len(train_tokens) < block_length:
        raise InputError(f"the training text has {len(train_tokens)} tokens, less than one block of {block_length}")
    eval_windows = held_out_windows(held_out_tokens, block_length)

    on_gpu = torch.cuda.is_available()
    training_args = TrainingArguments(
        **training_options(args, on_gpu),
        torch_compile=args.compile,
        gradient_accumulation_steps=args.gradient_accumulation,
        learning_rate=args.learning_rate,
        lr_scheduler_kwargs={"min_lr_rate": args.min_lr_ratio},
        save_steps=args.eval_steps,
        load_best_model_at_end=True,
        metric_for_best_model="bits_per_byte",
        greater_is_better=False,
        train_sampling_strategy="sequential",  # the windows come in random order already
        dataloader_num_workers=args.num_workers,
        report_to="none",
    )
    windows_per_step = training_args.train_batch_size * training_args.world_size * args.gradient_accumulation
    if args.epochs:
        training_args.max_steps = math.ceil(args.epochs * len(train_tokens) / block_length / windows_per_step)
    num_windows = training_args.max_steps * windows_per_step
    settings = run_settings(
        args, config, (training, held_out), windows_per_step, training_args.max_steps, block_length
    )
    if checkpoint:
        check_settings(args.checkpoint_dir, settings)

    set_seed(args.seed)
    model = T6ForCausalLM(config)
    add_dropout(model, args.dropout)

    predicted = len(held_out_tokens) - 1, *text_size(held_out)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=RandomWindows(train_tokens, block_length, num_windows, args.seed),
        eval_dataset=eval_windows,
        processing_class=tokenizer,
        # Sums per window instead of all logits: exact, and small.
        preprocess_logits_for_metrics=window_losses,
        **evaluation_options(*predicted),
    )
    if trainer.is_world_process_zero():
        print(
            f"{model.num_parameters():,} parameters, {len(train_tokens):,} tokens to train on, "
            f"{len(held_out_tokens):,} held out, {num_windows * block_length / len(train_tokens):.1f} passes"
        )
    if checkpoint is None and trainer.is_world_process_zero():
        remove_checkpoints(args.checkpoint_dir)
        write_settings(args.checkpoint_dir, settings)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.best_global_step is None:
        raise InputError("the held-out loss was never a number: lower --learning-rate or raise --warmup-steps")
    if not trainer.is_world_process_zero():
        return {}

    model.to(getattr(torch, args.save_dtype))
    model.config.use_cache = True  # Trainer turns it off
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.8
    with new_folder(args.output_dir, args.overwrite, inputs(args)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # What the card reports is measured on the folder as it will be loaded.
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).to(trainer.args.device)
        report = loss_report(total_loss(saved, eval_windows, args.batch_size), *predicted)
        prompt = args.prompt or next(line for line in "\n".join(held_out).splitlines() if line.strip())
        source = ", ".join(path.name for path in args.text) if args.text else f"`{args.dataset}`, split {args.split}"
        facts = {
            **report,
            "prompt": prompt,
            "sample": sample_text(saved, tokenizer, prompt, args.seed),
            "data": f"{source}: {sum(map(len, training + held_out)):,} characters.",
            "train_tokens": len(train_tokens),
            "held_out_tokens": len(held_out_tokens),
            "held_out": args.validation_text.name if args.validation_text else "the end of the text",
            "block_length": block_length,
            "passes": trainer.state.best_global_step * windows_per_step * block_length / len(train_tokens),
            "best_step": trainer.state.best_global_step,
            "steps": trainer.state.max_steps,
        }
        (folder / "README.md").write_text(model_card(args, saved, facts), encoding="utf-8")

    size = (args.output_dir / "model.safetensors").stat().st_size
    print(f"{args.output_dir}: {size / 1e6:.2f} MB of weights, step {facts['best_step']}, {json.dumps(report)}")
    return report


def main(argv: list[str] | None = None) -> dict[str, float]:
    with input_errors("train.py"):
        return train(parse_args(argv))


if __name__ == "__main__":
    main()
