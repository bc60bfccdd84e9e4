"""The public surface: names, signatures, version, imports without a GPU."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_attn
import flash_attn.flash_attn_interface as interface
from flash_attn import flash_attn_func

TAIL = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
REQUIRED = inspect.Parameter.empty
VARLEN = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), REQUIRED)
SIGNATURES = {
    "flash_attn_func": dict.fromkeys("qkv", REQUIRED) | TAIL,
    "flash_attn_kvpacked_func": dict.fromkeys(("q", "kv"), REQUIRED) | TAIL,
    "flash_attn_qkvpacked_func": {"qkv": REQUIRED} | TAIL,
    "flash_attn_varlen_func": dict.fromkeys("qkv", REQUIRED)
    | VARLEN
    | TAIL
    | {"block_table": None},
    "flash_attn_varlen_kvpacked_func": dict.fromkeys(("q", "kv"), REQUIRED) | VARLEN | TAIL,
    "flash_attn_varlen_qkvpacked_func": dict.fromkeys(("qkv", "cu_seqlens", "max_seqlen"), REQUIRED)
    | TAIL,
    "flash_attn_with_kvcache": dict.fromkeys(("q", "k_cache", "v_cache"), REQUIRED)
    | dict.fromkeys(
        (
            *("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx"),
            *("cache_leftpad", "block_table", "softmax_scale"),
        )
    )
    | {
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    },
    "merge_states": dict.fromkeys(("out_a", "lse_a", "out_b", "lse_b"), REQUIRED),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_the_documented_one(name: str) -> None:
    """Same names, order and defaults; further parameters are keyword-only."""
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    positional = {
        p.name: p.default for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    }
    assert list(positional.items()) == list(SIGNATURES[name].items())
    extra = [p for p in parameters.values() if p.kind is not p.POSITIONAL_OR_KEYWORD]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not REQUIRED for p in extra)


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_function_is_documented(name: str) -> None:
    doc = inspect.getdoc(getattr(flash_attn, name)) or ""
    assert len(doc) > 100, f"{name} needs a docstring with shapes, dtypes and errors"


def test_version() -> None:
    assert flash_attn.__version__ == "2.8.3"


def test_installed_metadata_agrees() -> None:
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flash-attn is imported from the source tree, not installed")
    assert version == flash_attn.__version__


def test_other_distributions_may_add_submodules(tmp_path: Path) -> None:
    """flash_attn.cute of another distribution is importable beside this package."""
    other = tmp_path / "flash_attn" / "cute"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("here = True\n")
    run_python(
        "import sys, flash_attn, flash_attn.cute; assert flash_attn.cute.here",
        path=[*package_path(), str(tmp_path)],
    )


QKV = [torch.zeros(1, 4, 2, 8) for _ in range(3)]


@pytest.mark.parametrize(
    ("window_size", "causal", "same_as_causal"),
    [
        ((-1, -1), False, False),
        ((-1, -1), True, True),
        ((-1, 0), False, True),
        ((-1, 0), True, True),
        ((-5, -5), False, False),
        ((100, 0), False, True),
        ((100, 100), False, False),
        ((100, 100), True, True),
        ((torch.tensor(-1), torch.tensor(0)), False, True),
    ],
    ids=str,
)
def test_window_that_hides_nothing_more(
    window_size: tuple[int, int], causal: bool, same_as_causal: bool
) -> None:
    """Windows that say no more than `causal` are the same call."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 6, 2, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    out = flash_attn_func(q, k, v, causal=causal, window_size=window_size)
    assert torch.equal(out, flash_attn_func(q, k, v, causal=same_as_causal))


