"""The diagnosis: what each ablation changes, twins with norm and gate, Muon, and that runs are comparable and go on."""

import json
from pathlib import Path

import pytest
import token_data
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import ablations
import captured
import diagnose
import muon
import twins
from diagnosis import attention, report
from language_modeling import load_tokenizer
from modeling_t6 import factors_t6, heads_t6


TINY = {
    "hidden_size": 64, "num_layers": 2, "head_dim": 16, "block_length": 32, "sequences_per_step": 2, "max_steps": 3,
    "warmup_steps": 1, "eval_steps": 2, "measure_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return token_data.write_tokens(tmp_path_factory.mktemp("text"), 20, 150)


@pytest.fixture(scope="module")
def configurations(data) -> ablations.Configurations:
    return ablations.Configurations(TINY, load_tokenizer(data))


def new_model(configurations: ablations.Configurations, ablation: ablations.Ablation):
    torch.manual_seed(0)
    return ablations.make_model(ablation, configurations.of(ablation), "sdpa")


def test_parts(configurations):
    named = ablations.ablations()
    found = {}
    for name in ("TPA", "TPA-KVonly, gate", "MHA, QK norm, gate", "MLA"):
        model = new_model(configurations, named[name])
        found[name] = {ablations.part_of(parameter) for parameter, _ in model.named_parameters()}
    common = {"o", "mlp", "norm", "embedding"}
    assert found["TPA"] == common | set(ablations.FACTORS)
    assert found["TPA-KVonly, gate"] == common | {"q", "a_k", "b_k", "a_v", "b_v", "gate"}
    assert found["MHA, QK norm, gate"] == common | {"q", "k", "v", "gate"}
    assert found["MLA"] == common | {"a_q", "b_q", "k"}
    with pytest.raises(ValueError, match="model.wte.weight is of no part"):
        ablations.part_of("model.wte.weight")


def test_equal_parameters():
    """At the proxy's own size, gates of twins included."""
    settings = diagnose.SETTINGS
    configurations = ablations.Configurations(
        settings, load_tokenizer(Path(__file__).parents[2] / "examples" / "t6-tiny-shakespeare")
    )
    named = ablations.ablations()
    for name in ("GQA, gate", "TPA, gate", "TPA, 4 to a KV head", "TPA-KVonly, rank 4, 4 to a KV head"):
        ablation = named[name]
        config = configurations.of(ablation)
        model = ablations.make_model(ablation, config, "sdpa")
        embedding = model.get_input_embeddings().weight.numel()
        target = configurations.target - embedding
        assert model.num_parameters() - embedding == pytest.approx(target, rel=0.03), name
        if ablation.groups > 1:
            assert config.num_attention_heads == ablation.groups * config.num_key_value_heads
    assert configurations.of(named["TPA, heads of MHA"]).num_attention_heads == 8


def test_first_weights(configurations):
    torch.manual_seed(0)
    inputs = torch.randn(400, TINY["hidden_size"])
    inputs = inputs / inputs.square().mean(-1, keepdim=True).sqrt()
    llama = new_model(configurations, ablations.Ablation("MHA")).model.layers[0].self_attn
    model = new_model(configurations, ablations.Ablation("TPA", prepare=ablations.heads_as_llama()))
    layer = model.model.layers[1].self_attn
    for name in "qkv":
        a, b = (getattr(layer, f"{name}_{factor}_proj") for factor in "ab")
        rank = getattr(layer, f"{name}_rank")
        heads = a(inputs).unflatten(-1, (-1, rank)) @ b(inputs).unflatten(-1, (rank, -1)) / rank
        expected = getattr(llama, f"{name}_proj")(inputs).std().item()
        assert heads.std().item() == pytest.approx(expected, rel=0.2)
    named = ablations.ablations()
    model = new_model(configurations, named["TPA, A starts constant, QKV as Llama's"])
    layer = model.model.layers[1].self_attn
    a = layer.k_a_proj(inputs).unflatten(-1, (-1, 2))
    assert a.equal(a[:1].expand_as(a)) and a.std().item() == pytest.approx(1.0, rel=0.5)  # of few numbers
    other = new_model(configurations, ablations.Ablation("TPA", ablations.BIASES, prepare=ablations.heads_as_llama()))
    assert layer.k_b_proj.weight.equal(other.model.layers[1].self_attn.k_b_proj.weight)
    model = new_model(configurations, ablations.Ablation("MHA", prepare=ablations.outputs_as_llama))
    assert model.model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> torch.Tensor:
    ids = torch.arange(2, 42).view(2, 20)
    ablations.set_rates(optimizer, 0.5)
    for _ in range(steps):
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
    return loss.detach()


def test_without_scaling(configurations, monkeypatch):
    """Rates, decays and first weights of B in place of 1/R: the same losses as a T6 that does not divide by R."""
    scaled = ablations.ablations()["TPA, no 1/R"]
    model = new_model(configurations, scaled)
    loss = train(model, ablations.make_optimizer(scaled, model, 1e-2, 0.1))
    other = new_model(configurations, ablations.Ablation("TPA"))
    assert not loss.isclose(
        train(other, ablations.make_optimizer(ablations.Ablation("TPA"), other, 1e-2, 0.1)), rtol=1e-3
    )

    undivided = new_model(configurations, ablations.Ablation("TPA"))
    monkeypatch.setattr(heads_t6, "form_heads", lambda a, b: factors_t6.form_heads(a, b) * a.shape[-2])
    optimizers = ablations.make_optimizer(ablations.Ablation("TPA"), undivided, 1e-2, 0.1)
    assert loss.isclose(train(undivided, optimizers), rtol=1e-4)


def test_rates_and_decays(configurations):
    ablation = ablations.Ablation("TPA", rates={"a_q": 2.0}, decays={"b_v": 0.0}, optimizer="muon of blocks")
    model = new_model(configurations, ablation)
    optimizer = ablations.make_optimizer(ablation, model, 1e-3, 0.1)
    ablations.set_rates(optimizer, 0.5)
    seen = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen[names.pop(id(parameter))] = group["matrices"], group["lr"], group["weight_decay"]
    assert not names
    layer = "model.layers.1.self_attn"
    assert seen[f"{layer}.q_a_proj.weight"] == (6, 1e-3, 0.1)
    assert seen[f"{layer}.v_b_proj.weight"] == (2, 5e-4, 0.0)
    assert seen["model.layers.0.mlp.up_proj.weight"] == (1, 5e-4, 0.1)
    assert seen["model.embed_tokens.weight"] == (0, 5e-4, 0.1)
    assert seen["model.norm.weight"] == (0, 5e-4, 0.0)


def test_schedule():
    rates = [ablations.schedule(step, 4, 12) for step in range(12)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert ablations.schedule(12, 4, 12) == pytest.approx(0.1)


# Muon


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24)], ids=["wide", "tall"])
def test_orthogonal(shape):
    """Of the singular value decomposition the vectors stay, and the values come near to 1."""
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ muon.orthogonal(matrices) @ v.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < diagonal.min() and diagonal.max() < 1.3
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-3


