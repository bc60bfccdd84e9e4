"""benchmarks/compare_outputs.py: what it records of a build, and which differences of two it names."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import flash_attn
from benchmarks import compare_outputs
from benchmarks.compare_outputs import Call

SMALL = [
    Call("dense", 32, "fp16", (2, 1), (5, 9), causal=True, dropout=0.3),
    Call("dense", 32, "fp16", (2, 1), (5, 9), deterministic=False),
    Call("packed", 40, "bf16", (2, 2), (7, 7), softcap=3.0),
    Call("varlen", 32, "bf16", (2, 1), (9, 12), alibi=True, window=(4, 0)),
    Call("decode", 64, "bf16", (4, 2), (2, 30), num_splits=3),
    Call("paged", 64, "fp16", (4, 1), (3, 300), causal=True, new=3),
]
GRADIENTS = {"out", "lse", "dq", "dk", "dv"}
NAMES = [
    GRADIENTS | {"S_dmask"},
    GRADIENTS - {"dq"},
    {"out", "lse", "dqkv"},
    GRADIENTS,
    {"out", "lse"},
    {"out", "lse", "k_cache", "v_cache"},
]


def test_calls_have_names_of_their_own_and_every_kind() -> None:
    calls = list(compare_outputs.calls())
    assert len({str(call) for call in calls}) == len(calls) == 250
    assert {call.kind for call in calls} == set(compare_outputs.CALLS)
    assert str(SMALL[3]) == "varlen hd32 bf16 heads=(2,1) lengths=(9,12) window=(4,0) alibi=True"


def test_outputs_are_recorded_and_the_same_again(device: str) -> None:
    first, second = (compare_outputs.record(device, SMALL) for _ in range(2))
    assert [set(outputs) for outputs in first.values()] == NAMES
    hashes = [value for outputs in first.values() for value in outputs.values()]
    assert len(set(hashes)) == len(hashes) and {len(value) for value in hashes} == {64}
    assert first == second and compare_outputs.compare(first, second) == []


def test_digest_tells_bits_shapes_and_dtypes_apart() -> None:
    x = torch.arange(6.0)
    others = x, -x, x.view(2, 3), x.double(), x.view(torch.int32), x[:0], torch.tensor(-0.0)
    assert len(set(map(compare_outputs.digest, others))) == len(others)
    assert compare_outputs.digest(x.view(2, 3).mT) == compare_outputs.digest(
        x.view(2, 3).mT.contiguous()
    )


def test_one_changed_bit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compare_outputs.record("cpu", SMALL)
    original = flash_attn.flash_attn_with_kvcache

    def changed(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = original(*args, **kwargs)
        lse.flatten()[:1].nextafter_(torch.tensor([torch.inf]))
        return out, lse

    monkeypatch.setattr(flash_attn, "flash_attn_with_kvcache", changed)
    lines = compare_outputs.compare(before, compare_outputs.record("cpu", SMALL))
    assert [line.rpartition(": ")[0] for line in lines] == [f"{call}: lse" for call in SMALL[4:]]


def test_an_output_that_is_not_repeatable_differs_from_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = itertools.count()
    monkeypatch.setitem(
        compare_outputs.CALLS, "dense", lambda make: dict(out=torch.tensor(next(numbers)))
    )
    found = compare_outputs.record("cpu", SMALL[:1])
    want = f"{SMALL[0]}: out: not repeatable, not repeatable"
    assert compare_outputs.compare(found, found) == [want]


def test_error_of_a_build_is_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(make: object) -> dict:
        raise RuntimeError("paged: not here\nTraceback")

    before = compare_outputs.record("cpu", SMALL)
    monkeypatch.setitem(compare_outputs.CALLS, "paged", refuse)
    after = compare_outputs.record("cpu", SMALL[1:])
    assert f"{SMALL[5]}: paged: not here" in capsys.readouterr().err
    lines = compare_outputs.compare(before, after)
    assert lines[0] == f"{SMALL[0]}: only in the first"
    assert lines[-1] == f"{SMALL[5]}: error: missing, paged: not here"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    chosen = ["--device", "cpu", "--calls", "dense hd32 fp16 causal"]
    assert compare_outputs.main(["--json", str(a), *chosen]) == 0
    assert compare_outputs.main(["--json", str(b), *chosen]) == 0
    assert compare_outputs.main([str(a), str(b)]) == 0
    assert "all outputs of 1 calls are equal" in capsys.readouterr().out
    record = json.loads(b.read_text())
    assert Path(record["build"]["package"]).name == "flash_attn"
    record["outputs"]["dense hd32 fp16 causal=True"]["dq"] = "0" * 64
    b.write_text(json.dumps(record))
    assert compare_outputs.main([str(a), str(b)]) == 1
    assert "dense hd32 fp16 causal=True: dq: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare_outputs.main([str(a)])
    with pytest.raises(SystemExit):
        compare_outputs.main(["--json", str(a), "--calls", "nothing has this name"])
