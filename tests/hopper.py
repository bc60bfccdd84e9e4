"""The sm90 forward kernels for the tests: where they are, their tiles, the oracle's check."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from cases import AttnCase, Inputs, VarlenCase, VarlenInputs, built_isas, on_devices
from harness import features_of, run_flash, run_varlen
from oracle import Result, attention_oracle, attention_peer, check_result, per_sequence

ISA = "sm90"
IS_HOPPER = ISA in built_isas("fwd")
MULTIPROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count if IS_HOPPER else 132
TABLE = Path(__file__).resolve().parents[1] / "csrc" / "kernels" / ISA / "tile_config.h"


def tiles() -> dict[int, tuple[int, int, int, int]]:
    """Rows of a query tile, keys of a block, stages of the ring, buffers for Q, by head dimension."""
    found = re.findall(
        r"(?:case (\d+)|default):[^\n]*\s+return {\.groups = (\d), \.block_n = (\d+), "
        r"\.stages = (\d), \.q_buffers = (\d)};",
        TABLE.read_text(),
    )
    return {int(d or 256): (64 * int(g), int(n), int(s), int(q)) for d, g, n, s, q in found}


TILES = tiles()


def on_hopper(*cases: AttnCase | VarlenCase) -> Callable:
    """Parametrize `device` and `case` where the GPU and the build have these kernels."""
    return on_devices(cuda=[case for case in cases if IS_HOPPER])


def check(case: AttnCase, x: Inputs) -> Result:
    """The forward pass of `x` against the oracle; returns our result."""
    features = features_of(case, x.q.device)
    ours = run_flash(x.q, x.k, x.v, causal=case.causal, **features)
    options = dict(scale=case.scale, causal=case.causal, **features)
    want = attention_oracle(x.q, x.k, x.v, **options)
    check_result(ours, attention_peer(x.q, x.k, x.v, **options), want, case=case)
    return ours


def check_varlen(case: VarlenCase, x: VarlenInputs) -> Result:
    """The forward pass of all sequences against the oracle; returns our result."""
    features = features_of(case, x.q.device)
    ours = run_varlen(x, causal=case.causal, backward=False, **features)
    options = dict(
        scale=case.scale,
        causal=case.causal,
        cu_seqlens_q=x.cu_seqlens_q.tolist(),
        cu_seqlens_k=x.cu_seqlens_k.tolist(),
        **features,
    )
    want = per_sequence(attention_oracle, x.q, x.k, x.v, **options)
    peer = per_sequence(attention_peer, x.q, x.k, x.v, **options)
    check_result(ours, peer, want, case=case)
    return ours
