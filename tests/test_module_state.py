"""What modules keep: constants that no cast destroys, and tables that no mode of torch leaves behind."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.mha import MHA, get_alibi_slopes

DIM, HEADS, LENGTH = 16, 4, 4096
Build = Callable[[], nn.Module]


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def on_meta(build: Build) -> nn.Module:
    with torch.device("meta"):
        return build()


def with_default_dtype(build: Build) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return build().float()
    finally:
        torch.set_default_dtype(before)


def with_default_device(build: Build) -> nn.Module:
    torch.set_default_device("meta")
    try:
        module = build()
    finally:
        torch.set_default_device(None)
    return module.to_empty(device="cpu")


def skip_init(build: Build) -> nn.Module:
    """As torch.nn.utils.skip_init does."""
    return on_meta(build).to_empty(device="cpu")


def filled_one_by_one(build: Build) -> nn.Module:
    """As loaders do that know parameters and buffers only."""
    module = on_meta(build)
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, torch.full_like(buffer, torch.nan, device="cpu"))
    return module


def buffers_overwritten(build: Build) -> nn.Module:
    """As where buffers are broadcast or cast through .data."""
    module = build()
    for buffer in module.buffers():
        buffer.data = torch.full_like(buffer, torch.nan)
    return module


def fsdp_like(build: Build) -> nn.Module:
    """Module by module: memory, then reset_parameters."""
    module = on_meta(build)
    for owner in module.modules():
        owner.to_empty(device="cpu", recurse=False)
        if hasattr(owner, "reset_parameters"):
            owner.reset_parameters()
    return module


def under_inference_mode(build: Build) -> nn.Module:
    with torch.inference_mode():
        return build()


def under_vmap(build: Build) -> nn.Module:
    modules = []

    def made(x: Tensor) -> Tensor:
        modules.append(build())
        return x

    torch.func.grad(lambda x: made(x).sum())(torch.ones(2))
    return modules[0]


TREATMENTS: dict[str, Callable[[Build], nn.Module]] = {
    "none": lambda build: build(),
    "half": lambda build: build().half().float(),
    "bfloat16": lambda build: build().to(torch.bfloat16).float(),
    "double": lambda build: build().double().float(),
    "bf16_twice": lambda build: build().bfloat16().bfloat16().to("cpu", torch.float32),
    "to_empty": lambda build: build().to_empty(device="cpu"),
    "meta": skip_init,
    "there_and_back": lambda build: build().to("meta").to_empty(device="cpu"),
    "meta_half": lambda build: on_meta(build).half().to_empty(device="cpu").float(),
    "default_dtype": with_default_dtype,
    "default_device": with_default_device,
    "one_by_one": filled_one_by_one,
    "buffers": buffers_overwritten,
    "fsdp": fsdp_like,
    "deepcopy": lambda build: copy.deepcopy(build().half()).float(),
    "pickle": lambda build: through_pickle(build().half()).float(),
    "torch_save": lambda build: through_torch_save(build().half()).float(),
    "shared": lambda build: build().share_memory().half().float(),
    "inference_mode": under_inference_mode,
    "transform": under_vmap,
    "assigned": lambda build: (m := build().half(), m.load_state_dict(build().state_dict()))[
        0
    ].float(),
}
every_treatment = pytest.mark.parametrize("name", TREATMENTS)


def angles(length: int = LENGTH, base: float = 10000.0) -> Tensor:
    pair = torch.arange(0, DIM, 2).double()
    return torch.arange(length).double()[:, None] * base ** (-pair / DIM)


@every_treatment
@pytest.mark.parametrize("scale_base", [None, 512.0], ids=["", "xpos"])
def test_rotary_constants_after(name: str, scale_base: float | None, device: str) -> None:
    module = TREATMENTS[name](lambda: RotaryEmbedding(DIM, scale_base=scale_base)).to(device)
    pair = torch.arange(0, DIM, 2).double()
    want = 10000.0 ** (-pair / DIM)
    assert module.inv_freq.dtype == torch.float32
    assert torch.equal(module.inv_freq.cpu(), want.float())
    scale = (pair + 0.4 * DIM) / (1.4 * DIM)
    if scale_base is None:
        assert module.scale is None
    else:
        assert module.scale.dtype == torch.float32
        assert torch.equal(module.scale.cpu(), scale.float())
    module._update_cos_sin_cache(LENGTH, torch.device(device), torch.float32)
    assert not module.state_dict()
    power = torch.ones(1, 1).double()
    if scale_base is not None:
        power = scale ** ((torch.arange(LENGTH) - LENGTH // 2)[:, None] / scale_base)
    # An angle of n radians is known to n roundings of fp32.
    tolerance = dict(rtol=5e-6, atol=5e-4 * power.max().item())
    torch.testing.assert_close(
        module._cos_cached.cpu().double(), angles().cos() * power, **tolerance
    )
    torch.testing.assert_close(
        module._sin_cached.cpu().double(), angles().sin() * power, **tolerance
    )


@every_treatment
def test_layer_after(name: str, device: str) -> None:
    """The same weights give the same output, and 16 bits run."""

    def build() -> MHA:
        return MHA(64, HEADS, causal=True, rotary_emb_dim=DIM, use_alibi=True)

    reference = build()
    layer = TREATMENTS[name](build)
    layer.load_state_dict(copy.deepcopy(reference.state_dict()), assign=True)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    layer, reference = layer.to(device, dtype), reference.to(device, dtype)
    assert torch.equal(layer.alibi_slopes.cpu(), torch.tensor(get_alibi_slopes(HEADS)))
    assert layer.alibi_slopes.device.type == device
    x = torch.randn(2, 37, 64, device=device, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), reference(x))
    layer.half()
    assert layer.alibi_slopes.dtype == torch.float32
    assert layer(x.half()).isfinite().all()


def test_fp64_tables_are_exact_to_fp64(device: str) -> None:
    module = RotaryEmbedding(DIM, scale_base=64.0, device=device)
    module._update_cos_sin_cache(LENGTH // 8, torch.device(device), torch.float64)
    plain = RotaryEmbedding(DIM, device=device)
    plain._update_cos_sin_cache(LENGTH, torch.device(device), torch.float64)
    close = dict(rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(plain._cos_cached.cpu(), angles().cos(), **close)
    scale = (torch.arange(0, DIM, 2).double() + 0.4 * DIM) / (1.4 * DIM)
    power = (torch.arange(LENGTH // 8) - LENGTH // 16)[:, None] / 64
    want = angles(LENGTH // 8).sin() * scale**power
    torch.testing.assert_close(module._sin_cached.cpu(), want, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("edit", ["assigned", "in_place"])
def test_frequencies_of_the_owner(edit: str) -> None:
    """Another inv_freq serves, and survives casts."""
    module, want = RotaryEmbedding(DIM), angles(64) / 4
    if edit == "assigned":
        module._update_cos_sin_cache(64)
        module.inv_freq = module.inv_freq / 4
    else:
        module.inv_freq.div_(4)
    module = copy.deepcopy(module.half()).float()
    for dtype in (torch.float32, torch.float64):
        module._update_cos_sin_cache(64, torch.device("cpu"), dtype)
        torch.testing.assert_close(module._cos_cached.double(), want.cos(), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="inv_freq gets no gradient"):
        module.inv_freq = torch.ones(DIM // 2, requires_grad=True)


def test_scale_without_scale_base_is_refused() -> None:
    module = RotaryEmbedding(DIM)
    module.scale = torch.ones(DIM // 2)
    with pytest.raises(RuntimeError, match="scale needs scale_base.*got None"):
        module._update_cos_sin_cache(64)


def test_xpos_tables_depend_on_the_length_asked_for_only() -> None:
    """Keys rotated at a cache's length fit queries rotated at it, whatever was asked for between."""
    module = RotaryEmbedding(DIM, scale_base=32.0)
    module._update_cos_sin_cache(40)
    want = module._cos_cached
    module._update_cos_sin_cache(90)
    module._update_cos_sin_cache(40)
    assert torch.equal(module._cos_cached, want)


