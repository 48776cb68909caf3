"""
Holds a chat with a T6 model, each answer streamed, and shows the size of its cache beside that of its source.

    make chat                                                  SmolLM2-135M-Instruct, which it installs and converts
    python examples/chat.py DIR                                a folder with a chat template, or a name on the Hub
    python examples/chat.py DIR --prompt "What is a tensor?"   one question

Without --prompt, each line is a message, and an empty line or the end of the input ends the chat.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from command_line import DTYPES, InputError, input_errors, loading, number, utf8


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name")
    parser.add_argument("--prompt", type=utf8, help="one message, instead of a chat")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=400, help="of an answer")
    parser.add_argument("--temperature", type=number(float, 0, 1000), default=0.2, help="0 is greedy decoding")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights and the cache; default: bfloat16 on a GPU, on a CPU float32"
    )
    args = parser.parse_args(argv)
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty")
    return args


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from conversion.files.devices import find_device


class Chat:
    """A conversation, which the model reads anew for each answer."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.messages = args, []
        device = find_device(args.device)
        # In float32, a CPU without instructions for bfloat16 is the faster one, and one with them not slow.
        dtype = args.dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
        # The code of the tokenizer is Transformers' own, but Transformers learns the model's type from the model's code.
        with loading("tokenizer", args.model):
            self.tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
        with loading("model", args.model):
            self.model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True, dtype=dtype)
        self.model = self.model.to(device).eval()
        if not self.tokenizer.chat_template:
            raise InputError(f"{args.model} has no chat template: examples/generate.py goes on from any text")
        set_seed(args.seed)

    @torch.inference_mode()
    def answer(self, text: str) -> None:
        """Prints the answer to `text` while it is generated, then its speed and the size of the cache."""
        self.messages.append({"role": "user", "content": text})
        inputs = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        room = self.model.config.max_position_embeddings - length
        if room < 1:
            raise InputError(f"the conversation has {length} tokens, more than the context of the model")
        options = {"do_sample": self.args.temperature > 0}
        if self.args.temperature > 0:
            options["temperature"] = self.args.temperature
        start = time.perf_counter()
        output = self.model.generate(
            **inputs, **options, max_new_tokens=min(self.args.max_new_tokens, room), return_dict_in_generate=True,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        tokens = output.sequences[0, length:]
        answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        cache = output.cache if hasattr(output, "cache") else output.past_key_values  # renamed in Transformers 5.24
        nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        print(
            f"[{len(tokens)} tokens, {len(tokens) / seconds:.1f} per second; {self.cache(nbytes, cache.get_seq_length())}]"
        )

    def cache(self, nbytes: int, length: int) -> str:
        """The bytes of the cache, beside those of its source, where it is converted, and of MHA."""
        config, size = self.model.config, self.model.dtype.itemsize
        text = f"cache of {length:,} tokens {nbytes:,} bytes, {nbytes / length:,.0f} a token"
        report = Path(self.args.model) / "conversion.json"
        if report.is_file():
            numbers = json.loads(report.read_text(encoding="utf-8")).get("source_cache_numbers_per_token")
            text += f", its source {numbers * size:,}" if numbers else ""
        mha = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        return f"{text}, MHA {mha * size:,}"


def messages(prompt: str | None):
    """The one message, or lines until an empty one, asked for where somebody is there to answer."""
    if prompt is not None:
        yield prompt
        return
    asks = sys.stdin.isatty()
    while True:
        print("\n> " if asks else "", end="", flush=True)
        try:
            line = utf8(sys.stdin.readline()).strip()
        except UnicodeError as error:
            raise InputError("a message is not UTF-8 text") from error
        if not line:
            return
        yield line


def chat(args: argparse.Namespace) -> None:
    conversation = Chat(args)
    for text in messages(args.prompt):
        conversation.answer(text)


def main(argv: list[str] | None = None) -> None:
    with input_errors("chat.py"):
        chat(parse_args(argv))


if __name__ == "__main__":
    main()
