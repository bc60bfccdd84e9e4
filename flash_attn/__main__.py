"""`python -m flash_attn`: versions, GPUs, what is built, which path serves what, and what is missing."""

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from itertools import zip_longest

import torch

import flash_attn
from flash_attn import _ops
from flash_attn._head_dims import MAX_HEAD_DIM

REBUILD = "in the source directory: pip install -v --no-build-isolation ."
MINIMUM_CAPABILITY = (8, 0)
# What the kernels of an isa are made of, and the GPUs that they run on.
ISAS = {
    "sm90": "sm90 (wgmma, TMA): compute capability 9.0",
    "sm80": "sm80 (mma.sync, cp.async): 8.0 and newer",
}
SERVES = {
    "fwd": "attention; with a cache: long prompts in one piece, of equal lengths",
    "bwd": "gradients",
    "decode": "flash_attn_with_kvcache; paged keys and values",
}
# Small kernels that every build has.
BESIDE_DECODING = "appending to a cache, rotary embedding on the way, merge_states"
CPU_FILES = [
    ("flash_attn/cpu/attention.py", "attention and gradients"),
    ("flash_attn/cpu/varlen.py", "variable length, paged keys and values"),
    ("flash_attn/cpu/decode.py", "flash_attn_with_kvcache, merge_states"),
]


def _gpus() -> list[tuple[str, tuple[int, int]]]:
    """(name, compute capability) of each visible GPU."""
    if not torch.cuda.is_available():
        return []
    indices = range(torch.cuda.device_count())
    return [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in indices]


def _kernels(info: dict) -> list[str]:
    """The table of CUDA kernels: one row per pass and isa, in the order in which they are asked."""
    rows = [("pass", "serves", "head_dims built", "dtypes", "kernels")]
    for isa, name in dict.fromkeys((isa, name) for isa, name, _, _ in info["kernels"]):
        built = [(d, dtype) for i, n, d, dtype in info["kernels"] if (i, n) == (isa, name)]
        own = [f"{d}/{dv}" for i, n, d, dv in info["value_head_dims"] if (i, n) == (isa, name)]
        head_dims = ", ".join([*map(str, sorted({head_dim for head_dim, _ in built})), *own])
        dtypes = ", ".join(sorted({dtype for _, dtype in built}))
        rows.append((name, SERVES.get(name, ""), head_dims, dtypes, ISAS.get(isa, isa)))
    return _aligned(rows)


def tiles_for(built: Sequence[int], allowed: int) -> int:
    """The size of shared memory whose tiles a GPU gets that allows so many KB; 0: none is built."""
    return max((size for size in built if size <= allowed), default=0)


def _smem_lines(info: dict, allowed: Sequence[int]) -> list[str]:
    """What tiles each GPU gets.  allowed: KB of shared memory that each allows a thread block."""
    lines = []
    for index, kb in enumerate(allowed):
        size = tiles_for(info["smem_kb"], kb)
        tiles = f"tiles for {size} KB" if size else "some tiles do not fit, see below"
        lines.append(f"GPU {index}       {kb} KB of shared memory per thread block: {tiles}")
    return lines


def _passes(info: dict) -> set[str]:
    """Passes that this build has kernels for."""
    return {name for _, name, _, _ in info["kernels"]}


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of a table as lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)) for row in rows]
    return [line.rstrip() for line in lines]