@pytest.mark.parametrize("interleaved", [True, False])
def test_muon_of_blocks(interleaved):
    """A step of a parameter that holds three matrices is a step of each of them alone."""
    torch.manual_seed(0)

    def blocks_of(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.unflatten(0, (-1, 3)).unbind(1) if interleaved else x.chunk(3)

    whole = nn.Parameter(torch.randn(12, 8))
    blocks = [nn.Parameter(block.clone()) for block in blocks_of(whole.detach())]
    one = muon.Muon([{"params": [whole], "matrices": 3, "interleaved": interleaved}], lr=0.1, weight_decay=0.5)
    other = muon.Muon([{"params": blocks, "matrices": 1}], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        whole.grad = torch.randn(12, 8)
        for block, gradient in zip(blocks, blocks_of(whole.grad)):
            block.grad = gradient.clone()
        before = whole.detach().clone()
        one.step()
        other.step()
        torch.testing.assert_close(list(blocks_of(whole.detach())), [block.detach() for block in blocks])
        moved = whole.detach() - 0.95 * before
        assert moved.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.3)  # as AdamW's would


def test_muon_saves_and_loads(tmp_path):
    """With AdamW's of the other parameters: a run that goes on takes the same steps."""
    torch.manual_seed(0)
    gradients = [(torch.randn(6, 4), torch.randn(5)) for _ in range(4)]

    def new() -> tuple[list[nn.Parameter], muon.Muon]:
        parameters = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(5))]
        return parameters, muon.Muon([{"params": parameters[:1], "matrices": 1}, {"params": parameters[1:]}], lr=0.1)

    def take(parameters: list[nn.Parameter], optimizer: muon.Muon, chosen: list) -> None:
        for of_step in chosen:
            for parameter, gradient in zip(parameters, of_step):
                parameter.grad = gradient.clone()
            optimizer.step()

    parameters, optimizer = new()
    take(parameters, optimizer, gradients)
    halfway, first = new()
    take(halfway, first, gradients[:2])
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    _, second = new()
    second.param_groups[0]["params"], second.param_groups[1]["params"] = halfway[:1], halfway[1:]
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    take(halfway, second, gradients[2:])
    assert all(one.equal(other) for one, other in zip(parameters, halfway))
    adamw = nn.Parameter(torch.ones(5))
    plain = torch.optim.AdamW([adamw], lr=0.1)
    for _, gradient in gradients:
        adamw.grad = gradient.clone()
        plain.step()
    assert adamw.equal(parameters[1])


# Twins


@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
def test_normed_twin_is_qwen3(configurations, bias):
    ablation = ablations.Ablation("MHA", {"qk_norm": True, "attention_bias": bias})
    model = new_model(configurations, ablation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    fields = {
        name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "architectures")
    }
    qwen = Qwen3ForCausalLM(Qwen3Config(**fields | {"attention_bias": bias})).eval()
    weights = {}
    for name, value in model.state_dict().items():
        weights[name.replace("q_proj.norm", "q_norm").replace("k_proj.norm", "k_norm")] = value
    missing, unexpected = qwen.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("o_proj.bias") for name in missing)
    with torch.no_grad():
        for layer in qwen.model.layers if bias else ():
            layer.self_attn.o_proj.bias.zero_()
    ids = torch.randint(280, (2, 20))
    torch.testing.assert_close(model(ids).logits, qwen(ids).logits, rtol=1e-4, atol=1e-4)


