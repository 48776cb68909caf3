"""A kernel that is started as it was compiled is the one that Triton would start, with the same arguments."""

import contextlib
import itertools
import random

import pytest
import torch

from modeling_t6 import launch_t6
from modeling_t6.launch_t6 import KeptKernel, keep


jit = pytest.importorskip("triton.runtime.jit", reason="Triton is for Linux")

pytestmark = pytest.mark.once


class Compiled:
    """What Triton compiles for a kind of arguments; notes its launches."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launches = []

    def launch_metadata(self, grid, stream, *args) -> None:
        return None

    def run(self, *args) -> None:
        where, arguments = args[:6], args[9:]  # between them hooks, and what these are told
        self.launches.append((where, [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]))


class Driver:
    """Of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 5

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def compiler(monkeypatch) -> None:
    monkeypatch.setattr(jit.driver, "_active", Driver())
    monkeypatch.setattr(
        jit.JITFunction,
        "_do_compile",
        lambda self, key, *args: self.device_caches[0][0].setdefault(key, Compiled()),
    )


def make_kernel():
    """With tensors and numbers in turn, at some of which Triton does not look."""
    import triton.language as tl

    def kernel(first_ptr, plain, listed, scale, second_ptr, last, FIRST: tl.constexpr, SECOND: tl.constexpr):
        pass

    return jit.JITFunction(kernel, do_not_specialize=["listed", "last"])


CONSTANTS = {"SECOND": (2, "two"), "FIRST": 1, "num_warps": 2}
DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def random_arguments(choose: random.Random) -> tuple[list[torch.Tensor], list[int | float]]:
    tensors = [torch.zeros(64, dtype=choose.choice(DTYPES))[choose.choice((0, 0, 1, 8)) :] for _ in range(2)]
    plain, listed, last = (choose.choice((1, 7, 16, 48, 2**31 - 1, 2**31, 2**40)) for _ in range(3))
    return tensors, [plain, listed, choose.choice((0.5, 1.0)), last]


@pytest.fixture(params=[0, 3], ids=["as they are", "parts of one"])
def offset(request) -> int:
    return request.param


def test_starts_what_triton_would(offset):
    kernel, choose = make_kernel(), random.Random(0)
    kept = KeptKernel(kernel, **CONSTANTS)
    for _ in range(400):
        tensors, numbers = random_arguments(choose)
        parts = [x[offset:] for x in tensors]
        plain, listed, scale, last = numbers
        compiled = kernel[(3, 2, 1)](parts[0], plain, listed, scale, parts[1], last, **CONSTANTS)
        expected = compiled.launches.pop()
        kept((3, 2, 1), tensors, numbers, [offset * x.itemsize for x in tensors] if offset else None)
        assert compiled.launches == [expected]
        compiled.launches.clear()
    assert 10 < len(kept.compiled) < 400  # each kind of arguments by Triton once


def test_does_not_ask_triton_again(monkeypatch):
    kernel, (tensors, numbers) = make_kernel(), random_arguments(random.Random(1))
    kept = KeptKernel(kernel, **CONSTANTS)
    kept((1, 1, 1), tensors, numbers)
    (compiled,) = kept.compiled.values()
    monkeypatch.setattr(jit.JITFunction, "run", None)
    others = [x.clone() for x in tensors]
    kept((9, 1, 1), others, numbers)
    where, arguments = compiled.launches[-1]
    assert where == (9, 1, 1, 5, "function", "metadata")
    assert [arguments[0], arguments[4]] == [x.data_ptr() for x in others]


@pytest.mark.parametrize("where", ["launch_enter_hook", "launch_exit_hook", "pre_run_hooks"])
def test_hooks_are_called(where, monkeypatch):
    """Launches that somebody looks at go by Triton, which says what they are."""
    kernel, (tensors, numbers) = make_kernel(), random_arguments(random.Random(2))
    kept = KeptKernel(kernel, **CONSTANTS)
    asked, run = [], jit.JITFunction.run
    monkeypatch.setattr(
        jit.JITFunction, "run", lambda self, *args, **kwargs: asked.append(1) or run(self, *args, **kwargs)
    )

    def hook(*args, **kwargs) -> None:
        pass

    for _ in range(2):
        kept((1, 1, 1), tensors, numbers)
    assert len(asked) == 1
    with contextlib.ExitStack() as stack:
        if where == "pre_run_hooks":
            kernel.add_pre_run_hook(hook)
        else:
            hooks = getattr(jit.knobs.runtime, where)
            hooks.add(hook)
            stack.callback(hooks.remove, hook)
        kept((1, 1, 1), tensors, numbers)
    assert len(asked) == 2


def test_what_a_profiler_had_compiled_is_not_kept():
    """Proton's instrumentation, while it is on, has Triton compile kernels that write into its buffers."""
    kernel, (tensors, numbers) = make_kernel(), random_arguments(random.Random(3))
    kept, hooks = KeptKernel(kernel, **CONSTANTS), jit.knobs.runtime.launch_enter_hook

    def hook(metadata) -> None:
        pass

    with jit.knobs.compilation.scope():
        jit.knobs.compilation.instrumentation_mode = "proton"
        hooks.add(hook)
        kept((1, 1, 1), tensors, numbers)
        hooks.remove(hook)
    (instrumented,) = kernel.device_caches[0][0].values()
    kept((1, 1, 1), tensors, numbers)
    _, plain = kernel.device_caches[0][0].values()
    kept((1, 1, 1), tensors, numbers)
    assert len(instrumented.launches) == 1 and len(plain.launches) == 2


def test_another_triton_starts_all_kernels_itself(monkeypatch):
    """One whose compiled kernels may be started in another way."""
    kernel, (tensors, numbers) = make_kernel(), random_arguments(random.Random(4))
    monkeypatch.setattr(launch_t6, "CAN_KEEP", False)
    kept, asked, run = KeptKernel(kernel, **CONSTANTS), [], jit.JITFunction.run
    monkeypatch.setattr(
        jit.JITFunction, "run", lambda self, *args, **kwargs: asked.append(1) or run(self, *args, **kwargs)
    )
    for n in (1, 2):
        kept((1, 1, 1), tensors, numbers)
        assert len(asked) == n


def test_one_for_each_set_of_constants():
    kernel = make_kernel()
    sets = [{"FIRST": first, "SECOND": second} for first, second in itertools.product((1, 2), ((2,), (3,)))]
    assert len({id(keep(kernel, **constants)) for constants in sets * 2}) == len(sets)
