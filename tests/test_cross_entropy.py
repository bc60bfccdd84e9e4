"""Cross entropy against torch's in fp64: torch operations on the CPU, Triton kernels on CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from harness import capture
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import flash_attn
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton import _cross_entropy_kernels as kernels
from flash_attn.ops.triton import _cross_entropy_ops as ops
from flash_attn.ops.triton.cross_entropy import CrossEntropyLoss as AutogradName
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

IGNORED = -100


@dataclass(frozen=True)
class LossCase:
    """size: the standard deviation of the logits."""

    rows: int = 9
    vocab: int = 1000
    dtype: str = "fp32"
    smoothing: float = 0.0
    scale: float = 1.0
    z: float = 0.0
    labels: str = "int64"
    size: float = 4.0

    def __str__(self) -> str:
        options = f"s{self.smoothing:g}-x{self.scale:g}-z{self.z:g}"
        return f"r{self.rows}-v{self.vocab}-{self.dtype}-{options}-{self.labels}-{self.size:g}"

    def but(self, **changes: Any) -> LossCase:
        return replace(self, **changes)

    @property
    def options(self) -> dict[str, float]:
        return dict(label_smoothing=self.smoothing, logit_scale=self.scale, lse_square_scale=self.z)


BASE = LossCase()
ALL = BASE.but(smoothing=0.1, scale=0.7, z=1e-2)
CASES = [
    *(BASE.but(dtype=dtype) for dtype in DTYPES),
    *(ALL.but(dtype=dtype) for dtype in DTYPES),
    *(ALL.but(vocab=vocab) for vocab in (1, 2, 127, 128, 4096, 8192, 8193, 20000)),
    BASE.but(vocab=131072, rows=10, dtype="bf16"),
    BASE.but(smoothing=0.3),
    BASE.but(smoothing=1.0),
    BASE.but(scale=-1.5),
    BASE.but(scale=0.0),
    BASE.but(z=-0.1),
    BASE.but(labels="int32"),
    BASE.but(size=100.0),
    BASE.but(rows=1),
    BASE.but(rows=300, vocab=37),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def make(case: LossCase, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """logits, labels with some ignored, and a gradient of the losses."""
    gen = torch.Generator().manual_seed(case.rows + case.vocab)
    logits = case.size * torch.randn(case.rows, case.vocab, generator=gen, dtype=torch.float64)
    labels = torch.randint(case.vocab, (case.rows,), generator=gen)
    labels[1::3] = IGNORED
    dlosses = torch.randn(case.rows, generator=gen, dtype=torch.float64)
    dtype = DTYPES[case.dtype]
    wide = torch.promote_types(dtype, torch.float32)
    labels = labels.to(getattr(torch, case.labels))
    return logits.to(dtype).to(device), labels.to(device), dlosses.to(wide).to(device)


def oracle(case: LossCase, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """torch's cross entropy in fp64, and the z loss by its formula."""
    scaled = logits.double() * case.scale
    losses = F.cross_entropy(
        scaled, labels.long(), reduction="none", label_smoothing=case.smoothing
    )
    z_losses = torch.where(labels == IGNORED, 0.0, case.z * scaled.logsumexp(1).square())
    return losses + z_losses, z_losses


def gradient(logits: Tensor, labels: Tensor, dlosses: Tensor, **options: Any) -> Tensor:
    logits = logits.detach().requires_grad_()
    losses, _ = cross_entropy_loss(logits, labels, **options)
    return torch.autograd.grad(losses, logits, dlosses)[0]


def exact_gradient(case: LossCase, logits: Tensor, labels: Tensor, dlosses: Tensor) -> Tensor:
    exact = logits.detach().double().requires_grad_()
    return torch.autograd.grad(oracle(case, exact, labels)[0], exact, dlosses.double())[0]


def assert_rounded(ours: Tensor, want: Tensor, dtype: torch.dtype, magnitude: float) -> None:
    """Equal but for one rounding to dtype and the arithmetic's, of values up to magnitude."""
    assert ours.dtype == dtype and ours.shape == want.shape
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(
        ours.double(), want, rtol=0.51 * torch.finfo(dtype).eps + 4 * eps, atol=8 * eps * magnitude
    )


@every_case
def test_losses_are_torchs(case: LossCase, device: str) -> None:
    logits, labels, dlosses = make(case, device)
    losses, z_losses = cross_entropy_loss(logits, labels, **case.options)
    want, want_z = oracle(case, logits, labels)
    magnitude = 1 + (case.scale * logits).abs().max().item()
    magnitude *= 1 + 2 * abs(case.z) * magnitude
    assert_rounded(losses, want, dlosses.dtype, magnitude)
    assert_rounded(z_losses, want_z, dlosses.dtype, magnitude)
    assert (losses[labels == IGNORED] == 0).all()


