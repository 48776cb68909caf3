"""Pushed from one process, pulled by others that know nothing of this package: the same logits, bit for bit."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_t6
from conversion.__main__ import main as convert
from hub.folder import UploadError
from hub.verify import load_in_clean_process
from modeling_t6 import T6Config

from .common import ROOT, SHIPPED, environment, make_model, run
from .hub_server import Fault


# Arguments: the file for the result, then repositories with a revision each. Loads them by every Auto class.
PULL = """if True:
    import sys, torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

    result, *sources = sys.argv[1:]
    tensors = {}
    for source in sources:
        name, _, revision = source.partition("@")
        options = {"revision": revision, "trust_remote_code": True}
        config = AutoConfig.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(name, **options).eval()
        assert type(model).__module__.startswith("transformers_modules.") and "modeling_t6" not in sys.modules
        assert type(config).__name__ == "T6Config" and model.config.k_rank == config.k_rank
        with torch.no_grad():
            tensors[source] = model(**tokenizer("ROMEO: what light", return_tensors="pt")).logits
    generate = pipeline("text-generation", model=name, revision=revision, trust_remote_code=True)
    assert len(generate("ROMEO:", max_new_tokens=8, do_sample=False)[0]["generated_text"]) > 6
    save_file(tensors, result)"""


def pull(hub, folder, *sources, **variables) -> dict[str, torch.Tensor]:
    """The logits that a clean process computes with each of `name@revision`."""
    env = environment(hub, folder / "home of the puller", **variables)
    outcome = run(PULL, "result.safetensors", *sources, env=env, cwd=folder)
    assert outcome.code == 0, outcome.output
    return load_file(folder / "result.safetensors")


def expected_logits(folder) -> torch.Tensor:
    """By this package, from the folder."""
    inputs = AutoTokenizer.from_pretrained(folder)("ROMEO: what light", return_tensors="pt")
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(**inputs).logits


@pytest.mark.once  # pushed and pulled with the oldest, too: `test_push_to_hub_alone`
def test_shipped_model_from_the_shell(hub, tmp_path):
    """The command as a user gives it; then one who was let through a gate: at a branch, a tag, a commit, by a pipeline."""
    env = environment(hub, tmp_path / "home", HF_TOKEN="hf_someone", HF_DEBUG="1", TRANSFORMERS_VERBOSITY="debug")
    command = [sys.executable, "hub_upload.py", str(SHIPPED), "someone/t6"]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    output = process.stdout + process.stderr
    assert process.returncode == 0, output
    assert "every file and every logit is the same" in output
    assert "hf_someone" not in output  # neither here nor in what HF_DEBUG logs
    repository = hub.repositories["someone/t6"]
    commit = repository.refs["refs/heads/main"]
    assert f'revision="{commit}"' in output and len(repository.commits) == 2
    repository.refs["refs/tags/v1"] = commit

    sources = [f"someone/t6@{revision}" for revision in ("main", "v1", commit)]
    repository.gated, repository.allowed = "manual", {"reader"}
    found, expected = pull(hub, tmp_path, *sources, HF_TOKEN="hf_reader"), expected_logits(SHIPPED)
    assert set(found) == set(sources) and all(torch.equal(logits, expected) for logits in found.values())


@pytest.mark.once
def test_code_that_is_not_trusted_does_not_run(hub, uploader, tmp_path):
    make_model(tmp_path / "model")
    assert uploader(tmp_path / "model", "someone/t6").code == 0
    # Were any of it run, it would leave a file.
    repository, trap = hub.repositories["someone/t6"], f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    repository.change(**{name: trap + data for name, data in repository.files().items() if name.endswith(".py")})
    code = """if True:
        import os
        from transformers import AutoConfig, AutoModelForCausalLM
        for auto_class in (AutoConfig, AutoModelForCausalLM):
            try:
                auto_class.from_pretrained("someone/t6", trust_remote_code=False)
            except ValueError as error:
                print("refused:", error)
        print("asked for code:", os.path.exists("asked"), "ran:", os.path.exists("ran"))
        AutoConfig.from_pretrained("someone/t6", trust_remote_code=True)
        print("asked for code:", os.path.exists("asked"), "ran:", os.path.exists("ran"))"""
    hub.faults.append(Fault("GET", r"\.py$", times=99, action=(tmp_path / "asked").touch))
    outcome = run(code, env=environment(hub, tmp_path / "home"), cwd=tmp_path)
    assert outcome.code == 0, outcome.output
    assert outcome.output.count("refused: The repository someone/t6 contains custom code") == 2, outcome.output
    assert "pass the argument `trust_remote_code=True`" in outcome.output
    states = [line for line in outcome.output.splitlines() if line.startswith("asked for code:")]
    assert states == ["asked for code: False ran: False", "asked for code: True ran: True"]  # the trap works


HEADS = {
    "SequenceClassification": {"num_labels": 3, "pad_token_id": 1},
    "TokenClassification": {"num_labels": 5},
    "QuestionAnswering": {},
}


@pytest.mark.once
def test_heads(hub, uploader, tmp_path):
    """Each kind of head in a clean process, before any other model there has made `AutoModel` known; one pushed from there."""
    expected, ids = {}, torch.arange(10).view(2, 5)
    for head, options in HEADS.items():
        torch.manual_seed(0)
        config = T6Config(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8, **options
        )
        model = getattr(modeling_t6, f"T6For{head}")(config).eval()
        model.save_pretrained(tmp_path / head)
        with torch.no_grad():
            expected[head] = model(ids)[0]
        outcome = uploader(tmp_path / head, f"someone/{head}", "--no-tokenizer")
        assert outcome.code == 0, outcome.output
    code = """if True:
        import sys, torch, transformers
        from safetensors.torch import save_file
        tensors = {}
        for head in sys.argv[2:]:
            auto_class = getattr(transformers, f"AutoModelFor{head}")
            for name in (head, f"{head}-again") if head == sys.argv[2] else (head,):
                model = auto_class.from_pretrained(f"someone/{name}", trust_remote_code=True).eval()
                assert type(model).__module__.startswith("transformers_modules.") and "modeling_t6" not in sys.modules
                with torch.no_grad():
                    tensors[name] = model(torch.arange(10).view(2, 5))[0]
                if head == sys.argv[2] and name == head:
                    model.push_to_hub(f"someone/{head}-again")
        save_file(tensors, sys.argv[1])"""
    env = environment(hub, tmp_path / "home", HF_TOKEN="hf_someone")
    outcome = run(code, "result.safetensors", *HEADS, env=env, cwd=tmp_path)
    assert outcome.code == 0, outcome.output
    found = load_file(tmp_path / "result.safetensors")
    assert len(found) == len(HEADS) + 1
    for name, logits in found.items():
        assert torch.equal(logits, expected[name.removesuffix("-again")])


@pytest.mark.once
def test_what_readers_get(hub, uploader, tmp_path):
    """
    A model of mixed dtypes, with named chat templates, into a repository with an adapter, code and a template of another,
    from a machine into whose memory it does not fit. Then the lines of its card run as they stand there.
    """
    folder = tmp_path / "model"
    make_model(folder)
    tensors = {n: t if "norm" in n else t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"dtype": "bfloat16"}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "D {{ messages[0]['content'] }}", "tool_use": "T {{ tools }}"}
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert uploader(folder, "someone/t6").code == 0
    repository = hub.repositories["someone/t6"]
    adapter = b'{"peft_type": "LORA", "base_model_name_or_path": "someone/base"}'
    left = {
        "adapter_config.json": adapter,
        "custom_generate/generate.py": b"raise SystemExit('code of another model runs')\n",
        "additional_chat_templates/old.jinja": b"O",
    }
    repository.change(**left)
    outcome = uploader(folder, "someone/t6", load=False)
    assert outcome.code == 0 and "loaded by a clean process without its numbers" in outcome.output, outcome.output
    assert not set(left) & set(repository.files())

    card = repository.files()["README.md"].decode()
    lines = card.split("```python\n")[1].split("```")[0]
    lines = lines.replace('revision = "..."', f'revision = "{repository.refs["refs/heads/main"]}"')
    assert "apply_chat_template" in lines and "model.generate(**inputs" in lines
    code = lines + "\nprint(sorted(tokenizer.chat_template), tokenizer.decode(inputs['input_ids'][0]), model.dtype)"
    outcome = run(code, env=environment(hub, tmp_path / "home"), cwd=tmp_path)
    assert outcome.code == 0, outcome.output
    assert outcome.output.splitlines()[-1] == "['default', 'tool_use'] D What is worth knowing? torch.bfloat16"


@pytest.mark.once
def test_a_reader_who_gets_something_else(tmp_path):
    """What the check of a push would say of a repository into which it has come, by its own reader."""
    make_model(tmp_path / "model")
    (tmp_path / "model" / "custom_generate").mkdir()
    (tmp_path / "model" / "custom_generate" / "generate.py").write_text("def generate(model, **kwargs): ...\n")
    with pytest.raises(UploadError, match="custom_generate/generate.py takes the place of generate()"):
        load_in_clean_process(
            str(tmp_path / "model"),
            "",
            "AutoModelForCausalLM",
            ["meta", "generate"],
            tmp_path,
            {"HF_HUB_OFFLINE": "1"},
        )


def make_llama(folder):
    """A Llama with random weights and the tokenizer of the shipped model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)
    return model.eval()


