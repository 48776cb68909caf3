# Copyright 2026 The T6 for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Launches of Triton kernels with little host overhead: the result of Triton's look at the arguments is cached"""

import functools
from collections.abc import Sequence
from operator import itemgetter

import torch


try:
    import triton
    from triton import knobs
    from triton.runtime import driver
except ImportError:
    pass  # there are no kernels
else:
    # Versions of Triton whose `JITFunction.run` launches a compiled kernel as it is done here. Others launch every time themselves.
    CAN_KEEP = (3, 5) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)


class KeptKernel:
    """
    A kernel and its constants, for many launches. At each launch Triton inspects every argument, including constants, to find
    the compiled variant of the kernel, which takes the host longer than a short kernel takes the GPU. Here it does so once for
    each kind of arguments, and the compiled kernel is launched directly from then on.

    Triton compiles another variant for another dtype of a tensor, for a tensor that does not start on 16 bytes, for integers
    beyond 32 bits, and for 1 and multiples of 16 among the integers that the kernel does not list in `do_not_specialize`. Here
    each value of those counts as a kind, so there should be few. No number may be below -2**31, and each must always be an
    integer, or always a float.

    Args:
        kernel: of `triton.jit`. Parameters whose names end in `_ptr` are tensors, none of them `None`.
        constants: all `tl.constexpr` parameters by name, and options of the launch such as `num_warps`.
    """

    def __init__(self, kernel, **constants):
        self.kernel, self.constants = kernel, constants
        names = kernel.arg_names
        self.trailing = tuple(constants[name] for name in names if name in constants)
        tensors = [i for i, name in enumerate(names) if name.endswith("_ptr")]
        numbers = [i for i, name in enumerate(names) if name not in constants and not name.endswith("_ptr")]
        # Where the tensors, and then the numbers, go among the arguments.
        self.order = None
        if [*tensors, *numbers] != sorted([*tensors, *numbers]):
            self.order = itemgetter(*sorted(range(len(tensors) + len(numbers)), key=[*tensors, *numbers].__getitem__))
        params = getattr(kernel, "params", None)  # not in the interpreter, which compiles nothing
        specialized = [n for n, i in enumerate(numbers) if params is not None and not params[i].do_not_specialize]
        self.specialized = itemgetter(*specialized) if specialized else None
        self.compiled = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[torch.Tensor],
        numbers: Sequence[int | float],
        offsets: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            tensors: all on one device, in the order of the kernel's parameters.
            numbers: in the order of the kernel's parameters.
            offsets: for each tensor, the bytes from its start to the pointer that the kernel is given.
        """
        devices = [x.get_device() for x in tensors]
        device = devices[0]
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(grid, tensors, numbers, offsets)
        pointers = [x.data_ptr() for x in tensors]
        if offsets is not None:
            pointers = [p + n for p, n in zip(pointers, offsets)]
        specialized = None if self.specialized is None else self.specialized(numbers)
        wide = None if max(numbers) < 2**31 else tuple([n >= 2**31 for n in numbers])
        low = 0
        for p in pointers:
            low |= p
        aligned = None if low % 16 == 0 else tuple([p % 16 == 0 for p in pointers])
        key = (specialized, wide, aligned, *devices, *[x.dtype for x in tensors])
        compiled = self.compiled.get(key)
        if compiled is None or _is_watched(self.kernel):
            self._launch_by_triton(key, grid, tensors, numbers, offsets)
            return
        arguments = self._in_order([*pointers, *numbers])
        stream = driver.active.get_current_stream(device)
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *self.trailing
        )  # as in `JITFunction.run`

    def _launch_by_triton(self, key, grid, tensors, numbers, offsets) -> None:
        if offsets is not None:
            tensors = [
                x.as_strided((1,), (1,), x.storage_offset() + n // x.itemsize) if n else x
                for x, n in zip(tensors, offsets)
            ]
        compiled = self.kernel[grid](*self._in_order([*tensors, *numbers]), **self.constants)
        # The interpreter compiles nothing, and a profiler may have instrumented the kernel.
        if compiled is not None and CAN_KEEP and not _is_watched(self.kernel):
            self.compiled[key] = compiled

    def _in_order(self, arguments: list) -> Sequence:
        return arguments if self.order is None else self.order(arguments)


def _is_watched(kernel) -> bool:
    """Whether the kernel's launches have hooks, such as those of Triton's profiler."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook  # chains of hooks, hooks, or `None`
    return bool(kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@functools.cache
def keep(kernel, **constants) -> KeptKernel:
    """The [`KeptKernel`] for this kernel and these constants, created once."""
    return KeptKernel(kernel, **constants)