@every_case
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_gradients_are_torchs(case: LossCase, inplace: bool, device: str) -> None:
    logits, labels, dlosses = make(case, device)
    want = exact_gradient(case, logits, labels, dlosses)
    size = (case.scale * logits).abs().max().item()
    before = logits.clone()
    ours = gradient(logits, labels, dlosses, inplace_backward=inplace, **case.options)
    magnitude = abs(case.scale) * (1 + size) * (1 + 2 * abs(case.z) * size) * dlosses.abs().max()
    assert_rounded(ours, want, logits.dtype, 1e-3 + magnitude.item())
    assert (ours[labels == IGNORED] == 0).all()
    assert torch.equal(logits, ours if inplace else before)


def layouts(logits: Tensor) -> dict[str, Tensor]:
    rows, cols = logits.shape
    wide = torch.full((rows, 2 * cols + 3), torch.nan, dtype=logits.dtype, device=logits.device)
    return {
        "columns first": logits.t().contiguous().t(),
        "odd rows": wide[:, 1 : cols + 1].copy_(logits),
        "every other column": wide.clone()[:, 2 : 2 * cols + 2 : 2].copy_(logits),
    }


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("layout", ["columns first", "odd rows", "every other column"])
def test_any_strides(layout: str, inplace: bool, device: str) -> None:
    logits, labels, dlosses = make(ALL, device)
    want = gradient(logits, labels, dlosses, **ALL.options)
    strided = layouts(logits)[layout]
    losses, _ = cross_entropy_loss(strided, torch.stack((labels, labels), 1)[:, 1], **ALL.options)
    close = dict(rtol=1e-5, atol=1e-6)  # vectors of another width are summed in another order
    torch.testing.assert_close(
        losses, cross_entropy_loss(logits, labels, **ALL.options)[0], **close
    )
    dlosses = torch.stack((dlosses, dlosses), 1)[:, 0]
    ours = gradient(strided, labels, dlosses, inplace_backward=inplace, **ALL.options)
    torch.testing.assert_close(ours, want, **close)
    assert inplace == torch.equal(strided, ours)


def test_rows_that_share_memory_are_not_overwritten(device: str) -> None:
    logits, labels, dlosses = make(BASE, device)
    shared = logits[:1].expand(BASE.rows, -1)
    want = gradient(shared.contiguous(), labels, dlosses)
    ours = gradient(shared, labels, dlosses, inplace_backward=True)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(shared[0], logits[0])


def test_gradient_written_over_the_logits_is_told_to_others(device: str) -> None:
    """Whoever saved the logits gets torch's error instead of wrong gradients."""
    x, labels, _ = make(BASE, device)
    x.requires_grad_()
    logits = 1 * x
    square = logits.square().sum()
    losses, _ = cross_entropy_loss(logits, labels, inplace_backward=True)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_leaf_gets_its_gradient_in_place(device: str) -> None:
    logits, labels, _ = make(BASE, device)
    want = exact_gradient(BASE, logits, labels, torch.ones(BASE.rows, device=device))
    leaf = logits.clone().requires_grad_()
    cross_entropy_loss(leaf, labels, inplace_backward=True)[0].sum().backward()
    assert_rounded(leaf.grad, want, torch.float32, 10.0)


def test_no_rows(device: str) -> None:
    logits = torch.empty(0, 50, device=device, requires_grad=True)
    labels = torch.empty(0, device=device, dtype=torch.int64)
    losses, z_losses = cross_entropy_loss(logits, labels, label_smoothing=0.1)
    assert losses.shape == z_losses.shape == (0,)
    losses.sum().backward()
    assert logits.grad.shape == (0, 50)


def test_ignored_class_may_be_a_class(device: str) -> None:
    logits, labels, dlosses = make(BASE, device)
    labels = labels.clamp(min=0)
    labels[::2] = 3
    want = F.cross_entropy(logits.double(), labels, ignore_index=3, reduction="none")
    losses, _ = cross_entropy_loss(logits, labels, ignore_index=3)
    assert_rounded(losses, want, torch.float32, 20.0)
    grad = gradient(logits, labels, dlosses, ignore_index=3)
    assert (grad[::2] == 0).all() and (grad[1::2] != 0).any()