def test_gated_twin(configurations):
    """The heads' outputs, times the sigmoid of what the layer's input is projected to."""
    model = new_model(configurations, ablations.Ablation("MHA"))
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight.normal_()
    seen = {}
    attention.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
    ids = torch.arange(2, 22)[None]
    model(ids)
    twins.add_extras(model, output_gate=True)
    gate = attention.o_proj.gate
    expected = (seen["heads"] * torch.sigmoid(seen["hidden_states"] @ gate.weight.T)) @ attention.o_proj.weight.T
    outputs = []
    attention.register_forward_hook(lambda _, args, output: outputs.append(output[0]))
    model(ids)
    torch.testing.assert_close(outputs[0], expected)


# Runs


def test_same_batches():
    settings = TINY | {"max_steps": 5, "sequences_per_step": 4, "block_length": 10}
    starts = captured.batch_starts(95, settings, 3)
    assert starts.shape == (5, 4) and starts.equal(captured.batch_starts(95, settings, 3))
    assert starts.min() >= 0 and starts.max() + 10 <= 95
    first_pass = starts.flatten()[:8]
    assert len(set((first_pass % 10).tolist())) == 1 and len(set(first_pass.tolist())) == 8


def test_measured():
    """Of a model that attends to the token before, and of one that attends to what it copies."""
    length, dim = 2 * attention.COPIED, 2 * attention.COPIED
    value = torch.randn(1, 1, length, dim)
    for distance, field in ((1, "to_previous"), (attention.COPIED - 1, "to_copied")):
        key = torch.eye(length)[None, None]
        query = torch.roll(key, -distance, -1) * 1e4  # row i is that of key i - distance
        numbers = attention.MeasuredAttention.look(query, key, value, 1.0)
        assert numbers[field] > 0.95
        assert numbers["k_directions"] == pytest.approx(length, rel=0.01)
    uniform = attention.MeasuredAttention.look(
        torch.zeros(1, 1, 4, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8), 1.0
    )
    expected = sum(torch.tensor(n).float().log().item() for n in (1, 2, 3, 4)) / 4
    assert uniform["entropy"] == pytest.approx(expected, abs=1e-4)


def test_runs_go_on(data, tmp_path, capsys, monkeypatch, threads):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    options = ["run", "--data", str(data), "--results", str(tmp_path / "r.json"), "--cpu", "--seeds", "0", *words]
    monkeypatch.setattr("diagnosis.attention.COPIED", 16)
    monkeypatch.setattr("diagnosis.training.COPIED", 16)
    diagnose.main([*options, "--variants", "MHA", "TPA, QK norm of heads@0.004"])
    first = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert list(first) == ["MHA lr 0.002 seed 0", "TPA, QK norm of heads lr 0.004 seed 0"]
    run = first["TPA, QK norm of heads lr 0.004 seed 0"]
    assert [entry["step"] for entry in run["curve"]] == [0, 2, 3]
    assert [entry["step"] for entry in run["looks"]] == [0, 2, 3] and len(run["looks"][0]["entropy"]) == 2
    changes = {(entry["step"], entry["of"]): entry for entry in run["norms"]}
    assert changes[0, "update"]["o"] > 0 and changes[2, "gradient"]["a_k"] > 0
    assert run["curve"][-1]["loss"] < run["curve"][0]["loss"]

    capsys.readouterr()
    diagnose.main([*options, "--variants", "MHA", "TPA, Muon", "TPA, Muon@0.002"])
    assert capsys.readouterr().out.count(" ms a step\n") == 1
    results = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert results["MHA lr 0.002 seed 0"] == first["MHA lr 0.002 seed 0"] and len(results) == 3
    diagnose.main([*options, "--variants", "GQA", "--minutes", "0"])
    assert "1 of the runs known to be needed are left" in capsys.readouterr().out
    diagnose.main(["report", "--results", str(tmp_path / "r.json")])
    assert "| TPA, Muon | 0.002 |" in capsys.readouterr().out
    for words, message in (
        (["--variants", "GPA"], "there is no 'GPA'; there are MHA; MQA"),
        (["--variants", "MHA@fast"], "--variants MHA@fast: expected a number as its rate"),
        (["--block-length", "100000"], "has train_tokens=.*: expected at least 200000, or a smaller --block-length"),
        (["--head-dim", "48"], "--hidden-size 64: expected a multiple of --head-dim 48"),
        (["--max-steps", "4"], "has max_steps=3, this command 4"),
    ):
        with pytest.raises(SystemExit, match=message):
            diagnose.main([*options, *words])


def test_fall():
    run = {"curve": [{"step": 0, "loss": 8.0}, {"step": 50, "loss": 6.0}, {"step": 100, "loss": 2.0}]}
    assert report.fall(run, 4.0) == 75
    assert report.fall(run, 1.0) == float("inf")