@pytest.mark.once
def test_converted_and_compressed_llama(hub, uploader, tmp_path):
    """In private repositories, one with four shards; what is pulled computes what the Llama does."""
    llama = make_llama(tmp_path / "llama")
    exact, small = tmp_path / "exact", tmp_path / "small"
    assert convert(["hf", str(tmp_path / "llama"), str(exact), "--no-verify", "--max-shard-size", "100KB"]) == 0
    assert len(list(exact.glob("*.safetensors"))) == 4
    (tmp_path / "text").write_text((ROOT / "LICENSE").read_text()[:4000])
    compression = ["--k-rank", "1", "--v-rank", "1", "--calibration", str(tmp_path / "text"), "--window", "32"]
    assert convert(["hf", str(tmp_path / "llama"), str(small), "--no-verify", *compression]) == 0
    assert "the license of converted weights" in uploader(exact, "someone/exact", "--private").output
    assert not hub.repositories
    options = ["--private", "--license", "llama3.2"]
    outcome = uploader(exact, "someone/exact", *options, "--base-model", "meta-llama/Llama-3.2-1B")
    assert outcome.code == 0, outcome.output
    repository = hub.repositories["someone/exact"]
    assert repository.private and "LICENSE-CODE" in repository.files()
    card = repository.files()["README.md"].decode()
    assert "license: llama3.2\n" in card and "base_model: meta-llama/Llama-3.2-1B\n" in card
    assert "| converted by | `python -m conversion hf llama exact " in card
    outcome = uploader(small, "someone/small", *options)
    assert outcome.code == 0, outcome.output
    card = hub.repositories["someone/small"].files()["README.md"].decode()
    report = json.loads((small / "conversion.json").read_text())
    assert len(report["perplexity"]) > 1
    for row in report["perplexity"]:
        assert f"| {row['model']} | {row['cache_bytes_per_token']:,.0f} | {row['perplexity']:.4f} |" in card
    assert "conversion.png" in hub.repositories["someone/small"].files()

    found = pull(hub, tmp_path, "someone/exact@main", "someone/small@main", HF_TOKEN="hf_someone")
    for name, folder in (("exact", exact), ("small", small)):
        assert torch.equal(found[f"someone/{name}@main"], expected_logits(folder))
    inputs = AutoTokenizer.from_pretrained(SHIPPED)("ROMEO: what light", return_tensors="pt")
    with torch.no_grad():
        expected = llama(**inputs).logits
    # Float32 has 7 digits, and the model adds up hundreds of numbers.
    limits = {"rtol": 1e-4, "atol": 1e-5 * expected.abs().max().item()}
    torch.testing.assert_close(found["someone/exact@main"], expected, **limits)
    assert not torch.allclose(found["someone/small@main"], expected, **limits)


