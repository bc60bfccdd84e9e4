"""Dropout: the mask is known exactly, so results are compared as without it; and how it is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, product

import numpy as np
import pytest
import torch
from cases import (
    Alibi,
    AttnCase,
    Inputs,
    Mask,
    everywhere,
    make_dlse,
    make_inputs,
    on_devices,
)
from harness import (
    assert_bitwise,
    assert_nearly,
    assert_same_result,
    capture,
    check_case,
    features_of,
    leaves,
    peek_rng_state,
    poison,
    run_flash,
)
from oracle import (
    Result,
    assert_probs,
    attention_oracle,
    attention_peer,
    check_result,
    visible,
)
from philox import keep_mask, keeping_values, keeps, philox4x32
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_attn import flash_attn_func
from flash_attn._head_dims import HEAD_DIMS as DIMS
from flash_attn.cpu import philox as cpu_philox

HALF = ("fp16", "bf16")
# Around the borders of the 32 x 16 blocks that share random words, and of the kernels' tiles.
LENGTHS = (
    *((97, 97), (113, 203), (203, 113), (1, 300), (300, 1), (257, 257), (15, 17), (16, 16)),
    *((17, 15), (64, 128), (129, 65), (33, 512), (144, 80)),
)
GROUPS = ((2, 1), (4, 2), (3, 3), (6, 1), (1, 1), (12, 4), (5, 5))
RATES = (0.17, 0.1, 0.5, 0.9, 0.001)
STATES = [(0, 0), (1234, 0), (2**40 + 17, 96), (-3, 2**33 + 12), (2**63 - 1, 2**62 + 5), (5, 2**32)]


# Published test vectors: counter, key, and the words after 7 and after 10 rounds.
KNOWN = [
    (
        ((0, 0, 0, 0), (0, 0)),
        "5f6fb709 0d893f64 4f121f81 4f730a48",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2),
        "5207ddc2 45165e59 4d8ee751 8c52f662",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)),
        "4dfccaba 190a87f0 c47362ba b6b5242a",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("given", "after_7", "after_10"), KNOWN, ids=["zeros", "ones", "pi"])
def test_the_generator_of_the_tests_is_philox(
    given: tuple[Sequence[int], tuple[int, int]], after_7: str, after_10: str
) -> None:
    for rounds, want in ((7, after_7), (10, after_10)):
        assert " ".join(f"{int(word):08x}" for word in philox4x32(*given, rounds)) == want


@pytest.mark.parametrize("state", STATES, ids=str)
def test_the_mask_of_the_tests_is_its_definition(state: tuple[int, int]) -> None:
    batches, heads, seqlen_q, seqlen_k = (3, 0), 2, 37, 50
    mask = keep_mask(state, batches, heads, seqlen_q, seqlen_k, 0.3)
    assert mask.shape == (2, heads, seqlen_q, seqlen_k)
    for index in range(0, mask.numel(), 7):
        b, h, row, col = (int(i) for i in torch.unravel_index(torch.tensor(index), mask.shape))
        kept = keeps(*state, batches[b] * heads + h, row, col, 0.3)
        assert mask[b, h, row, col].item() == kept, (b, h, row, col)


# Around whole bytes of the threshold, where NaNs end, and where -0 and 0 would have to be told apart.
KEPT = (
    *(0, 1, 255, 256, 2045, 2046, 2047, 2303, 2304, 2305, 32768, 33535, 33789, 33790, 33791),
    *(33792, 33793, 34047, 34048, 58981, 58982, 58983, 65279, 65280, 65281, 65534, 65535),
)


@pytest.mark.parametrize("kept", KEPT)
def test_as_many_values_as_asked_keep_a_weight(kept: int) -> None:
    """By the definition, and by the package's comparison with one number."""
    want = keeping_values(1 - kept / 65536)
    assert want.sum() == kept
    pattern, inverted = cpu_philox.keep_rule(kept)
    values = np.arange(65536, dtype=np.uint16).view(np.float16)
    assert np.array_equal((values >= values[pattern]) == inverted, want)


def random_bits(state: tuple[int, int], heads: int, rows: int, cols: int) -> Tensor:
    """(heads, rows, cols), 0 to 65535: by the package."""
    heads, rng_state = torch.arange(heads), torch.tensor(state)
    bits = cpu_philox.random_bits(rng_state, heads, slice(0, rows), slice(0, cols))
    return bits.int() & 0xFFFF


