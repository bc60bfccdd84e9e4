"""Whether two builds give the same bits: records a hash of every output of a fixed list of calls.

    PYTHONPATH=<tree of one build> python benchmarks/compare_outputs.py --json before.json
    PYTHONPATH=<tree of the other> python benchmarks/compare_outputs.py --json after.json
    python benchmarks/compare_outputs.py before.json after.json

Inputs come from seeds and are made on the CPU.  Only functions are called that flash-attn 2.8 has too, so
that older builds can be recorded.  Every call runs twice: an output that is not the same both times is
recorded as such, and counts as a difference.  dq is hashed where the call is deterministic, as the
default backward adds in any order.  The exit status of a comparison is 1 when anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# At the end of the path: the package is that of the build which is recorded.
sys.path.append(str(Path(__file__).resolve().parents[1]))
from csrc.kernels.kernel_list import HEAD_DIMS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
NOT_REPEATABLE = "not repeatable"
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """One line of the list.  What has its default is not in the name."""

    kind: str  # a key of CALLS
    head_dim: int = 64
    dtype: str = "bf16"
    heads: tuple[int, int] = (4, 2)
    lengths: tuple[int, int] = (300, 420)  # of queries and keys, the longest of variable ones
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    dropout: float = 0.0
    deterministic: bool = True
    num_splits: int = 0
    new: int = 0  # tokens that are appended to a cache

    def __str__(self) -> str:
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self)[3:])
        rest = [f"{name}={value}" for name, value, default in given if value != default]
        return " ".join([self.kind, f"hd{self.head_dim}", self.dtype, *rest]).replace(", ", ",")

    @property
    def options(self) -> dict[str, Any]:
        return dict(causal=self.causal, window_size=self.window, softcap=self.softcap)


class Maker:
    """The inputs of a call."""

    def __init__(self, call: Call, device: str) -> None:
        self.call, self.device = call, device
        self.generator = torch.Generator("cpu").manual_seed(zlib.crc32(str(call).encode()))

    def normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator)
        return x.to(self.device, DTYPES[self.call.dtype])

    def leaf(self, *shape: int) -> Tensor:
        return self.normal(*shape).requires_grad_()

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def slopes(self) -> Tensor | None:
        heads = self.call.heads[0]
        slopes = 2.0 ** -torch.arange(1, heads + 1, dtype=torch.float32)
        return slopes.to(self.device) if self.call.alibi else None


def _differentiated(make: Maker, results: tuple, inputs: dict[str, Tensor]) -> Outputs:
    """The outputs of a call that returned its probabilities, and its gradients."""
    call, (out, lse, probabilities) = make.call, results
    gradients = torch.autograd.grad(out, list(inputs.values()), make.normal(*out.shape))
    outputs = dict(out=out, lse=lse)
    if call.dropout > 0:
        outputs["S_dmask"] = probabilities
    for name, gradient in zip(inputs, gradients):
        if call.deterministic or name in ("k", "v"):
            outputs[f"d{name}"] = gradient
    return outputs


def _training_options(make: Maker) -> dict[str, Any]:
    call = make.call
    options = call.options | dict(dropout_p=call.dropout, deterministic=call.deterministic)
    return options | dict(alibi_slopes=make.slopes(), return_attn_probs=True)


def dense(make: Maker) -> Outputs:
    from flash_attn import flash_attn_func

    (heads_q, heads_k), (rows_q, rows_k), d = make.call.heads, make.call.lengths, make.call.head_dim
    inputs = dict(q=make.leaf(2, rows_q, heads_q, d), k=make.leaf(2, rows_k, heads_k, d))
    inputs["v"] = make.leaf(2, rows_k, heads_k, d)
    return _differentiated(
        make, flash_attn_func(*inputs.values(), **_training_options(make)), inputs
    )


def packed(make: Maker) -> Outputs:
    from flash_attn import flash_attn_qkvpacked_func

    call = make.call
    qkv = make.leaf(2, call.lengths[0], 3, call.heads[0], call.head_dim)
    results = flash_attn_qkvpacked_func(qkv, **_training_options(make))
    return _differentiated(make, results, dict(qkv=qkv))


def _cumulative(make: Maker, longest: int) -> Tensor:
    ends = [0]
    for length in (longest, 1, longest // 3, longest // 2 + 1):
        ends.append(ends[-1] + length)
    return make.integers(*ends)


def varlen(make: Maker) -> Outputs:
    from flash_attn import flash_attn_varlen_func

    (heads_q, heads_k), longest, d = make.call.heads, make.call.lengths, make.call.head_dim
    cu_q, cu_k = (_cumulative(make, n) for n in longest)
    inputs = dict(q=make.leaf(int(cu_q[-1]), heads_q, d), k=make.leaf(int(cu_k[-1]), heads_k, d))
    inputs["v"] = make.leaf(int(cu_k[-1]), heads_k, d)
    options = _training_options(make)
    results = flash_attn_varlen_func(*inputs.values(), cu_q, cu_k, *longest, **options)
    return _differentiated(make, results, inputs)


def _cached(make: Maker, cache: tuple[Tensor, Tensor], **options: Any) -> Outputs:
    from flash_attn import flash_attn_with_kvcache

    call, capacity = make.call, 1024
    q = make.normal(3, call.lengths[0], call.heads[0], call.head_dim)
    if call.new:
        shape = 3, call.new, call.heads[1], call.head_dim
        angles = torch.linspace(0, 3, capacity * 8).view(capacity, 8)
        tables = (t.to(make.device, q.dtype) for t in (angles.cos(), angles.sin()))
        options |= dict(k=make.normal(*shape), v=make.normal(*shape))
        options |= dict(zip(("rotary_cos", "rotary_sin"), tables))
    out, lse = flash_attn_with_kvcache(
        *(q, *cache),
        cache_seqlens=make.integers(call.lengths[1], 1, call.lengths[1] // 2),
        alibi_slopes=make.slopes(),
        num_splits=call.num_splits,
        return_softmax_lse=True,
        **call.options,
        **options,
    )
    return dict(out=out, lse=lse) | (dict(k_cache=cache[0], v_cache=cache[1]) if call.new else {})


def decode(make: Maker) -> Outputs:
    shape = 4, 1024, make.call.heads[1], make.call.head_dim
    return _cached(
        make, (make.normal(*shape), make.normal(*shape)), cache_batch_idx=make.integers(2, 0, 3)
    )


def paged(make: Maker) -> Outputs:
    shape = 14, 256, make.call.heads[1], make.call.head_dim
    table = make.integers(7, 1, 12, 0, 3, 5, 11, 2, 9, 8, 4, 13).view(3, 4)
    return _cached(make, (make.normal(*shape), make.normal(*shape)), block_table=table)


CALLS: dict[str, Callable[[Maker], Outputs]] = dict(
    dense=dense, packed=packed, varlen=varlen, decode=decode, paged=paged
)


def calls() -> Iterator[Call]:
    """Every head dimension and dtype with each mask, and the features alone and together."""
    masks: tuple[dict[str, Any], ...] = ({}, dict(causal=True), dict(window=(70, 10)))
    for head_dim in (*HEAD_DIMS, 40, 72):
        for dtype in DTYPES:
            for mask in masks:
                yield Call("dense", head_dim, dtype, **mask)
            yield Call("varlen", head_dim, dtype, causal=True)
            yield Call("packed", head_dim, dtype, (2, 2), causal=True)
            yield Call("decode", head_dim, dtype, (8, 2), (1, 700), causal=True)
            yield Call("paged", head_dim, dtype, (8, 2), (1, 700), causal=True)
    features: tuple[dict[str, Any], ...] = (
        *(dict(softcap=20.0), dict(alibi=True), dict(dropout=0.2)),
        dict(softcap=20.0, alibi=True, dropout=0.2, causal=True),
        dict(softcap=20.0, window=(50, 0), alibi=True),
    )
    for head_dim in HEAD_DIMS:
        for some in features:
            yield Call("dense", head_dim, **some)
            yield Call("varlen", head_dim, lengths=(260, 260), **some)
        yield Call("dense", head_dim, deterministic=False, causal=True)
        yield Call("dense", head_dim, "fp16", (3, 3), (420, 130), causal=True)  # blind rows
        yield Call("dense", head_dim, "fp16", (2, 1), (1030, 1030), causal=True)
    for kind in ("decode", "paged"):
        for head_dim in HEAD_DIMS:
            yield Call(kind, head_dim, "fp16", (8, 1), (30, 600), causal=True)
            yield Call(kind, head_dim, "bf16", (4, 2), (3, 600), causal=True, new=3)
            yield Call(kind, head_dim, "bf16", (4, 4), (1, 900), num_splits=5)
            yield Call(kind, head_dim, "bf16", (4, 4), (2, 900), softcap=9.0, window=(300, 0))
            yield Call(kind, head_dim, "bf16", (4, 2), (2, 900), alibi=True, causal=True)


def digest(x: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    x = x.detach().cpu().contiguous()
    found = hashlib.sha256(f"{x.dtype} {tuple(x.shape)} ".encode())
    found.update(x.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _run(call: Call, device: str) -> dict[str, str]:
    torch.manual_seed(1)
    outputs = CALLS[call.kind](Maker(call, device))
    return {name: digest(x) for name, x in outputs.items()}


def record(device: str, chosen: list[Call]) -> dict[str, dict[str, str]]:
    """The hash of each output of each call; of a call that raises, the first line of the error."""
    outputs: dict[str, dict[str, str]] = {}
    for call in chosen:
        try:
            first, second = (_run(call, device) for _ in range(2))
        except (RuntimeError, TypeError) as error:  # what a build does not support
            first = second = {"error": str(error).partition("\n")[0]}
            print(f"{call}: {first['error']}", file=sys.stderr)
        outputs[str(call)] = {
            name: value if second[name] == value else NOT_REPEATABLE
            for name, value in first.items()
        }
    return outputs


def describe(device: str) -> dict[str, str]:
    import flash_attn

    extension = importlib.util.find_spec("flash_attn_2_cuda")
    return dict(
        package=str(Path(flash_attn.__file__).resolve().parent),
        extension="" if extension is None else str(extension.origin),
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        isa=os.environ.get("FLASH_ATTN_ISA", ""),
    )


def compare(before: dict, after: dict) -> list[str]:
    """A line for each call whose outputs are not the same and repeatable in both."""
    lines = []
    for call in dict.fromkeys((*before, *after)):
        if call not in before or call not in after:
            lines.append(f"{call}: only in the {'first' if call in before else 'second'}")
            continue
        a, b = before[call], after[call]
        for name in dict.fromkeys((*a, *b)):
            pair = a.get(name, "missing"), b.get(name, "missing")
            if pair[0] != pair[1] or NOT_REPEATABLE in pair:
                words = [x if len(x) != 64 else f"{x[:8]}..." for x in pair]
                lines.append(f"{call}: {name}: {words[0]}, {words[1]}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="two records to compare")
    parser.add_argument("--json", type=Path, help="record this build, to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", default="", help="only calls with this text in their names")
    given = parser.parse_args(arguments)
    if len(given.files) != (0 if given.json else 2):
        parser.error("give --json to record, or two files to compare")
    if given.json:
        chosen = [call for call in calls() if given.calls in str(call)]
        if not chosen:
            parser.error(f"--calls: no call has {given.calls!r} in its name")
        outputs = record(given.device, chosen)
        text = json.dumps(dict(build=describe(given.device), outputs=outputs), indent=1)
        given.json.write_text(text + "\n")
        print(f"{sum(map(len, outputs.values()))} outputs of {len(outputs)} calls: {given.json}")
        return 0
    before, after = (json.loads(path.read_text()) for path in given.files)
    for build in (before["build"], after["build"]):
        print(", ".join(f"{name} {value}" for name, value in build.items() if value))
    lines = compare(before["outputs"], after["outputs"])
    print("\n".join(lines) if lines else f"all outputs of {len(before['outputs'])} calls are equal")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
