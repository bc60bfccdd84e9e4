"""How flash_attn_func behaves inside autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from cases import AttnCase, Mask, everywhere, generator, make_inputs, on_devices, randn
from harness import assert_bitwise, assert_nearly, leaves, run_flash
from oracle import Result, attention_oracle, attention_peer, check_result
from torch.utils.checkpoint import checkpoint

from flash_attn import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

SMALL = AttnCase(65, 97, (4, 2), 64, Mask.causal)
LSE_CASES = [
    SMALL,
    AttnCase(200, 130, (4, 2), 64, Mask.causal, "fp16", batch=2),
    AttnCase(130, 130, (2, 1), 128, Mask.none),
    AttnCase(113, 203, (2, 2), 33, Mask.causal, "fp16"),
    AttnCase(97, 97, (3, 1), 256, Mask.causal),
    AttnCase(1, 300, (2, 1), 96, Mask.none),
    AttnCase(300, 300, (2, 1), 192, Mask.causal),
    AttnCase(129, 128, (2, 1), 32, Mask.causal, "fp16"),
]
all_lse_cases = on_devices(
    cpu=[case.but(dtype=dtype) for case in LSE_CASES[:4] for dtype in ("fp32", "bf16", "fp64")],
    cuda=LSE_CASES,
)


@all_lse_cases
@pytest.mark.parametrize("with_dout", [True, False], ids=["with_dout", "lse_only"])
def test_gradient_of_lse_is_used(device: str, case: AttnCase, with_dout: bool) -> None:
    x = make_inputs(case, device)
    dout = x.dout if with_dout else None
    dlse = randn((case.batch, case.heads[0], case.seqlen_q), torch.float32, generator(case, device))
    if case.dtype == "fp64":
        dlse = dlse.double()
    exact = dict(scale=case.scale, causal=case.causal, dlse=dlse)
    ours = run_flash(x.q, x.k, x.v, dout, causal=case.causal, dlse=dlse)
    want = attention_oracle(x.q, x.k, x.v, dout, **exact)
    peer = attention_peer(x.q, x.k, x.v, dout, **exact)
    check_result(ours, peer, want, case=case)


@everywhere(SMALL)
def test_gradient_of_lse_through_ordinary_operations(device: str, case: AttnCase) -> None:
    """The z-loss pattern: out and lse feed one loss; dlse arrives expanded, in no special layout."""
    x = make_inputs(case, device)
    q, k, v = leaves(x.q, x.k, x.v)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    ((out * x.dout).sum() + 0.5 * lse.sum()).backward()
    want = run_flash(x.q, x.k, x.v, x.dout, causal=True, dlse=torch.full_like(lse, 0.5))
    assert_bitwise("dk", k.grad, want.dk, case)
    assert_bitwise("dv", v.grad, want.dv, case)
    assert_nearly("dq", q.grad, want.dq, case)


@everywhere(SMALL, SMALL.but(head_dim=33))
def test_only_requested_gradients_come(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    want = run_flash(x.q, x.k, x.v, x.dout, causal=True)
    for wanted in product((False, True), repeat=3):
        inputs = [t.detach().requires_grad_(w) for t, w in zip((x.q, x.k, x.v), wanted)]
        out = flash_attn_func(*inputs, causal=True)
        assert out.requires_grad == any(wanted)
        if not any(wanted):
            continue
        out.backward(x.dout)
        for name, t, w in zip(("dq", "dk", "dv"), inputs, wanted):
            assert (t.grad is not None) == w, f"{name}, wanted {wanted}; case {case}"
            if w:
                assert_nearly(name, t.grad, getattr(want, name), case)


@everywhere(SMALL)
def test_no_grad_and_inference_mode_record_nothing(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    q, k, v = leaves(x.q, x.k, x.v)
    want = flash_attn_func(q, k, v, causal=True)
    assert want.requires_grad and want.grad_fn is not None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        assert not out.requires_grad and out.grad_fn is None and not lse.requires_grad
        assert_bitwise("out", out.clone(), want.detach(), case)


@everywhere(SMALL)
def test_inputs_made_in_inference_mode(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    want = flash_attn_func(x.q, x.k, x.v, causal=True)
    with torch.inference_mode():
        x = make_inputs(case, device)
        out = flash_attn_func(x.q, x.k, x.v, causal=True)
    assert_bitwise("out", out.clone(), want, case)


@everywhere(SMALL)
def test_saved_tensors_are_only_the_inputs_and_outputs(device: str, case: AttnCase) -> None:
    """q, k, v, out and lse: nothing of size sq * sk."""
    x = make_inputs(case.but(seqlen_q=256, seqlen_k=256), device)
    sizes: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        flash_attn_func(*leaves(x.q, x.k, x.v), causal=True)
    assert sum(sizes) <= 2 * x.q.numel() + x.k.numel() + x.v.numel() + x.q.numel() // 64
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.no_grad():
        sizes.clear()
        flash_attn_func(x.q, x.k, x.v, causal=True)
    assert not sizes


@everywhere(SMALL)
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["q", "k", "v", "out"])
def test_saved_tensor_changed_in_place_raises(device: str, case: AttnCase, which: int) -> None:
    x = make_inputs(case, device)
    q, k, v = (t + 0 for t in leaves(x.q, x.k, x.v))
    out = flash_attn_func(q, k, v, causal=True)
    with torch.no_grad():
        (q, k, v, out)[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        out.backward(x.dout)


@everywhere(SMALL)
def test_backward_twice(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    q, k, v = leaves(x.q, x.k, x.v)
    out = flash_attn_func(q, k, v, causal=True)
    first = torch.autograd.grad(out, (q, k, v), x.dout, retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), x.dout)
    for name, a, b in zip(("dq", "dk", "dv"), second, first):
        assert_nearly(name, a, b, case)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(x.dout)


@everywhere(SMALL)
@pytest.mark.parametrize("constant", [True, False], ids=["constant_dout", "dout_with_gradient"])
def test_double_backward_says_that_it_is_missing(
    device: str, case: AttnCase, constant: bool
) -> None:
    x = make_inputs(case, device)
    q, k, v = leaves(x.q, x.k, x.v)
    out = flash_attn_func(q, k, v, causal=True)
    dout = x.dout if constant else out.square()
    with pytest.raises(RuntimeError, match="not twice.*create_graph"):
        torch.autograd.grad(out, q, dout, create_graph=True)


@everywhere(SMALL, SMALL.but(seqlen_k=65), SMALL.but(heads=(1, 1)), SMALL.but(head_dim=33))
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no_grad"])
def test_results_may_be_changed_in_place(device: str, case: AttnCase, recorded: bool) -> None:
    """`out += residual` in a model: the results are no views that autograd keeps from changes."""
    x = make_inputs(case, device)
    inputs = leaves(x.q, x.k, x.v)
    with torch.set_grad_enabled(recorded):
        out, lse, _ = flash_attn_func(*inputs, causal=True, return_attn_probs=True)
        want = out.detach() + x.dout
        out += x.dout
        lse += 1
    assert out.requires_grad == recorded
    assert_bitwise("out", out.detach(), want, case)


@everywhere(SMALL)
def test_gradients_accumulate(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    q, k, v = leaves(x.q, x.k, x.v)
    for _ in range(2):
        flash_attn_func(q, k, v, causal=True, deterministic=True).backward(x.dout)
    want = run_flash(x.q, x.k, x.v, x.dout, causal=True, deterministic=True)
    for name, t in (("dq", q), ("dk", k), ("dv", v)):
        assert_nearly(name, t.grad, 2 * getattr(want, name), case)


@everywhere(SMALL, SMALL.but(seqlen_q=200, seqlen_k=100))
def test_anomaly_detection_runs_clean(device: str, case: AttnCase) -> None:
    x = make_inputs(case, device)
    with torch.autograd.detect_anomaly(check_nan=True):
        out = flash_attn_func(*leaves(x.q, x.k, x.v), causal=True)
        out.backward(x.dout)


@everywhere(SMALL)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpoint_gives_the_same_gradients(
    device: str, case: AttnCase, use_reentrant: bool
) -> None:
    x = make_inputs(case, device)
    q, k, v = leaves(x.q, x.k, x.v)

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_func(q, k, v, causal=True, deterministic=True)

    out = checkpoint(block, q, k, v, use_reentrant=use_reentrant)
    out.backward(x.dout)
    want = run_flash(x.q, x.k, x.v, x.dout, causal=True, deterministic=True)
    ours = Result(out.detach(), want.lse, q.grad, k.grad, v.grad)
    for name in ("out", "dq", "dk", "dv"):
        assert_bitwise(name, getattr(ours, name), getattr(want, name), case)


@everywhere(SMALL)
def test_chained_through_a_network(device: str, case: AttnCase) -> None:
    """Two calls, the second on the first's output; views and dtypes between them as in a model."""
    x = make_inputs(case.but(heads=(2, 2), seqlen_k=case.seqlen_q), device)

    def chain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attend) -> torch.Tensor:
        y = attend(q, k, v)
        y = (y.flatten(2) * 1.5).view_as(y)
        return attend(y, k, y)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_func(q, k, v, causal=True)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s = torch.einsum("bihd,bjhd->bhij", q, k) * case.scale
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        return torch.einsum("bhij,bjhd->bihd", s.masked_fill(hidden, -torch.inf).softmax(-1), v)

    results = []
    for attend, dtype in ((ours, None), (plain, None), (plain, torch.float64)):
        inputs = leaves(*(t if dtype is None else t.to(dtype) for t in (x.q, x.k, x.v)))
        out = chain(*inputs, attend)
        grads = torch.autograd.grad(out, inputs, x.dout.to(out.dtype))
        results.append(Result(out.detach(), None, *grads))
    check_result(*results, case=case)