def test_wide_window_with_more_queries_than_keys() -> None:
    """window (-1, sk) with sq > 2 sk still hides keys: not the same as no window."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 30, 1, 8), torch.randn(1, 10, 1, 8), torch.randn(1, 10, 1, 8)
    out = flash_attn_func(q, k, v, window_size=(-1, 12))
    assert not out[:, :8].any(), "query 0 sees keys up to 0 + 10 - 30 + 12 only"
    assert out[:, 8:].any(-1).all()


@pytest.mark.parametrize("window_size", [(1, 2, 3), (1,), (0.5, 0), ("a", 0), (torch.rand(2), 0)])
def test_window_that_is_none(window_size: tuple) -> None:
    with pytest.raises(RuntimeError, match="window_size"):
        flash_attn_func(*QKV, window_size=window_size)


def test_exports_are_the_documented_ones() -> None:
    assert sorted(flash_attn.__all__) == sorted(SIGNATURES)
    for name in SIGNATURES:
        assert getattr(interface, name) is getattr(flash_attn, name)
    extra = {"cu_seqlens_q": None, "max_seqlen_q": None}
    parameters = inspect.signature(flash_attn.flash_attn_with_kvcache).parameters.values()
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords == extra


def test_defaults_spelled_out_are_accepted() -> None:
    want = flash_attn_func(*QKV)
    out = flash_attn_func(*QKV, 0.0, None, False, (-1, -1), 0.0, None, False, False)
    assert torch.equal(out, want)
    out = flash_attn_func(*QKV, **TAIL)
    assert torch.equal(out, want)
    out = flash_attn_func(*QKV, dropout_p=0, window_size=[-1, -1], softcap=0)
    assert torch.equal(out, want)


OPTIONS = {
    "dropout_p": 0.5,
    "softmax_scale": 0.1,
    "causal": True,
    "window_size": (2, 1),
    "softcap": 0.5,
    "alibi_slopes": torch.ones(2),
}
CU_SEQLENS = torch.tensor([0, 4, 18], dtype=torch.int32)
FORMS = {
    "flash_attn_func": lambda qkv, **options: flash_attn_func(*qkv.unbind(2), **options),
    "flash_attn_kvpacked_func": lambda qkv, **options: flash_attn.flash_attn_kvpacked_func(
        qkv[:, :, 0], qkv[:, :, 1:], **options
    ),
    "flash_attn_qkvpacked_func": lambda qkv, **options: flash_attn.flash_attn_qkvpacked_func(
        qkv, **options
    ),
    "flash_attn_varlen_func": lambda qkv, **options: flash_attn.flash_attn_varlen_func(
        *qkv.flatten(0, 1).unbind(1), CU_SEQLENS, CU_SEQLENS, 14, 14, **options
    ),
    "flash_attn_varlen_kvpacked_func": lambda qkv, **options: (
        flash_attn.flash_attn_varlen_kvpacked_func(
            *(qkv.flatten(0, 1)[:, 0], qkv.flatten(0, 1)[:, 1:]),
            *(CU_SEQLENS, CU_SEQLENS, 14, 14),
            **options,
        )
    ),
    "flash_attn_varlen_qkvpacked_func": lambda qkv, **options: (
        flash_attn.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), CU_SEQLENS, 14, **options)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_argument_has_an_effect(form: str) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 3, 2, 8)
    call = FORMS[form]
    plain = call(qkv)
    assert isinstance(plain, torch.Tensor)
    for name, value in OPTIONS.items():
        assert not torch.equal(call(qkv, **{name: value}), plain), name
    out, lse, s_dmask = call(qkv, return_attn_probs=True)
    assert torch.equal(out, plain) and lse.dtype == torch.float32
    assert s_dmask.shape == (0,) and s_dmask.dtype == qkv.dtype
    _, _, s_dmask = call(qkv, return_attn_probs=True, dropout_p=0.5)
    assert s_dmask.shape == (2, 2, 128, 128) and s_dmask.dtype == qkv.dtype
    assert torch.equal(call(qkv, deterministic=True), plain)


@pytest.mark.parametrize("form", FORMS)
def test_function_classes_of_flash_attn_2(form: str) -> None:
    """apply takes the public arguments by position and, last, whether gradients are enabled."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 3, 2, 8)
    varlen = "Varlen" if "varlen" in form else ""
    packed = "QKVPacked" if "qkvpacked" in form else "KVPacked" if "kvpacked" in form else ""
    rows = (qkv.flatten(0, 1) if varlen else qkv).clone().requires_grad_()
    tensors = {
        "": rows.unbind(-3),
        "KVPacked": (rows[..., 0, :, :], rows[..., 1:, :, :]),
        "QKVPacked": (rows,),
    }
    lengths = (CU_SEQLENS, 14) if packed == "QKVPacked" else (CU_SEQLENS, CU_SEQLENS, 14, 14)
    arguments = [*tensors[packed], *(lengths if varlen else ())]
    arguments += [0.0, None, True, (-1, -1), 0.0, None, False, False]
    if form == "flash_attn_varlen_func":
        arguments.append(None)
    function = getattr(interface, f"FlashAttn{varlen}{packed}Func")
    want = FORMS[form](qkv, causal=True)
    for enabled in (True, False):
        out = function.apply(*arguments, enabled)
        assert torch.equal(out, want) and out.requires_grad == enabled
    assert function.apply(*arguments).requires_grad


