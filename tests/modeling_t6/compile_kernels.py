"""
Compiles FlashTPA's kernels for a GPU that need not be there.

    python -m tests.modeling_t6.compile_kernels 80 89 90 100    # compute capability 8.0, ...: registers and spills
    python -m tests.modeling_t6.compile_kernels 90 --kinds      # one of each kind, as the test does
"""

import itertools
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_t6.cache_t6 import FactorLayout
from modeling_t6.flash_tpa_kernels_t6 import Mask, combine_kernel, combine_pages_kernel, decode_kernel, schedule_kernel
from modeling_t6.flash_tpa_low_bit_kernels_t6 import LowBitLaunch, Pages, low_bit_decode_kernel
from modeling_t6.flash_tpa_pages_t6 import SCHEDULE_WARPS, SCHEDULED_REQUESTS, SCHEDULED_SLOTS
from modeling_t6.flash_tpa_t6 import (
    COMBINE_WARPS,
    COMBINED_SPLITS,
    LAUNCH_OPTIONS,
    MAX_SPLITS,
    WITHOUT_PAGES,
    choose_launch,
    choose_low_bit_launch,
    elements_per_load,
    power_of_2,
    rows_of,
)


SHAPES = [  # heads (and groups), head_dim, k_rank, v_rank, queries, constant A, dtype, dtype of the cache, mask, aligned rows
    (32, 64, 1, 1, 1, False, "bf16", "bf16", "none", True),
    (32, 64, 2, 2, 1, False, "bf16", "u8", "none", True),
    (9, 96, 3, 3, 1, True, "fp16", "u8", "none", True),
    (34, 64, 2, 2, 1, False, "bf16", "bf16", "boolean", True),
    (12, 64, 2, 3, 1, False, "bf16", "bf16", "additive", False),
    (32, 33, 8, 5, 1, False, "bf16", "bf16", "none", True),
    (5, 64, 2, 3, 16, False, "bf16", "bf16", "additive", True),
    (16, 256, 8, 16, 1, True, "bf16", "bf16", "none", True),
    (47, 128, 2, 2, 2, False, "fp32", "fp32", "none", True),
    ((48, 4), 128, 4, 4, 1, False, "bf16", "bf16", "none", True),
    ((12, 3), 64, 2, 1, 3, False, "bf16", "bf16", "boolean", True),
]
PAGED_SHAPES = {  # by tokens of a page: whole tiles, parts of one
    16: (78, 64, 2, 2, 1, False, "bf16", "fp8e4nv", "none", True),
    64: (5, 64, 2, 3, 16, False, "bf16", "bf16", "none", True),
    24: ((32, 4), 64, 2, 2, 1, False, "bf16", "fp8e4nv", "none", True),
}
# Of kinds that are above, too.
MORE_SHAPES = [
    (32, 64, 1, 1, 1, False, "bf16", "u8", "none", True),
    (34, 64, 3, 1, 1, False, "bf16", "u8", "none", True),
    (78, 64, 2, 2, 1, False, "bf16", "u8", "none", True),
    (78, 64, 2, 2, 1, False, "bf16", "fp8e4nv", "none", True),
    (59, 64, 1, 2, 1, False, "fp16", "fp8e4nv", "none", True),
    (78, 64, 2, 2, 1, False, "bf16", "bf16", "none", True),
    (12, 96, 8, 3, 1, False, "fp16", "fp16", "none", True),
    ((34, 2), 64, 2, 2, 1, False, "bf16", "bf16", "none", True),
    ((32, 4), 64, 2, 2, 1, False, "bf16", "fp8e4nv", "none", True),
    ((9, 3), 64, 1, 4, 1, False, "bf16", "bf16", "additive", True),
]
MORE_PAGED_SHAPES = {
    128: (32, 64, 1, 1, 1, False, "bf16", "bf16", "none", True),
    32: ((48, 4), 128, 4, 4, 1, False, "bf16", "bf16", "none", True),
    256: (32, 64, 1, 1, 1, False, "bf16", "fp8e4nv", "none", True),
}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8e4nv": 1, "u8": 1}
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