# The other forms: the same behaviour in autograd.


@dataclass
class Form:
    """A public function with its tensors and the arguments that follow them."""

    name: str
    function: Callable[..., torch.Tensor]
    layout: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]  # of qkv (b, s, 3, h, d)

    def __str__(self) -> str:
        return self.name

    def make(self, device: str, heads: int = 2) -> tuple[list[torch.Tensor], tuple]:
        """Tensors without gradients, and cu_seqlens and so on; the last row belongs to no sequence."""
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        gen = torch.Generator(device).manual_seed(3)
        qkv = torch.randn(2, 40, 3, heads, 64, generator=gen, device=device).to(dtype)
        if "varlen" not in self.name:
            return list(self.layout(qkv)), ()
        cu_seqlens = torch.tensor([0, 33, 33, 79], dtype=torch.int32, device=device)
        lengths = (cu_seqlens, 46) if "qkv" in self.name else (cu_seqlens,) * 2 + (46, 46)
        return list(self.layout(qkv.flatten(0, 1))), lengths


def split(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.contiguous() for t in qkv.unbind(-3))


def split_kv(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return qkv[..., 0, :, :].contiguous(), qkv[..., 1:, :, :].contiguous()


FORMS = [
    Form("dense", flash_attn_func, split),
    Form("kvpacked", flash_attn_kvpacked_func, split_kv),
    Form("qkvpacked", flash_attn_qkvpacked_func, lambda qkv: (qkv,)),
    Form("varlen", flash_attn_varlen_func, split),
    Form("varlen_kvpacked", flash_attn_varlen_kvpacked_func, split_kv),
    Form("varlen_qkvpacked", flash_attn_varlen_qkvpacked_func, lambda qkv: (qkv,)),
]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)
FEATURES = dict(dropout_p=0.2, window_size=(30, 3), softcap=3.0, deterministic=True)