@pytest.mark.once
def test_shards_to_an_existing_repository(hub, uploader, tmp_path):
    """One file becomes four: what the repository held of the old model goes, what is not of a model stays."""
    make_model(tmp_path / "old", seed=1)
    assert uploader(tmp_path / "old", "someone/t6").code == 0
    repository = hub.repositories["someone/t6"]
    stale, kept = {"model.safetensors", "merges.txt", "helper.py", "pytorch_model.bin"}, {"a.png", "folder/merges.txt"}
    repository.change(**dict.fromkeys((stale | kept) - {"model.safetensors"}, b"of before"))

    model = make_model(tmp_path / "new", seed=2)
    size = sum(parameter.nbytes for parameter in model.parameters()) - model.model.embed_tokens.weight.nbytes
    hub.multipart_size = 4096
    outcome = uploader(tmp_path / "new", "someone/t6", "--max-shard-size", f"{size / 2000:.3f}KB")
    assert outcome.code == 0, outcome.output
    files = repository.files()
    assert len([name for name in files if name.endswith(".safetensors")]) == 4
    assert {"model.safetensors.index.json", *kept} <= set(files) and not stale & set(files)
    assert hub.requests("POST", "^/complete/") and len(repository.commits) == 4

    again = uploader(tmp_path / "new", "someone/t6", "--max-shard-size", f"{size / 2000:.3f}KB")
    assert again.code == 0 and len(repository.commits) == 4  # nothing changed: no empty commit