# The names of flash_attn_interface that other libraries call.

COMPAT_SIGNATURES = {
    "_flash_attn_forward": "q k v dropout_p softmax_scale causal window_size_left window_size_right"
    " softcap alibi_slopes return_softmax",
    "_flash_attn_varlen_forward": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    " dropout_p softmax_scale causal window_size_left=-1 window_size_right=-1 softcap=0.0"
    " alibi_slopes=None return_softmax=False block_table=None leftpad_k=None seqused_k=None"
    " zero_tensors=False num_splits=0",
    "_flash_attn_backward": "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal"
    " window_size_left window_size_right softcap alibi_slopes deterministic rng_state=None",
    "_flash_attn_varlen_backward": "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k"
    " max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size_left window_size_right"
    " softcap alibi_slopes deterministic rng_state=None zero_tensors=False",
}


@pytest.mark.parametrize("name", COMPAT_SIGNATURES)
def test_internal_name_that_others_call(name: str) -> None:
    function = getattr(interface, name)
    assert inspect.isfunction(function)  # of which others read the arguments
    parameters = inspect.signature(function).parameters.values()
    got = " ".join(p.name if p.default is REQUIRED else f"{p.name}={p.default}" for p in parameters)
    assert got == COMPAT_SIGNATURES[name]
    assert getattr(interface, f"_wrapped{name}") is getattr(torch.ops.flash_attn, name)
    assert len(function.__doc__ or "") > 50


def test_small_internal_names() -> None:
    assert interface.USE_TRITON_ROCM is False
    assert [interface.round_multiple(x, 128) for x in (0, 1, 128, 129)] == [0, 128, 128, 256]
    assert interface._get_block_size_n(torch.device("cpu"), 64, True, False) >= 2**30
    x = torch.zeros(3, 4)
    assert interface.maybe_contiguous(x) is x and interface.maybe_contiguous(None) is None
    assert interface.maybe_contiguous(x.t()).is_contiguous()
    assert hasattr(interface, "flash_attn_gpu")


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_internal_passes_are_the_public_function(
    device: str, varlen: bool, dropout_p: float
) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = (18,) if varlen else (2, 9)
    q, k, v, dout = (torch.randn(*shape, 2, 64, dtype=dtype, device=device) for _ in range(4))
    cu_seqlens = CU_SEQLENS.to(device)
    lengths = (cu_seqlens, cu_seqlens, 14, 14) if varlen else ()
    slopes = torch.tensor([0.5, 0.1], device=device)
    public = flash_attn.flash_attn_varlen_func if varlen else flash_attn_func
    options = dict(window_size=(5, 2), softcap=2.0, alibi_slopes=slopes)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(1)
    want, want_lse, want_s_dmask = public(
        *(*inputs, *lengths, dropout_p, 0.2),
        deterministic=True,
        return_attn_probs=True,
        **options,
    )
    want_grads = torch.autograd.grad(want, inputs, dout)

    kind = "_varlen" if varlen else ""
    tail = (False, 5, 2, 2.0, slopes)
    torch.manual_seed(1)
    forward = getattr(interface, f"_flash_attn{kind}_forward")
    out, lse, s_dmask, rng_state = forward(q, k, v, *lengths, dropout_p, 0.2, *tail, True)
    wrapped = getattr(interface, f"_wrapped_flash_attn{kind}_forward")
    assert torch.equal(wrapped(q, k, v, *lengths, 0.0, 0.2, *tail, True)[1], lse)
    for name, a, b in (("out", out, want), ("lse", lse, want_lse), ("S", s_dmask, want_s_dmask)):
        assert torch.equal(a, b), name
    assert rng_state.dtype == torch.int64 and rng_state.shape == (2,)

    packed = torch.empty(*shape, 3, 2, 64, dtype=dtype, device=device)
    grads = packed.unbind(-3)
    backward = getattr(interface, f"_flash_attn{kind}_backward")
    softmax_d = backward(
        *(dout, q, k, v, out, lse, *grads, *lengths, dropout_p, 0.2, *tail, True),
        rng_state=rng_state,
    )
    for name, a, b in zip(("dq", "dk", "dv"), grads, want_grads):
        assert torch.equal(a, b), name
    assert softmax_d.shape == ((2, 18 + 2 * 128) if varlen else (2, 2, 128))
    delta = (dout.float() * out.float()).sum(-1).movedim(-1, -2)
    torch.testing.assert_close(softmax_d[..., : shape[-1]], delta)

    arguments = (dout, q, k, v, out, lse, None, None, None, *lengths, dropout_p, 0.2, *tail, True)
    if dropout_p > 0:
        with pytest.raises(RuntimeError, match="rng_state"):
            backward(*arguments)
    else:
        assert backward(*arguments).shape == softmax_d.shape