def compile_kernel(kernel, types: dict[str, str], constants: dict, warps: int, capability: int):
    """The kernel for arguments of these types, all of whose pointers are aligned to 16 bytes."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps} | LAUNCH_OPTIONS
    )


def compile_shape(shape: tuple, capability: int, page_size: int = 0):
    """
    The two kernels as `flash_tpa`, or `paged_flash_tpa` for pages of that many tokens, starts them on such a GPU, and the
    launch.
    """
    heads, head_dim, k_rank, v_rank, queries, constant_a, dtype, cache_dtype, mask, aligned = shape
    heads, groups = heads if isinstance(heads, tuple) else (heads, 1)
    packed = cache_dtype == "u8"
    stored = torch.uint8 if packed else torch.float8_e4m3fn if cache_dtype == "fp8e4nv" else torch.bfloat16
    unit = 1 if page_size else elements_per_load(k_rank, v_rank, head_dim, stored, aligned)
    launch = choose_launch(
        queries, heads, head_dim, k_rank, v_rank, constant_a, BYTES[cache_dtype], SHARED_MEMORY[capability], aligned,
        groups, unit, dtype == "fp32",
    )  # fmt: skip
    if page_size % 8 == 0 and queries == groups == 1 and not constant_a and mask == "none" and aligned:
        computed = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        launch = choose_low_bit_launch(heads, head_dim, k_rank, v_rank, computed, stored) or launch
    is_low_bit = isinstance(launch, LowBitLaunch)
    layouts = [FactorLayout(rank, 0 if constant_a else heads // groups, head_dim) for rank in (k_rank, v_rank)]
    widths = [layout.quantized.width if packed else layout.width for layout in layouts]
    strides = [sum(widths)] * 2 if page_size else [width + (not aligned) for width in widths]
    gathered = page_size % launch.block_n != 0
    rows = [
        rows_of(
            rank,
            heads,
            head_dim,
            stride,
            width,
            constant_a,
            1 if is_low_bit else launch.step,
            gathered,
            groups=groups,
            packed=packed,
            elements_per_load=unit,
        )
        for rank, width, stride in zip((k_rank, v_rank), widths, strides)
    ]
    constants = {
        "KEYS": rows[0], "VALUES": rows[1], "LAUNCH": launch, "HAS_LENGTHS": True,
        "STRIDE_UNIT": 8 if packed else 16 // BYTES[cache_dtype] if aligned else 1, "OVERLAP": capability >= 90,
    }  # fmt: skip
    if not is_low_bit:
        sliding = page_size > 0 and queries > 1
        constants["MASK"] = Mask(queries, heads, True, mask, mask == "additive", sliding=sliding)
        constants |= {"PAGE_SIZE": page_size} if page_size else WITHOUT_PAGES
    elif page_size:
        constants["PAGES"] = Pages(page_size, math.gcd(page_size, launch.block_n * launch.warps))
    else:
        constants["PAGES"] = Pages()
        constants |= {name: None for name in low_bit_decode_kernel.arg_names if name in WITHOUT_PAGES}
    types = dict.fromkeys(("query_ptr", "key_a_ptr", "value_a_ptr", "out_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("slots_ptr", "table_ptr", "splits_ptr"), "*i32")
    types |= {
        "key_ptr": f"*{cache_dtype}", "value_ptr": f"*{cache_dtype}", "length_ptr": "*i32" if page_size else "*i64",
        "partial_ptr": "*fp32", "lse_ptr": "*fp32", "mask_ptr": "*i1" if mask == "boolean" else f"*{dtype}",
        "scale": "fp32", "log2_e": "fp32",
    }  # fmt: skip
    kernel = low_bit_decode_kernel if is_low_bit else decode_kernel
    decode = compile_kernel(kernel, types, constants, launch.warps, capability)
    constants = {
        "HEAD_DIM": head_dim, "V_RANK": v_rank, "BLOCK_D": power_of_2(head_dim, least=16), "BLOCK_S": COMBINED_SPLITS,
        "MAX_SPLITS": MAX_SPLITS, "OVERLAP": capability >= 90,
    }  # fmt: skip
    if page_size:
        kernel, constants = combine_pages_kernel, constants | {"NUM_QUERIES": queries, "NUM_HEADS": heads}
    else:
        kernel, constants = combine_kernel, constants | {"COLUMNS": queries * heads, "ROTATED": packed}
    return launch, decode, compile_kernel(kernel, types, constants, COMBINE_WARPS, capability)


def compile_schedule(capability: int):
    """The kernel that shares out the rows of a batch on pages."""
    types = dict.fromkeys(("length_ptr", "query_starts_ptr", "slots_ptr", "splits_ptr"), "*i32")
    constants = {"TILE": 64, "BLOCK_R": SCHEDULED_REQUESTS, "BLOCK_S": SCHEDULED_SLOTS, "MAX_SPLITS": MAX_SPLITS}
    return compile_kernel(schedule_kernel, types, constants, SCHEDULE_WARPS, capability)


def _report(tool: str, option: str, kernel) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def registers_and_spills(kernel) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: what did not fit them."""
    report = _report("cuobjdump", "-res-usage", kernel)
    return tuple(int(number) for number in re.search(r"REG:(\d+) STACK:(\d+)", report).groups())


