"""The sm90 forward kernels for the tests: where they are, their tiles, the oracle's check."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from cases import AttnCase, Inputs, VarlenCase, VarlenInputs, built_isas, on_devices
from harness import features_of, run_flash, run_varlen, varlen_keep
from oracle import Result, attention_oracle, attention_peer, check_result, per_sequence
from philox import keep_mask

from csrc.kernels import kernel_list

ISA = "sm90"
IS_HOPPER = ISA in built_isas("fwd")
MULTIPROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count if IS_HOPPER else 132
TABLE = Path(__file__).resolve().parents[1] / "csrc" / "kernels" / ISA / "tile_config.h"


class Tile(NamedTuple):
    """One tile of the table."""

    rows: int  # queries
    block_n: int  # keys of a block
    stages: int  # of the ring
    q_buffers: int
    q_in_registers: bool


def tiles(*, is_general: bool) -> dict[int, Tile]:
    """By head dimension.  is_general: of kernels that do more than mask."""

    def value(text: str) -> int:
        text = text.replace("!is_general", str(int(not is_general)))
        if "?" in text:  # is_general ? general : plain
            text = text.partition("?")[2].split(":")[not is_general]
        return int({"true": "1", "false": "0"}.get(text.strip(), text))

    names = ("groups", "block_n", "stages", "q_buffers", "q_in_registers")
    fields = r",\s*".join(rf"\.{name}\s*= ([^,}}]+)" for name in names)
    found = re.findall(
        r"(?:case (\d+)|default):[^\n]*\s+return \{\s*" + fields + r"\};", TABLE.read_text()
    )
    rows = {int(row[0] or 256): [value(text) for text in row[1:]] for row in found}
    return {d: Tile(64 * g, n, s, q, bool(r)) for d, (g, n, s, q, r) in rows.items()}


TILES = tiles(is_general=False)
GENERAL_TILES = tiles(is_general=True)
# Head dimensions of q and k, and of v where it has its own, for which there are kernels.
HEAD_DIMS = (*((d, 0) for d in TILES), *kernel_list.VALUE_HEAD_DIMS[ISA])


def on_hopper(*cases: AttnCase | VarlenCase) -> Callable:
    """Parametrize `device` and `case` where the GPU and the build have these kernels."""
    return on_devices(cuda=[case for case in cases if IS_HOPPER])


def check(case: AttnCase, x: Inputs) -> Result:
    """The forward pass of `x` against the oracle; returns our result."""
    features = features_of(case, x.q.device)
    ours = run_flash(x.q, x.k, x.v, causal=case.causal, **features)
    if case.dropout:
        shape = (range(case.batch), case.heads[0], case.seqlen_q, case.seqlen_k)
        features["keep"] = keep_mask(ours.rng_state, *shape, case.dropout, x.q.device)
    options = dict(scale=case.scale, causal=case.causal, **features)
    want = attention_oracle(x.q, x.k, x.v, **options)
    check_result(ours, attention_peer(x.q, x.k, x.v, **options), want, case=case)
    return ours


def check_varlen(case: VarlenCase, x: VarlenInputs) -> Result:
    """The forward pass of all sequences against the oracle; returns our result."""
    features = features_of(case, x.q.device)
    ours = run_varlen(x, causal=case.causal, backward=False, **features)
    if case.dropout:
        features["keep"] = varlen_keep(case, ours.rng_state, x.q.device)
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