def test_infinite_and_undefined_logits(device: str) -> None:
    """-inf takes no part, be it a whole block at the beginning; ignored rows pass nothing on."""
    logits, labels, dlosses = make(BASE.but(vocab=9000, rows=6), device)
    logits[0, :8500], labels[0] = -torch.inf, 8999
    logits[2, 3:], labels[2] = -torch.inf, 1
    logits[4] = torch.nan
    labels[4] = IGNORED
    losses, _ = cross_entropy_loss(logits, labels)
    assert_rounded(losses, oracle(BASE, logits, labels)[0], torch.float32, 20.0)
    grad = gradient(logits, labels, dlosses)
    keep = labels != IGNORED
    want = exact_gradient(BASE, logits[keep], labels[keep], dlosses[keep])
    assert_rounded(grad[keep], want, torch.float32, 20.0)
    assert (grad[~keep] == 0).all()
    labels[0] = 0
    assert cross_entropy_loss(logits, labels)[0][0] == torch.inf


@pytest.mark.parametrize("label", [-1, 1000, 1 << 40], ids=str)
def test_label_that_is_no_class(label: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels, dlosses = make(BASE, device)
    labels[5] = label
    message = rf"labels must be in \[0, 1000\) or ignore_index = -100; got {label} in row 5"
    monkeypatch.setenv("FLASH_ATTN_CHECK_DEVICE_DATA", "1")
    with pytest.raises(RuntimeError, match=message):
        cross_entropy_loss(logits, labels)
    if device == "cuda":
        monkeypatch.delenv("FLASH_ATTN_CHECK_DEVICE_DATA")
        losses, _ = cross_entropy_loss(logits, labels)
        assert losses.isnan().nonzero().flatten().tolist() == [5]
        assert gradient(logits, labels, dlosses).isfinite().all()


def test_lse_of_the_caller_is_used_where_it_can_be(device: str) -> None:
    logits, labels, dlosses = make(BASE, device)
    lse = logits.logsumexp(1)
    want = cross_entropy_loss(logits, labels, lse_square_scale=0.1)[0]
    ours = cross_entropy_loss(logits, labels, lse, lse_square_scale=0.1)[0]
    torch.testing.assert_close(ours, want)
    kept = labels != IGNORED
    moved = cross_entropy_loss(logits, labels, lse + 1)[0]
    torch.testing.assert_close(moved[kept], cross_entropy_loss(logits, labels)[0][kept] + 1)
    smooth = cross_entropy_loss(logits, labels, lse + 1, label_smoothing=0.1)[0]
    assert torch.equal(smooth, cross_entropy_loss(logits, labels, label_smoothing=0.1)[0])
    torch.testing.assert_close(
        gradient(logits, labels, dlosses, precomputed_lse=lse.double()),
        gradient(logits, labels, dlosses),
    )


def test_z_losses_are_for_the_record(device: str) -> None:
    logits, labels, _ = make(ALL, device)
    losses, z_losses = cross_entropy_loss(logits.requires_grad_(), labels, **ALL.options)
    assert losses.requires_grad and not z_losses.requires_grad
    with torch.no_grad():
        assert not cross_entropy_loss(logits, labels, **ALL.options)[0].requires_grad


def test_autocast_changes_nothing(device: str) -> None:
    logits, labels, dlosses = make(ALL, device)
    want = gradient(logits, labels, dlosses, **ALL.options)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours = gradient(logits, labels, dlosses, **ALL.options)
    assert torch.equal(ours, want)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled(dynamic: bool, device: str) -> None:
    def step(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses, z_losses = cross_entropy_loss(
            2 * logits, labels, inplace_backward=True, **ALL.options
        )
        return losses.sum() / (labels != IGNORED).sum(), z_losses

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (9, 12):
        logits, labels, _ = make(ALL.but(rows=rows), device)
        results = []
        for function in (compiled, step):
            x = logits.clone().requires_grad_()
            loss, z_losses = function(x, labels)
            loss.backward()
            results.append((loss.detach(), z_losses, x.grad))
        for ours, want in zip(*results):
            torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("case", [BASE, ALL], ids=str)
def test_operators_keep_torchs_rules(case: LossCase, device: str) -> None:
    logits, labels, dlosses = make(case, device)
    options = (case.smoothing, case.scale, case.z, IGNORED, 0, case.vocab)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.forward, (logits, labels, None, *options), test_utils=tests)
    _, _, lse = ops.forward(logits, labels, None, *options)
    inputs = (dlosses, logits, labels, lse, *options)
    torch.library.opcheck(ops.backward, inputs, test_utils=tests)
    into = (*inputs, torch.empty_like(logits))
    torch.library.opcheck(ops.backward_into, into, test_utils=tests)


def small(**options: Any) -> tuple[Any, Tensor]:
    logits, labels, _ = make(LossCase(rows=4, vocab=7, dtype="fp64"), "cpu")
    return lambda x: cross_entropy_loss(x, labels, **options)[0], logits


@pytest.mark.parametrize("options", [{}, ALL.options], ids=["", "all"])
def test_first_and_second_derivatives(options: dict[str, float]) -> None:
    function, logits = small(**options)
    logits.requires_grad_()
    assert gradcheck(function, logits, check_batched_grad=True)
    assert gradgradcheck(function, logits)
    in_place, _ = small(inplace_backward=True, **options)
    assert gradgradcheck(lambda x: in_place(x.clone()), logits)


def test_transforms_of_torch_func(device: str) -> None:
    _, labels, _ = make(ALL, device)
    stack = torch.randn(3, ALL.rows, ALL.vocab, device=device)

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy_loss(logits, labels, inplace_backward=True, **ALL.options)[0].sum()

    want = torch.stack(
        [gradient(x, labels, torch.ones(9, device=device), **ALL.options) for x in stack]
    )
    torch.testing.assert_close(torch.func.grad(loss)(stack[0]), want[0])
    compiled = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(stack[0]), want[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(stack), want)
    x = stack.clone().requires_grad_()
    torch.func.vmap(loss, in_dims=1)(x.transpose(0, 1)).sum().backward()
    torch.testing.assert_close(x.grad, want)
    per_row = torch.func.jacrev(lambda t: cross_entropy_loss(t, labels)[0])(stack[0])
    assert (per_row.sum((0, 2)).abs() < 1e-4).all() and per_row.abs().max() > 0.1


def test_derivative_that_does_not_exist_is_an_error(device: str) -> None:
    logits, labels, _ = make(BASE, device)

    def loss(x: Tensor) -> Tensor:
        return cross_entropy_loss(x, labels)[0].sum()

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (logits,), (logits,))
    with pytest.raises(RuntimeError, match="cross_entropy_fwd has no derivative of its own"):
        options = (0.0, 1.0, 0.0, IGNORED, 0, BASE.vocab)
        ops.forward(logits.requires_grad_(), labels, None, *options)[0].sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_module_is_torchs(reduction: str, device: str) -> None:
    logits, labels, _ = make(ALL, device)
    ours = CrossEntropyLoss(reduction=reduction, label_smoothing=0.1)(logits, labels)
    theirs = torch.nn.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs(logits, labels))
    module = CrossEntropyLoss(
        IGNORED, reduction, 0.1, 0.7, 1e-2, inplace_backward=True, return_z_loss=True
    )
    loss, z_loss = module(logits, labels)
    want = [x.float() for x in oracle(ALL, logits, labels)]
    if reduction != "none":
        want = [x.sum() for x in want]
    if reduction == "mean":
        want = [x / (labels != IGNORED).sum() for x in want]
    torch.testing.assert_close([loss, z_loss], want)


