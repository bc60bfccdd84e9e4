"""The cross entropy benchmark's own logic, without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench
import bench_cross_entropy
from bench_cross_entropy import COMPILED, EAGER, OURS, compare, ratios

from flash_attn.ops.triton import _cross_entropy_kernels as kernels


def test_defaults_are_the_sizes_asked_for() -> None:
    args = bench_cross_entropy.parse_args([])
    assert args.rows == [4096, 8192] and args.vocabs == [131072, 32000]
    with pytest.raises(SystemExit):
        bench_cross_entropy.parse_args(["--rows", "0"])


def test_every_provider_runs_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the timing left out, and without the compiler."""
    seen = set()

    def times(calls: dict, target_seconds: float, repeats: int | None) -> dict:
        for call in calls.values():
            call()
            call()
        return {name: bench.Times(2.0, 1.0, 1) for name in calls}

    monkeypatch.setattr(bench_cross_entropy, "device_times", times)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(bench_cross_entropy, "SWEEP", [(256, 4)])
    run = bench_cross_entropy.CrossEntropyLoss.forward

    def forward(self: object, *inputs: torch.Tensor) -> torch.Tensor:
        seen.add(kernels.FORWARD)
        return run(self, *inputs)

    monkeypatch.setattr(bench_cross_entropy.CrossEntropyLoss, "forward", forward)
    kept = kernels.FORWARD
    args = bench_cross_entropy.parse_args(["--sweep"])
    rows, wrong = bench_cross_entropy.measure(6, 50, args, "cpu")
    assert not wrong and seen == {kept, (256, 4)} and kernels.FORWARD == kept
    names = [OURS, COMPILED, EAGER, f"{OURS} 256x4"]
    assert [(row["pass"], row["provider"]) for row in rows] == [
        (direction, name) for direction in ("fwd", "bwd") for name in names
    ]
    assert rows[0]["gb_per_s"] == pytest.approx(6 * 50 * 2 / 2e-3 / 1e9)
    assert rows[-1]["gb_per_s"] == pytest.approx(2 * rows[0]["gb_per_s"])
    json.dumps(rows)
    head = bench_cross_entropy.LINE.format(*bench_cross_entropy.COLUMNS)
    assert {len(bench_cross_entropy.row_line(row)) for row in rows} == {len(head)}
    assert ratios(rows)[0].startswith("fwd 6x50: flash_attn is 1.00 times as fast as compiled")


def test_wrong_result_is_named() -> None:
    want = [torch.tensor(2.0), torch.ones(3)]
    assert compare("x", want, want) is None
    assert compare("x", [torch.tensor(2.1), want[1]], want) == "x: loss differs by 0.1, limit 0.02"
    assert "gradient" in compare("x", [want[0], torch.full((3,), torch.nan)], want)
