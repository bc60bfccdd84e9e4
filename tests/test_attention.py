"""Forward and backward against the fp64 oracle: lengths, head dimensions, heads, masks, dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, product

import pytest
import torch
from cases import NATIVE_HEAD_DIMS, AttnCase, Mask, make_inputs, on_devices
from harness import assert_bitwise, check_case, run_flash

from flash_attn import flash_attn_func

# Around the borders of every query and key block that a kernel may use.
BORDERS = (1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 80, 81, 95, 96, 97, 111, 112, 113)
BORDERS += (127, 128, 129, 159, 160, 161, 191, 192, 193, 255, 256, 257, 511, 513, 1023, 1025)
UNEQUAL = (
    *((1, 2), (2, 1), (1, 64), (1, 129), (1, 513), (1, 1025), (64, 1), (129, 1), (513, 1), (3, 17)),
    *((17, 3), (63, 65), (65, 63), (64, 128), (128, 64), (96, 112), (112, 96), (113, 203)),
    *((203, 113), (127, 257), (257, 127), (128, 1), (79, 191), (191, 79), (255, 1023)),
    *((1023, 255), (33, 1025), (1025, 33), (511, 513), (513, 511), (128, 129), (129, 128)),
)
PADDED_HEAD_DIMS = (1, 3, 8, 16, 24, 33, 40, 59, 72, 80, 104, 111, 112, 136, 160, 200, 224, 248)
GROUPS = ((2, 1), (3, 1), (4, 1), (8, 1), (16, 1), (4, 2), (6, 2), (8, 2), (16, 4), (12, 3), (5, 5))
HALF = ("fp16", "bf16")


def square_cases(dtypes: Sequence[str]) -> Iterator[AttnCase]:
    heads = cycle(((1, 1), (2, 1), (2, 2), (3, 1), (4, 2)))
    batch = cycle((1, 2))
    for seqlen, head_dim, mask, dtype in product(BORDERS, NATIVE_HEAD_DIMS, Mask, dtypes):
        yield AttnCase(seqlen, seqlen, next(heads), head_dim, mask, dtype, next(batch))


def unequal_cases() -> Iterator[AttnCase]:
    heads, dtype = cycle(((1, 1), (2, 1), (4, 2), (3, 3), (3, 1))), cycle(HALF)
    for (seqlen_q, seqlen_k), head_dim, mask in product(UNEQUAL, NATIVE_HEAD_DIMS, Mask):
        case = AttnCase(seqlen_q, seqlen_k, next(heads), head_dim, mask, batch=2)
        yield case.but(dtype=next(dtype))


def padded_cases() -> Iterator[AttnCase]:
    lengths = ((113, 113), (65, 130), (130, 65))
    for head_dim, (seqlen_q, seqlen_k), mask, dtype in product(
        PADDED_HEAD_DIMS, lengths, Mask, HALF
    ):
        yield AttnCase(seqlen_q, seqlen_k, (4, 2), head_dim, mask, dtype)
    for head_dim, mask in product(range(8, 257, 8), Mask):
        yield AttnCase(97, 161, (2, 1), head_dim, mask, batch=2)


def group_cases() -> Iterator[AttnCase]:
    dtype = cycle(HALF)
    for heads, head_dim, mask in product(GROUPS, NATIVE_HEAD_DIMS, Mask):
        yield AttnCase(130, 193, heads, head_dim, mask, next(dtype), batch=2)


def long_cases() -> Iterator[AttnCase]:
    for head_dim, mask in product(NATIVE_HEAD_DIMS, Mask):
        yield AttnCase(2048, 2048, (2, 1), head_dim, mask)
    yield AttnCase(4096, 4096, (1, 1), 128, Mask.causal, "fp16")
    yield AttnCase(515, 4099, (1, 1), 64, Mask.causal)


EMPTY = [
    AttnCase(seqlen_q, seqlen_k, (2, 1), head_dim, mask, batch=2)
    for (seqlen_q, seqlen_k), head_dim, mask in product(
        ((0, 5), (5, 0), (0, 0), (0, 200), (200, 0)), (64, 128, 33), Mask
    )
]


def cpu_cases() -> Iterator[AttnCase]:
    """One case in a few of the above: fp32 at every border, the other dtypes more sparsely."""
    for index, case in enumerate(square_cases(["fp32"])):
        if index % 4 == case.seqlen_q % 4 and case.seqlen_q < 1000:
            yield case
    rarer = cycle(("fp32", "bf16", "fp64", "fp16", "fp32"))
    for index, case in enumerate((*unequal_cases(), *padded_cases(), *group_cases())):
        if index % 7 == 3:
            yield case.but(dtype=next(rarer))
    yield from (AttnCase(1025, 1025, (2, 1), 64, mask, "fp32") for mask in Mask)
    yield AttnCase(1023, 1025, (2, 2), 40, Mask.causal, "bf16")
    yield AttnCase(513, 513, (2, 1), 64, Mask.causal, "fp64")


@on_devices(
    cpu=cpu_cases(),
    cuda=(
        *square_cases(HALF),
        *unequal_cases(),
        *padded_cases(),
        *group_cases(),
        *long_cases(),
    ),
)
def test_attention_matches_oracle(device: str, case: AttnCase) -> None:
    check_case(case, make_inputs(case, device))


def deterministic_cases() -> Iterator[AttnCase]:
    dtype = cycle(HALF)
    for seqlen, head_dim, mask in product((1, 33, 128, 257), NATIVE_HEAD_DIMS, Mask):
        yield AttnCase(seqlen, seqlen, (4, 2), head_dim, mask, next(dtype), batch=2)
    for (seqlen_q, seqlen_k), head_dim in product(((1, 300), (300, 1), (200, 513)), (40, 64, 128)):
        yield AttnCase(seqlen_q, seqlen_k, (3, 1), head_dim, Mask.causal, next(dtype))
    yield AttnCase(1500, 1500, (2, 1), 128, Mask.causal)
    yield AttnCase(1500, 1500, (2, 1), 64)


@on_devices(cpu=[AttnCase(113, 203, (4, 2), 40, Mask.causal, "fp32")], cuda=deterministic_cases())
def test_deterministic_mode_matches_oracle(device: str, case: AttnCase) -> None:
    check_case(case, make_inputs(case, device), deterministic=True)


@on_devices(cpu=[case.but(dtype="fp32") for case in EMPTY], cuda=EMPTY)
@pytest.mark.parametrize("deterministic", [False, True], ids=["default", "deterministic"])
def test_empty_sequences_give_zeros(device: str, case: AttnCase, deterministic: bool) -> None:
    x = make_inputs(case, device)
    ours = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, deterministic=deterministic)
    assert ours.out.shape == case.q_shape and not ours.out.any()
    assert ours.lse.shape == (case.batch, case.heads[0], case.seqlen_q)
    assert (ours.lse == torch.inf).all() or case.seqlen_q == 0
    for grad, shape in (
        (ours.dq, case.q_shape),
        (ours.dk, case.kv_shape),
        (ours.dv, case.kv_shape),
    ):
        assert grad.shape == shape and not grad.any(), case


PLAIN = [
    AttnCase(113, 113, (4, 2), 64, Mask.causal),
    AttnCase(113, 203, (2, 2), 33, Mask.none, "fp16"),
    AttnCase(64, 64, (2, 1), 128, Mask.causal, "fp16"),
    AttnCase(80, 161, (4, 2), 111, Mask.causal),
]


@on_devices(cpu=[case.but(dtype="fp32") for case in PLAIN], cuda=PLAIN)
def test_results_are_fresh_contiguous_tensors_of_the_callers_shape(
    device: str, case: AttnCase
) -> None:
    x = make_inputs(case, device).map(lambda t: t.requires_grad_())
    out = flash_attn_func(x.q, x.k, x.v, causal=case.causal)
    dq, dk, dv = torch.autograd.grad(out, (x.q, x.k, x.v), x.dout.detach())
    for name, ours, like in (("out", out, x.q), ("dq", dq, x.q), ("dk", dk, x.k), ("dv", dv, x.v)):
        assert ours.shape == like.shape and ours.dtype == like.dtype, f"{name}; case {case}"
        assert ours.device == like.device and ours.is_contiguous(), f"{name}; case {case}"
        assert ours.data_ptr() != like.data_ptr(), f"{name}; case {case}"


@on_devices(cpu=[case.but(dtype="fp32") for case in PLAIN], cuda=PLAIN)
def test_asking_for_lse_does_not_change_the_output(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    out = flash_attn_func(x.q, x.k, x.v, causal=case.causal)
    with_lse, lse, s_dmask = flash_attn_func(
        x.q, x.k, x.v, causal=case.causal, return_attn_probs=True
    )
    assert_bitwise("out", with_lse, out, case)
    assert lse.shape == (case.batch, case.heads[0], case.seqlen_q) and lse.dtype == torch.float32
    assert s_dmask is None or s_dmask.numel() == 0


@on_devices(
    cpu=[AttnCase(6, 9, (2, 1), 16, mask, "fp32") for mask in Mask],
    cuda=[AttnCase(200, sk, (2, 1), 256, mask) for mask in Mask for sk in (150, 200, 256)],
)
def test_one_hot_values_show_the_mask_exactly(device: str, case: AttnCase) -> None:
    """With V = identity, out holds the probabilities: hidden ones must be exactly 0."""
    x = make_inputs(case, device)
    v = torch.eye(case.seqlen_k, case.head_dim, device=device, dtype=case.torch_dtype)
    v = v[None, :, None].expand(case.kv_shape)
    out = run_flash(x.q * 0, x.k, v, causal=case.causal).out
    i = torch.arange(case.seqlen_q, device=device)[:, None]
    j = torch.arange(case.head_dim, device=device)[None, :]
    see = j < case.seqlen_k
    if case.causal:
        see = see & (j <= i + case.seqlen_k - case.seqlen_q)
    seen = out.transpose(1, 2) != 0
    assert torch.equal(seen, (see & (i >= 0)).expand_as(seen)), case
