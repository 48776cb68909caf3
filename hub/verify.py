"""What a stranger gets: the model loaded by a process that knows nothing of this package, and compared bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from .folder import UploadError


# Loads as a stranger does. Arguments: source, revision or "", Auto class, what to do beside, result.
LOAD = """
import sys
import torch
import transformers
from safetensors.torch import save_file

source, revision, auto_class, tasks, result = sys.argv[1:]
options = {"trust_remote_code": True}
if revision:
    options |= {"revision": revision, "code_revision": revision}
config = transformers.AutoConfig.from_pretrained(source, **options)
model = getattr(transformers, auto_class).from_pretrained(source, dtype="auto", **options).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
length = min(64, config.max_position_embeddings)
ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    output = model(input_ids=ids, use_cache=False)
tensors = {name: value.contiguous() for name, value in output.items() if isinstance(value, torch.Tensor)}
if "generate" in tasks:
    prompt = ids[:1, : max(1, length - 8)]
    tensors["generated"] = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=length - prompt.shape[1] or 1
    )
if "tokenize" in tasks:
    loaded = transformers.AutoTokenizer.from_pretrained(source, **options)
    tensors["token_ids"] = torch.tensor(loaded("To be, or not to be: \\u00e9\\u6728 1234").input_ids or [-1])
save_file(tensors, result)
"""


def load_in_clean_process(
    source: str, revision: str, auto_class: str, tasks: list[str], home: Path, environment: dict[str, str]
) -> dict[str, torch.Tensor]:
    """
    What a process computes that loads the model by the Auto classes, with nothing in its caches but those in `home`.

    Returns:
        The model's outputs for random tokens; with the tasks "generate" and "tokenize", a greedy continuation and the
        token ids of a sentence.
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
        [sys.executable, "-c", LOAD, *arguments], cwd=home, env=environment, capture_output=True, text=True
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