def test_internal_forward_without_dropout_returns_an_empty_s_dmask() -> None:
    out, _, s_dmask, rng_state = interface._flash_attn_forward(
        *QKV, 0.0, 1.0, False, -1, -1, 0.0, None, True
    )
    assert s_dmask.shape == (0,) and s_dmask.dtype == out.dtype
    assert rng_state.shape == (2,)


def test_internal_forward_with_probability_too_small_to_drop() -> None:
    """A client's way to get S_dmask without dropout."""
    torch.manual_seed(0)
    qkv = torch.randn(3, 1, 4, 2, 8).unbind()
    out, _, s_dmask, _ = interface._flash_attn_forward(
        *qkv, 1e-30, 1.0, False, -1, -1, 0.0, None, True
    )
    assert torch.equal(out, flash_attn_func(*qkv, softmax_scale=1.0))
    assert s_dmask.shape == (1, 2, 128, 128)


def package_path() -> list[str]:
    return [str(Path(flash_attn.__file__).resolve().parents[1])]


def run_python(code: str, *, path: list[str] | None = None, **environment: str) -> str:
    """Run `code` in a fresh interpreter that finds the same package."""
    env = os.environ | environment
    inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    env["PYTHONPATH"] = os.pathsep.join([*(path or package_path()), *inherited])
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


NO_EXTENSION = """
import sys
sys.modules["flash_attn_2_cuda"] = None  # import raises ImportError
"""


def test_import_needs_neither_gpu_nor_extension() -> None:
    run_python(
        NO_EXTENSION
        + """
import torch, flash_attn
out = flash_attn.flash_attn_func(*(torch.ones(1, 3, 2, 8) for _ in range(3)))
assert out.shape == (1, 3, 2, 8)
assert not torch.cuda.is_initialized()
""",
        CUDA_VISIBLE_DEVICES="",
    )


def test_every_operator_says_that_the_extension_is_missing() -> None:
    run_python(
        NO_EXTENSION
        + """
import torch
from flash_attn import _ops
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
x = torch.zeros(1)
rest = {"Tensor": x, "Optional[Tensor]": None, "float": 0.5, "bool": False, "int": 0, "SymInt": 0}
named = {name: getattr(_ops, name) for name in _ops.__all__}
operators = {name: x for name, x in named.items() if isinstance(x, torch._ops.OpOverload)}
assert len(operators) == len(_ops.SCHEMAS)
for name, op in operators.items():
    arguments = [rest[str(a.type)] for a in op._schema.arguments if not a.kwarg_only]
    try:
        op.redispatch(cuda, *arguments)
    except RuntimeError as error:
        assert "flash_attn_2_cuda" in str(error) and "pip install" in str(error), error
    else:
        raise AssertionError(name)
""",
        CUDA_VISIBLE_DEVICES="",
    )


def test_import_is_quiet_and_starts_no_cuda() -> None:
    out = run_python(
        "import flash_attn, torch\nassert not torch.cuda.is_initialized()\nprint('done')"
    )
    assert out == "done\n"


@pytest.mark.cuda
def test_cuda_call_without_extension_says_what_to_do(device: str) -> None:
    run_python(
        NO_EXTENSION
        + """
import torch, flash_attn
q = torch.ones(1, 3, 2, 64, device="cuda", dtype=torch.float16)
try:
    flash_attn.flash_attn_func(q, q, q)
except (RuntimeError, ImportError) as error:
    assert "flash_attn_2_cuda" in str(error) and "build" in str(error).lower(), error
else:
    raise AssertionError("no error")
"""
    )
