"""The MHA layer against attention written out in fp64 from its own weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attn import flash_attn_kvpacked_func
from flash_attn.modules import mha
from flash_attn.modules.mha import MHA, InferenceParams, get_alibi_slopes

EMBED = 64


@dataclass(frozen=True)
class LayerCase:
    """Constructor arguments of one layer of EMBED features."""

    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name

    def build(self, device: str, **options: Any) -> MHA:
        """fp32 on the CPU, bf16 on CUDA."""
        torch.manual_seed(len(self.name))
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return MHA(EMBED, **({"num_heads": 4} | self.options | options), device=device, dtype=dtype)


SELF = [
    LayerCase("plain"),
    LayerCase("causal", dict(causal=True)),
    LayerCase("grouped", dict(num_heads_kv=2, causal=True)),
    LayerCase("one_kv_head", dict(num_heads_kv=1)),
    LayerCase("no_bias", dict(qkv_proj_bias=False, out_proj_bias=False)),
    LayerCase("scale", dict(softmax_scale=0.5)),
    LayerCase("window", dict(window_size=(5, 2))),
    LayerCase("alibi", dict(use_alibi=True, num_heads=8)),
    LayerCase(
        "alibi_window_grouped",
        dict(use_alibi=True, causal=True, window_size=(9, 0), num_heads_kv=2),
    ),
    LayerCase("rotary", dict(rotary_emb_dim=16, causal=True)),
    LayerCase("rotary_grouped", dict(rotary_emb_dim=8, num_heads_kv=2, rotary_emb_base=100.0)),
    LayerCase("rotary_interleaved", dict(rotary_emb_dim=12, rotary_emb_interleaved=True)),
    LayerCase("xpos", dict(rotary_emb_dim=16, rotary_emb_scale_base=64.0, causal=True)),
]
CROSS = [LayerCase(case.name, case.options | dict(cross_attn=True)) for case in SELF]
every_self = pytest.mark.parametrize("case", SELF, ids=str)
every_cross = pytest.mark.parametrize("case", CROSS, ids=str)


def rotate(x: Tensor, layer: MHA, is_key: bool) -> Tensor:
    """(seqlen, heads, head_dim) by the formula, position 0 first."""
    dim, rotary = layer.rotary_emb_dim, layer.rotary_emb
    pair = torch.arange(0, dim, 2, device=x.device).double()
    position = torch.arange(x.shape[0], device=x.device).double()[:, None]
    unit = torch.polar(torch.ones_like(position), position * rotary.base ** (-pair / dim))
    if rotary.scale_base is not None:
        scale = ((pair + 0.4 * dim) / (1.4 * dim)) ** (position / rotary.scale_base)
        unit = unit / scale if is_key else unit * scale
    first, rest = x[..., :dim], x[..., dim:]
    order = (dim // 2, 2) if rotary.interleaved else (2, dim // 2)
    pairs = first.unflatten(-1, order)
    pairs = pairs if rotary.interleaved else pairs.transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * unit[:, None])
    turned = turned if rotary.interleaved else turned.transpose(-1, -2)
    return torch.cat((turned.flatten(-2), rest), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, layer: MHA) -> Tensor:
    """One sequence: q (seqlen_q, heads, head_dim), k and v (seqlen_k, heads_kv, head_dim)."""
    group = layer.num_heads // layer.num_heads_kv
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = layer.head_dim**-0.5 if layer.softmax_scale is None else layer.softmax_scale
    scores = scale * torch.einsum("qhd,khd->hqk", q, k)
    i = torch.arange(q.shape[0], device=q.device)[:, None] + k.shape[0] - q.shape[0]
    j = torch.arange(k.shape[0], device=q.device)
    if layer.alibi_slopes is not None:
        slopes = torch.tensor(get_alibi_slopes(layer.num_heads), device=q.device).double()
        scores = scores - slopes[:, None, None] * (i - j).abs()
    left, right = layer.window_size
    seen = torch.ones_like(i == j)
    seen &= (j >= i - left) if left >= 0 else seen
    seen &= (j <= i + right) if right >= 0 else seen
    seen &= (j <= i) if layer.causal else seen
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return torch.einsum("hqk,khd->qhd", weights, v)


def written_out(layer: MHA, x: Tensor, x_kv: Tensor | None = None) -> Tensor:
    """The layer on one sequence, (seqlen, embed), in fp64; gradients reach the layer's parameters."""
    weights = {name: p.double() for name, p in layer.named_parameters()}

    def project(name: str, t: Tensor) -> Tensor:
        out = F.linear(t.double(), weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        return out if name == "out_proj" else out.unflatten(-1, (-1, layer.head_dim))

    if layer.cross_attn:
        q, kv = project("Wq", x), project("Wkv", x if x_kv is None else x_kv)
        k, v = kv.chunk(2, 1)
    else:
        groups = layer.num_heads, layer.num_heads_kv, layer.num_heads_kv
        q, k, v = project("Wqkv", x).split(groups, 1)
    if layer.rotary_emb_dim:
        q, k = rotate(q, layer, False), rotate(k, layer, True)
    return project("out_proj", attend(q, k, v, layer).flatten(1))


def assert_near(name: str, ours: Tensor, want: Tensor) -> None:
    """Within the precision of the layer, in relation to the largest value."""
    assert ours.shape == want.shape, f"{name}: {ours.shape}, want {want.shape}"
    limit = (2e-5 if ours.dtype == torch.float32 else 4e-2) * (1e-2 + want.abs().max().item())
    error = (ours.double() - want).abs().max().item()
    assert error <= limit, f"{name}: error {error:.3g}, limit {limit:.3g}"


def compare(layer: MHA, ours: Tensor, want: Tensor) -> None:
    """Outputs and the gradients of all parameters."""
    assert_near("out", ours, want)
    dout = torch.randn(want.shape, device=want.device, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    theirs = torch.autograd.grad(want, list(parameters.values()), dout, retain_graph=True)
    grads = torch.autograd.grad(ours, list(parameters.values()), dout.to(ours.dtype))
    for name, a, b in zip(parameters, grads, theirs):
        assert_near(name, a, b.double())


def inputs(layer: MHA, *shape: int) -> Tensor:
    weight = layer.out_proj.weight
    return torch.randn(*shape, EMBED, device=weight.device, dtype=weight.dtype)


@every_self
def test_self_attention(case: LayerCase, device: str) -> None:
    layer = case.build(device)
    x = inputs(layer, 2, 37)
    compare(layer, layer(x), torch.stack([written_out(layer, row) for row in x]))


@every_cross
def test_cross_attention(case: LayerCase, device: str) -> None:
    layer = case.build(device)
    x, x_kv = inputs(layer, 2, 19), inputs(layer, 2, 37)
    compare(layer, layer(x, x_kv), torch.stack([written_out(layer, *r) for r in zip(x, x_kv)]))


LENGTHS = [11, 1, 37, 6]


def boundaries(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


@every_self
def test_ragged_self_attention(case: LayerCase, device: str) -> None:
    layer = case.build(device)
    x = inputs(layer, sum(LENGTHS))
    ours = layer(x, cu_seqlens=boundaries(LENGTHS, device), max_seqlen=max(LENGTHS))
    compare(layer, ours, torch.cat([written_out(layer, row) for row in x.split(LENGTHS)]))


@every_cross
def test_ragged_cross_attention(case: LayerCase, device: str) -> None:
    layer = case.build(device)
    lengths_k = [5, 9, 37, 22]
    x, x_kv = inputs(layer, sum(LENGTHS)), inputs(layer, sum(lengths_k))
    ours = layer(
        x,
        x_kv,
        cu_seqlens=boundaries(LENGTHS, device),
        max_seqlen=max(LENGTHS),
        cu_seqlens_k=boundaries(lengths_k, device),
        max_seqlen_k=max(lengths_k),
    )
    pairs = zip(x.split(LENGTHS), x_kv.split(lengths_k))
    compare(layer, ours, torch.cat([written_out(layer, *pair) for pair in pairs]))


@every_self
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_self_attention(case: LayerCase, side: str, device: str) -> None:
    layer = case.build(device)
    x = inputs(layer, len(LENGTHS), max(LENGTHS))
    place = torch.arange(max(LENGTHS), device=device)
    lengths = torch.tensor(LENGTHS, device=device)[:, None]
    mask = place < lengths if side == "right" else place >= max(LENGTHS) - lengths
    ours = layer(x, key_padding_mask=mask)
    compare(layer, ours[mask], torch.cat([written_out(layer, r[m]) for r, m in zip(x, mask)]))
    bias = layer.out_proj.bias
    assert torch.equal(ours[~mask], torch.zeros_like(ours[~mask]) + (0 if bias is None else bias))


@every_cross
def test_padded_cross_attention(case: LayerCase, device: str) -> None:
    layer = case.build(device)
    x, x_kv = inputs(layer, len(LENGTHS), 5), inputs(layer, len(LENGTHS), max(LENGTHS))
    mask = torch.arange(max(LENGTHS), device=device) < torch.tensor(LENGTHS, device=device)[:, None]
    ours = layer(x, x_kv, key_padding_mask=mask)
    rows = [written_out(layer, a, b[m]) for a, b, m in zip(x, x_kv, mask)]
    compare(layer, ours, torch.stack(rows))


def test_subset_of_queries(device: str) -> None:
    """The class token alone, as the last layer of a vision transformer wants."""
    layer = CROSS[0].build(device, return_residual=True)
    x = inputs(layer, 2, 20)
    out, rest = layer(x, mixer_subset=slice(0, 1))
    assert torch.equal(rest, x[:, :1])
    compare(layer, out, torch.stack([written_out(layer, r[:1], r) for r in x]))
    index = torch.tensor([3, 0], device=device)
    out, rest = layer(x, mixer_subset=index)
    assert torch.equal(rest, x[:, index])
    compare(layer, out, torch.stack([written_out(layer, r[index], r) for r in x]))


def test_residual_is_the_input(device: str) -> None:
    layer, plain = SELF[0].build(device, return_residual=True), SELF[0].build(device)
    x = inputs(layer, 2, 9)
    out, rest = layer(x)
    assert rest is x and torch.equal(out, plain(x))


def test_state_dict_has_the_projections_only() -> None:
    assert set(MHA(EMBED, 4, rotary_emb_dim=16, use_alibi=True).state_dict()) == {
        *("Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias")
    }
    layer = MHA(EMBED, 4, num_heads_kv=2, cross_attn=True, qkv_proj_bias=False)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "Wq.weight": (EMBED, EMBED),
        "Wkv.weight": (EMBED, EMBED),
        "out_proj.weight": (EMBED, EMBED),
        "out_proj.bias": (EMBED,),
    }
    assert MHA(EMBED, 4, num_heads_kv=1).Wqkv.weight.shape == (EMBED + 2 * 16, EMBED)


@pytest.mark.parametrize("heads", [1, 2, 8, 3, 6, 12], ids=str)
def test_alibi_slopes(heads: int) -> None:
    """A geometric series for powers of two; the others fill in those of the next power."""
    slopes = get_alibi_slopes(heads)
    assert len(set(slopes)) == heads and all(0 < s < 1 for s in slopes)
    power = 1 << (heads.bit_length() - 1)
    assert slopes[:power] == pytest.approx([2 ** (-8 * (i + 1) / power) for i in range(power)])
    between = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(2 * power)][0::2]
    assert slopes[power:] == pytest.approx(between[: heads - power])


def test_dropout_is_of_the_training_mode_only(device: str) -> None:
    layer, plain = SELF[1].build(device, dropout=0.5), SELF[1].build(device)
    x = inputs(layer, 2, 37)
    assert torch.equal(layer.eval()(x), plain(x))
    layer.train()
    torch.manual_seed(0)
    first = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first) and not torch.equal(plain(x), first)


