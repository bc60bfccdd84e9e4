"""The public surface: names, signatures, version, what is not there yet, imports without a GPU."""

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
    ("argument", "value"),
    [
        ("dropout_p", 0.1),
        ("window_size", (1, 0)),
        ("window_size", (1, 1)),
        ("window_size", (0, -1)),
        ("softcap", 30.0),
        ("alibi_slopes", torch.ones(2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_missing_feature_is_named(argument: str, value: object, causal: bool) -> None:
    try:
        flash_attn_func(*QKV, causal=causal, **{argument: value})
    except NotImplementedError as error:
        assert argument in str(error)
    else:
        pytest.fail(f"{argument}={value} was ignored")


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
    """Windows that say no more than `causal` are the same call, or named as missing; never wrong."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 6, 2, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    try:
        out = flash_attn_func(q, k, v, causal=causal, window_size=window_size)
    except NotImplementedError as error:
        assert "window_size" in str(error)
        assert window_size != (-1, -1)
    else:
        assert torch.equal(out, flash_attn_func(q, k, v, causal=same_as_causal))


def test_wide_window_with_more_queries_than_keys() -> None:
    """window (-1, sk) with sq > 2 sk still hides keys: not the same as no window."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 30, 1, 8), torch.randn(1, 10, 1, 8), torch.randn(1, 10, 1, 8)
    try:
        out = flash_attn_func(q, k, v, window_size=(-1, 12))
    except NotImplementedError as error:
        assert "window_size" in str(error)
    else:
        assert not out[:, :8].any(), "query 0 sees keys up to 0 + 10 - 30 + 12 only"


FUTURE_CALLS = {
    "flash_attn_varlen_func": (
        *(torch.zeros(4, 2, 8),) * 3,
        *(torch.tensor([0, 4]).int(),) * 2,
        4,
        4,
    ),
    "flash_attn_varlen_kvpacked_func": (
        *(torch.zeros(4, 2, 8), torch.zeros(4, 2, 2, 8)),
        *((torch.tensor([0, 4]).int(),) * 2),
        *(4, 4),
    ),
    "flash_attn_varlen_qkvpacked_func": (torch.zeros(4, 3, 2, 8), torch.tensor([0, 4]).int(), 4),
    "flash_attn_with_kvcache": tuple(QKV),
}


@pytest.mark.parametrize("name", FUTURE_CALLS)
def test_function_of_a_later_release_says_so(name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        getattr(flash_attn, name)(*FUTURE_CALLS[name])


def test_packed_functions_agree_or_say_that_they_are_missing() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3, 2, 8)
    want = flash_attn_func(*qkv.unbind(2), causal=True)
    for name, arguments in (
        ("flash_attn_qkvpacked_func", (qkv,)),
        ("flash_attn_kvpacked_func", (qkv[:, :, 0], qkv[:, :, 1:])),
    ):
        try:
            out = getattr(flash_attn, name)(*arguments, causal=True)
        except NotImplementedError as error:
            assert name in str(error)
        else:
            torch.testing.assert_close(out, want)


def test_defaults_spelled_out_are_accepted() -> None:
    want = flash_attn_func(*QKV)
    out = flash_attn_func(*QKV, 0.0, None, False, (-1, -1), 0.0, None, False, False)
    assert torch.equal(out, want)
    out = flash_attn_func(*QKV, **TAIL)
    assert torch.equal(out, want)
    out = flash_attn_func(*QKV, dropout_p=0, window_size=[-1, -1], softcap=0)
    assert torch.equal(out, want)


def test_every_argument_has_an_effect() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    plain = flash_attn_func(q, k, v)
    assert not torch.equal(flash_attn_func(q, k, v, causal=True), plain)
    assert not torch.equal(flash_attn_func(q, k, v, softmax_scale=0.1), plain)
    assert len(flash_attn_func(q, k, v, return_attn_probs=True)) == 3
    assert isinstance(plain, torch.Tensor)


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
