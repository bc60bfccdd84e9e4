"""Attention under torch.func's transforms and batched gradients: the derivatives of a loop, or an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    merge_states,
)
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.modules.mha import MHA

EXAMPLES = 3


@dataclass(frozen=True)
class Form:
    """A public function as one of qkv (batch, rows, 3, heads, head_dim)."""

    name: str
    call: Callable[..., Any]

    def __str__(self) -> str:
        return self.name


def lengths_of(qkv: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens of three sequences in qkv's rows, the last two of which are no sequence's."""
    rows = qkv.shape[0] * qkv.shape[1]
    ends = torch.tensor([0, 5, 5, rows - 2], dtype=torch.int32, device=qkv.device)
    return ends, max(5, rows - 7)


def varlen(qkv: Tensor, **options: Any) -> Any:
    cu, longest = lengths_of(qkv)
    q, k, v = qkv.flatten(0, 1).unbind(1)
    return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, **options)


def varlen_kvpacked(qkv: Tensor, **options: Any) -> Any:
    cu, longest = lengths_of(qkv)
    flat = qkv.flatten(0, 1)
    q, kv = flat[:, 0], flat[:, 1:]
    return flash_attn_varlen_kvpacked_func(q, kv, cu, cu, longest, longest, **options)


def varlen_qkvpacked(qkv: Tensor, **options: Any) -> Any:
    return flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), *lengths_of(qkv), **options)


FORMS = [
    Form("dense", lambda qkv, **options: flash_attn_func(*qkv.unbind(2), **options)),
    Form(
        "grouped",
        lambda qkv, **options: flash_attn_func(
            qkv[:, :, 0], qkv[:, :, 1, :1], qkv[:, :, 2, 1:2], **options
        ),
    ),
    Form(
        "kvpacked",
        lambda qkv, **options: flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options),
    ),
    Form("qkvpacked", flash_attn_qkvpacked_func),
    Form("varlen", varlen),
    Form("varlen_kvpacked", varlen_kvpacked),
    Form("varlen_qkvpacked", varlen_qkvpacked),
]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)
PLAIN = dict(causal=True, deterministic=True)
FEATURES = dict(window_size=(6, 2), softcap=3.0, deterministic=True)
every_feature = pytest.mark.parametrize("options", [PLAIN, FEATURES], ids=["causal", "features"])


def make_qkv(device: str, *lead: int, heads: int = 2, head_dim: int = 16) -> Tensor:
    gen = torch.Generator("cpu").manual_seed(3)
    shape = (*lead, 2, 11, 3, heads, head_dim)
    x = torch.randn(shape, generator=gen).to(device)
    return x if device == "cpu" else x.to(torch.bfloat16)


def assert_close(ours: Tensor, want: Tensor, slack: float = 1) -> None:
    """Equal but for the order of sums; slack: for sums of many 16-bit numbers."""
    tolerance = 1e-5 if want.dtype == torch.float32 else 1e-2 * slack
    torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)
    assert want.any()


def loss_of(form: Form, **options: Any) -> Callable[[Tensor], Tensor]:
    """Attention and, beside it, something else that has a gradient."""

    def loss(qkv: Tensor) -> Tensor:
        return form.call(qkv, **options).float().square().sum() + qkv.float().sin().sum()

    return loss