@pytest.mark.once
def test_revisions_and_pull_requests(hub, uploader, tmp_path):
    make_model(tmp_path / "one", seed=1)
    make_model(tmp_path / "two", seed=2)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert "404: there is no someone/t6" in uploader(tmp_path / "one", "someone/t6", "--create-pr").output
    assert uploader(tmp_path / "one", "someone/t6").code == 0
    repository = hub.repositories["someone/t6"]

    assert uploader(tmp_path / "two", "someone/t6", "--revision", "next/v2", "--commit-message", "Second").code == 0
    assert repository.files("main")["model.safetensors"] == one
    assert repository.files("next/v2")["model.safetensors"] == two
    assert repository.resolve("next/v2").title == "Second"

    repository.refs["refs/tags/v1"] = repository.refs["refs/heads/main"]
    assert "v1 is a tag of someone/t6" in uploader(tmp_path / "two", "someone/t6", "--revision", "v1").output
    assert "refs/heads/v1" not in repository.refs

    # One who may not write can open a pull request.
    outcome = uploader(tmp_path / "two", "someone/t6", "--create-pr", token="hf_reader")
    assert outcome.code == 0 and f"{hub.endpoint}/someone/t6/discussions/1" in outcome.output
    assert repository.files("refs/pr/1")["model.safetensors"] == two
    assert repository.files("main")["model.safetensors"] == one
    assert uploader(tmp_path / "one", "someone/t6", "--revision", "refs/pr/1").code == 0  # goes on with it
    assert repository.files("refs/pr/1")["model.safetensors"] == one
    assert "403: the token may not" in uploader(tmp_path / "two", "someone/t6", token="hf_reader").output
    assert uploader(tmp_path / "two", "someone/t6", "--revision", "refs/pr/7").code == 1
    assert repository.files("main")["model.safetensors"] == one and len(repository.pull_requests) == 1


@pytest.mark.once
def test_private_is_not_made_public(hub, uploader, tmp_path):
    make_model(tmp_path / "model")
    assert uploader(tmp_path / "model", "someone/t6").code == 0
    commit = hub.repositories["someone/t6"].refs["refs/heads/main"]
    outcome = uploader(tmp_path / "model", "someone/t6", "--private")
    assert outcome.code == 1 and "exists and is public" in outcome.output
    assert hub.repositories["someone/t6"].refs["refs/heads/main"] == commit


@pytest.mark.once
def test_code_only(hub, uploader, tmp_path):
    make_model(tmp_path / "model", seed=1)
    assert uploader(tmp_path / "model", "someone/t6").code == 0
    repository = hub.repositories["someone/t6"]
    card, tokenizer = (repository.files()[name] for name in ("README.md", "tokenizer_config.json"))
    changed = {
        "README.md": card.replace(b"# t6\n", b"# t6\n\nWritten on the Hub.\n"),
        "modeling_t6.py": b"old = 1\n",
        "gone.py": b"",
        "tokenizer_config.json": tokenizer + b"\n",
    }
    repository.change(**changed)
    before = repository.files()
    hub.log.clear()
    outcome = uploader(tmp_path / "model", "someone/t6", "--code-only")
    assert outcome.code == 0, outcome.output
    after = repository.files()
    code = (ROOT / "modeling_t6" / "modeling_t6.py").read_bytes()
    assert after == {name: data for name, data in before.items() if name != "gone.py"} | {"modeling_t6.py": code}
    assert b"Written on the Hub." in after["README.md"]
    assert not hub.requests("PUT", "^/upload/")

    make_model(tmp_path / "other", seed=2)
    outcome = uploader(tmp_path / "other", "someone/t6", "--code-only")
    assert outcome.code == 1 and "does not hold the weights of" in outcome.output
    assert "there is no someone/none" in uploader(tmp_path / "other", "someone/none", "--code-only").output
    assert "someone/none" not in hub.repositories