@every_form
@pytest.mark.parametrize("features", [{}, FEATURES], ids=["plain", "features"])
def test_form_saves_only_inputs_and_outputs(device: str, form: Form, features: dict) -> None:
    tensors, lengths = form.make(device)
    inputs = leaves(*tensors)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = form.function(*inputs, *lengths, **features)
    expected = sum(t.numel() for t in inputs) + out.numel() + out.numel() // 64
    assert sum(t.numel() for t in saved) <= expected + 16
    (fewer,) = [[t for t in saved if t.numel() > 16]]
    assert len(fewer) == len(inputs) + 2, "a packed tensor is saved as one"


@every_form
def test_form_gives_only_requested_gradients(device: str, form: Form) -> None:
    tensors, lengths = form.make(device)
    inputs = leaves(*tensors)
    dout = torch.ones_like(form.function(*inputs, *lengths))
    want = torch.autograd.grad(form.function(*inputs, *lengths, deterministic=True), inputs, dout)
    for wanted in product((False, True), repeat=len(tensors)):
        inputs = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted)]
        out = form.function(*inputs, *lengths, deterministic=True)
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.backward(dout)
        for t, w, expected in zip(inputs, wanted, want):
            assert (t.grad is not None) == w
            if w:
                assert_bitwise("gradient", t.grad, expected, form)
    with torch.no_grad():
        assert form.function(*leaves(*tensors), *lengths).grad_fn is None


