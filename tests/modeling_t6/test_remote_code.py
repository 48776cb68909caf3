"""A saved model carries its code: a process that has never seen this repository loads and runs it."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import modeling_t6
from modeling_t6 import T6ForSequenceClassification

from ..processes import run
from .common import random_ids, random_model, tiny_config


CODE = {path.name: path for path in Path(modeling_t6.__file__).parent.glob("*.py") if path.name != "__init__.py"}
AUTO_MAP = {
    "AutoConfig": "configuration_t6.T6Config",
    "AutoModel": "modeling_t6.T6Model",
    "AutoModelForCausalLM": "modeling_t6.T6ForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_t6.T6ForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_t6.T6ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_t6.T6ForTokenClassification",
}

SCRIPT = """
import json, sys
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
result = {"module": type(model).__module__, "tokens": model.generate(ids, max_new_tokens=6, do_sample=False).tolist()}
result["cache"] = type(model(ids)[1]).__name__
generator = pipeline("text-generation", model=folder, trust_remote_code=True, device="cpu")
result["text"] = generator("t5 t6 t7", max_new_tokens=4, do_sample=False)[0]["generated_text"]
result["base"] = type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__
result["classifier"] = type(AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)).__name__
model.save_pretrained(folder + "-again")
again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
result["again"] = again.generate(ids, max_new_tokens=6, do_sample=False).tolist()
try:
    import modeling_t6
    result["installed"] = True
except ImportError:
    result["installed"] = False
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "model"
    random_model(tiny_config()).save_pretrained(folder)
    vocabulary = {f"t{i}": i for i in range(97)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t0").save_pretrained(folder)
    return folder


def test_folder_holds_code_and_auto_map(folder, tmp_path):
    assert {path.name: path.read_text() for path in folder.glob("*.py")} == {n: p.read_text() for n, p in CODE.items()}
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    random_model(tiny_config(), cls=T6ForSequenceClassification).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_loads_where_the_package_is_not_installed(folder, tmp_path):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    ids = random_ids(tiny_config(), 2, 7)
    # `-S` would also hide transformers: an editable install of this repository is hidden by name instead.
    script = "import sys; sys.modules['modeling_t6'] = None\n" + SCRIPT
    result = run(script, str(folder), json.dumps(ids.tolist()), env=environment, cwd=tmp_path)
    assert result.code == 0, result.stderr
    result = json.loads(result.stdout.splitlines()[-1])
    assert result["module"].startswith("transformers_modules.") and not result["installed"]
    expected = random_model(tiny_config()).generate(ids, max_new_tokens=6, do_sample=False).tolist()
    assert result["tokens"] == result["again"] == expected
    assert result["cache"] == "T6Cache"
    assert result["text"].startswith("t5 t6 t7") and result["text"] != "t5 t6 t7"
    assert (result["base"], result["classifier"]) == ("T6Model", "T6ForSequenceClassification")
    again = Path(f"{folder}-again")
    assert {path.name for path in again.glob("*.py")} == set(CODE)
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_code_imports_what_every_user_has():
    """
    The remote-code loader follows `from .name import ...` only, and checks that other packages are there; but not
    those imported in `try`, such as Triton.
    """
    allowed = {"torch", "transformers", "huggingface_hub"} | sys.stdlib_module_names
    for path in CODE.values():
        tree = ast.parse(path.read_text())
        optional = {node for block in tree.body if isinstance(block, ast.Try) for node in ast.walk(block)}
        for node in ast.walk(tree):
            if node in optional and not getattr(node, "level", 0):
                continue
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), path.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, path.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and f"{node.module}.py" in CODE, path.name


def test_shards(tmp_path):
    model = random_model(tiny_config())
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
