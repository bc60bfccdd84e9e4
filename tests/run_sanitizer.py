"""Run one small case of each kernel under NVIDIA's compute-sanitizer.

    python3 tests/run_sanitizer.py                       the cases alone
    python3 tests/run_sanitizer.py --tool memcheck       the same under the sanitizer (also racecheck,
                                                         initcheck, synccheck); exit status 1 on any finding

These are the kernels that calls take.  With FLASH_ATTN_ISA=sm80 in the environment they are sm80's, also
where the GPU has newer ones; with FLASH_ATTN_TEST_SMEM_KB=163 or 99 those of GPUs with less shared memory.

Cases: forward and backward (default and deterministic) of every built head dimension and dtype, causal
and full, ragged lengths with more queries than keys and the reverse, grouped heads; then windows,
softcap, ALiBi and dropout with S_dmask, sequences of different lengths, pages, and decoding: few and
many queries, caches with and without pages, appending with rotary, splits and merged parts, one
sequence alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_states,
)

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PADDED = {
    64: 40,
    128: 104,
    192: 168,
    256: 200,
}  # built head dimension: one that its kernel serves by predicates
FEATURES = dict(softcap=5.0, alibi=True, dropout_p=0.2)  # slopes are made with the inputs


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH or in a CUDA toolkit."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    roots = [Path(os.environ[n]) for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    roots += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    tools = (p for r in roots for p in (r / "bin", r / "compute-sanitizer"))
    return next(
        (str(t / "compute-sanitizer") for t in tools if (t / "compute-sanitizer").is_file()), None
    )


def problems(head_dims: list[int], dtypes: list[str], only: int | None) -> Iterator[tuple]:
    """(head_dim, dtype, seqlen_q, seqlen_k, options), each small enough for a sanitizer."""
    for head_dim in head_dims:
        if only not in (None, head_dim):
            continue
        for dtype in dtypes:
            yield head_dim, dtype, 161, 225, dict(causal=True)
            yield head_dim, dtype, 130, 97, dict(causal=False)
            yield head_dim, dtype, 193, 65, dict(causal=True)
            yield head_dim, dtype, 161, 225, dict(window_size=(40, 9), **FEATURES)
            yield head_dim, dtype, 193, 65, dict(causal=True, window_size=(40, -1), **FEATURES)
            # Each of these has a kernel of its own.
            yield head_dim, dtype, 161, 225, dict(window_size=(40, 9))
            yield head_dim, dtype, 193, 225, dict(causal=True, softcap=5.0)
            yield head_dim, dtype, 161, 97, dict(window_size=(40, 9), alibi=True)
            yield head_dim, dtype, 193, 225, dict(causal=True, dropout_p=0.2)
        if head_dim in PADDED:
            yield PADDED[head_dim], dtypes[0], 97, 161, dict(causal=True)
            yield PADDED[head_dim], dtypes[0], 97, 161, dict(window_size=(-1, 30), **FEATURES)


def dense_case(head_dim: int, dtype: torch.dtype, sq: int, sk: int, options: dict) -> None:
    """flash_attn_func, forward and backward."""
    shapes = ((1, sq, 2, head_dim), (1, sk, 1, head_dim), (1, sk, 1, head_dim))
    # Made on the CPU: only our kernels and a few copies run under the sanitizer.
    q, k, v = (torch.randn(s).to(dtype).cuda().requires_grad_() for s in shapes)
    dout, dlse = torch.randn(shapes[0]).to(dtype).cuda(), torch.randn(1, 2, sq).cuda()
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.tensor([0.5, 0.01]).cuda()
    for deterministic in (False, True):
        out, lse, _ = flash_attn_func(
            q, k, v, deterministic=deterministic, return_attn_probs=True, **options
        )
        torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))


def varlen_case(head_dim: int, dtype: torch.dtype, options: dict) -> None:
    """flash_attn_varlen_func, forward and backward, and forward with pages; rows of no sequence."""
    lengths_q, lengths_k = (97, 0, 33, 130), (65, 7, 0, 161)
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32).cuda()
        for n in (lengths_q, lengths_k)
    )
    shapes = ((sum(lengths_q) + 5, 2, head_dim), *((sum(lengths_k) + 9, 1, head_dim),) * 2)
    q, k, v = (torch.randn(s).to(dtype).cuda().requires_grad_() for s in shapes)
    dout, dlse = torch.randn(shapes[0]).to(dtype).cuda(), torch.randn(2, shapes[0][0]).cuda()
    lengths = (cu_q, cu_k, max(lengths_q), max(lengths_k))
    for deterministic in (False, True):
        out, lse, _ = flash_attn_varlen_func(
            *(q, k, v, *lengths),
            deterministic=deterministic,
            return_attn_probs=True,
            **options,
        )
        torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    if not options.get("dropout_p"):
        paged_case(head_dim, dtype, cu_q, lengths_k, max(lengths_q), options)


def make_pages(
    head_dim: int, dtype: torch.dtype, lengths: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    """Pages of 16 for K and V, whole ones only, and their table, out of range where none is needed."""
    counts = [-(-n // 16) for n in lengths]
    table = torch.full((len(lengths), max(counts) + 1), 2**30, dtype=torch.int32)
    order = iter(torch.randperm(sum(counts)).tolist())
    for n, count in enumerate(counts):
        table[n, :count] = torch.tensor([next(order) for _ in range(count)], dtype=torch.int32)
    k, v = (torch.randn(sum(counts), 16, 1, head_dim).to(dtype).cuda() for _ in range(2))
    return k, v, table.cuda()


def paged_case(
    head_dim: int,
    dtype: torch.dtype,
    cu_q: torch.Tensor,
    lengths_k: tuple[int, ...],
    longest_q: int,
    options: dict,
) -> None:
    """flash_attn_varlen_func with pages."""
    q = torch.randn(int(cu_q[-1]) + 5, 2, head_dim).to(dtype).cuda()
    k, v, table = make_pages(head_dim, dtype, lengths_k)
    cu_k = torch.tensor([0, *itertools.accumulate(lengths_k)], dtype=torch.int32).cuda()
    flash_attn_varlen_func(
        *(q, k, v, cu_q, cu_k, longest_q, max(lengths_k)), block_table=table, **options
    )


def decode_case(head_dim: int, dtype: torch.dtype, seqlen_q: int, heads: int, paged: bool) -> None:
    """flash_attn_with_kvcache: attention alone in one and more parts, then appending, and merging."""
    lengths = (0, 33, 200)
    full = tuple(n + seqlen_q for n in lengths)
    if paged:
        k_cache, v_cache, table = make_pages(head_dim, dtype, full)
        indices = dict(block_table=table)
    else:
        k_cache, v_cache = (
            torch.randn(4, max(full), 1, head_dim).to(dtype).cuda() for _ in range(2)
        )
        indices = dict(cache_batch_idx=torch.tensor([2, 3, 0], dtype=torch.int32).cuda())
    q = torch.randn(3, seqlen_q, heads, head_dim).to(dtype).cuda()
    seqlens = torch.tensor(lengths, dtype=torch.int32).cuda()
    states = []
    for options in (
        dict(num_splits=0),
        dict(num_splits=1, causal=True),
        dict(num_splits=3, window_size=(60, 3), softcap=5.0),
        dict(cache_leftpad=torch.tensor([0, 33, 70], dtype=torch.int32).cuda()),
    ):
        states.append(
            flash_attn_with_kvcache(
                *(q, k_cache, v_cache),
                cache_seqlens=seqlens,
                return_softmax_lse=True,
                **indices,
                **options,
            )
        )
    merge_states(*states[0], *states[3])
    new = [torch.randn(3, seqlen_q, 1, head_dim).to(dtype).cuda() for _ in range(2)]
    tables = [torch.rand(272 + seqlen_q, 16).to(dtype).cuda() for _ in range(2)]
    for interleaved in (False, True):
        flash_attn_with_kvcache(
            *(q, k_cache, v_cache, *new, *tables),
            cache_seqlens=seqlens,
            causal=True,
            rotary_interleaved=interleaved,
            **indices,
        )
    cu_q = torch.tensor([0, seqlen_q, seqlen_q, 2 * seqlen_q], dtype=torch.int32).cuda()
    flash_attn_with_kvcache(
        *(q.flatten(0, 1), k_cache, v_cache, *(t.flatten(0, 1) for t in new)),
        cache_seqlens=seqlens,
        causal=True,
        cu_seqlens_q=cu_q,
        max_seqlen_q=seqlen_q,
        **indices,
    )


def single_case(head_dim: int, dtype: torch.dtype) -> None:
    """flash_attn_with_kvcache with one sequence: its thread blocks merge in clusters, if there are any."""
    caches = [torch.randn(1, 3400, 1, head_dim).to(dtype).cuda() for _ in range(2)]
    q = torch.randn(1, 1, 8, head_dim).to(dtype).cuda()
    for length in (0, 100, 1000, 3400):
        seqlens = torch.tensor([length], dtype=torch.int32).cuda()
        flash_attn_with_kvcache(q, *caches, cache_seqlens=seqlens, causal=True)


def run(only: int | None) -> None:
    """Every case once in this process."""
    import flash_attn_2_cuda

    names = {"fp16": torch.float16, "bf16": torch.bfloat16}
    info = flash_attn_2_cuda.build_info()
    count = 0
    for head_dim, dtype, sq, sk, options in problems(info["head_dims"], info["dtypes"], only):
        dense_case(head_dim, names[dtype], sq, sk, options)
        torch.cuda.synchronize()
        count += 1
        print(f"{dtype} d{head_dim} q{sq} k{sk} {options}", flush=True)
    for head_dim, dtype in itertools.product(info["head_dims"], info["dtypes"]):
        if only not in (None, head_dim):
            continue
        for options in (dict(causal=True), dict(window_size=(50, 3), softcap=4.0, dropout_p=0.1)):
            varlen_case(head_dim, names[dtype], options)
            torch.cuda.synchronize()
            count += 1
            print(f"{dtype} d{head_dim} varlen {options}", flush=True)
        single_case(head_dim, names[dtype])
        torch.cuda.synchronize()
        count += 1
        print(f"{dtype} d{head_dim} decode one sequence", flush=True)
        for (seqlen_q, heads), paged in itertools.product(((1, 8), (3, 1), (70, 2)), (False, True)):
            decode_case(head_dim, names[dtype], seqlen_q, heads, paged)
            torch.cuda.synchronize()
            count += 1
            print(f"{dtype} d{head_dim} decode q{seqlen_q} h{heads} paged {paged}", flush=True)
    if count == 0:
        raise SystemExit("no case: is the head dimension built?")
    limit = os.environ.get("FLASH_ATTN_TEST_SMEM_KB")
    print(f"ran {count} cases" + (f" with at most {limit} KB of shared memory" if limit else ""))


def run_under(tool: str, arguments: list[str]) -> int:
    """This script again, under the sanitizer; its exit status."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        raise SystemExit("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--print-limit", "20"]
    if tool == "memcheck":
        command += ["--leak-check", "no", "--padding", "64"]
    # Without the caching allocator, memory past the end of a tensor is out of bounds.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}
    command += [sys.executable, str(Path(__file__).resolve()), *arguments]
    return subprocess.run(command, env=env).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tool", choices=TOOLS, help="run under this tool of compute-sanitizer")
    parser.add_argument("--head-dim", type=int, help="only this built head dimension")
    options = parser.parse_args()
    arguments = [] if options.head_dim is None else ["--head-dim", str(options.head_dim)]
    if options.tool:
        return run_under(options.tool, arguments)
    run(options.head_dim)
    return 0


if __name__ == "__main__":
    sys.exit(main())