def test_the_low_byte_decides_beside_the_thresholds_high_byte() -> None:
    """Kept weights are as many as asked also between multiples of 256 of 65536."""
    shape, state = (16, 512, 512), (7, 11)
    bits = random_bits(state, *shape).long()
    whole = 2047 + 31744 + 0x6200  # the threshold is a positive number with a low byte of 0
    assert cpu_philox.keep_rule(whole) == (0x6200, False)
    previous, before = None, whole
    for kept in (whole - 64, whole, whole + 1, whole + 64, whole + 128, whole + 255, whole + 256):
        mask = torch.from_numpy(keeping_values(1 - kept / 65536))[bits]
        share = kept / 65536
        error = mask.double().mean().item() - share
        assert abs(error) < 6 * (share * (1 - share) / mask.numel()) ** 0.5, kept
        # More precisely: of the weights between two thresholds.
        if previous is not None:
            assert not (previous & ~mask).any()
            want = (kept - before) / 65536 * mask.numel()
            assert abs((mask & ~previous).sum().item() - want) < 6 * want**0.5, kept
        previous, before = mask, kept


def test_bytes_of_a_call_are_uniform_and_uncorrelated() -> None:
    """The sixteen high bytes, and the four low ones that the weights of a word share."""
    heads, rows, cols = 16, 512, 512
    bits = random_bits((2**40 + 3, 5), heads, rows, cols)
    # (head, row block, block half, row half, row % 8, column block, column half, pair, parity)
    bits = bits.view(heads, rows // 32, 2, 2, 8, cols // 16, 2, 4, 2)
    bits = bits.permute(0, 1, 4, 5, 7, 3, 6, 2, 8).reshape(-1, 4, 4)  # (call, word, byte)
    low = bits & 0xFF
    assert torch.equal(low, low[:, :, :1].expand_as(low))
    of_call = torch.cat([(bits >> 8).flatten(1), low[:, :, 0]], 1).T.double()
    deviation = of_call.shape[1] ** -0.5
    for values in of_call:
        error = values.int().bincount(minlength=256) / values.numel() * 256 - 1
        assert error.abs().max() < 6 * 16 * deviation
    for power in (1, 2):
        off_diagonal = torch.corrcoef((of_call - 127.5) ** power) - torch.eye(20)
        assert off_diagonal.abs().max() < 6 * deviation


def dropout_cases() -> Iterator[AttnCase]:
    lengths, heads, dtype, p = (cycle(x) for x in (LENGTHS, GROUPS, HALF, RATES))
    for head_dim, mask, _ in product(DIMS, Mask, range(13)):
        shape = (*next(lengths), next(heads), head_dim, mask, next(dtype), 2)
        yield AttnCase(*shape, dropout=next(p))
    for head_dim, mask in product((1, 33, 40, 59, 72, 111, 160, 200), Mask):
        shape = (113, 150, (4, 2), head_dim, mask, next(dtype), 3)
        yield AttnCase(*shape, dropout=next(p))
    for head_dim, mask in product(DIMS, Mask):
        yield AttnCase(600, 700, (2, 1), head_dim, mask, next(dtype), dropout=0.1)


def cpu_dropout_cases() -> Iterator[AttnCase]:
    dtype = cycle(("fp32", "bf16", "fp32", "fp64", "fp16"))
    for index, case in enumerate(dropout_cases()):
        if index % 4 == 1:
            yield case.but(dtype=next(dtype))


@on_devices(cpu=cpu_dropout_cases(), cuda=dropout_cases())
def test_dropout_matches_oracle(device: str, case: AttnCase) -> None:
    """Forward and backward apply the mask that torch's generator gave the call."""
    check_case(case, make_inputs(case, device))


FEW = [
    AttnCase(130, 193, (4, 2), 64, Mask.causal, batch=2, dropout=0.17),
    AttnCase(130, 193, (2, 1), 128, Mask.none, "fp16", 2, dropout=0.3),
    AttnCase(193, 130, (4, 2), 96, Mask.causal, "bf16", 2, dropout=0.5),
    AttnCase(100, 160, (2, 2), 33, Mask.none, "fp16", 2, (40, 20), dropout=0.1),
    AttnCase(150, 90, (6, 2), 256, Mask.causal, "bf16", 1, alibi=Alibi.per_head, dropout=0.2),
]
few = everywhere(*FEW)


def state_tensor(state: Sequence[int], device: str | torch.device) -> Tensor:
    return torch.tensor(state, dtype=torch.int64, device=device)


def op_options(case: AttnCase, slopes: Tensor | None) -> tuple:
    """Arguments of the operators from dropout_p to alibi_slopes."""
    return (case.dropout, case.scale, case.causal, *case.window, case.softcap, slopes)


def forward_op(q: Tensor, k: Tensor, v: Tensor, options: tuple, state: Tensor) -> tuple:
    """(out, softmax_lse, S_dmask, rng_state) with an explicit state."""
    op = torch.ops.flash_attn._flash_attn_forward
    return op(q, k, v, *options, True, rng_state=state)


def run_ops(case: AttnCase, x: Inputs, rng_state: Tensor, dlse: Tensor | None = None) -> Result:
    """The operators of both passes with an explicit state."""
    options = op_options(case, features_of(case, x.q.device).get("alibi_slopes"))
    poison(x.q.device)
    out, lse, _, state = forward_op(x.q, x.k, x.v, options, rng_state)
    assert torch.equal(state, rng_state) and state.data_ptr() != rng_state.data_ptr()
    poison(x.q.device)
    grads = torch.ops.flash_attn._flash_attn_backward.functional(
        x.dout, x.q, x.k, x.v, out, lse, *options, True, rng_state, dlse=dlse
    )
    return Result(out, lse, *grads, rng_state)


def keep_of(case: AttnCase, rng_state: Tensor, device: str | torch.device) -> Tensor:
    shape = (range(case.batch), case.heads[0], case.seqlen_q, case.seqlen_k)
    return keep_mask(rng_state, *shape, case.dropout, device)


@everywhere(*(case for case in FEW if case.head_dim % 8 == 0))
@pytest.mark.parametrize("state", STATES, ids=str)
def test_operators_with_an_explicit_state(
    device: str, case: AttnCase, state: tuple[int, int]
) -> None:
    """All 64 bits of the seed and of the offset count; the same mask on every device."""
    x, dlse = make_inputs(case, device), make_dlse(case, device)
    ours = run_ops(case, x, state_tensor(state, device), dlse)
    exact = features_of(case, device) | dict(scale=case.scale, causal=case.causal, dlse=dlse)
    exact["keep"] = keep_of(case, ours.rng_state, device)
    want = attention_oracle(x.q, x.k, x.v, x.dout, **exact)
    peer = attention_peer(x.q, x.k, x.v, x.dout, **exact)
    check_result(ours, peer, want, case=f"{case}, {state}")


@pytest.mark.cuda
@on_devices(cuda=[case for case in FEW if case.head_dim % 8 == 0])
def test_the_cpu_backend_drops_the_same_weights(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    state = (987654321987, 4096)
    ours = run_ops(case, x, state_tensor(state, device))
    slopes = features_of(case, device).get("alibi_slopes")
    options = op_options(case, None if slopes is None else slopes.cpu())
    y = x.map(Tensor.cpu)
    out, lse, _, _ = forward_op(y.q, y.k, y.v, options, state_tensor(state, "cpu"))
    grads = torch.ops.flash_attn._flash_attn_backward.functional(
        *(y.dout, y.q, y.k, y.v, out, lse, *options, True, state_tensor(state, "cpu"))
    )
    eps = torch.finfo(out.dtype).eps
    for name, want in zip(("out", "dq", "dk", "dv"), (out, *grads)):
        assert_nearly(name, getattr(ours, name).cpu(), want, case, eps=4 * eps)
    plain = op_options(case, None)
    probs = [forward_op(t.q, t.k, t.v, plain, state_tensor(state, t.q.device))[2] for t in (x, y)]
    ours_signs, want_signs = (p.cpu().signbit() & (p.cpu() != 0) for p in probs)
    assert torch.equal(ours_signs, want_signs), case


def check_probs(case: AttnCase, x: Inputs, probs: Tensor, keep: Tensor) -> None:
    """S_dmask of a dense call: its shape, its values, its signs."""
    shape = tuple(-(-n // 128) * 128 for n in (case.seqlen_q, case.seqlen_k))
    assert probs.shape == (case.batch, case.heads[0], *shape), case
    assert probs.dtype == case.torch_dtype and probs.device == x.q.device, case
    slopes = features_of(case, x.q.device).get("alibi_slopes")
    assert_probs(case, x.q, x.k, probs, keep, slopes)


S_DMASK = [
    *FEW,
    AttnCase(128, 256, (2, 1), 64, Mask.causal, dropout=0.4),
    AttnCase(129, 127, (3, 1), 40, Mask.causal, "fp16", dropout=0.4),
    AttnCase(1, 500, (2, 1), 192, Mask.none, dropout=0.4),
    AttnCase(300, 1, (2, 1), 32, Mask.none, dropout=0.4),
    AttnCase(100, 100, (2, 1), 64, Mask.causal, softcap=5.0, dropout=0.4),
    AttnCase(300, 100, (2, 1), 64, Mask.none, "bf16", 1, (5, 70), 3.0, Alibi.per_head, 0.2),
    AttnCase(70, 40, (4, 1), 111, Mask.none, "bf16", 2, (-1, 0), 0.0, Alibi.per_batch, 0.2),
]


@on_devices(
    cpu=[c.but(dtype=d) for c in S_DMASK for d in ("fp32", "bf16")],
    cuda=[*S_DMASK, *(c.but(dtype="fp16") for c in S_DMASK)],
)
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no_grad"])
def test_s_dmask_shows_probabilities_and_mask(device: str, case: AttnCase, recorded: bool) -> None:
    x = make_inputs(case, device)
    features = features_of(case, device)
    torch.manual_seed(7)
    state = peek_rng_state(x.q, case.batch, case.heads[0])
    poison(device)
    inputs = leaves(x.q, x.k, x.v) if recorded else (x.q, x.k, x.v)
    _, _, probs = flash_attn_func(*inputs, causal=case.causal, return_attn_probs=True, **features)
    assert not probs.requires_grad
    check_probs(case, x, probs, keep_of(case, state, device))


@few
def test_asking_for_s_dmask_changes_nothing(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    features = features_of(case, device)
    results = []
    for ask in (False, True):
        torch.manual_seed(3)
        got = flash_attn_func(x.q, x.k, x.v, causal=case.causal, return_attn_probs=ask, **features)
        results.append(got[0] if ask else got)
    assert_bitwise("out", *results, case)


ONE_HOT = [
    AttnCase(200, 200, (4, 2), 256, Mask.none, batch=2, dropout=0.3),
    AttnCase(120, 128, (2, 1), 128, Mask.causal, "fp16", 3, dropout=0.5),
    AttnCase(64, 50, (2, 1), 64, Mask.none, batch=2, dropout=0.1),
    AttnCase(30, 31, (6, 3), 32, Mask.causal, "fp16", 2, dropout=0.8),
    AttnCase(90, 96, (2, 1), 96, Mask.none, batch=2, dropout=0.25),
    AttnCase(190, 180, (2, 1), 192, Mask.causal, batch=2, dropout=0.25),
]


@everywhere(*ONE_HOT)
def test_one_hot_values_show_the_masks_of_both_passes(device: str, case: AttnCase) -> None:
    """V = identity shows the forward's mask in out, dout = identity the backward's in dv."""
    x = make_inputs(case, device)
    heads, head_dim = case.heads[0], case.head_dim
    v = torch.eye(case.seqlen_k, head_dim, device=device, dtype=case.torch_dtype)
    dout = torch.eye(case.seqlen_q, head_dim, device=device, dtype=case.torch_dtype)
    v, dout = v[None, :, None].expand(case.kv_shape), dout[None, :, None].expand(case.q_shape)
    ours = run_flash(x.q * 0, x.k, v, dout, causal=case.causal, dropout_p=case.dropout)
    see = visible(case.seqlen_q, case.seqlen_k, case.causal, device)
    kept = keep_of(case, ours.rng_state, device) & see
    shown = ours.out.transpose(1, 2)[..., : case.seqlen_k] != 0
    assert torch.equal(shown, kept), f"forward; case {case}"
    # Heads that share a key head add up: no more is shown than that one of them kept the weight.
    grouped = kept.view(case.batch, case.heads[1], heads // case.heads[1], *kept.shape[2:])
    shown = ours.dv.permute(0, 2, 3, 1)[:, :, : case.seqlen_q] != 0
    assert torch.equal(shown, grouped.any(2)), f"backward; case {case}"


@everywhere(AttnCase(64, 64, (2, 1), 64, batch=2, dropout=0.5))
def test_the_mask_depends_on_no_length_tile_or_head_dim(device: str, case: AttnCase) -> None:
    """One state, problems of all sizes: where they overlap, their masks are the same."""
    state = state_tensor((42, 640), device)
    whole = keep_of(case.but(seqlen_q=300, seqlen_k=300), state, device)
    for head_dim, sq, sk in (
        *((64, 64, 64), (128, 64, 64), (256, 33, 64), (32, 64, 32), (96, 200, 90), (192, 65, 64)),
        *((64, 1, 64), (64, 300, 1), (128, 300, 128), (256, 17, 256)),
    ):
        small = case.but(head_dim=head_dim, seqlen_q=sq, seqlen_k=sk)
        x = make_inputs(small, device)
        v = torch.eye(sk, head_dim, device=device, dtype=case.torch_dtype)
        v = v[None, :, None].expand(small.kv_shape).contiguous()
        out, *_ = forward_op(x.q * 0, x.k, v, op_options(small, None), state)
        seen = min(sk, head_dim)
        shown = out.transpose(1, 2)[..., :seen] != 0
        assert torch.equal(shown, whole[:, :, :sq, :seen]), small
        _, _, probs, _ = forward_op(x.q, x.k, v, op_options(small, None), state)
        assert torch.equal(~probs[:, :, :sq, :sk].signbit(), whole[:, :, :sq, :sk]), small


@everywhere(AttnCase(128, 128, (4, 4), 32, batch=4))
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.83], ids=str)
def test_dropped_weights_are_as_many_as_asked_and_independent(
    device: str, case: AttnCase, p: float
) -> None:
    """By S_dmask's signs; the bounds are 6 standard deviations of independent draws."""
    x = make_inputs(case, device)
    torch.manual_seed(11)
    _, _, probs = flash_attn_func(x.q * 0, x.k, x.v, dropout_p=p, return_attn_probs=True)
    dropped = probs.signbit().double()

    def check_mean(what: str, values: Tensor, expected: float, deviation: float) -> None:
        error = (values - expected).abs().max().item()
        assert error < 6 * deviation, f"{what}: off by {error:.3g} from {expected:.3g}"

    deviation = (p * (1 - p)) ** 0.5
    check_mean("all", dropped.mean(), p, deviation / dropped.numel() ** 0.5 + 2**-16)
    for what, dims in (("a head", (2, 3)), ("a row", (0, 1, 3)), ("a column", (0, 1, 2))):
        means = dropped.mean(dims)
        count = dropped.numel() / means.numel()
        check_mean(what, means, p, deviation / count**0.5 + 1 / count)

    # Correlations, with deviation 1 / sqrt(number of pairs): between batches, heads, neighbours in
    # both directions, bytes of one random word, and blocks that share counters.
    centred = (dropped - p) / deviation
    pairs = {
        "batches": (centred[:-1], centred[1:]),
        "heads": (centred[:, :-1], centred[:, 1:]),
        "rows": (centred[:, :, :-1], centred[:, :, 1:]),
        "columns": (centred[..., :-1], centred[..., 1:]),
        "parities": (centred[..., ::2], centred[..., 1::2]),
        "rows 8 apart": (centred[:, :, :-8], centred[:, :, 8:]),
        "columns 8 apart": (centred[..., :-8], centred[..., 8:]),
        "rows 16 apart": (centred[:, :, :-16], centred[:, :, 16:]),
        "rows 16 apart, next columns": (centred[:, :, :-16, ::2], centred[:, :, 16:, 1::2]),
        "row blocks": (centred[:, :, :-32], centred[:, :, 32:]),
        "column blocks": (centred[..., :-16], centred[..., 16:]),
        "transposed": (centred, centred.transpose(2, 3)),
    }
    for what, (a, b) in pairs.items():
        limit = 2**0.5 if what == "transposed" else 1
        tail = 1 / (p * (1 - p) * a.numel())  # rare events: few of them decide
        check_mean(what, (a * b).mean(), 0, limit / a.numel() ** 0.5 + tail)


@few
def test_dropout_p_too_small_to_drop_anything(device: str, case: AttnCase) -> None:
    """Clients ask for 1e-30 to get S_dmask: nothing is dropped, results are as with 0."""
    case = case.but(dropout=1e-30)
    x = make_inputs(case, device)
    ours = check_case(case, x)
    features = features_of(case, device)
    _, _, probs = flash_attn_func(
        x.q, x.k, x.v, causal=case.causal, return_attn_probs=True, **features
    )
    check_probs(case, x, probs, torch.ones_like(keep_of(case, ours.rng_state, device)))
    del features["dropout_p"]
    want = run_flash(x.q, x.k, x.v, x.dout, causal=case.causal, **features)
    eps = torch.finfo(ours.out.dtype).eps
    for name in ("out", "lse", "dq", "dk", "dv"):
        mine, zero = getattr(ours, name), getattr(want, name)
        assert_nearly(name, mine, zero, case, eps=None if name == "lse" else 4 * eps)


@few
def test_dropout_0_draws_nothing(device: str, case: AttnCase) -> None:
    """S_dmask is empty, and torch's generator stays where it was."""
    x = make_inputs(case, device)
    features = features_of(case.but(dropout=0.0), device)
    torch.manual_seed(5)
    before = generator_state(device)
    _, _, probs = flash_attn_func(
        x.q, x.k, x.v, causal=case.causal, return_attn_probs=True, **features
    )
    assert probs.shape == (0,) and probs.dtype == case.torch_dtype
    assert torch.equal(before, generator_state(device))


def generator_state(device: str) -> Tensor:
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


@everywhere(FEW[0])
@pytest.mark.parametrize("p", [1.0, 1.5, -0.1, float("nan")], ids=str)
def test_impossible_probabilities_are_refused(device: str, case: AttnCase, p: float) -> None:
    x = make_inputs(case, device)
    with pytest.raises(RuntimeError, match="dropout"):
        flash_attn_func(x.q, x.k, x.v, dropout_p=p)


@everywhere(FEW[0])
def test_backward_operator_without_a_state_is_refused(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    state = state_tensor((1, 2), device)
    ours = run_ops(case, x, state)
    with pytest.raises(RuntimeError, match="rng_state"):
        torch.ops.flash_attn._flash_attn_backward.functional(
            *(x.dout, x.q, x.k, x.v, ours.out, ours.lse, *op_options(case, None), False)
        )


@few
def test_torchs_seed_reproduces_and_calls_differ(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    call = partial(flash_attn_func, x.q, x.k, x.v, causal=case.causal, **features_of(case, device))
    torch.manual_seed(100)
    first, second = call(), call()
    torch.manual_seed(100)
    assert_bitwise("out", call(), first, case)
    assert_bitwise("out", call(), second, case)
    torch.manual_seed(101)
    third = call()
    assert not torch.equal(first, second) and not torch.equal(first, third), case


@everywhere(FEW[0])
def test_fork_rng_reproduces(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    call = partial(flash_attn_func, x.q, x.k, x.v, dropout_p=0.2)
    with torch.random.fork_rng():
        first = call()
    assert_bitwise("out", call(), first, case)


@few
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpoint_reproduces(device: str, case: AttnCase, use_reentrant: bool) -> None:
    x = make_inputs(case, device)
    options = dict(causal=case.causal, deterministic=True, **features_of(case, device))

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, **options)
        return flash_attn_func(out, k, v, **options)  # draws a second mask

    results = []
    for call in (block, partial(checkpoint, block, use_reentrant=use_reentrant)):
        inputs = leaves(x.q, x.k, x.v)
        torch.manual_seed(21)
        out = call(*inputs)
        torch.rand(5, device=device)  # the generator has moved on before the backward pass
        grads = torch.autograd.grad(out, inputs, x.dout) if not use_reentrant else None
        if use_reentrant:
            out.backward(x.dout)
            grads = [t.grad for t in inputs]
        results.append(Result(out.detach(), None, *grads))
    assert_same_result(*results, case, dq_bitwise=True)


@few
def test_backward_twice_applies_the_mask_of_the_forward(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    inputs = leaves(x.q, x.k, x.v)
    options = dict(causal=case.causal, deterministic=True, **features_of(case, device))
    out = flash_attn_func(*inputs, **options)
    first = torch.autograd.grad(out, inputs, x.dout, retain_graph=True)
    flash_attn_func(*inputs, **options)
    second = torch.autograd.grad(out, inputs, x.dout)
    for name, a, b in zip(("dq", "dk", "dv"), first, second):
        assert_bitwise(name, a, b, case)


@pytest.mark.cuda
def test_state_is_seed_and_offset_of_torchs_cuda_generator(device: str) -> None:
    """As flash-attn 2.8 draws them: a call takes 32 values for each batch entry and head."""
    q = torch.zeros(3, 8, 5, 64, dtype=torch.bfloat16, device=device)
    torch.cuda.manual_seed(1234)
    options = (0.1, 1.0, False, -1, -1, 0.0, None, False)
    *_, state = torch.ops.flash_attn._flash_attn_forward(q, q, q, *options)
    assert state.dtype == torch.int64 and state.shape == (2,) and state.device == q.device
    assert state.tolist() == [1234, 0]
    flash_attn_func(q, q, q, dropout_p=0.1)
    *_, state = torch.ops.flash_attn._flash_attn_forward(q, q, q, *options)
    assert state.tolist() == [1234, 2 * 3 * 5 * 32]


def test_state_of_the_cpu_comes_from_torchs_generator() -> None:
    q = torch.zeros(1, 2, 1, 8)

    def draw() -> Tensor:
        options = (0.1, 1.0, False, -1, -1, 0.0, None, False)
        return torch.ops.flash_attn._flash_attn_forward(q, q, q, *options)[3]

    torch.manual_seed(1)
    first = draw()
    assert first.dtype == torch.int64 and first.shape == (2,)
    second = draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


def test_operator_draws_nothing_without_dropout(device: str) -> None:
    q = torch.zeros(1, 2, 1, 8, device=device, dtype=torch.bfloat16)
    before = generator_state(device)
    results = torch.ops.flash_attn._flash_attn_forward(
        q, q, q, 0.0, 1.0, *(False, -1, -1, 0.0, None, True)
    )
    assert [t.shape for t in results[2:]] == [(0,), (0,)]
    assert torch.equal(before, generator_state(device))


GRAPHS = [case for case in FEW if case.head_dim % 8 == 0]


@pytest.mark.cuda
@on_devices(cuda=GRAPHS)
def test_cuda_graph_replays_draw_fresh_masks(device: str, case: AttnCase) -> None:
    """Also: seeding again repeats them, and the backward in the graph uses its forward's mask."""
    x = make_inputs(case, device)
    options = dict(causal=case.causal, deterministic=True, **features_of(case, device))
    heads = case.heads[0]

    def step() -> tuple[Tensor, ...]:
        inputs = leaves(x.q, x.k, x.v)
        out, _, probs = flash_attn_func(*inputs, return_attn_probs=True, **options)
        return out.detach(), probs, *torch.autograd.grad(out, inputs, x.dout)

    graph, recorded = capture(step)

    def replay() -> list[Tensor]:
        graph.replay()
        return [t.clone() for t in recorded]

    torch.cuda.manual_seed(77)
    first, second = replay(), replay()
    torch.cuda.manual_seed(77)
    again, expected = replay(), []
    torch.cuda.manual_seed(77)
    for _ in range(2):
        state = peek_rng_state(x.q, case.batch, heads)
        expected.append((keep_of(case, state, device), [t.clone() for t in step()]))
    for name, a, b in zip(("out", "S_dmask", "dq", "dk", "dv"), first, again):
        assert_bitwise(name, a, b, f"{case}, seeded again")
    assert not torch.equal(first[1].signbit(), second[1].signbit()), case
    for got, (keep, want) in zip((first, second), expected):
        for name, a, b in zip(("out", "S_dmask", "dq", "dk", "dv"), got, want):
            assert_bitwise(name, a, b, f"{case}, as without a graph")
        check_probs(case, x, got[1], keep)