def loop_gradient(loss: Callable[[Tensor], Tensor], qkv: Tensor) -> Tensor:
    """The gradients of each example, by plain autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    return torch.stack([torch.autograd.grad(loss(x), x)[0] for x in leaves])


@every_form
@every_feature
def test_autograd_through_vmap_is_that_of_a_loop(device: str, form: Form, options: dict) -> None:
    qkv = make_qkv(device, EXAMPLES)
    loss = loss_of(form, **options)
    leaf = qkv.clone().requires_grad_()
    vmap(loss)(leaf).sum().backward()
    assert_close(leaf.grad, loop_gradient(loss, qkv))


@every_form
@every_feature
def test_per_sample_gradients(device: str, form: Form, options: dict) -> None:
    qkv = make_qkv(device, EXAMPLES)
    loss = loss_of(form, **options)
    assert_close(vmap(grad(loss))(qkv), loop_gradient(loss, qkv))


@every_form
def test_gradient_of_a_transform(device: str, form: Form) -> None:
    qkv = make_qkv(device, EXAMPLES)
    loss = loss_of(form, **PLAIN)
    want = loop_gradient(loss, qkv)
    assert_close(grad(lambda x: vmap(loss)(x).sum())(qkv), want)
    assert_close(torch.stack([grad(loss)(x) for x in qkv]), want)
    _, pull = vjp(vmap(loss), qkv)
    (ours,) = pull(torch.ones(EXAMPLES, device=device))
    assert_close(ours, want)


@every_form
@pytest.mark.parametrize("in_dim", [1, 3, -1])
def test_vmap_over_any_dimension(device: str, form: Form, in_dim: int) -> None:
    qkv = make_qkv(device, EXAMPLES)
    loss = loss_of(form, **PLAIN)
    moved = qkv.movedim(0, in_dim)
    assert_close(vmap(grad(loss), in_dim, 0)(moved), loop_gradient(loss, qkv))


@every_form
def test_vmap_of_vmap(device: str, form: Form) -> None:
    qkv = make_qkv(device, 2, EXAMPLES)
    loss = loss_of(form, **PLAIN)
    want = torch.stack([loop_gradient(loss, x) for x in qkv])
    assert_close(vmap(vmap(grad(loss)))(qkv), want)
    leaf = qkv.clone().requires_grad_()
    vmap(vmap(loss), 1, 1)(leaf).sum().backward()
    assert_close(leaf.grad, want)


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("shared", ["q", "k", "v"])
def test_one_tensor_shared_by_all_examples(device: str, ragged: bool, shared: str) -> None:
    """Its gradient is the sum over examples, or under vmap(grad) each example's."""
    tensors = dict(zip("qkv", make_qkv(device, EXAMPLES).unbind(3)))
    tensors[shared] = tensors[shared][0]
    dims = {name: None if name == shared else 0 for name in tensors}

    def loss(x: dict[str, Tensor]) -> Tensor:
        if ragged:
            cu, longest = lengths_of(x["q"])
            flat = [t.flatten(0, 1) for t in x.values()]
            out = flash_attn_varlen_func(*flat, cu, cu, longest, longest, **PLAIN)
        else:
            out = flash_attn_func(*x.values(), **PLAIN)
        return out.float().square().sum()

    ours = vmap(grad(loss), (dims,))(tensors)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    vmap(loss, (dims,))(leaves).sum().backward()
    for i in range(EXAMPLES):
        one = {n: t if n == shared else t[i] for n, t in tensors.items()}
        want = grad(loss)(one)
        for name in tensors:
            assert_close(ours[name][i], want[name])
            if name != shared:
                assert_close(leaves[name].grad[i], want[name])
    assert_close(leaves[shared].grad, ours[shared].sum(0))


@every_form
def test_results_without_gradients_are_those_of_a_loop(device: str, form: Form) -> None:
    qkv = make_qkv(device, EXAMPLES)

    def results(x: Tensor) -> tuple[Tensor, Tensor]:
        return form.call(x, **PLAIN, return_attn_probs=True)[:2]

    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            ours = vmap(results)(qkv)
        for a, b in zip(ours, zip(*(results(x) for x in qkv))):
            assert_close(a, torch.stack(b))


@every_form
def test_gradient_of_lse_under_vmap(device: str, form: Form) -> None:
    def loss(x: Tensor) -> Tensor:
        lse = form.call(x, **PLAIN, return_attn_probs=True)[1]
        return lse.masked_fill(lse.isinf(), 0).square().sum()

    qkv = make_qkv(device, EXAMPLES)
    assert_close(vmap(grad(loss))(qkv), loop_gradient(loss, qkv))


@pytest.mark.parametrize("kind", ["shared", "per_batch", "per_example", "per_example_and_batch"])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "varlen"])
def test_slopes_under_vmap(device: str, ragged: bool, kind: str) -> None:
    form = FORMS[4 if ragged else 0]
    sequences = 3 if ragged else 2
    shape = dict(
        shared=(2,), per_batch=(sequences, 2), per_example=(EXAMPLES, 2),
        per_example_and_batch=(EXAMPLES, sequences, 2),
    )[kind]  # fmt: skip
    slopes = torch.linspace(0.1, 1, torch.Size(shape).numel(), device=device).view(shape)
    is_batched = kind.startswith("per_example")

    def loss(x: Tensor, slopes: Tensor) -> Tensor:
        return form.call(x, alibi_slopes=slopes, **PLAIN).float().square().sum()

    qkv = make_qkv(device, EXAMPLES)
    ours = vmap(grad(loss), (0, 0 if is_batched else None))(qkv, slopes)
    for i in range(EXAMPLES):
        assert_close(ours[i], grad(loss)(qkv[i], slopes[i] if is_batched else slopes))