def unset_registers(kernel) -> set[int]:
    """
    Uniform registers that the machine code reads and nothing before sets. ptxas 12.8 forgets to set those of a product's
    operand where two products, of different shapes, take turns with one place in shared memory.
    """
    is_set, unset = {63}, set()  # 63 is zero
    for line in _report("nvdisasm", "-c", kernel).splitlines():
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\S+) (.*?) ;", line)
        if instruction is None:
            continue
        name, operands = instruction.groups()
        # A product's operands lie where four registers say, two each; its first may be in other registers.
        products = re.findall(r", (R\d+, )?gdesc\[UR(\d+)\]", operands)
        read = [n for first, at in products for n in range(int(at) + (2 if first else 0), int(at) + 4)]
        others = [int(n) for n in re.findall(r"\bUR(\d+)", re.sub(r"gdesc\[UR\d+\]", "", operands))]
        target = [others.pop(0)] if re.match(r"UR\d", operands) else []
        unset |= {*read, *others} - is_set
        is_set |= {n + high for n in target for high in range(2 if re.search(r"\.64|\.WIDE", name) else 1)}
    return unset


def main() -> None:
    """Fails for a kernel that does not fit the GPU, spills much, or is known to be miscompiled."""
    capabilities = [int(word) for word in sys.argv[1:] if word != "--kinds"]
    shapes = [*((0, shape) for shape in SHAPES), *PAGED_SHAPES.items()]
    if "--kinds" not in sys.argv:
        shapes += [*((0, shape) for shape in MORE_SHAPES), *MORE_PAGED_SHAPES.items()]
    for capability, (page_size, shape) in itertools.product(capabilities, shapes):
        if {"fp8e4nv", "u8"} & set(shape) and capability < 89:
            continue
        launch, decode, _ = compile_shape(shape, capability, page_size)
        shape += (f"pages of {page_size}",) if page_size else ()
        shared = decode.metadata.shared
        assert shared <= SHARED_MEMORY[capability], f"{capability} {shape}: {shared} bytes of shared memory"
        assert "m64n8k" not in decode.asm["ptx"], (
            f"{capability} {shape}: products of 8 columns, which Triton 3.6 miscompiles"
        )
        assert capability != 90 or not unset_registers(decode), f"{capability} {shape}: ptxas lost a register's value"
        registers, spills = registers_and_spills(decode)
        assert spills <= 512, f"{capability} {shape}: {spills} bytes of spills"
        print(
            f"{capability} {shape}: {registers} registers, {spills} bytes of spills, {shared} bytes of shared memory, {launch}"
        )
    for capability in capabilities:
        registers, spills = registers_and_spills(compile_schedule(capability))
        assert spills == 0, f"{capability} schedule: {spills} bytes of spills"
        print(f"{capability} schedule: {registers} registers")


if __name__ == "__main__":
    main()