def test_push_to_hub_alone(hub, tmp_path):
    """Transformers' own method, by a model that was itself loaded as remote code and by one of this package."""
    make_model(tmp_path / "model", seed=5)
    code = """if True:
        import sys
        from transformers import AutoModelForCausalLM, AutoTokenizer
        folder, package = sys.argv[1:]
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.")
        model.push_to_hub("someone/remote", max_shard_size="5KB")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        tokenizer.push_to_hub("someone/remote")
        sys.path.insert(0, package)
        from modeling_t6 import T6ForCausalLM
        T6ForCausalLM.from_pretrained(folder).push_to_hub("someone/package", private=True)
        tokenizer.push_to_hub("someone/package")"""
    env = environment(hub, tmp_path / "home", HF_TOKEN="hf_someone")
    outcome = run(code, str(tmp_path / "model"), str(ROOT), env=env, cwd=tmp_path)
    assert outcome.code == 0, outcome.output
    assert len([name for name in hub.repositories["someone/remote"].files() if name.endswith(".safetensors")]) > 1
    assert hub.repositories["someone/package"].private
    found = pull(hub, tmp_path, "someone/remote@main", "someone/package@main", HF_TOKEN="hf_someone")
    expected = expected_logits(tmp_path / "model")
    assert len(found) == 2 and all(torch.equal(logits, expected) for logits in found.values())


@pytest.mark.once
def test_lm_eval(hub, uploader, tmp_path):
    """lm-eval's hf model at a commit; its scores by another way, and then in the card."""
    make_model(tmp_path / "model", seed=4)
    assert uploader(tmp_path / "model", "someone/t6").code == 0
    commit = hub.repositories["someone/t6"].refs["refs/heads/main"]
    documents = [{"text": text, "answer": answer} for text, answer in
                 (("To be, or", " not to be"), ("ROMEO:", " what"), ("the", " king"), ("my lord,", " the queen"))]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(document) for document in documents))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "lines.yaml").write_text(f"""
task: lines
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
""")
    # Its command line, but for its own thousands of tasks, whose index takes longer than all else; with them: `test_score.py`.
    code = """if True:
        import functools
        from lm_eval import tasks
        tasks.TaskManager.__init__ = functools.partialmethod(tasks.TaskManager.__init__, include_defaults=False)
        from lm_eval.__main__ import cli_evaluate
        cli_evaluate()"""
    command = ["--model", "hf", "--device", "cpu", "--batch_size", "2"]
    command += ["--model_args", f"pretrained=someone/t6,revision={commit},trust_remote_code=True,dtype=float32"]
    command += ["--tasks", "lines", "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    outcome = run(code, *command, env=environment(hub, tmp_path / "home"), cwd=tmp_path)
    assert outcome.code == 0, outcome.output
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["lines"]

    tokenizer, model = AutoTokenizer.from_pretrained(SHIPPED), AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    total = 0.0
    for document in documents:
        start = len(tokenizer(document["text"]).input_ids)
        ids = torch.tensor([tokenizer(document["text"] + document["answer"]).input_ids])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        total += scores[start - 1 :].sum().item()
    # Sums of float32 over padded batches against single rows.
    assert found["perplexity,none"] == pytest.approx(torch.tensor(-total / 4).exp().item(), rel=1e-4)

    assert uploader(tmp_path / "model", "someone/t6", "--eval-results", results).code == 0
    card = hub.repositories["someone/t6"].files()["README.md"].decode()
    assert "model-index:" in card and f"| lines 0-shot | perplexity | {found['perplexity,none']:.4f} |" in card
