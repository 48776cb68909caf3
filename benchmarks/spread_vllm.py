"""
How far vLLM's log-probabilities of the tokens that it chose are from those of the same weights in float32, for T6 and for Llama with
multi-head attention: random weights of the size of a model of configuration/, greedy, on a GPU in bfloat16.

    python benchmarks/spread_vllm.py --output spread.json

The prompts and the chosen tokens go through Transformers in float32, as one text each, and through Transformers in bfloat16. Llama
runs in vLLM with two attention back ends, which compute the same in another order: by as much as these two differ is what a
back end may differ. T6 also runs with what takes other ways through its plugin: pages of 16 tokens, prompts in pieces whose keys and
values do not fit the workspace at once, prefix caching, speculation by n-grams, sliding windows, rows in FP8. Both run on two GPUs
through NCCL where there are two.
"""

import argparse

from options import add_output, describe, save


SETTINGS = {
    "llama-mha-small": {
        "FlashAttention": {"attention_backend": "FLASH_ATTN"},
        "Triton": {"attention_backend": "TRITON_ATTN"},
        "two GPUs": {"tensor_parallel_size": 2, "disable_custom_all_reduce": True},
    },
    "t6-small": {
        "graphs": {},
        "pages of 16": {"block_size": 16},
        "pieces": {"max_num_batched_tokens": 256, "max_num_seqs": 32, "workspace": 300},
        "n-grams": {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 4,
                "prompt_lookup_max": 3,
                "prompt_lookup_min": 1,
            }
        },
        "window of 64": {"hf_overrides": {"sliding_window": 64}},
        "FP8 rows": {"kv_cache_dtype": "fp8"},
        "two GPUs": {"tensor_parallel_size": 2, "disable_custom_all_reduce": True},
    },
}
EAGER = ("pages of 16", "pieces", "window of 64", "FP8 rows", "Triton", "two GPUs")  # the others in CUDA graphs


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="MODEL")
    parser.add_argument("--settings", nargs="+", metavar="SETTING", help="some of them alone")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    add_output(parser, plots=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import gc
import json
import os
import random
import tempfile
from pathlib import Path

import torch
from serve_vllm import fixed_cache
from turns import alone
from vllm_server import machine, model_folders


def make_weights(folder: Path, layers: int) -> None:
    """Random weights that make the logits of a model vary, as trained ones do, for the config.json in a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import modeling_t6  # noqa: F401

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)


def answer(folder: Path, settings: dict[str, dict], prompts: list[list[int]], args: argparse.Namespace) -> dict:
    """Of each setting: for each prompt the tokens that vLLM chose, and their log-probabilities."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # CUDA is in use here
    from vllm import LLM, SamplingParams

    import vllm_t6.prefill

    sampling = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True, detokenize=False, logprobs=0)
    answers, workspace = {}, vllm_t6.prefill.WORKSPACE_ROWS
    for name, setting in settings.items():
        setting = {"enforce_eager": name in EAGER, **setting}
        vllm_t6.prefill.WORKSPACE_ROWS = setting.pop("workspace", workspace)
        # vLLM does not give all of its memory back: little enough for all settings.
        setting |= fixed_cache(2**32)
        try:
            llm = LLM(str(folder), dtype=args.dtype, skip_tokenizer_init=True, seed=0, **setting)
        except Exception as error:
            print(f"{name} does not start, and is left out: {error}", flush=True)
            continue
        for _ in range(2):  # the second finds the prompts in the cache
            requests = [{"prompt_token_ids": prompt} for prompt in prompts]
            outputs = llm.generate(requests, sampling, use_tqdm=False)
        answers[name] = [
            ([*output.outputs[0].token_ids], [step[token].logprob for step, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids)])
            for output in outputs
        ]  # fmt: skip
        del llm
        gc.collect()
        torch.cuda.empty_cache()
    return answers


@torch.no_grad()
def log_probabilities(
    folder: Path, dtypes: list[str], answers: dict[str, list], prompts: list[list[int]], settings: dict[str, dict]
) -> dict[tuple[str, str], list]:
    """Of each setting and dtype, for each prompt: log-probabilities of the chosen tokens, and whether each was the likeliest."""
    from transformers import AutoModelForCausalLM

    import modeling_t6  # noqa: F401

    results = {}
    for setting, given in answers.items():
        for dtype in dtypes:
            overrides = settings[setting].get("hf_overrides", {})
            model = (
                AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **overrides).cuda().eval()
            )
            rows = results[setting, dtype] = []
            for prompt, (tokens, _) in zip(prompts, given):
                logits = model(torch.tensor([prompt + tokens], device="cuda")).logits[0, len(prompt) - 1 : -1]
                chosen = logits.float().log_softmax(-1).gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
                rows.append((chosen.tolist(), (logits.argmax(-1).cpu() == torch.tensor(tokens)).tolist()))
    return results


def measure(args: argparse.Namespace, directory: Path) -> dict:
    results = {}
    print(
        f"{machine()}, {args.dtype}: differences from float32 in nats, of {args.requests} x {args.new_tokens} tokens"
    )
    print(
        f"{'':<18}{'':<16}{'vLLM: mean':>12}{'99th':>8}{'most':>8}   {'Transformers: mean':>18}{'99th':>8}{'most':>8}   first choice"
    )
    for name, folder in model_folders(args.models, directory, 1024).items():
        make_weights(folder, args.layers)
        generator = random.Random(0)
        vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        prompts = [
            [generator.randrange(vocabulary) for _ in range(generator.randint(1, 800))] for _ in range(args.requests)
        ]
        for prompt in prompts[::2]:  # such as n-grams find something in
            prompt += prompt[:100] * 2
        prompts = [prompt[: 1023 - args.new_tokens] for prompt in prompts]
        settings = {
            setting: given
            for setting, given in SETTINGS[name].items()
            if (not args.settings or setting in args.settings)
            and given.get("tensor_parallel_size", 1) <= torch.cuda.device_count()
        }
        answers = alone(answer, folder, settings, prompts, args)
        computed = alone(log_probabilities, folder, ["float32", args.dtype], answers, prompts, SETTINGS[name])
        for setting, given in answers.items():
            exact, rounded = computed[setting, "float32"], computed[setting, args.dtype]
            reference = torch.tensor([x for row, _ in exact for x in row])
            row = {}
            for of, values in (
                ("vllm", [x for _, row in given for x in row]), ("transformers", [x for row, _ in rounded for x in row])
            ):  # fmt: skip
                error = (torch.tensor(values) - reference).abs()
                row[of] = {
                    "mean": error.mean().item(),
                    "99th": error.quantile(0.99).item(),
                    "most": error.max().item(),
                }
            firsts = [is_first for _, row in exact for is_first in row]
            row["first_choice"] = sum(firsts) / len(firsts)
            results[f"{name}, {setting}"] = row
            numbers = ["".join(f"{row[of][key]:>{width}.4f}" for key, width in (("mean", first), ("99th", 8), ("most", 8))) for of, first in (("vllm", 12), ("transformers", 21))]  # fmt: skip
            print(f"{name:<18}{setting:<16}{''.join(numbers)}   {row['first_choice']:>10.2%}", flush=True)
    return {"machine": machine(), "dtype": args.dtype, "spread": results}


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as directory:
        save(measure(args, Path(directory)), args.output)


if __name__ == "__main__":
    main()
