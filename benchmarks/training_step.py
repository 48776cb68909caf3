"""
A training step and a prefill of t6-medium on a GPU: heads kept for the backward pass, and formed again from their factors.

    python benchmarks/training_step.py --output training.json     # measure
    python benchmarks/training_step.py --plot training.json training.png

Forward and backward of the whole model, 8 sequences of 2048 tokens in bfloat16, eager and with each layer compiled; the
same of one attention layer, from hidden states to its output, and what it keeps from its forward to its backward pass;
and its forward alone. `materialised` keeps Q, K and V, `rebuilt` their factors. Heads are matrix products of factors,
sums of outer products, which torch.compile fuses, or formed `at once` by a kernel out of the product of all factors. The factors
of a layer come from one product, or from projections `one by one`. `materialised, compiled` is the way of the research code:
ratios are to it. The last line says whether the default way under torch.compile, `rebuilt, compiled, at once`, is no slower
and keeps at least 20% less. What fails prints its error; the exit status is 1 if anything failed. `--profile` lists the
kernels that one attention layer spends its time in.

    python benchmarks/training_step.py --device cpu --layers 2 --batch 1 --length 128 --prefill 1x256    # does it run?
"""

import argparse

from options import add_output, batch_and_tokens, describe, draw, save


def parse_args() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--config", default="configuration/t6-medium")
    parser.add_argument("--qk-norm", action="store_true", help="the norm of queries' and keys' formed heads")
    parser.add_argument("--layers", type=int, help="of the model, instead of those in its configuration")
    parser.add_argument("--attention", default="sdpa", help="an attention implementation of Transformers")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--prefill", type=batch_and_tokens, nargs="*", default=[(1, 32768), (8, 2048)], metavar="BxN")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="list kernels of the baseline, of the default way and of outer products",
    )
    add_output(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # help and mistakes are answered here, before imports that take seconds

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from gpu import machine, release_memory
from timing import median_seconds, synchronize
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_t6 import attention_t6, factor_product_t6, heads_at_once_t6, heads_t6


BASELINE = "materialised, compiled"
ONE_BY_ONE = "one by one: "
WAYS = {  # heads are rebuilt; they are matrix products, sums of outer products, or formed at once; compiled
    BASELINE: (False, "products", True),
    "materialised, eager": (False, "products", False),
    "materialised, eager, at once": (False, "at once", False),
    "rebuilt, eager, at once": (True, "at once", False),
    "materialised, compiled, outer products": (False, "outer", True),
    "materialised, compiled, at once": (False, "at once", True),
    "rebuilt, compiled, outer products": (True, "outer", True),
    "rebuilt, compiled, at once": (True, "at once", True),
    ONE_BY_ONE + "rebuilt, compiled, outer products": (True, "outer", True),
}
DEFAULT = "rebuilt, compiled, at once"
# Of the default to the baseline: no slower, to the half percent by which medians of one way differ; 20% less kept.
MAX_RATIOS = {"step_seconds": 1.005, "attention_kept_bytes": 0.8}
MAX_OUTER_PRODUCTS = heads_t6.MAX_OUTER_PRODUCTS or 8
# bfloat16 has 2.4 digits: gradients of two ways, each some roundings from exact, differ by 1% or so of their norm.
MAX_DIFFERENCE = 3e-2


ARE_PLAIN = factor_product_t6._are_plain


def choose(name: str) -> None:
    rebuilt, formed, _ = WAYS[name]
    one_by_one = name.startswith(ONE_BY_ONE)
    factor_product_t6._are_plain = (lambda projections: False) if one_by_one else ARE_PLAIN
    attention_t6.RECOMPUTE_HEADS_COMPILED = attention_t6.RECOMPUTE_HEADS_EAGER = rebuilt
    heads_at_once_t6.AT_ONCE = formed == "at once"
    heads_t6.MAX_OUTER_PRODUCTS = 0 if formed == "products" else MAX_OUTER_PRODUCTS
    torch._dynamo.reset()


def seconds_and_peak(call, device: str, repeats: int) -> tuple[float, int | None]:
    """Median seconds of a call, and the most bytes it had allocated beyond those before it."""
    for _ in range(3):
        call()
    synchronize(device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds({"": call}, repeats, device)[""]
    return seconds, torch.cuda.max_memory_allocated() - before if device == "cuda" else None


def make_model(config, device: str):
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for layer in model.model.layers:  # which are zero at initialisation
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.normal_(projection.weight, std=0.02)
    return model.train()


def make_attention(config, device: str, batch: int, length: int, compiled: bool):
    """One attention layer, and hidden states and positions for it."""
    config = copy.deepcopy(config)  # with its attention function, which is no field
    config.num_hidden_layers = 1
    model = make_model(config, device)
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(batch, length, config.hidden_size, device=device, dtype=torch.bfloat16)
    positions = model.model.rotary_emb(hidden, torch.arange(length, device=device)[None])
    return torch.compile(attention, dynamic=False) if compiled else attention, hidden, positions


def make_step(config, device: str, batch: int, length: int, compiled: bool, with_loss: bool = False) -> Callable:
    """A training step of a model, its layers `compiled` or not; without the head unless it is `with_loss`."""
    model = make_model(config, device)
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    ids = torch.randint(0, config.vocab_size, (batch, length), device=device)

    def step():
        model.zero_grad(set_to_none=True)
        if with_loss:
            loss = model(ids, labels=ids, use_cache=False).loss
        else:  # the head and the loss are the same for every model
            loss = model.model(ids, use_cache=False).last_hidden_state.float().square().mean()
        loss.backward()

    return step


def measure_step(config, device: str, batch: int, length: int, compiled: bool) -> dict:
    step = make_step(config, device, batch, length, compiled)
    return dict(zip(("step_seconds", "step_peak_bytes"), seconds_and_peak(step, device, 6)))


def measure_attention(config, device: str, batch: int, length: int, compiled: bool) -> tuple[dict, torch.Tensor]:
    """Times and bytes, and the gradient of the hidden states."""
    attention, hidden, positions = make_attention(config, device, batch, length, compiled)
    hidden.requires_grad_()
    probe = torch.randn_like(hidden)

    def step():
        attention.zero_grad(set_to_none=True)
        hidden.grad = None
        attention(hidden, positions)[0].backward(probe)

    row = dict(zip(("attention_seconds", "attention_peak_bytes"), seconds_and_peak(step, device, 20)))
    gradient = hidden.grad.float().cpu()
    if device == "cuda":
        attention.zero_grad(set_to_none=True)
        hidden.grad = None
        before = torch.cuda.memory_allocated()
        output = attention(hidden, positions)[0]
        row["attention_kept_bytes"] = torch.cuda.memory_allocated() - before - output.nbytes
    return row, gradient


def measure_prefill(config, device: str, batch: int, length: int, compiled: bool) -> float:
    attention, hidden, positions = make_attention(config, device, batch, length, compiled)
    with torch.no_grad():
        return seconds_and_peak(lambda: attention(hidden, positions), device, 20)[0]


def kernels_of(call: Callable, device: str, repeats: int) -> list[tuple[str, float, float]]:
    """Kernels (on a CPU operators) of a call: name, seconds, and how many times; longest first."""
    activity = getattr(torch.profiler.ProfilerActivity, device.upper())
    for _ in range(3):
        call()
    synchronize(device)
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(repeats):
            call()
        synchronize(device)
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    rows = [
        (row.key, getattr(row, attribute) * 1e-6 / repeats, row.count / repeats) for row in profiler.key_averages()
    ]
    return sorted(rows, key=lambda row: -row[1])


def profile_attention(config, device: str, batch: int, length: int, compiled: bool, most: int = 16) -> None:
    """Prints where the time of a forward and backward pass goes, by kernel (on a CPU, by operator)."""
    attention, hidden, positions = make_attention(config, device, batch, length, compiled)
    hidden.requires_grad_()
    probe = torch.randn_like(hidden)
    rows = kernels_of(lambda: attention(hidden, positions)[0].backward(probe), device, 5)
    print(f"  {sum(seconds for _, seconds, _ in rows) * 1e3:8.3f} ms in all")
    for key, seconds, count in rows[:most]:
        print(f"  {seconds * 1e3:8.3f} ms  {count:4.0f} x  {key[:100]}")


def judge(training: dict) -> bool:
    """Prints whether the default way is good enough against the baseline."""
    if not (BASELINE in training and DEFAULT in training):
        print("FAIL: the default way or the one it is compared with did not run")
        return False
    ratios = {key: training[DEFAULT][key] / training[BASELINE][key] for key in MAX_RATIOS}
    passed = all(ratios[key] <= most for key, most in MAX_RATIOS.items())
    step, kept = ratios.values()
    print(
        f"{'PASS' if passed else 'FAIL'}: {DEFAULT}, to {BASELINE}: a step takes {step:.3f}x (no slower: at most "
        f"{MAX_RATIOS['step_seconds']}x), an attention layer keeps {kept:.3f}x (at most "
        f"{MAX_RATIOS['attention_kept_bytes']}x)"
    )
    return passed


def line(name: str, row: dict, baseline: dict) -> str:
    """Figures, and ratios to the baseline."""
    columns = []
    for key, label, unit, scale in (
        ("step_seconds", "step", "ms", 1e3),
        ("step_peak_bytes", "peak", "GiB", 2**-30),
        ("attention_seconds", "attention", "ms", 1e3),
        ("attention_kept_bytes", "keeps", "MiB", 2**-20),
        ("attention_peak_bytes", "peak", "MiB", 2**-20),
        ("prefill_seconds", "forward", "ms", 1e3),
    ):
        if row.get(key) is not None:
            ratio = f" ({row[key] / baseline[key]:4.2f}x)" if key in baseline else ""
            columns.append(f"{label} {row[key] * scale:8.2f} {unit}{ratio}")
    return f"{name:40} {'; '.join(columns)}"


@contextlib.contextmanager
def reported(name: str, failures: list[str]) -> Iterator[None]:
    """What fails within prints its error, and its name is added to `failures`."""
    try:
        yield
    except Exception as error:
        failures.append(name)
        print(f"{name:40} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
    torch._dynamo.reset()
    release_memory()


def measure(args) -> tuple[dict, bool]:
    config = AutoConfig.from_pretrained(args.config, attn_implementation=args.attention)
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    config.qk_norm = "heads" if args.qk_norm else config.qk_norm
    if args.device == "cuda":
        head = machine()
    else:
        head = f"CPU, torch {torch.__version__}"
    print(f"{head}; {args.config}, {config.num_hidden_layers} layers, {args.attention}, bfloat16")
    print(f"Training, {args.batch} x {args.length} tokens: a step of the model, and one attention layer")
    training, prefill, failures = {}, {}, []
    shape, expected = (args.device, args.batch, args.length), None
    for name, (*_, compiled) in WAYS.items():
        choose(name)
        with reported(name, failures):
            row = measure_step(config, *shape, compiled)
            attention, gradient = measure_attention(config, *shape, compiled)
            expected = gradient if expected is None else expected
            row |= attention | {"difference": ((gradient - expected).norm() / expected.norm()).item()}
            training[name] = row
            print(line(name, row, training.get(BASELINE, {})), flush=True)
            if not row["difference"] <= MAX_DIFFERENCE:
                raise ValueError(f"its gradient differs by {row['difference']:.1%} from that of the first way")
    for batch, length in args.prefill:
        print(f"Prefill, {batch} x {length} tokens: one attention layer")
        rows = prefill[f"{batch}x{length}"] = {}
        for name, (rebuilt, _, compiled) in WAYS.items():
            if rebuilt:
                continue
            choose(name)
            with reported(name, failures):
                seconds = measure_prefill(config, args.device, batch, length, compiled)
                rows[name] = {"prefill_seconds": seconds}
                print(line(name.removeprefix("materialised, "), rows[name], rows.get(BASELINE, {})), flush=True)
    for name in (BASELINE, DEFAULT, "rebuilt, compiled, outer products") if args.profile else ():
        compiled = WAYS[name][-1]
        choose(name)
        print(f"Kernels of one attention layer, forward and backward: {name}")
        with reported(name, failures):
            profile_attention(config, *shape, compiled)
    # The bytes that a layer keeps are not measured elsewhere.
    passed = args.device != "cuda" or judge(training)
    return {"machine": head, "training": training, "prefill": prefill}, passed and not failures


def plot(data: dict, figure) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    names = list(data["training"])[::-1]
    colors = ["tab:orange" if name == BASELINE else "tab:blue" for name in names]
    for axis, key, label, scale in (
        (axes[0], "step_seconds", "training step (ms)", 1e3),
        (axes[1], "attention_kept_bytes", "kept by one attention layer for the backward pass (MiB)", 2**-20),
    ):
        bars = axis.barh(names, [(data["training"][name].get(key) or 0) * scale for name in names], color=colors)
        axis.bar_label(bars, fmt="%.0f", padding=2)
        axis.set_xlabel(label)
        axis.margins(x=0.12)
    figure.suptitle(data["machine"], fontsize=9)


def main() -> None:
    args = parse_args()
    if args.plot:
        return draw(plot, args.plot, (11, 3.6))
    data, passed = measure(args)
    save(data, args.output)
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