class Stop(Exception):
    pass


def under_fake_tensors(function: Callable[[Tensor], Any], x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(function(mode.from_tensor(x)), FakeTensor)


def under_fake_tensors_outside_their_mode(function: Callable[[Tensor], Any], x: Tensor) -> None:
    fake = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x)
    assert isinstance(function(fake), FakeTensor)


def under_a_vmap_that_raises(function: Callable[[Tensor], Any], x: Tensor) -> None:
    def stopped(sample: Tensor) -> Tensor:
        function(sample)
        raise Stop

    with pytest.raises(Stop):
        torch.vmap(stopped)(torch.stack((x, x)))


def under_inference(function: Callable[[Tensor], Any], x: Tensor) -> None:
    with torch.inference_mode():
        function(x)


def under_compile(function: Callable[[Tensor], Any], x: Tensor) -> None:
    torch._dynamo.reset()
    torch.compile(function, backend="aot_eager", fullgraph=True)(x)


def under_export(strict: bool) -> Callable:
    def run(function: Callable[[Tensor], Any], x: Tensor) -> None:
        class Wrapper(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return function(x)

        torch.export.export(Wrapper(), (x,), strict=strict)

    return run


def under_device_context(function: Callable[[Tensor], Any], x: Tensor) -> None:
    with torch.device("meta"):
        function(x)


MODES: dict[str, Callable[[Callable[[Tensor], Any], Tensor], None]] = {
    "fake": under_fake_tensors,
    "fake_outside": under_fake_tensors_outside_their_mode,
    "vmap": lambda function, x: torch.vmap(function)(torch.stack((x, x))),
    "vmap_that_raises": under_a_vmap_that_raises,
    "grad": lambda function, x: torch.func.grad(lambda t: function(t).sum())(x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "vmap_of_grad": lambda function, x: torch.vmap(torch.func.grad(lambda t: function(t).sum()))(
        torch.stack((x, x))
    ),
    "inference": under_inference,
    "compile": under_compile,
    "export": under_export(False),
    "export_strict": under_export(True),
    "make_fx": lambda function, x: make_fx(function)(x),
    "make_fx_fake": lambda function, x: make_fx(function, tracing_mode="fake")(x),
    "make_fx_symbolic": lambda function, x: make_fx(function, tracing_mode="symbolic")(x),
    "device_context": under_device_context,
    "meta": lambda function, x: function(x.to("meta")),
}


class Client(RotaryEmbedding):
    """As a subclass elsewhere: it fills the tables and reads them itself."""

    def forward(self, qkv: Tensor) -> Tensor:
        self._update_cos_sin_cache(qkv.shape[1], device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        x, y = qkv[..., : DIM // 2], qkv[..., DIM // 2 :]
        cos, sin = cos[:, None, None], sin[:, None, None]
        return torch.cat((x * cos - y * sin, x * sin + y * cos), -1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("kind", [RotaryEmbedding, Client], ids=lambda kind: kind.__name__)
def test_no_table_outlives_a_mode(mode: str, filled: bool, kind: type, device: str) -> None:
    module = kind(DIM, device=device)
    x = torch.randn(1, 11, 3, 2, DIM, device=device)
    reference = kind(DIM, device=device)(x.clone())
    if filled:
        module(x[:, :7].clone())
    MODES[mode](lambda qkv: module(qkv.clone()), x)
    assert torch.equal(module(x.clone()), reference)
    copy.deepcopy(module)
    leaf = x.clone().requires_grad_()
    module(leaf * 1).square().sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * leaf.detach(), **ROTATED)


ROTATED = dict(rtol=1e-4, atol=1e-4)  # a rotation keeps squares: its gradient is 2 x


@pytest.mark.parametrize("mode", ["fake", "vmap_that_raises", "inference", "compile"])
def test_layer_after_a_mode(mode: str, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    options = dict(causal=True, rotary_emb_dim=DIM, use_alibi=True, device=device, dtype=dtype)
    layer = MHA(64, HEADS, **options)
    x = torch.randn(2, 19, 64, device=device, dtype=dtype)
    want = copy.deepcopy(layer)(x)
    MODES[mode](layer, x)
    out = layer(x)
    assert torch.equal(out, want)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_module_made_in_a_mode_is_right_outside() -> None:
    with FakeTensorMode():
        module = RotaryEmbedding(DIM, scale_base=32.0)
        module(torch.randn(1, 9, 3, 2, DIM))
    x = torch.randn(1, 9, 3, 2, DIM)
    assert torch.equal(module(x.clone()), RotaryEmbedding(DIM, scale_base=32.0)(x.clone()))


@pytest.mark.cuda
@pytest.mark.parametrize("warm", [False, True], ids=["", "warm"])
def test_tables_and_cuda_graphs(warm: bool, device: str) -> None:
    """A capture leaves no table that is not written yet, and what it reads outlives a longer call."""
    module = RotaryEmbedding(DIM, device=device)
    x = torch.randn(1, 50, 3, 2, DIM, device=device)
    want = RotaryEmbedding(DIM, device=device)(x.clone())
    RotaryEmbedding(DIM, device=device)(x.clone())  # the kernel is compiled
    if warm:
        module(x.clone())
    static, out = x.clone(), torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(module(static.clone()))
    assert torch.equal(module(x.clone()), want)
    module(torch.randn(1, 700, 3, 2, DIM, device=device))  # longer tables take their place
    poison = [torch.full((1 << 14,), torch.nan, device=device) for _ in range(64)]
    graph.replay()
    assert torch.equal(out, want)
    del poison, graph
    torch.cuda.empty_cache()
    assert torch.equal(module(x.clone()), want)