def _runs_on(archs: list[int], capability: tuple[int, int]) -> bool:
    """Whether SASS for one of archs runs on a GPU: same major version, minor not newer than its."""
    major, minor = capability
    return any(arch // 10 == major and arch % 10 <= minor for arch in archs)


def missing_pieces(
    info: dict | None,
    cuda: str | None,
    gpus: list[tuple[str, tuple[int, int]]],
    nvcc: bool,
    allowed: Sequence[int] = (),
) -> list[str]:
    """What keeps CUDA tensors from being served, and how to get it.

    info: build_info() of the extension, None when it is not importable; cuda: CUDA version of torch or None;
    gpus: (name, compute capability) of each GPU; nvcc: whether a CUDA compiler is on PATH;
    allowed: KB of shared memory that each GPU allows a thread block, where the extension can ask.
    """
    missing = []
    if cuda is None:
        missing.append("a CUDA build of torch, for GPUs: see https://pytorch.org/get-started")
    elif not gpus:
        missing.append("a visible GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES")
    if info is None and cuda is not None:
        if not nvcc:
            missing.append(f"a CUDA {cuda} toolkit (nvcc on PATH, or CUDA_HOME)")
        missing.append(f"the extension flash_attn_2_cuda: {REBUILD}")
    if info is not None:
        unbuilt = ", ".join(name for name in SERVES if name not in _passes(info))
        if unbuilt:
            missing.append(f"kernels for {unbuilt} in flash_attn_2_cuda: {REBUILD}")
    for (name, capability), kb in zip_longest(gpus, allowed):
        target = 10 * capability[0] + capability[1]
        if capability < MINIMUM_CAPABILITY:
            missing.append(f"{name} is sm_{target}; the CUDA kernels need sm_80 or newer")
        elif info is not None:
            archs = ";".join(map(str, sorted({*info["archs"], target})))
            rebuild = f'FLASH_ATTN_CUDA_ARCHS="{archs}", then {REBUILD}'
            built = ", ".join(map(str, info["smem_kb"]))
            if not _runs_on(info["archs"], capability):
                missing.append(f"kernels for {name} (sm_{target}): {rebuild}")
            elif kb is not None and not tiles_for(info["smem_kb"], kb):
                memory = f"the {kb} KB of shared memory of {name} (built: {built} KB)"
                missing.append(f"tiles for {memory}: {rebuild}")
    return missing


def report() -> str:
    """The report as text."""
    gpus = _gpus()
    lines = [
        f"flash_attn  {flash_attn.__version__}",
        f"torch       {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        f"Python      {platform.python_version()} on {platform.system()} {platform.machine()}",
    ]
    for index, (name, (major, minor)) in enumerate(gpus):
        lines.append(f"GPU {index}       {name}, compute capability {major}.{minor}")
    if not gpus:
        lines.append("GPU         none visible")

    info = _ops.extension.build_info() if _ops.extension is not None else None
    allowed: list[int] = []
    if info is None:
        lines.append("extension   flash_attn_2_cuda is not built or does not import")
    else:
        allowed = [_ops.extension.smem_kb(index) for index in range(len(gpus))]
        lines += _smem_lines(info, allowed)
        archs = ", ".join(f"sm_{arch}" for arch in info["archs"])
        lines.append(
            f"extension   flash_attn_2_cuda for {archs}, tiles for "
            f"{', '.join(map(str, info['smem_kb']))} KB of shared memory; CUDA "
            f"{info['cuda_version']}, CUTLASS {info['cutlass_version']}"
        )

    lines += [
        "",
        "What serves what",
        f"  CPU tensors, head_dim up to {MAX_HEAD_DIM}; fp64, fp32, bf16, fp16:",
    ]
    lines += [f"    {row}" for row in _aligned(CPU_FILES)]
    if info is None:
        lines.append("  CUDA tensors: nothing in this installation")
    else:
        lines.append("  CUDA tensors, each head_dim in the next kernel that holds it; of a pass,")
        lines.append("  the first row whose kernels serve the call:")
        lines += [f"    {row}" for row in _kernels(info)]
        if info["value_head_dims"]:
            lines.append("  192/128 stands for 192 of q and k, 128 of v, and what that holds")
        if info["isa"]:
            lines.append(f"  FLASH_ATTN_ISA={info['isa']}: kernels of other isas are not used")
        if limit := os.environ.get("FLASH_ATTN_TEST_SMEM_KB"):
            lines.append(f"  FLASH_ATTN_TEST_SMEM_KB={limit}: tiles for no more shared memory")
        if "decode" in _passes(info):
            lines.append(f"  {BESIDE_DECODING}: csrc/kernels/common, every head_dim")
    missing = missing_pieces(info, torch.version.cuda, gpus, _has_nvcc(), allowed)
    if missing:
        lines += ["", "Missing", *(f"  {piece}" for piece in missing)]
    return "\n".join(lines)


def _has_nvcc() -> bool:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    return bool(shutil.which("nvcc")) or any(
        home and os.path.isfile(os.path.join(home, "bin", "nvcc")) for home in homes
    )


if __name__ == "__main__":
    print(report())
    sys.exit(0)
