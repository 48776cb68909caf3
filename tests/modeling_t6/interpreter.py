"""What Triton's interpreter does not do by itself: bfloat16 arithmetic, checks of every address and launch, and some haste."""

import dataclasses

import numpy as np
import torch
from triton.runtime import interpreter


def compute_as_a_gpu(monkeypatch, float8: bool = False) -> None:
    """All that tests of kernels want of it: `float8` if they write such rows."""
    compute_bfloat16(monkeypatch)
    if float8:
        round_float8(monkeypatch)
    check_addresses(monkeypatch)
    check_options(monkeypatch)
    make_haste(monkeypatch)


def make_haste(monkeypatch) -> None:
    """Half of the interpreter's time is for nothing."""
    patch_language_once(monkeypatch)
    leave_out_unused(monkeypatch)
    make_types_once(monkeypatch)
    reduce_by_halves(monkeypatch)


def compute_bfloat16(monkeypatch) -> None:
    """
    The interpreter multiplies and adds the bits of bfloat16 numbers as if they were integers, and cuts digits off: widen
    them first, and round to the nearest number, ties to even, as a GPU does.
    """
    builder = interpreter.InterpreterBuilder
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl
    bfloat16, float32 = interpreter.tl.bfloat16, interpreter.tl.float32

    def widened(operand):
        if operand.dtype.scalar != bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), float32)

    def cast(self, operand, dtype):
        if operand.dtype.scalar != float32 or dtype.scalar != bfloat16:
            return plain_cast(self, operand, dtype)
        bits = np.ascontiguousarray(operand.data).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(operand.data), np.uint16(0x7FC0), rounded), bfloat16)

    def create_dot(self, a, b, *args):
        return plain_dot(self, widened(a), widened(b), *args)

    def elementwise(plain):
        def create(self, a, b):
            result = plain(self, widened(a), widened(b))
            return cast(self, result, bfloat16) if a.dtype.scalar == bfloat16 else result

        return create

    monkeypatch.setattr(builder, "create_dot", create_dot)
    for name in ("create_fmul", "create_fadd"):
        monkeypatch.setattr(builder, name, elementwise(getattr(builder, name)))
    monkeypatch.setattr(builder, "cast_impl", cast)


def round_float8(monkeypatch) -> None:
    """The interpreter rounds numbers just below a power of 2, as float8, to half of it: what float32 becomes on a GPU."""
    builder, language = interpreter.InterpreterBuilder, interpreter.tl
    plain_convert = builder.create_fp_to_fp

    def convert(self, operand, dtype, rounding_mode):
        if operand.dtype.scalar != language.float32 or dtype.scalar != language.float8e4nv:
            return plain_convert(self, operand, dtype, rounding_mode)
        numbers = torch.from_numpy(np.array(operand.data)).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(numbers.view(torch.uint8).numpy(), language.float8e4nv)

    monkeypatch.setattr(builder, "create_fp_to_fp", convert)


