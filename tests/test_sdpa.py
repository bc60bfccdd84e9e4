"""torch's own attention on our kernels, through torch's functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import Library
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import _ops, flash_attn_func, flash_attn_varlen_func, sdpa

aten = torch.ops.aten

if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip("this torch has no register_flash_attention_impl", allow_module_level=True)


class Calls:
    """How often torch came to our operators."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in ("forward", "backward", "varlen_forward", "varlen_backward"):
            monkeypatch.setattr(_ops, name, self._counted(name, getattr(_ops, name)))

    def _counted(self, name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.names.append(name)
            return function(*arguments, **options)

        return call

    def take(self) -> list[str]:
        names, self.names = self.names, []
        return names


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """Our implementation of torch's two operators, for CPU tensors: torch has none to replace."""
    active = sdpa._Active("CPU")
    yield
    active.remove()


@pytest.fixture
def on_cuda() -> Iterator[None]:
    sdpa.activate()
    yield
    torch.nn.attention.restore_flash_attention_impl()


def tensors(*shapes: tuple[int, ...], device: str, grad: bool = True) -> list[Tensor]:
    """fp32 on the CPU, bf16 on CUDA."""
    gen = torch.Generator().manual_seed(sum(map(sum, shapes)))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    made = [torch.randn(s, generator=gen).to(device, dtype) for s in shapes]
    return [t.requires_grad_() for t in made] if grad else made


def written_out(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Attention of (batch, heads, seqlen, head_dim) in fp64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (t.double() for t in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        hidden = torch.ones(q.shape[2], k.shape[2], device=q.device).triu(1).bool()
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v


def assert_near(ours: Tensor, want: Tensor) -> None:
    assert ours.shape == want.shape
    limit = (1e-5 if ours.dtype == torch.float32 else 2e-2) * (1e-2 + want.abs().max().item())
    error = (ours.double() - want.double()).abs().max().item()
    assert error <= limit, f"error {error:.3g}, limit {limit:.3g}"


def compare(ours: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    """Results and gradients."""
    dout = torch.randn(want.shape, device=want.device, dtype=torch.float64)
    assert_near(ours, want)
    grads = torch.autograd.grad(ours, inputs, dout.to(ours.dtype))
    for a, b in zip(grads, torch.autograd.grad(want, inputs, dout)):
        assert_near(a, b)


def names() -> list[str]:
    return torch.nn.attention.list_flash_attention_impls()


def test_registering_activates_nothing() -> None:
    sdpa.register()
    assert sdpa.NAME in names() and {"FA3", "FA4"} <= set(names())
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.mark.skipif(_ops.extension is not None, reason="the extension is built")
def test_activating_without_the_extension_says_what_to_do() -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(RuntimeError, match="flash_attn_2_cuda"):
        sdpa.activate()
    assert torch.nn.attention.current_flash_attention_impl() is None
    assert torch.backends.cuda.cudnn_sdp_enabled() == enabled


def forward(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **options: Any) -> list[Any]:
    """aten::_flash_attention_forward with its defaults: out, logsumexp, rng_state, unused, mask."""
    dropout_p, causal = options.pop("dropout_p", 0.0), options.pop("causal", False)
    lengths = lengths or (None, None, q.shape[1], k.shape[1])
    return aten._flash_attention_forward(q, k, v, *lengths, dropout_p, causal, False, **options)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("layout", ["rows", "heads"])
def test_dense_operator(on_cpu: None, causal: bool, layout: str) -> None:
    """Dense tensors of both memory orders; results have the order of the inputs, as torch assumes."""
    shapes = (2, 19, 4, 32), (2, 19, 2, 32), (2, 19, 2, 32)
    q, k, v, dout = tensors(*shapes, shapes[0], device="cpu", grad=False)
    if layout == "heads":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    out, lse, state, unused, mask = forward(q, k, v, causal=causal, scale=0.3)
    leaves = [t.transpose(1, 2).detach().requires_grad_() for t in (q, k, v)]
    want = written_out(*leaves, causal, 0.3)
    assert_near(out.transpose(1, 2), want)
    assert lse.shape == (2, 4, 19) and lse.dtype == torch.float32
    assert (state.shape, state.dtype) == ((2,), torch.uint64)
    assert (unused.shape, unused.dtype) == ((), torch.uint64)
    assert mask.shape == (0,) and out.stride() == q.stride()
    grads = aten._flash_attention_backward(
        *(dout, q, k, v, out, lse, None, None, 19, 19, 0.0, causal, state, unused), scale=0.3
    )
    wanted = torch.autograd.grad(want, leaves, dout.transpose(1, 2).double())
    for ours, theirs, x in zip(grads, wanted, (q, k, v)):
        assert_near(ours.transpose(1, 2), theirs)
        assert ours.stride() == x.stride()


def test_dropout_is_that_of_flash_attn_func(on_cpu: None) -> None:
    q, k, v, dout = tensors(*[(2, 19, 4, 32)] * 4, device="cpu", grad=False)
    torch.manual_seed(3)
    out, lse, state, unused, _ = forward(q, k, v, dropout_p=0.3)
    grads = aten._flash_attention_backward(
        *(dout, q, k, v, out, lse, None, None, 19, 19, 0.3, False, state, unused)
    )
    torch.manual_seed(3)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    want = flash_attn_func(*leaves, dropout_p=0.3)
    assert torch.equal(out, want)
    for ours, theirs in zip(grads, torch.autograd.grad(want, leaves, dout)):
        torch.testing.assert_close(ours, theirs)


def test_ragged_operator(on_cpu: None) -> None:
    lengths = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    q, k, v, dout = tensors((20, 4, 32), *[(20, 2, 32)] * 2, (20, 4, 32), device="cpu", grad=False)
    window = dict(window_size_left=4, window_size_right=1)
    out, lse, state, unused, _ = forward(q, k, v, lengths, lengths, 13, 13, **window)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    want = flash_attn_varlen_func(*leaves, lengths, lengths, 13, 13, window_size=(4, 1))
    assert torch.equal(out, want) and lse.shape == (4, 20)
    grads = aten._flash_attention_backward(
        *(dout, q, k, v, out, lse, lengths, lengths, 13, 13, 0.0, False, state, unused), **window
    )
    for ours, theirs in zip(grads, torch.autograd.grad(want, leaves, dout)):
        torch.testing.assert_close(ours, theirs)


def test_slopes_and_used_lengths(on_cpu: None) -> None:
    lengths = torch.tensor([0, 7, 20], dtype=torch.int32)
    q, k, v = tensors(*[(20, 4, 32)] * 3, device="cpu", grad=False)
    used, slopes = torch.tensor([3, 13], dtype=torch.int32), torch.tensor([0.5, 0.1, 0.2, 0.3])
    out, *_ = forward(q, k, v, lengths, lengths, 13, 13, seqused_k=used, alibi_slopes=slopes)
    for begin, end, n in ((0, 7, 3), (7, 20, 13)):
        keys = k[None, begin : begin + n], v[None, begin : begin + n]
        want = flash_attn_func(q[None, begin:end], *keys, alibi_slopes=slopes)
        torch.testing.assert_close(out[begin:end], want[0])


def test_what_is_not_served_raises(on_cpu: None) -> None:
    q, k, v = tensors(*[(2, 5, 4, 32)] * 3, device="cpu", grad=False)
    lengths = torch.tensor([0, 5, 10], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="return_debug_mask"):
        aten._flash_attention_forward(q, k, v, None, None, 5, 5, 0.0, False, True)
    with pytest.raises(RuntimeError, match="value must have the head_dim of query.*got 8 and"):
        aten._flash_attention_forward(q, k, v[..., :8], None, None, 5, 5, 0.0, False, False)
    with pytest.raises(RuntimeError, match="together"):
        forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), lengths, None, 5, 5)
    with pytest.raises(RuntimeError, match="seqused_k"):
        forward(q, k, v, seqused_k=lengths[1:])


def test_remove_gives_torch_its_operators_back() -> None:
    q, k, v = tensors(*[(2, 5, 4, 32)] * 3, device="cpu", grad=False)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    for _ in range(2):
        active = sdpa._Active("CPU")
        forward(q, k, v)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        active.remove()
        active.remove()
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
        with pytest.raises(NotImplementedError):
            forward(q, k, v)


def test_varlen_attn(on_cpu: None, calls: Calls) -> None:
    """torch.nn.attention.varlen reaches the operators whatever the device."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    lengths = torch.tensor([0, 7, 20], dtype=torch.int32)
    q, k, v = tensors(*[(20, 4, 32)] * 3, device="cpu")
    out = varlen.varlen_attn(q, k, v, lengths, lengths, 13, 13)
    want = flash_attn_varlen_func(q, k, v, lengths, lengths, 13, 13)
    assert calls.take()[0] == "varlen_forward"
    assert torch.equal(out, want)
    for ours, theirs in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (out, want))):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture
def torchs_cuda_entry_on_cpu(on_cpu: None) -> Iterator[None]:
    """torch's code behind scaled_dot_product_attention on CUDA, called with CPU tensors.

    It only reorders dimensions and calls the two operators, which are ours here.
    """
    entries = "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if not all(has(f"aten::{name}", "CUDA") for name in entries):
        pytest.skip("needs a CUDA build of torch")
    library = Library("aten", "IMPL", "CPU")
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name in entries:
        kernel = torch.library.get_kernel(f"aten::{name}", "CUDA")

        def call(*arguments: Any, kernel: Any = kernel, **options: Any) -> Any:
            return kernel.call_boxed(cuda, *arguments, **options)

        library.impl(name, call)
    yield
    library._destroy()


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_torchs_cuda_entry_comes_to_our_operators(
    torchs_cuda_entry_on_cpu: None, calls: Calls, causal: bool
) -> None:
    q, k, v = tensors((2, 4, 19, 32), (2, 2, 19, 32), (2, 2, 19, 32), device="cpu")
    out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=0.2)[0]
    compare(out, written_out(q, k, v, causal, 0.2), [q, k, v])
    assert calls.take() == ["forward", "backward"]


@pytest.mark.cuda
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("head_dim", [64, 40, 33, 256])
def test_scaled_dot_product_attention(
    on_cuda: None, calls: Calls, device: str, causal: bool, head_dim: int
) -> None:
    heads = (2, 4, 130, head_dim), (2, 2, 130, head_dim), (2, 2, 130, head_dim)
    for order in (lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):
        q, k, v = (order(t).detach().requires_grad_() for t in tensors(*heads, device=device))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.2, enable_gqa=True)
        compare(out, written_out(q, k, v, causal, 0.2), [q, k, v])
        assert calls.take() == ["forward", "backward"]


@pytest.mark.cuda
def test_dropout(on_cuda: None, calls: Calls, device: str) -> None:
    q, k, v = tensors(*[(2, 4, 130, 64)] * 3, device=device)
    torch.manual_seed(1)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)
    torch.manual_seed(1)
    want = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), dropout_p=0.2)
    want = want.transpose(1, 2)
    assert torch.equal(out, want)
    dout = torch.randn_like(out)
    grads = zip(*(torch.autograd.grad(o, (q, k, v), dout) for o in (out, want)))
    for ours, theirs in grads:
        assert_near(ours, theirs)


@pytest.mark.cuda
def test_torch_chooses_the_backend_as_before(on_cuda: None, calls: Calls, device: str) -> None:
    q, k, v = tensors(*[(2, 4, 130, 64)] * 3, device=device, grad=False)
    mask = torch.ones(130, 130, device=device, dtype=torch.bool)
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    F.scaled_dot_product_attention(q[:, :, :7], k, v, is_causal=True)
    F.scaled_dot_product_attention(*(t.float() for t in (q, k, v)))
    with sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, k, v)
    assert calls.take() == []
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        F.scaled_dot_product_attention(q, k, v)
    assert calls.take() == ["forward"]


@pytest.mark.cuda
def test_restoring(calls: Calls, device: str) -> None:
    q, k, v = tensors(*[(2, 4, 130, 64)] * 3, device=device, grad=False)
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    for _ in range(2):
        sdpa.activate()
        assert torch.nn.attention.current_flash_attention_impl() == sdpa.NAME
        F.scaled_dot_product_attention(q, k, v)
        assert calls.take() == ["forward"]
        torch.nn.attention.restore_flash_attention_impl()
        assert torch.nn.attention.current_flash_attention_impl() is None
        assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
        F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            F.scaled_dot_product_attention(q, k, v)
        assert calls.take() == []


class Block(nn.Module):
    """A transformer layer that only knows torch."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


def model(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(128, 4) for _ in range(2))).to(device, torch.bfloat16)


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_model(calls: Calls, device: str, compiled: bool) -> None:
    """Trained one step with and without: results and gradients within bf16's precision of fp32's."""
    (x,) = tensors((2, 130, 128), device=device, grad=False)
    exact = model(device).float()
    want = exact(x.float())
    want.square().mean().backward()
    ours = model(device)
    if compiled:
        torch._dynamo.reset()
        pytest.importorskip("triton")
    run = torch.compile(ours) if compiled else ours
    sdpa.activate()
    try:
        out = run(x)
        out.float().square().mean().backward()
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert calls.take() == ["forward", "forward", "backward", "backward"]
    pairs = [("out", out, want)]
    pairs += [(n, p.grad, q.grad) for (n, p), q in zip(ours.named_parameters(), exact.parameters())]
    for name, a, b in pairs:
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        assert error < 0.05, f"{name}: {error:.3g}"


@pytest.mark.cuda
def test_nested_tensors(on_cuda: None, calls: Calls, device: str) -> None:
    lengths = [7, 130, 64]
    rows = [tensors((n, 4, 64), device=device, grad=False)[0] for n in lengths]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(nested, nested, nested, is_causal=True)
    assert calls.take() == ["varlen_forward"]
    for row, ours in zip(rows, out.transpose(1, 2).unbind()):
        x = row.transpose(0, 1)[None]
        assert_near(ours.transpose(0, 1)[None], written_out(x, x, x, True, None))


@pytest.mark.cuda
def test_varlen_attn_on_cuda(on_cuda: None, calls: Calls, device: str) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    lengths = torch.tensor([0, 7, 200], dtype=torch.int32, device=device)
    q, k, v = tensors(*[(200, 4, 64)] * 3, device=device)
    out = varlen.varlen_attn(q, k, v, lengths, lengths, 193, 193)
    assert calls.take() == ["varlen_forward"]
    want = flash_attn_varlen_func(q, k, v, lengths, lengths, 193, 193)
    dout = torch.randn_like(out)
    assert torch.equal(out, want)
    for ours, theirs in zip(*(torch.autograd.grad(o, (q, k, v), dout) for o in (out, want))):
        assert_near(ours, theirs)


@pytest.mark.cuda
def test_deterministic_algorithms(on_cuda: None, device: str) -> None:
    q, k, v = tensors(*[(2, 4, 700, 64)] * 3, device=device)
    dout = torch.randn_like(q)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = []
        for _ in range(5):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            runs.append(torch.autograd.grad(out, (q, k, v), dout))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0]))
