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
"""What `train.py` and `pretrain.py` share: data sets of the Hub, and how `Trainer` trains on packed windows."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import EvalPrediction, PreTrainedConfig

from command_line import InputError, loading, read_text, write_json
from language_modeling import collate, loss_report


SETTINGS = "settings.json"


def load_dataset(args: argparse.Namespace, instead: str, streaming: bool = False):
    """
    The data set that `--dataset`, `--dataset-config` and `--split` name, with the column `--text-column`.

    Args:
        instead: where text goes that needs no package `datasets`, for the error.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"--dataset needs the package `datasets`; {instead}") from error
    with loading("data set", args.dataset):
        dataset = datasets.load_dataset(args.dataset, args.dataset_config, split=args.split, streaming=streaming)
    columns = dataset.column_names  # of a stream, they may be unknown
    if columns is not None and args.text_column not in columns:
        raise InputError(f"the data set has no column {args.text_column!r}, only {', '.join(columns)}")
    return dataset


def config_fields(config: PreTrainedConfig) -> dict:
    """What a configuration says, whichever version of Transformers made it."""
    return {
        name: value
        for name, value in json.loads(config.to_json_string(use_diff=False)).items()
        if name != "transformers_version"
    }


def write_settings(checkpoint_dir: Path, settings: dict) -> None:
    """Keeps beside the checkpoints what a run that goes on from them must have in common with this one."""
    write_json(checkpoint_dir / SETTINGS, settings)


def check_settings(checkpoint_dir: Path, settings: dict) -> None:
    """
    Raises:
        InputError: the run that made the checkpoints was started with others; it names the first that differs.
    """
    try:
        old = json.loads(read_text(checkpoint_dir / SETTINGS))
    except json.JSONDecodeError as error:
        raise InputError(f"--resume: {checkpoint_dir / SETTINGS} is not JSON: {error}") from error
    check_same_run(old, settings, "--resume: the run was started")


def check_same_run(old: dict, new: dict, what: str) -> None:
    """Names the first setting by which a run, `what` was done, would go another way than another."""
    new = json.loads(json.dumps(new))  # tuples as lists
    for name in new:
        if isinstance(new[name], dict) and isinstance(old.get(name), dict):
            check_same_run(old[name], new[name], what)
        elif old.get(name) != new[name]:
            raise InputError(f"{what} with {name}={old.get(name)}, this command has {new[name]}")


def training_options(args: argparse.Namespace, on_gpu: bool) -> dict:
    """
    What `TrainingArguments` of both have in common: the paper's optimizer and schedule (appendix H.1), held-out loss and
    checkpoints by steps, the best checkpoint and the last.
    """
    return {
        "output_dir": str(args.checkpoint_dir),
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": min(args.batch_size, 16),  # of evaluation, logits are in float32
        "max_steps": args.max_steps,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "cosine_with_min_lr",
        "warmup_steps": args.warmup_steps,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": args.weight_decay,
        "max_grad_norm": 1.0,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "eval_strategy": "steps",
        "eval_steps": args.eval_steps,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "logging_steps": args.logging_steps,
        "remove_unused_columns": False,
        "dataloader_pin_memory": on_gpu,
        "seed": args.seed,
    }


def evaluation_options(num_predicted: int, num_characters: int, num_bytes: int) -> dict[str, Callable]:
    """What makes `Trainer` report `loss_report` of a held-out text, from the sums of its windows."""

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        nats = prediction.predictions.astype("float64").sum()
        return loss_report(nats, num_predicted, num_characters, num_bytes)

    return {"data_collator": collate, "compute_metrics": metrics}
