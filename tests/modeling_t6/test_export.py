"""A decoding step with its static cache of factors, through `torch.export` and into a process that knows torch alone."""

import json
import os
import sys

import pytest
import torch

from export import export_decoding_step, main
from modeling_t6.cache_t6 import factor_layouts

from ..processes import run
from ..versions import once_but
from .common import random_ids, random_model, tiny_config
from .test_generation import generate


LENGTH, PROMPT, NEW = 16, 6, 8
VARIANTS = {
    "TPA": {"num_hidden_layers": 2},
    "non-contextual A, KVonly": {"noncontextual_a": True, "q_rank": None},
    "non-contextual B, softmax": {"noncontextual_b": True, "head_factor_act": "softmax"},
    "shared B, third order": {"shared_b": True, "v_rank": 2, "c_factor_dim": 4, "output_gate": True},
    # Decodes beyond its window.
    "sliding, eager": {"sliding_window": 5, "attn_implementation": "eager"},
}

# Decodes two texts one after the other: position 0 starts anew.
CLEAN_PROCESS = """
import json, sys, torch
results = {}
for path, prompts, new in json.loads(sys.argv[1]):
    step = torch.export.load(path).module()
    texts = []
    for tokens in prompts:
        tokens = torch.tensor(tokens)  # [batch, prompt]
        prompt = tokens.shape[1]
        for position in range(prompt + new - 1):
            logits = step(input_ids=tokens[:, position : position + 1], cache_position=torch.tensor([position]))
            if position >= prompt - 1:
                tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        texts.append(tokens.tolist())
    results[path] = texts
print(json.dumps({"results": results, "transformers": "transformers" in sys.modules}))
"""


def model_of(variant: str):
    return random_model(tiny_config(**{"num_hidden_layers": 1} | VARIANTS[variant])).cpu()


@pytest.mark.once
def test_round_trip(tmp_path):
    """Every variant, saved, and decoded token by token in one clean process: the tokens of `generate()`."""
    tasks, expected = [], {}
    for i, variant in enumerate(VARIANTS):
        model, batch = model_of(variant), 1 + i % 2
        prompts = [random_ids(model.config, batch, PROMPT, seed=seed).cpu() for seed in (1, 2)]
        path = str(tmp_path / f"{i}.pt2")
        expected[path] = [generate(model, ids, max_new_tokens=NEW).tolist() for ids in prompts]
        program = export_decoding_step(model, LENGTH, batch_size=batch)
        torch.export.save(program, path)
        tasks.append([path, [ids.tolist() for ids in prompts], NEW])
        # The cache that goes along holds rows of factors.
        buffers = dict(program.named_buffers())
        for layer_idx in range(model.config.num_hidden_layers):
            for name, layout in zip(("key", "value"), factor_layouts(model.config, layer_idx)):
                rows = buffers[f"{name}_cache_{layer_idx}"]
                assert rows.shape == (batch, 1, LENGTH, layout.width)
    result = run(CLEAN_PROCESS, json.dumps(tasks), env=dict(os.environ), cwd=tmp_path)
    assert result.code == 0, result.stderr
    result = json.loads(result.stdout.splitlines()[-1])
    assert result["transformers"] is False
    for variant, path in zip(VARIANTS, expected):
        assert result["results"][path] == expected[path], variant


def test_state_is_buffers():
    """
    What compilers and runtimes of exported programs look at: the step writes its buffers. Tensors that a program took for
    constants, but writes, fail to decompose.
    """
    program = export_decoding_step(model_of("non-contextual A, KVonly"), LENGTH).run_decompositions({})
    names = {"key_cache_0", "value_cache_0", "cumulative_length_0"}
    assert set(program.graph_signature.buffers_to_mutate.values()) == names


def run_main(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    main()


def test_command(tmp_path, monkeypatch, capsys):
    model = model_of("non-contextual A, KVonly")
    model.save_pretrained(tmp_path / "model")
    run_main(monkeypatch, tmp_path / "model", tmp_path / "step.pt2", "--max-cache-len", LENGTH)
    assert f"a cache of {LENGTH} tokens" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"model", "step.pt2"}
    step = torch.export.load(tmp_path / "step.pt2").module()
    ids = random_ids(model.config, 1, 3).cpu()
    logits = [step(input_ids=ids[:, t : t + 1], cache_position=torch.tensor([t])) for t in range(3)]
    with torch.no_grad():
        # Logits of order 1, float32.
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["step.bin"], "OUTPUT must end in .pt2, got step.bin"),
        (["nowhere/step.pt2"], "the folder of OUTPUT does not exist: nowhere"),
        (["step.pt2", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["step.pt2", "--max-cache-len", "0"], "--max-cache-len must be at least 1, got 0"),
    ],
)
def test_command_refuses(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "model", *arguments)
    assert message in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("strict", once_but({"traced": False, "strict": True}.items(), "strict"))
def test_any_length(strict):
    """One program for prompts of all lengths, short ones too."""

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model_of("TPA")

        def forward(self, input_ids):
            return self.model(input_ids, use_cache=False).logits

    module, lengths = Logits(), {"input_ids": {1: torch.export.Dim("length", min=2, max=64)}}
    prompts = [random_ids(module.model.config, 2, length).cpu() for length in (11, 2, 30)]
    step = torch.export.export(module, (prompts[0],), dynamic_shapes=lengths, strict=strict).module()
    for ids in prompts:
        torch.testing.assert_close(step(ids), module(ids), atol=1e-5, rtol=1e-5)