@every_form
def test_form_has_no_second_derivative(device: str, form: Form) -> None:
    tensors, lengths = form.make(device)
    inputs = leaves(*tensors)
    out = form.function(*inputs, *lengths, **FEATURES)
    with pytest.raises(RuntimeError, match="not twice.*create_graph"):
        torch.autograd.grad(out.square().sum(), inputs, create_graph=True)


@every_form
def test_form_notices_changes_in_place(device: str, form: Form) -> None:
    tensors, lengths = form.make(device)
    slopes = torch.full((2,), 0.1, device=device)
    for index in range(len(tensors) + 2):
        inputs = [t + 0 for t in leaves(*tensors)]
        out = form.function(*inputs, *lengths, alibi_slopes=slopes)
        with torch.no_grad():
            (*inputs, out, slopes)[index].mul_(2)
        with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
            out.sum().backward()


@every_form
def test_form_results_may_be_changed_in_place(device: str, form: Form) -> None:
    tensors, lengths = form.make(device)
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded):
            results = form.function(*leaves(*tensors), *lengths, return_attn_probs=True, **FEATURES)
            for result in results:
                result += 1
            assert results[0].requires_grad == results[1].requires_grad == recorded
            assert not results[2].requires_grad


@every_form
def test_form_gradient_of_lse_is_used(device: str, form: Form) -> None:
    """Alone and with that of out; both add up."""
    tensors, lengths = form.make(device)
    options = dict(return_attn_probs=True) | FEATURES

    def gradients(use_out: bool, use_lse: bool) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        inputs = leaves(*tensors)
        out, lse, _ = form.function(*inputs, *lengths, **options)
        loss = out.float().square().sum() * use_out
        if use_lse:
            loss = loss + lse.masked_fill(lse.isinf(), 0).square().sum()
        return torch.autograd.grad(loss, inputs)

    of_out, of_lse, of_both = gradients(True, False), gradients(False, True), gradients(True, True)
    assert of_out[0].any() and of_lse[0].any()
    for a, b, both in zip(of_out, of_lse, of_both):
        torch.testing.assert_close(both.float(), a.float() + b.float(), rtol=0.02, atol=0.02)


@every_form
def test_slopes_get_no_gradient(device: str, form: Form) -> None:
    tensors, lengths = form.make(device)
    slopes = torch.full((2,), 0.1, device=device, requires_grad=True)
    assert not form.function(*tensors, *lengths, alibi_slopes=slopes).requires_grad
    inputs = leaves(*tensors)
    form.function(*inputs, *lengths, alibi_slopes=slopes).sum().backward()
    assert slopes.grad is None and all(t.grad is not None for t in inputs)


@every_form
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_form_in_a_checkpoint(device: str, form: Form, use_reentrant: bool) -> None:
    """The recomputation draws the dropout of the first pass, in a region of several calls."""
    tensors, lengths = form.make(device)

    def block(*inputs: torch.Tensor) -> torch.Tensor:
        first = form.function(*inputs, *lengths, **FEATURES)
        return first + form.function(*inputs, *lengths, **FEATURES) * 2

    results = []
    for wrapped in (False, True):
        torch.manual_seed(1)
        inputs = leaves(*tensors)
        if wrapped:
            out = checkpoint(block, *inputs, use_reentrant=use_reentrant)
        else:
            out = block(*inputs)
        torch.rand(3, device=device)  # what is drawn between the passes does not matter
        out.sum().backward()
        results.append((out.detach(), *(t.grad for t in inputs)))
    for ours, want in zip(*results):
        assert_bitwise("checkpoint", ours, want, form)


@pytest.mark.cuda
@pytest.mark.parametrize("form", [f for f in FORMS if f.layout is split], ids=str)
@pytest.mark.parametrize("features", [{}, FEATURES], ids=["plain", "features"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_extension_and_python_record_the_same(
    form: Form, features: dict, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the extension serves the usual calls; everything else has the Python function."""
    tensors, lengths = form.make("cuda")
    options = dict(causal=causal) | features | dict(deterministic=True)
    results, recorded = [], []
    for fast in (True, False):
        if not fast:
            for name in ("_fast_attend", "_fast_varlen_attend"):
                monkeypatch.setattr(flash_attn_interface, name, None)
        inputs = leaves(*tensors)
        torch.manual_seed(5)
        out = form.function(*inputs, *lengths, **options)
        recorded.append(type(out.grad_fn).__name__)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    assert recorded[0] != recorded[1], recorded
    for name, ours, want in zip(("out", "dq", "dk", "dv"), *results):
        assert_bitwise(name, ours.detach(), want.detach(), str(form))