def check_addresses(monkeypatch) -> None:
    """
    Every load and store of a launch lies within one of the tensors that it was given, and no number is written twice:
    what memcheck and racecheck of compute-sanitizer look for on a GPU.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, host_arguments = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    allocations, written = [], set()

    def record(self, args_dev, kwargs):
        args, kwargs = host_arguments(self, args_dev, kwargs)
        allocations.clear(), written.clear()
        for tensor in args:
            if hasattr(tensor, "untyped_storage"):
                storage = tensor.untyped_storage()
                allocations.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        return args, kwargs

    def active(ptrs, mask):
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)].astype(np.int64)
        size = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty())).itemsize
        if not addresses.size:
            return addresses
        first, last = addresses.min(), addresses.max() + size
        if any(start <= first and last <= end for start, end in allocations):  # mostly
            return addresses
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, end in allocations:
            inside |= (addresses >= start) & (addresses + size <= end)
        assert inside.all(), f"{(~inside).sum()} of {inside.size} addresses are outside of every tensor"
        return addresses

    def create_masked_load(self, ptrs, mask, *args):
        active(ptrs, mask)
        return load(self, ptrs, mask, *args)

    def create_masked_store(self, ptrs, value, mask, *args):
        addresses = active(ptrs, mask).tolist()
        assert len(set(addresses)) == len(addresses) and written.isdisjoint(addresses), "a number is written twice"
        written.update(addresses)
        return store(self, ptrs, value, mask, *args)

    monkeypatch.setattr(executor, "_init_args_hst", record)
    monkeypatch.setattr(builder, "create_masked_load", create_masked_load)
    monkeypatch.setattr(builder, "create_masked_store", create_masked_store)


def check_options(monkeypatch) -> None:
    """
    Every launch says whether products and sums are one instruction. What kernels compile to else depends on the version of Triton,
    whose default 3.10 changes, and 3.9 warns of it.
    """
    executor = interpreter.GridExecutor
    start = executor.__call__

    def checked(self, *args, **kwargs):
        assert kwargs.get("enable_fp_fusion") is True, f"{self.fn.__name__} is started without `LAUNCH_OPTIONS`"
        return start(self, *args, **kwargs)

    monkeypatch.setattr(executor, "__call__", checked)


def patch_language_once(monkeypatch) -> None:
    """
    For each call of one jitted function by another, the interpreter looks through Triton's language for what it replaces,
    and finds it replaced: a third of its time. Once a launch is enough.
    """
    plain_patch, patched, languages_of = interpreter._patch_lang, set(), {}

    def patch_lang(fn):
        if fn not in languages_of:
            known = interpreter.tl, interpreter.tl.core
            languages_of[fn] = {value.__name__ for value in fn.__globals__.values() if value in known}
        languages = languages_of[fn]
        if languages <= patched:
            return interpreter._LangPatchScope()
        scope = plain_patch(fn)
        restore = scope.restore
        # A launch restores what it replaced; a call within it leaves that to the launch.
        scope.restore = lambda: (patched.clear(), restore())
        patched.update(languages)
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)


def leave_out_unused(monkeypatch) -> None:
    """
    For each sum and product of integers the interpreter computes whether it overflows, in eight more operations, and asserts that
    only with `debug`, which is off. And for each number it makes a table of all dtypes.
    """
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    plain, dtypes = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = plain(dtype)
        return dtypes[name]

    monkeypatch.setattr(interpreter, "_get_np_dtype", get_np_dtype)


def make_types_once(monkeypatch) -> None:
    """
    Each result of each operation has a type, whose shape the interpreter wraps, checks and writes out anew, and wraps once more for the
    tensor: half of its time. There are few types.
    """
    language, semantic = interpreter.tl.core, type(interpreter.interpreter_semantic)
    plain_block, plain_tensor = language.block_type.__init__, language.tensor.__init__
    plain_broadcast, plain_computed = semantic.broadcast_impl_value, semantic.computation_type_impl
    plain_equal = language.dtype.__eq__
    blocks, shapes, tensors, computed = {}, {}, {}, {}

    def init_block(self, element_ty, shape):
        key = id(element_ty), *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            plain_block(self, element_ty, shape)
            self.shape = shapes.setdefault(key[1:], self.shape)  # so that equal shapes are one
            blocks[key] = vars(self).copy()  # keeps the element's type, too, and with it its id
        vars(self).update(blocks[key])

    def init_tensor(self, handle, type):
        is_block = type.is_block()
        key = id(type.element_ty if is_block else type), id(type.shape) if is_block else None
        if key not in tensors:
            plain_tensor(self, None, type)
            tensors[key] = vars(self).copy()
        vars(self).update(tensors[key], handle=handle, type=type)

    def broadcast(self, lhs, rhs):
        a, b = lhs.type.is_block(), rhs.type.is_block()
        if a and not b:
            return lhs, splat(rhs, lhs)
        if b and not a:
            return splat(lhs, rhs), rhs
        if a and lhs.type.shape is not rhs.type.shape:
            return plain_broadcast(self, lhs, rhs)
        return lhs, rhs

    def splat(scalar, block):
        type = block.type.with_element_ty(scalar.dtype)
        return language.tensor(interpreter.interpreter_builder.create_splat(type, scalar.handle), type)

    def computation_type(self, *args):
        key = tuple(id(arg) for arg in args)
        if key not in computed:
            computed[key] = plain_computed(self, *args), args
        return computed[key][0]

    monkeypatch.setattr(language.dtype, "__eq__", lambda self, other: self is other or plain_equal(self, other))
    monkeypatch.setattr(language.block_type, "__init__", init_block)
    monkeypatch.setattr(language.tensor, "__init__", init_tensor)
    monkeypatch.setattr(semantic, "broadcast_impl_value", broadcast)
    monkeypatch.setattr(semantic, "computation_type_impl", computation_type)


def reduce_by_halves(monkeypatch) -> None:
    """Where a kernel says how two numbers become one, the interpreter goes number by number; the order is no one's promise."""
    reduction = interpreter.ReduceOps
    plain_reduce = reduction.generic_reduce

    def generic_reduce(self, inputs):
        if self.axis is not None or self.keep_dims or len(inputs) > 1:
            return plain_reduce(self, inputs)
        (numbers,) = inputs
        data = numbers.handle.data.flatten()
        while len(data) > 1:  # a power of 2 at first
            halves = (self.to_tensor(half, numbers.dtype) for half in np.split(data, 2))
            data = self.combine_fn.fn(*halves).handle.data
        return [self.to_tensor(data.item(), numbers.dtype)]

    monkeypatch.setattr(reduction, "generic_reduce", generic_reduce)
