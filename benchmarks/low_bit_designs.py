"""Experiment: the low-bit decode kernel with many launch sizes, beside what `flash_tpa` does now and bfloat16 rows."""

import functools
import itertools
import math
import os
import sys
import time

import torch
import triton
from gpu import copies_larger_than_l2, copy_bandwidth, graph_seconds, machine, random_cache
from shapes import CacheShape

from modeling_t6 import flash_tpa_t6
from modeling_t6.cache_t6 import FactorLayout
from modeling_t6.flash_tpa_kernels_t6 import Rows, combine_kernel
from modeling_t6.flash_tpa_low_bit_kernels_t6 import LowBitLaunch, low_bit_decode_kernel
from modeling_t6.flash_tpa_t6 import flash_tpa


def low_bit(setting, query, key_rows, value_rows, rank):
    n, w, stages, per_sm, maxnreg = setting
    batch, _, heads, d = query.shape
    packed = key_rows.dtype == torch.uint8
    padded = FactorLayout(rank, heads, d).padded_heads
    rows = Rows(rank, heads, d, key_rows.stride(2), padded, False, 1, packed=packed)
    unit = 8 if packed else 16
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    blocks = -(-heads // 32)
    tokens = key_rows.shape[2]
    splits = max(1, min(sms * per_sm // (batch * blocks), tokens // (n * w)))
    partial = query.new_empty((batch, splits, 1, heads, d), dtype=torch.float32)
    lse = query.new_empty((batch, splits, 1, heads), dtype=torch.float32)
    out = torch.empty_like(query)
    low_bit_decode_kernel[(blocks * splits, batch)](
        query, key_rows, value_rows, query, partial, lse, query.stride(0), query.stride(2),
        key_rows.stride(0) // unit, value_rows.stride(0) // unit, 0, tokens, splits,
        math.log2(math.e) * d**-0.5 / rank,
        KEYS=rows, VALUES=rows, LAUNCH=LowBitLaunch(n, 32, w, stages, 1), HAS_LENGTHS=False, STRIDE_UNIT=unit, OVERLAP=True,
        num_warps=w, **({"maxnreg": maxnreg} if maxnreg else {}),
    )  # fmt: skip
    combine_kernel[(heads, batch)](
        partial, lse, out, splits, COLUMNS=heads, HEAD_DIM=d, V_RANK=rank, BLOCK_D=d, BLOCK_S=64, MAX_SPLITS=1024,
        OVERLAP=True, ROTATED=packed, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return out


def settings():
    """n, warps, stages, programs on a multiprocessor, most registers"""
    found = [(32, w, s, 8 // w, None) for w, s in ((4, 1), (4, 2), (4, 3), (8, 2), (2, 2), (2, 3), (1, 2), (1, 3))]
    found += [(32, w, s, 12 // w, 168) for w, s in ((4, 1), (4, 2), (4, 3), (2, 2), (1, 2))]
    found += [(32, 4, 2, 4, 128), (32, 1, 2, 16, 128), (64, 4, 2, 2, None)]
    return found


def compiles(job):
    shape, setting = job
    query, rows = random_cache(shape._replace(batch=1, tokens=2048))
    try:
        if setting is None:
            flash_tpa(query, *rows[0], shape.rank, shape.rank, shape.head_dim**-0.5)
        else:
            low_bit(setting, query, *rows[0], shape.rank)
        torch.cuda.synchronize()
        return job, ""
    except Exception as error:  # noqa: BLE001
        return job, f"{type(error).__name__}: {str(error)[:200]}"


def main():
    begin = time.time()
    heads, ranks = 32, (1, 2)
    kinds = ("float8_e4m3fn", "int4")
    base = [CacheShape(0, 0, heads, 64, rank, kind) for rank in ranks for kind in kinds]
    jobs = [(shape, s) for s in (*settings(), None) for shape in base]
    jobs += [(CacheShape(0, 0, heads, 64, rank, "bfloat16"), None) for rank in ranks]
    with torch.multiprocessing.get_context("spawn").Pool(int(os.environ.get("PROCESSES", 15))) as pool:
        failed = {job: error for job, error in pool.imap_unordered(compiles, jobs, chunksize=2)}
    for job, error in failed.items():
        if error:
            print("failed", job, error)
    bandwidth = copy_bandwidth()
    print(f"{machine()}; copies move {bandwidth / 1e12:.2f} TB/s; compiled {len(jobs)} in {time.time() - begin:.0f} s", flush=True)
    for batch, rank in itertools.product((8, 16), ranks):
        plain = None
        for kind in ("bfloat16", *kinds):
            shape = CacheShape(batch, 131072, heads, 64, rank, kind)
            query, rows = random_cache(shape, copies_larger_than_l2(shape.num_bytes))
            calls = max(1, 4 // len(rows))

            def seconds(setting):
                if setting is None:
                    run = [functools.partial(flash_tpa, query, *pair, rank, rank, 0.125) for pair in rows]
                else:
                    run = [functools.partial(low_bit, setting, query, *pair, rank) for pair in rows]
                return graph_seconds(run * calls, 5), run[0]().float()

            now, expected = seconds(None)
            plain = plain or now
            bound = shape.num_bytes / bandwidth
            print(f"{batch} x 128k, rank {rank}, {kind}: now {now * 1e6:.1f} us {now / plain:.3f}; bytes {bound * 1e6:.1f} us")
            if kind == "bfloat16":
                del rows, expected
                torch.cuda.empty_cache()
                continue
            timed = []
            for setting in settings():
                if failed.get((shape._replace(batch=0, tokens=0), setting), "x"):
                    continue
                took, output = seconds(setting)
                timed.append((took, setting, ((output - expected).norm() / expected.norm()).item()))
            for took, setting, difference in sorted(timed)[: None if batch == 8 else 5]:
                print(f"   {took * 1e6:7.1f} us {took / plain:.3f} of bfloat16, {bound / took:4.0%} of copies  n, warps, stages, programs, registers {setting}  difference {difference:.1e}")
            sys.stdout.flush()
            del rows, expected
            torch.cuda.empty_cache()
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