def test_module_without_a_counted_row_is_undefined_as_torchs(device: str) -> None:
    logits, labels, _ = make(BASE, device)
    assert CrossEntropyLoss()(logits, labels.fill_(IGNORED)).isnan()
    with pytest.raises(NotImplementedError, match="reduction must be one of"):
        CrossEntropyLoss(reduction="median")


def test_name_of_the_autograd_function(device: str) -> None:
    logits, labels, _ = make(BASE, device)
    losses, z_losses = AutogradName.apply(logits, labels, None, 0.1, 0.7, 0.0, IGNORED, False, None)
    want = cross_entropy_loss(logits, labels, label_smoothing=0.1, logit_scale=0.7)
    assert torch.equal(losses, want[0]) and torch.equal(z_losses, want[1])


WRONG: list[tuple[dict[str, Any], str]] = [
    (dict(logits=torch.zeros(2, 3, 4)), r"logits must have shape \(rows, vocab\)"),
    (dict(logits=torch.zeros(2, 0)), r"vocab at least 1; got \(2, 0\)"),
    (dict(logits=torch.zeros(2, 4).int()), "logits must have a floating dtype; got torch.int32"),
    (dict(labels=torch.zeros(3).long()), r"labels must have shape \(rows,\) = \(2,\)"),
    (dict(labels=torch.zeros(2)), "int32 or int64; got .* torch.float32"),
    (dict(labels=torch.zeros(2, device="meta").long()), "labels must be on logits' device cpu"),
    (dict(precomputed_lse=torch.zeros(3)), r"precomputed_lse must have shape \(rows,\) = \(2,\)"),
    (dict(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\]; got 1.5"),
    (dict(logit_scale=torch.ones((), requires_grad=True)), "logit_scale must be a number"),
    (dict(ignore_index=0.5), "ignore_index must be an integer"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[m for _, m in WRONG])
def test_wrong_argument_is_named(wrong: dict[str, Any], message: str) -> None:
    given = dict(logits=torch.zeros(2, 4), labels=torch.zeros(2).long()) | wrong
    with pytest.raises(RuntimeError, match=message):
        cross_entropy_loss(**given)


def test_memory_of_the_cpu_path_is_a_part_of_the_logits() -> None:
    """Rows are widened in parts: what is allocated besides the gradient does not grow with them."""
    logits = torch.randn(64, 1 << 17, dtype=torch.float32).bfloat16().requires_grad_()
    labels = torch.zeros(64, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profile:
        cross_entropy_loss(logits, labels)[0].sum().backward()
    largest = max(e.cpu_memory_usage for e in profile.events() if e.name != "[memory]")
    assert largest <= 2 * logits.numel() + (1 << 20)


def test_import_needs_neither_triton_nor_a_gpu() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton.cross_entropy import CrossEntropyLoss as _, cross_entropy_loss
losses, z_losses = cross_entropy_loss(torch.zeros(2, 4), torch.tensor([0, 3]))
assert losses.allclose(torch.tensor(4.0).log()) and not torch.cuda.is_initialized()
"""
    root = str(Path(flash_attn.__file__).resolve().parents[1])
    env = os.environ | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


needs_triton = pytest.mark.skipif(kernels.triton is None, reason="needs triton")


@pytest.mark.cuda
@needs_triton
@every_case
def test_kernels_agree_with_torch(
    case: LossCase, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels, dlosses = make(case, device)
    ours = cross_entropy_loss(logits, labels, **case.options)
    grad = gradient(logits, labels, dlosses, **case.options)
    monkeypatch.setattr(ops, "_uses_kernels", lambda logits: False)
    want = cross_entropy_loss(logits, labels, **case.options)
    want_grad = gradient(logits, labels, dlosses, **case.options)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-4)
    eps = torch.finfo(logits.dtype).eps
    torch.testing.assert_close(grad, want_grad, rtol=2 * eps, atol=1e-4)


@pytest.mark.cuda
@needs_triton
def test_no_memory_but_the_gradients(device: str) -> None:
    logits = torch.randn(2048, 32000, device=device, dtype=torch.bfloat16)
    labels = torch.randint(32000, (2048,), device=device)
    logit_bytes = 2 * logits.numel()
    for inplace in (False, True):
        x = logits.clone().requires_grad_()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        cross_entropy_loss(x, labels, inplace_backward=inplace)[0].sum().backward()
        peak = torch.cuda.max_memory_allocated() - held
        assert peak <= (0 if inplace else logit_bytes) + (2 << 20)
        del x


@pytest.mark.cuda
def test_cuda_graph(device: str) -> None:
    logits, labels, _ = make(ALL.but(dtype="bf16"), device)
    logits.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        losses, _ = cross_entropy_loss(logits, labels, **ALL.options)
        return losses, torch.autograd.grad(losses.sum(), logits)[0]

    graph, recorded = capture(step)
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
        labels.copy_(labels.flip(0))
    graph.replay()
    for ours, want in zip(recorded, step()):
        assert torch.equal(ours, want)


@pytest.mark.cuda
def test_offsets_beyond_32_bits(device: str) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    rows, vocab = 17000, 131072  # 2.2e9 logits
    logits = torch.zeros(rows, vocab, device=device, dtype=torch.bfloat16)
    some, labels, _ = make(BASE.but(vocab=vocab, dtype="bf16"), device)
    places = torch.tensor([0, 5, 999, 8191, 16383, 16384, 16385, 16999, 12345], device=device)
    logits[places] = some
    all_labels = torch.full((rows,), IGNORED, device=device)
    all_labels[places] = labels
    want = cross_entropy_loss(some, labels)[0]
    want_grad = gradient(some, labels, torch.ones_like(want))
    logits.requires_grad_()
    losses, _ = cross_entropy_loss(logits, all_labels, inplace_backward=True)
    assert torch.equal(losses[places], want) and losses.count_nonzero() == want.count_nonzero()
    losses.sum().backward()
    assert torch.equal(logits.grad[places], want_grad)
    assert not logits.grad[16386:16999].any()


@pytest.mark.cuda
@pytest.mark.gpus(2)
def test_tensor_on_another_device_than_the_current(device: str) -> None:
    logits, labels, dlosses = make(ALL, "cuda:1")
    with torch.cuda.device(0):
        ours = gradient(logits, labels, dlosses, **ALL.options)
    assert_rounded(ours, exact_gradient(ALL, logits, labels, dlosses), torch.float32, 20.0)