def test_lengths_of_their_own_under_vmap(device: str) -> None:
    flat = make_qkv(device, EXAMPLES).flatten(1, 2)
    cu = torch.tensor([[0, 5, 20], [0, 9, 22], [0, 0, 7]], dtype=torch.int32, device=device)

    def loss(x: Tensor, cu: Tensor) -> Tensor:
        return flash_attn_varlen_qkvpacked_func(x, cu, 22, **PLAIN).float().square().sum()

    ours = vmap(grad(loss))(flat, cu)
    for i in range(EXAMPLES):
        assert_close(ours[i], grad(loss)(flat[i], cu[i]))


@every_form
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_batched_gradients_are_those_of_a_loop(device: str, form: Form, dropout_p: float) -> None:
    """torch.autograd.grad(is_grads_batched=True), of packed forms too."""
    leaf = make_qkv(device).requires_grad_()
    out = form.call(leaf, dropout_p=dropout_p, **PLAIN)
    douts = torch.randn(EXAMPLES, *out.shape, device=device).to(out.dtype)
    (ours,) = torch.autograd.grad(out, leaf, douts, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(douts):
        (want,) = torch.autograd.grad(out, leaf, dout, retain_graph=True)
        assert_close(ours[i], want)


@every_form
def test_jacrev(device: str, form: Form) -> None:
    qkv = make_qkv(device)[:1]

    def summed(x: Tensor) -> Tensor:
        return form.call(x, **PLAIN).float().flatten(0, -3).sum(0).flatten()[:5]

    ours = jacrev(summed)(qkv)
    leaf = qkv.clone().requires_grad_()
    for i, value in enumerate(summed(leaf)):
        (want,) = torch.autograd.grad(value, leaf, retain_graph=True)
        assert_close(ours[i], want)


# Dropout.


@every_form
def test_dropout_is_refused_where_vmap_refuses_randomness(device: str, form: Form) -> None:
    qkv = make_qkv(device, EXAMPLES)
    with pytest.raises(RuntimeError, match=r"flash_attn_.*dropout_p.*randomness"):
        vmap(lambda x: form.call(x, dropout_p=0.3))(qkv)
    with pytest.raises(RuntimeError, match=r"flash_attn_.*dropout_p.*randomness"):
        vmap(lambda _: form.call(qkv[0], dropout_p=0.3))(torch.zeros(2))


def masks_of(form: Form, qkv: Tensor, randomness: str, **dims: Any) -> tuple[Tensor, Tensor]:
    """S_dmask's signs and the gradient, of each example."""

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        out, _, probs = form.call(x, dropout_p=0.5, return_attn_probs=True, deterministic=True)
        return out.float().square().sum(), probs.detach()

    gradient, probs = vmap(grad(call, has_aux=True), randomness=randomness, **dims)(qkv)
    return probs.signbit(), gradient


@every_form
def test_masks_differ_or_agree_as_vmap_says(device: str, form: Form) -> None:
    same = make_qkv(device).expand(EXAMPLES, *make_qkv(device).shape)
    signs, gradient = masks_of(form, same, "same")
    assert all(torch.equal(signs[0], s) for s in signs)
    for g in gradient:
        assert_close(g, gradient[0])
    signs, gradient = masks_of(form, same, "different")
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(signs[i], signs[j])
        assert not torch.equal(gradient[i], gradient[j])


@every_form
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_gradients_have_the_mask_of_their_forward_pass(
    device: str, form: Form, randomness: str
) -> None:
    """vmap(grad), autograd through vmap and their outputs agree, seed by seed."""
    qkv = make_qkv(device, EXAMPLES)
    loss = loss_of(form, dropout_p=0.4, deterministic=True)
    torch.manual_seed(7)
    per_sample = vmap(grad(loss), randomness=randomness)(qkv)
    torch.manual_seed(7)
    leaf = qkv.clone().requires_grad_()
    vmap(loss, randomness=randomness)(leaf).sum().backward()
    assert_close(per_sample, leaf.grad)

    # v's gradient is linear: sum(v * dv) of sum(out) is sum(out) itself, with the same mask only.
    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        value = form.call(x, dropout_p=0.4, deterministic=True).float().sum()
        return value, value

    gradient, value = vmap(grad(total, has_aux=True), randomness=randomness)(qkv)
    dv, v = gradient[..., 2, :, :].float(), qkv[..., 2, :, :].float()
    if form.name.startswith("varlen"):
        flat = slice(0, -2)
        dv, v = (t.flatten(1, 2)[:, flat] for t in (dv, v))
    torch.testing.assert_close((v * dv).flatten(1).sum(1), value, rtol=3e-2, atol=3e-1)


def test_unbatched_tensors_draw_as_vmap_says(device: str) -> None:
    qkv, dummy = make_qkv(device), torch.zeros(EXAMPLES)

    def probs(_: Tensor) -> Tensor:
        return flash_attn_qkvpacked_func(qkv, 0.5, return_attn_probs=True)[2]

    different = vmap(probs, randomness="different")(dummy).signbit()
    assert not torch.equal(different[0], different[1])
    same = vmap(probs, randomness="same")(dummy).signbit()
    assert torch.equal(same[0], same[1])


def test_same_within_different(device: str) -> None:
    """The inner vmap's examples share a mask, the outer's do not."""
    qkv = make_qkv(device).expand(2, EXAMPLES, *make_qkv(device).shape)

    def probs(x: Tensor) -> Tensor:
        return flash_attn_qkvpacked_func(x, 0.5, return_attn_probs=True)[2]

    inner = vmap(probs, randomness="same")
    signs = vmap(inner, randomness="different")(qkv).signbit()
    for group in signs:
        assert all(torch.equal(group[0], s) for s in group)
    assert not torch.equal(signs[0, 0], signs[1, 0])


# Numbers that are tensors.


@every_form
@pytest.mark.parametrize("scale", [0.3, -0.2])
def test_learned_scale_gets_its_gradient(device: str, form: Form, scale: float) -> None:
    """Against differences of the loss, whatever mask, bias or softcap."""
    qkv = make_qkv("cpu").double()
    slopes = torch.tensor([0.2, 0.4])
    if device == "cuda":
        pytest.skip("fp64 runs on the CPU; test_learned_scale_on_both_devices compares")
    for options in (PLAIN, FEATURES, dict(alibi_slopes=slopes), dict(window_size=(2, 1))):
        leaf = torch.tensor(scale, dtype=torch.float64, requires_grad=True)

        def loss(s: Tensor | float, options: dict = options) -> Tensor:
            out, lse, _ = form.call(qkv, softmax_scale=s, return_attn_probs=True, **options)
            return out.square().sum() + lse.masked_fill(lse.isinf(), 0).sum()

        loss(leaf).backward()
        step = 1e-6
        want = (loss(scale + step) - loss(scale - step)) / (2 * step)
        torch.testing.assert_close(leaf.grad, want, rtol=1e-6, atol=1e-6)


@every_form
def test_learned_scale_on_both_devices(device: str, form: Form) -> None:
    qkv = make_qkv(device)
    scales = [torch.tensor([0.3], device=d, requires_grad=True) for d in {"cpu", device}]
    want = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    form.call(qkv.double().cpu(), softmax_scale=want, **FEATURES).square().sum().backward()
    for scale in scales:
        form.call(qkv, softmax_scale=scale, **FEATURES).float().square().sum().backward()
        assert scale.grad.shape == (1,) and scale.grad.device == scale.device
        tolerance = 1e-5 if device == "cpu" else 5e-2
        torch.testing.assert_close(
            scale.grad[0].double().cpu(), want.grad, rtol=tolerance, atol=tolerance
        )


@every_form
def test_scale_of_each_example(device: str, form: Form) -> None:
    qkv = make_qkv(device, EXAMPLES)
    scales = torch.tensor([0.1, 0.3, -0.2], device=device)

    def loss(x: Tensor, scale: Tensor) -> Tensor:
        return form.call(x, softmax_scale=scale, **PLAIN).float().square().sum()

    ours = vmap(grad(loss, (0, 1)))(qkv, scales)
    for i in range(EXAMPLES):
        for a, b in zip(ours, grad(loss, (0, 1))(qkv[i], scales[i])):
            assert_close(a[i], b)


@every_form
def test_softcap_that_requires_a_gradient_is_refused(device: str, form: Form) -> None:
    qkv, softcap = make_qkv(device), torch.tensor(3.0, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"flash_attn_\w+: softcap has no gradient.*detach"):
        form.call(qkv, softcap=softcap)
    with pytest.raises(RuntimeError, match=r"flash_attn_\w+: softcap has no gradient.*detach"):
        grad(lambda s: form.call(qkv, softcap=s).float().sum())(softcap.detach())
    leaf = torch.full((2,), 3.0, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"flash_attn_\w+: softcap has no gradient.*detach"):
        vmap(lambda s: form.call(qkv, softcap=s).float().sum())(leaf)


@every_form
def test_numbers_as_tensors_are_the_same_compiled_and_eager(device: str, form: Form) -> None:
    torch._dynamo.reset()
    qkv = make_qkv(device)

    def block(x: Tensor, scale: Tensor, softcap: Tensor) -> Tensor:
        return form.call(x, softmax_scale=scale, softcap=softcap, deterministic=True)

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    numbers = torch.tensor(0.3, device=device), torch.tensor(2.0, device=device)
    want = form.call(qkv, softmax_scale=0.3, softcap=2.0, deterministic=True)
    assert_close(block(qkv, *numbers), want)
    assert_close(compiled(qkv, *numbers), want)
    results = []
    for function in (block, compiled):
        leaf, scale = qkv.clone().requires_grad_(), numbers[0].clone().requires_grad_()
        function(leaf, scale, numbers[1]).float().square().sum().backward()
        results.append((leaf.grad, scale.grad))
    for ours, want in zip(*results):
        assert_close(ours, want)


def test_decodings_numbers_as_tensors_are_the_same_compiled_and_eager(device: str) -> None:
    torch._dynamo.reset()
    q, k, v = make_qkv(device).unbind(2)

    def block(scale: Tensor, softcap: Tensor, new: dict[str, Tensor]) -> Tensor:
        caches = k.clone(), v.clone()
        options = dict(softmax_scale=scale, softcap=softcap, cache_seqlens=4, causal=True)
        return flash_attn_with_kvcache(q, *caches, **options, **new)

    numbers = torch.tensor(0.3, device=device), torch.tensor(2.0, device=device)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for new in ({}, dict(k=k[:, :5], v=v[:, :5])):
        want = block(0.3, 2.0, new)
        assert_close(block(*numbers, new), want)
        assert_close(compiled(*numbers, new), want)


def test_tensors_that_are_no_number_are_refused(device: str) -> None:
    qkv = make_qkv(device)
    for name in ("softmax_scale", "softcap"):
        for wrong in (torch.ones(2), torch.ones((), dtype=torch.bool), torch.ones(0)):
            with pytest.raises(RuntimeError, match=f"{name} must be a number"):
                flash_attn_qkvpacked_func(qkv, **{name: wrong})
    for wrong in (torch.tensor(-1.0), torch.tensor(torch.inf)):
        with pytest.raises(RuntimeError, match="softcap must be 0"):
            flash_attn_qkvpacked_func(qkv, softcap=wrong)


# torch.compile, and the operators themselves.


@pytest.mark.parametrize("form", [FORMS[0], FORMS[4]], ids=str)
@pytest.mark.parametrize("transform", ["grad", "vmap_of_grad", "grad_of_vmap"])
def test_compiled_transforms(device: str, form: Form, transform: str) -> None:
    """torch.compile traces past the autograd functions, and comes to the operators."""
    torch._dynamo.reset()
    qkv, loss = make_qkv(device, EXAMPLES), loss_of(form, **PLAIN)
    function = dict(
        grad=lambda x: torch.stack([grad(loss)(t) for t in x]),
        vmap_of_grad=vmap(grad(loss)),
        grad_of_vmap=grad(lambda x: vmap(loss)(x).sum()),
    )[transform]
    assert_close(torch.compile(function, backend="aot_eager")(qkv), loop_gradient(loss, qkv))


LOST = {
    "rotary": lambda x: apply_rotary_emb(x[:, :, 0], *rotary_tables(x)).float().square().sum(),
    "packed": lambda x: flash_attn_qkvpacked_func(x, **PLAIN).float().square().sum(),
    "merge": lambda x: merge_states(
        *(x[:, :, 0], x[:, :, 0, :, 0].mT.float(), x[:, :, 1], x[:, :, 1, :, 0].mT.float())
    )[0].float().square().sum(),
}  # fmt: skip


def rotary_tables(x: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.linspace(0, 3, x.shape[1] * 8, device=x.device).view(x.shape[1], 8)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


@pytest.mark.parametrize("name", LOST)
def test_what_a_compiled_transform_would_lose_runs_uncompiled_or_raises(
    device: str, name: str
) -> None:
    torch._dynamo.reset()
    x, gradient = make_qkv(device), grad(LOST[name])
    assert_close(torch.compile(gradient, backend="aot_eager")(x), gradient(x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="inside of torch.func's transforms"):
        torch.compile(gradient, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_forward_mode_is_refused(device: str, fullgraph: bool) -> None:
    torch._dynamo.reset()
    qkv, loss = make_qkv(device), loss_of(FORMS[0], **PLAIN)
    compiled = torch.compile(
        lambda x: jvp(loss, (x,), (x,))[1], backend="aot_eager", fullgraph=fullgraph
    )
    with pytest.raises(Exception, match="has no forward-mode"):
        compiled(qkv)


def operator_loss(qkv: Tensor, **changes: Any) -> Tensor:
    """A loss of the operator's out and softmax_lse."""
    options = dict(
        dropout_p=0.0, softmax_scale=0.3, causal=True, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    q, k, v = qkv.unbind(2)
    out, lse, *_ = torch.ops.flash_attn._flash_attn_forward(q, k, v, **(options | changes))
    return out.float().square().sum() + lse.sin().sum()


def public_loss(qkv: Tensor, **options: Any) -> Tensor:
    q, k, v = qkv.unbind(2)
    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=0.3, return_attn_probs=True, **options)
    return out.float().square().sum() + lse.sin().sum()


def test_operators_have_the_functions_derivatives(device: str) -> None:
    qkv = make_qkv(device, EXAMPLES)
    want = loop_gradient(lambda x: public_loss(x, causal=True), qkv)
    assert_close(loop_gradient(operator_loss, qkv), want)
    assert_close(vmap(grad(operator_loss))(qkv), want)
    assert_close(grad(lambda x: vmap(operator_loss)(x).sum())(qkv), want)
    scale = torch.tensor(0.3, device=device, requires_grad=True)
    operator_loss(qkv[0], softmax_scale=9.0, softmax_scale_tensor=scale).backward()
    assert scale.grad.abs() > 0


def operator_of(qkv: Tensor, form: str, **given: Any) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the forward operator that returns S_dmask too."""
    q, k, v = qkv.unbind(2)
    score = 0.5, 0.3, False, -1, -1, 0.0, None, True  # dropout_p first, return_softmax last
    if form == "dense":
        return lambda: torch.ops.flash_attn._flash_attn_forward(q, k, v, *score, **given)
    cu, longest = lengths_of(qkv)
    return lambda: torch.ops.flash_attn._flash_attn_varlen_forward(
        *(t.flatten(0, 1) for t in (q, k, v)), cu, cu, longest, longest, *score, **given
    )


def masks_of_operator(qkv: Tensor, form: str, **given: Any) -> Callable[[Tensor], Tensor]:
    """A function of something else that returns what the operator draws for qkv, S_dmask's signs."""
    call = operator_of(qkv, form, **given)
    return lambda x: call()[2].signbit() | (x != x)


@pytest.mark.parametrize("form", ["dense", "varlen"])
def test_operator_of_unmapped_tensors_draws_as_vmap_says(device: str, form: str) -> None:
    qkv, dummy = make_qkv(device), torch.zeros(EXAMPLES, device=device)
    draw = masks_of_operator(qkv, form)
    with pytest.raises(RuntimeError, match=r'_forward: dropout_p.*vmap refuses.*"different"'):
        vmap(draw)(dummy)
    same = vmap(draw, randomness="same")(dummy)
    assert all(torch.equal(same[0], signs) for signs in same)
    different = vmap(draw, randomness="different")(dummy)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(different[i], different[j])

    state = torch.tensor([5, 7], device=device)
    given = masks_of_operator(qkv, form, rng_state=state)
    drawn_once = given(dummy[0])
    assert all(torch.equal(drawn_once, signs) for signs in vmap(given)(dummy))


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
@pytest.mark.parametrize("mapped", ["qkv", "rng_state", "both"])
@pytest.mark.parametrize("form", ["dense", "varlen"])
def test_operator_with_a_given_random_state_is_that_of_each_example(
    device: str, form: str, mapped: str, randomness: str
) -> None:
    """Nothing is drawn: out, masks and gradients are those of one call after the other."""
    qkv_dim, state_dim = (0 if mapped in (name, "both") else None for name in ("qkv", "rng_state"))
    qkvs = make_qkv(device, *(() if qkv_dim is None else (EXAMPLES,)))
    states = torch.tensor([[5, 8], [6, 8], [5, 8]], device=device)
    states = states[0] if state_dim is None else states

    def run(qkv: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        def loss(qkv: Tensor) -> tuple[Tensor, Tensor]:
            out, _, probabilities, _ = operator_of(qkv, form, rng_state=state)()
            return out.float().square().sum(), probabilities.signbit()

        return torch.func.grad(loss, has_aux=True)(qkv)

    ours = vmap(run, (qkv_dim, state_dim), randomness=randomness)(qkvs, states)
    for i in range(EXAMPLES):
        one = (x if dim is None else x[i] for x, dim in ((qkvs, qkv_dim), (states, state_dim)))
        dqkv, signs = run(*one)
        assert torch.equal(ours[1][i], signs)
        assert_close(ours[0][i], dqkv)


@pytest.mark.parametrize("outer", ["same", "different"])
@pytest.mark.parametrize("inner", ["same", "different"])
def test_operator_draws_for_each_of_two_vmaps(device: str, inner: str, outer: str) -> None:
    draw = masks_of_operator(make_qkv(device), "dense")
    dummy = torch.zeros(2, 3, device=device)
    signs = vmap(vmap(draw, randomness=inner), randomness=outer)(dummy)
    assert torch.equal(signs[0, 0], signs[0, 1]) == (inner == "same")
    assert torch.equal(signs[0, 0], signs[1, 0]) == (outer == "same")
    assert torch.equal(signs[0], signs[1]) == (outer == "same")


@pytest.mark.parametrize("outer", ["same", "different"])
@pytest.mark.parametrize("inner", ["same", "different"])
def test_operator_of_tensors_that_two_vmaps_map_has_their_masks(
    device: str, inner: str, outer: str
) -> None:
    qkv = make_qkv(device, 2, EXAMPLES)

    def draw(x: Tensor) -> Tensor:
        return masks_of_operator(x, "dense")(torch.zeros((), device=device))

    signs = vmap(vmap(draw, randomness=inner), randomness=outer)(qkv)
    assert torch.equal(signs[1, 0], signs[1, 1]) == (inner == "same")
    assert torch.equal(signs[0], signs[1]) == (outer == "same")


def test_gradient_of_an_unmapped_operator_has_its_masks(device: str) -> None:
    """sum(v * dv) of sum(out) is sum(out) itself, with the same masks only."""
    qkv = make_qkv(device).requires_grad_()
    dummy = torch.zeros(EXAMPLES, device=device)

    def total(x: Tensor) -> Tensor:
        q, k, v = qkv.unbind(2)
        score = 0.4, 0.3, False, -1, -1, 0.0, None, False
        out = torch.ops.flash_attn._flash_attn_forward(q, k, v, *score)[0]
        return out.float().sum() + x

    totals = vmap(total, randomness="different")(dummy)
    assert totals[0] != totals[1]
    totals.sum().backward()
    dv, v = qkv.grad[:, :, 2].float(), qkv.detach()[:, :, 2].float()
    torch.testing.assert_close((v * dv).sum(), totals.detach().sum(), rtol=3e-2, atol=3e-1)


def test_what_operators_cannot_differentiate_is_an_error(device: str) -> None:
    qkv = make_qkv(device)
    softcap = torch.tensor(3.0, requires_grad=True)
    with pytest.raises(RuntimeError, match="softcap_tensor has no gradient"):
        operator_loss(qkv, softcap_tensor=softcap)
    with pytest.raises(RuntimeError, match="_flash_attn_forward: dropout_p.*randomness"):
        vmap(lambda x: operator_loss(x, dropout_p=0.2))(qkv[None])
    with pytest.raises(RuntimeError, match="flash_attn .*once, not twice"):
        grad(lambda x: grad(operator_loss)(x).float().square().sum())(qkv)
    with pytest.raises(NotImplementedError, match="_flash_attn_forward has no forward-mode"):
        jvp(operator_loss, (qkv,), (qkv,))
    cu, longest = lengths_of(qkv)
    leaves = [t.clone().requires_grad_() for t in qkv.flatten(0, 1).unbind(1)]
    used = torch.zeros(3, dtype=torch.int32, device=device)
    out, *_ = torch.ops.flash_attn._flash_attn_varlen_forward(
        *leaves, cu, cu, longest, longest, 0.0, 1.0, False, seqused_k=used
    )
    with pytest.raises(RuntimeError, match="no gradients with seqused_k"):
        out.sum().backward()


# What has no derivative says so.


@every_form
def test_second_derivatives_are_refused(device: str, form: Form) -> None:
    qkv, loss = make_qkv(device), loss_of(form, **PLAIN)
    with pytest.raises(RuntimeError, match="flash_attn .*once, not twice"):
        grad(lambda x: grad(loss)(x).float().square().sum())(qkv)
    with pytest.raises(RuntimeError, match="flash_attn .*once, not twice"):
        vmap(grad(lambda x: grad(loss)(x).float().square().sum()))(qkv[None])
    leaf = qkv.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="flash_attn .*once, not twice"):
        grad(loss)(leaf).float().square().sum().backward()


@every_form
def test_forward_mode_is_refused(device: str, form: Form) -> None:
    qkv, loss = make_qkv(device), loss_of(form, **PLAIN)
    with pytest.raises(NotImplementedError, match=r"flash_attn\w* has no forward-mode"):
        jvp(loss, (qkv,), (qkv,))
    with pytest.raises(NotImplementedError, match=r"flash_attn\w* has no forward-mode"):
        vmap(lambda x: jvp(loss, (x,), (x,)))(qkv[None])
    with pytest.raises(NotImplementedError, match=r"flash_attn\w* has no forward-mode"):
        jvp(vmap(loss), (qkv[None],), (qkv[None],))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(qkv, qkv)
        with pytest.raises(NotImplementedError, match=r"flash_attn\w* has no forward-mode"):
            form.call(dual)
        assert form.call(qkv) is not None


def test_decoding_has_no_gradient_and_says_so(device: str) -> None:
    q, k, v = make_qkv(device).unbind(2)

    def loss(x: Tensor) -> Tensor:
        return x.float().sum() + flash_attn_with_kvcache(x, k, v, cache_seqlens=4).float().sum()

    with pytest.raises(RuntimeError, match=r"flash_attn_with_kvcache has no gradient.*grad"):
        grad(loss)(q)
    with pytest.raises(RuntimeError, match=r"flash_attn_with_kvcache has no gradient.*vmap"):
        vmap(loss)(q[None].clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache has no forward-mode"):
        jvp(loss, (q,), (q,))
    assert vmap(loss)(q[None]).shape == (1,)
    assert torch.equal(grad(lambda x: x.float().sum() + loss(x.detach()))(q), torch.ones_like(q))


# merge_states.


def make_parts(device: str, ragged: bool, *lead: int) -> list[Tensor]:
    gen = torch.Generator("cpu").manual_seed(2)
    rows, lse = ((9, 2, 16), (2, 9)) if ragged else ((2, 9, 2, 16), (2, 2, 9))
    shapes = (rows, lse, rows, lse)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    parts = [torch.randn(*lead, *s, generator=gen).to(device) for s in shapes]
    return [p.to(dtype) if i % 2 == 0 else p for i, p in enumerate(parts)]


def merge_loss(*parts: Tensor) -> Tensor:
    out, lse = merge_states(*parts)
    return out.float().square().sum() + lse.sin().sum()


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "varlen"])
def test_merge_states_under_transforms(device: str, ragged: bool) -> None:
    parts = make_parts(device, ragged, EXAMPLES)
    leaves = [p.clone().requires_grad_() for p in parts]
    vmap(merge_loss)(*leaves).sum().backward()
    ours = vmap(grad(merge_loss, (0, 1, 2, 3)))(*parts)
    for i in range(EXAMPLES):
        one = [p[i].clone().requires_grad_() for p in parts]
        want = torch.autograd.grad(merge_loss(*one), one)
        for leaf, a, b in zip(leaves, ours, want):
            assert_close(a[i], b)
            assert_close(leaf.grad[i], b)
    with pytest.raises(NotImplementedError, match="merge_states has no forward-mode"):
        jvp(merge_loss, tuple(p[0] for p in parts), tuple(p[0] for p in parts))


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "varlen"])
def test_merge_states_with_one_part_for_all_examples(device: str, ragged: bool) -> None:
    parts = make_parts(device, ragged, EXAMPLES)
    shared = [*parts[:2], parts[2][0], parts[3][0]]
    ours = vmap(grad(merge_loss, (0, 1, 2, 3)), (0, 0, None, None))(*shared)
    for i in range(EXAMPLES):
        one = [parts[0][i], parts[1][i], *shared[2:]]
        for a, b in zip(ours, grad(merge_loss, (0, 1, 2, 3))(*one)):
            assert_close(a[i], b)


def test_merge_states_has_a_second_derivative() -> None:
    parts = [p.double().requires_grad_() for p in make_parts("cpu", False)]
    assert torch.autograd.gradgradcheck(lambda *p: merge_states(*p), parts)


# A stack of modules.


def test_ensemble_of_modules(device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    kinds = dict(causal=True, device=device, dtype=dtype)
    models = [MHA(32, 2, **kinds) for _ in range(EXAMPLES)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(EXAMPLES, 2, 9, 32, device=device).to(dtype)

    def call(parameters: dict, buffers: dict, x: Tensor) -> Tensor:
        return functional_call(models[0], (parameters, buffers), (x,)).float().square().sum()

    vmap(call)(parameters, buffers, x).sum().backward()
    for i, model in enumerate(models):
        model(x[i]).float().square().sum().backward()
        for name, p in model.named_parameters():
            assert_close(parameters[name].grad[i], p.grad, slack=5)
