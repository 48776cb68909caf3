"""What a stranger gets: the model loaded by a process that knows nothing of this package, and compared bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from .folder import UploadError


# Loads as a stranger does. Arguments: source, revision or "", Auto class, what to do beside, result. A model that does not
# fit into memory is loaded to "meta": all files are looked for and all tensors placed, but no number is kept.
LOAD = """
import functools
import json
import sys
import torch
import transformers
from safetensors.torch import save_file

source, revision, auto_class, tasks, result = sys.argv[1:]
options = {"trust_remote_code": True}
if revision:
    options |= {"revision": revision, "code_revision": revision}
config = transformers.AutoConfig.from_pretrained(source, **options)
device = {"device_map": "meta"} if "meta" in tasks else {}
model, info = getattr(transformers, auto_class).from_pretrained(
    source, dtype="auto", output_loading_info=True, **device, **options
)
model.eval()
if not type(model).__module__.startswith("transformers_modules."):
    sys.exit(f"it loads {type(model)} instead of the code beside the weights")
if wrong := [f"{kind} {sorted(map(str, names))[:20]}" for kind, names in info.items() if names]:
    sys.exit("weights and model do not fit: " + ", ".join(wrong))
if getattr(model, "_hf_peft_config_loaded", False):
    sys.exit("an adapter is loaded with the model")
if isinstance(getattr(model, "generate", None), functools.partial):
    sys.exit("custom_generate/generate.py takes the place of generate()")


def text(value):
    return torch.tensor(list(json.dumps(value, sort_keys=True, default=str).encode()), dtype=torch.uint8)


tensors = {}
length = min(64, config.max_position_embeddings)
ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
if "meta" not in tasks:
    one_by_one = auto_class == "AutoModelForSequenceClassification" and config.pad_token_id is None
    with torch.no_grad():
        output = model(input_ids=ids[:1] if one_by_one else ids, use_cache=False)
    tensors |= {name: value.contiguous() for name, value in output.items() if isinstance(value, torch.Tensor)}
if "generate" in tasks:
    tensors["generation config"] = text(model.generation_config.to_dict())
    if "meta" not in tasks:
        prompt = ids[:1, : max(1, length - 8)]
        tensors["generated"] = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=length - prompt.shape[1] or 1
        )
if "tokenize" in tasks:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    sample = "To be, or not to be:  \\u00e9\\u6728 1234567\\n\\tdef f(x): return x[0]  # \\u6771\\u4eac \\U0001f600"
    tensors["token ids"] = torch.tensor(tokenizer(sample).input_ids or [-1])
    tensors["chat templates"] = text(tokenizer.chat_template)
save_file(tensors or {"nothing": torch.zeros(1)}, result)
"""


def load_in_clean_process(
    source: str, revision: str, auto_class: str, tasks: list[str], home: Path, environment: dict[str, str]
) -> dict[str, torch.Tensor]:
    """
    What a process computes that loads the model by the Auto classes, with nothing in its caches but those in `home`.

    Args:
        tasks: "generate" and "tokenize", what is to be done beside a forward pass; "meta": the numbers are not loaded,
            and nothing is computed with them.

    Returns:
        The model's outputs for random tokens; with "generate" a greedy continuation and the generation config, with
        "tokenize" the token ids of a sentence and the chat templates, the texts as bytes.
    """
    result = home / "result.safetensors"
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    }
    environment = inherited | {
        "HF_HOME": str(home / "home"),
        "HF_HUB_CACHE": str(home / "cache"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    } | environment  # fmt: skip
    arguments = [source, revision, auto_class, ",".join(tasks), str(result)]
    process = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,  # a question of Transformers is not for the user of this command
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        lines = [line for line in process.stderr.strip().splitlines() if line.strip()] or ["it ended without a word"]
        raise UploadError(f"a clean process cannot load {revision and 'the repository' or 'the folder'}: {lines[-1]}")
    tensors = load_file(result)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    for name in expected:
        if name not in found or not torch.equal(found[name], expected[name]):
            raise UploadError(f"the model that was downloaded is not the one in the folder: its {name} differ")