@pytest.mark.parametrize("case", [SELF[0], SELF[8], SELF[9]], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_checkpointing_changes_no_gradient(case: LayerCase, dropout: float, device: str) -> None:
    x = inputs(case.build(device), 2, 37)
    mask = torch.arange(37, device=device) < torch.tensor([[37], [20]], device=device)
    for options in ({}, dict(key_padding_mask=mask)):
        results = []
        for checkpointing in (False, True):
            layer = case.build(device, dropout=dropout, checkpointing=checkpointing)
            torch.manual_seed(1)
            out = layer(x, **options)
            out.sum().backward()
            results.append((out, [p.grad for p in layer.parameters()]))
        assert torch.equal(results[0][0], results[1][0])
        for i, (a, b) in enumerate(zip(results[0][1], results[1][1])):
            assert_near(f"parameter {i}", a, b.double())


def stand_in(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache_seqlens: int | Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    alibi_slopes: Tensor | None,
) -> Tensor:
    """What flash_attn_with_kvcache is documented to do, entry by entry."""
    outs = []
    for b in range(q.shape[0]):
        begin = int(cache_seqlens if isinstance(cache_seqlens, int) else cache_seqlens[b])
        end = begin + k.shape[1]
        k_cache[b, begin:end], v_cache[b, begin:end] = k[b], v[b]
        entry = (x[b : b + 1] for x in (q, k_cache[:, :end], v_cache[:, :end]))
        outs.append(
            flash_attn_kvpacked_func(
                next(entry),
                torch.stack(list(entry), 2),
                softmax_scale=softmax_scale,
                causal=causal,
                window_size=window_size,
                alibi_slopes=alibi_slopes,
            )
        )
    return torch.cat(outs)


@pytest.fixture(params=["own", "stand_in"])
def kvcache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash_attn_with_kvcache, and what the layer must get along with."""
    if request.param == "stand_in":
        monkeypatch.setattr(mha, "flash_attn_with_kvcache", stand_in)


CACHED = [case for case in SELF if case.options.get("causal")]


@pytest.mark.parametrize("case", CACHED, ids=str)
@pytest.mark.parametrize("chunk", [1, 4], ids=["one", "four"])
def test_generation_with_a_cache(case: LayerCase, chunk: int, device: str, kvcache: None) -> None:
    """Token by token, or a few at a time, gives what the whole sequence gives."""
    layer = case.build(device, layer_idx=3).eval()
    x = inputs(layer, 3, 21)
    want = layer(x)
    params = InferenceParams(max_seqlen=32, max_batch_size=3)
    with torch.inference_mode():
        outs = [layer(x[:, :9], inference_params=params)]
        for begin in range(9, 21, chunk):
            params.seqlen_offset = begin
            outs.append(layer(x[:, begin : begin + chunk], inference_params=params))
    assert params.key_value_memory_dict[3].shape == (3, 32, 2, layer.num_heads_kv, layer.head_dim)
    assert_near("out", torch.cat(outs, 1), want.double())


@pytest.mark.parametrize("case", CACHED, ids=str)
def test_generation_with_lengths_of_their_own(case: LayerCase, device: str, kvcache: None) -> None:
    layer = case.build(device, layer_idx=0).eval()
    x = inputs(layer, 2, 21)
    want = layer(x)
    starts = [4, 13]
    params = InferenceParams(max_seqlen=32, max_batch_size=2)
    with torch.inference_mode():
        for b, n in enumerate(starts):
            params.batch_size_offset, params.seqlen_offset = b, 0
            layer(x[b : b + 1, :n], inference_params=params)
        params.batch_size_offset, params.seqlen_offset = 0, max(starts)
        lengths = torch.tensor(starts, device=device, dtype=torch.int32)
        for step in range(5):
            params.lengths_per_sample = lengths + step
            rows = [x[b, n + step][None] for b, n in enumerate(starts)]
            out = layer(torch.stack(rows), inference_params=params)
            target = torch.stack([want[b, n + step][None] for b, n in enumerate(starts)])
            assert_near("out", out, target.double())


def test_cache_of_a_head_dim_that_is_no_multiple_of_8(device: str) -> None:
    """The cache's is the next multiple, as flash_attn_with_kvcache wants it."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    layer = MHA(80, 4, 2, causal=True, layer_idx=0, device=device, dtype=dtype).eval()
    x = torch.randn(2, 9, 80, device=device).to(dtype)
    want = layer(x)
    params = InferenceParams(max_seqlen=16, max_batch_size=2)
    outs = []
    with torch.no_grad():
        for rows in (slice(0, 5), *(slice(n, n + 1) for n in range(5, 9))):
            params.seqlen_offset = rows.start
            outs.append(layer(x[:, rows], inference_params=params))
    assert params.key_value_memory_dict[0].shape == (2, 16, 2, 2, 24)
    assert_near("out", torch.cat(outs, 1), want.double())


def test_inference_params_start_again() -> None:
    params = InferenceParams(8, 2, 5, lengths_per_sample=torch.ones(2))
    params.reset(16, 1)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (16, 1, 0)
    assert not params.lengths_per_sample.any()


STACKED = [SELF[0], SELF[2], SELF[7], SELF[9], SELF[12], CROSS[9]]


@pytest.mark.parametrize("case", STACKED, ids=str)
def test_stack_of_layers_under_vmap(case: LayerCase, device: str) -> None:
    """An ensemble on the meta device's skeleton: outputs and gradients of a loop over its members."""
    layers = [case.build(device) for _ in range(3)]
    for layer in layers[1:]:
        for parameter in layer.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    parameters, buffers = torch.func.stack_module_state(layers)
    skeleton = copy.deepcopy(layers[0]).to("meta")
    x = inputs(layers[0], 3, 2, 19)

    def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(skeleton, (parameters, {}), (x,))

    assert not buffers
    want = torch.stack([layer(row) for layer, row in zip(layers, x)])
    out = torch.vmap(run)(parameters, x)
    assert_near("out", out, want.double())
    dout = torch.randn_like(want)
    out.backward(dout)
    want.backward(dout)

    def loss(parameters: dict[str, Tensor], x: Tensor, dout: Tensor) -> Tensor:
        return (run(parameters, x) * dout).sum()

    detached = {name: p.detach() for name, p in parameters.items()}
    samples = torch.vmap(torch.func.grad(loss))(detached, x, dout)
    for name, p in parameters.items():
        expected = torch.stack([layer.get_parameter(name).grad for layer in layers]).double()
        assert_near(name, p.grad, expected)
        assert_near(name, samples[name], expected)


CU = torch.tensor([0, 4], dtype=torch.int32)
BATCH = torch.zeros(2, 4, EMBED)
BAD_CALLS = {
    "shape": ({}, dict(x=BATCH[0]), "x must have shape"),
    "ragged shape": ({}, dict(x=BATCH, cu_seqlens=CU, max_seqlen=4), "x must have shape"),
    "max_seqlen": ({}, dict(x=BATCH[0], cu_seqlens=CU), "needs max_seqlen"),
    "both": (
        {},
        dict(x=BATCH[0], cu_seqlens=CU, max_seqlen=4, key_padding_mask=BATCH[0] > 0),
        "key_padding_mask",
    ),
    "x_kv": ({}, dict(x=BATCH, x_kv=BATCH), "cross_attn"),
    "subset": ({}, dict(x=BATCH, mixer_subset=slice(1)), "cross_attn"),
    "ragged x_kv": (
        dict(cross_attn=True),
        dict(x=BATCH[0], x_kv=BATCH[0], cu_seqlens=CU, max_seqlen=4),
        "cu_seqlens_k",
    ),
    "cross cache": (
        dict(cross_attn=True, layer_idx=0),
        dict(x=BATCH, inference_params=InferenceParams(8, 2)),
        "self-attention",
    ),
    "layer_idx": ({}, dict(x=BATCH, inference_params=InferenceParams(8, 2)), "layer_idx"),
    "short cache": (
        dict(layer_idx=0),
        dict(x=BATCH, inference_params=InferenceParams(3, 2)),
        "too small",
    ),
    "small cache": (
        dict(layer_idx=0),
        dict(x=BATCH, inference_params=InferenceParams(8, 1)),
        "too small",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_raises(name: str) -> None:
    options, arguments, message = BAD_CALLS[name]
    if "x_kv" in arguments:
        arguments = arguments | dict(x_kv=arguments["x_kv"].clone())
    with pytest.raises(ValueError, match=message):
        MHA(EMBED, 4, **options)(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dwconv=True), "dwconv"),
        (dict(num_heads=5), "embed_dim"),
        (dict(num_heads_kv=3), "num_heads_kv"),
        (dict(num_heads_kv=0), "num_heads_kv"),
        (dict(rotary_emb_dim=32), "rotary_emb_dim"),
        (dict(rotary_emb_dim=7), "dim must be even"),
    ],
    ids=str,
)
def test_bad_layer_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MHA(EMBED, **({"num_heads": 4} | options))


def test_compatibility_switches_change_nothing(device: str) -> None:
    case = SELF[9]
    x = inputs(case.build(device), 2, 9)
    want = case.build(device)(x)
    assert torch.equal(case.build(device, fused_bias_fc=True, use_flash_attn=True)(x), want)


@pytest.mark.cuda
def test_autocast_runs_fp32_parameters_in_16_bits(device: str) -> None:
    layer = MHA(EMBED, 4, rotary_emb_dim=16, causal=True, device=device)
    x = torch.randn(2, 37, EMBED, device=device)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert_near("out", out, torch.stack([written_out(layer, row) for row in x]))
    out.sum().backward()
    assert layer.Wqkv.weight.grad.dtype == torch.float32
