"""
Generates text with a T6 model, and shows the size of its cache beside that of ordinary attention (MHA).

    python examples/generate.py --prompt "ROMEO:"

The model is loaded as any model of the Hub is, by the Auto classes and the code in its own folder. The MHA model has the
same layers, hidden size, heads and head size, and random weights: it serves to measure its cache and its speed.

    torchrun --nproc-per-node 2 examples/generate.py --parallel tensor

shares out the heads among the processes, and `--parallel pipeline` the layers; the MHA model is left out.
"""

import argparse
import os
import time
from pathlib import Path

from command_line import DTYPES, InputError, input_errors, loading, number, utf8


SHIPPED = Path(__file__).parent / "t6-tiny-shakespeare"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED), help="folder or Hub name")
    parser.add_argument("--prompt", type=utf8, default="ROMEO:")
    parser.add_argument("--max-new-tokens", type=int, default=250)
    parser.add_argument("--temperature", type=number(float, 0, 1000), default=0.7, help="0 is greedy decoding")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights and the cache; auto: as the checkpoint"
    )
    parser.add_argument("--parallel", choices=["tensor", "pipeline"], help="over the processes that torchrun started")
    args = parser.parse_args(argv)
    args.num_processes, args.rank = (int(os.environ.get(name, 0)) for name in ("WORLD_SIZE", "RANK"))
    if args.parallel and args.num_processes < 2:
        parser.error(f"--parallel {args.parallel} needs two processes or more: torchrun --nproc-per-node 2 ...")
    if args.parallel and args.device:
        parser.error("--device: with --parallel each process has a device of its own")
    if args.max_new_tokens < 2:
        parser.error(f"--max-new-tokens must be at least 2, got {args.max_new_tokens}")
    if not args.prompt:
        parser.error("--prompt is empty: it must hold at least one token")
    return args


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM, set_seed
from transformers.distributed import DistributedConfig

from configuration.twins import mha_twin
from conversion.files.devices import find_device


@torch.inference_mode()
def generate(model, input_ids: torch.Tensor, num_tokens: int, **kwargs) -> tuple[torch.Tensor, float, float]:
    """
    Generates `num_tokens` tokens.

    Returns:
        The token ids [1, seq], the new tokens per second, and the bytes of cache per token.
    """
    kwargs |= {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens, "return_dict_in_generate": True}
    attention_mask = torch.ones_like(input_ids)
    model.generate(input_ids, attention_mask=attention_mask, **kwargs | {"min_new_tokens": 2, "max_new_tokens": 2})
    start = time.perf_counter()
    output = model.generate(input_ids, attention_mask=attention_mask, **kwargs)
    seconds = time.perf_counter() - start
    cache = output.cache if hasattr(output, "cache") else output.past_key_values  # renamed in Transformers 5.24
    cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
    return output.sequences, num_tokens / seconds, cache_bytes / cache.get_seq_length()


def compare_with_mha(args: argparse.Namespace) -> None:
    """Prints the text, and the speed and cache of both models."""
    device = None if args.parallel else find_device(args.device)
    # The code of the tokenizer is Transformers' own, but Transformers learns the model's type from the model's code.
    with loading("tokenizer", args.model):
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    options = {"trust_remote_code": True, "dtype": args.dtype}
    if args.parallel:
        size = {"tensor": "tp_size", "pipeline": "pp_size"}[args.parallel]
        options["distributed_config"] = DistributedConfig(**{size: args.num_processes})
    with loading("model", args.model):
        model = AutoModelForCausalLM.from_pretrained(args.model, **options)
    if model.config.model_type != "t6":
        raise InputError(f"--model must be a T6 model, got one of type {model.config.model_type!r}")
    if not args.parallel:  # there, each process has been given its device
        model = model.to(device)
    input_ids = tokenizer(args.prompt, return_tensors="pt").input_ids.to(model.device)
    if input_ids.numel() == 0:
        raise InputError("--prompt must hold at least one token")

    sampling = {"do_sample": args.temperature > 0, "pad_token_id": tokenizer.pad_token_id}
    if args.temperature > 0:
        sampling["temperature"] = args.temperature
    set_seed(args.seed)
    sequences, speed, cache_bytes = generate(model, input_ids, args.max_new_tokens, **sampling)
    if args.rank == 0:
        print(tokenizer.decode(sequences[0], skip_special_tokens=True))
    if args.parallel:
        if args.rank == 0:
            print(
                f"\n{speed:.1f} tokens per second; {cache_bytes:,.0f} bytes of cache per token in this process, one of {args.num_processes}"
            )
        return

    mha = MistralForCausalLM(mha_twin(model.config)).to(device, model.dtype)
    mha.generation_config = model.generation_config  # what `generate()` does beside the model takes as long
    _, mha_speed, mha_cache_bytes = generate(mha, input_ids, args.max_new_tokens, **sampling)
    config = model.config
    print(
        f"\n{config.num_hidden_layers} layers, {config.num_attention_heads} heads of size {config.head_dim}, ranks "
        f"{config.q_rank}, {config.k_rank}, {config.v_rank}; {model.dtype}, {device}, {torch.get_num_threads()} threads"
    )
    print("                        tokens per second   bytes of cache per token")
    print(f"T6 (cache of factors)   {speed:17.1f}   {cache_bytes:24,.0f}")
    print(f"MHA of the same shape   {mha_speed:17.1f}   {mha_cache_bytes:24,.0f}")
    print(f"The cache is {mha_cache_bytes / cache_bytes:.1f} times smaller.")


def main(argv: list[str] | None = None) -> None:
    with input_errors("generate.py"):
        compare_with_mha(parse_args(argv))


if __name__ == "__main__":
    try:
        main()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
