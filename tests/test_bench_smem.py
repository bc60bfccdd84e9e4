"""The logic of the benchmark of tiles for less shared memory, without a GPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench
import bench_smem
import update_readme
from bench_smem import DEVICE, Cell, make_row

from flash_attn._head_dims import HEAD_DIMS

ROOT = Path(__file__).resolve().parents[1]
TIMES = {DEVICE: 2.0, 163: 2.2, 99: 2.8}


class Extension:
    """The extension's limit and pin; notes each change."""

    def __init__(self):
        self.limits, self.pins = [], []

    def limit_smem_kb(self, kb):
        self.limits.append(kb)

    def pin_isa(self, isa):
        self.pins.append(isa)

    def build_info(self):
        return {"isa": "", "smem_kb": [227, 163, 99]}


def test_every_pass_whose_tile_changes_is_measured():
    found = bench_smem.cells(HEAD_DIMS)
    assert {(c.direction, c.head_dim) for c in found} >= {
        *(("bwd", d) for d in (128, 192, 256)),
        *(("decode", d) for d in HEAD_DIMS),
        ("fwd", 192),
    }
    assert any(c.dropout for c in found) and {c.causal for c in found} == {True, False}
    assert {c.head_dim for c in bench_smem.cells([192])} == {192}


def test_sizes_are_those_below_the_devices():
    assert bench_smem.sizes([227, 163, 99], 227) == [163, 99]
    assert bench_smem.sizes([227, 99], 163) == [99]


def test_a_limit_is_set_for_one_call_alone():
    extension = Extension()
    seen = []
    call = bench_smem.limited(
        lambda: seen.append(list(extension.limits)), 99, extension.limit_smem_kb
    )
    call(), call()
    assert seen == [[99], [99, DEVICE, 99]] and extension.limits == [99, DEVICE] * 2


@pytest.mark.parametrize("ms, met", [(2.6, True), (2.61, False)])
def test_ratio_is_to_the_devices_own_tiles(ms, met):
    row = make_row(Cell("bwd", 128), {**TIMES, 99: ms})
    assert row["ratios"] == {"163": 1.1, "99": ms / 2} and row["met"] == met
    assert ("MISSED" in bench_smem.row_line(row)) != met
    assert "backward, head_dim 128, causal" in bench_smem.row_line(row)


def run(monkeypatch, attend):
    """Rows and errors of one forward cell on the CPU, by an attention of the limits set so far."""
    extension = Extension()

    def times(calls, target_seconds, repeats):
        for call in calls.values():
            call()
        return {name: bench.Times(1.0, 1.0, 1) for name in calls}

    real = bench_smem.flash_attn_func
    monkeypatch.setattr(bench_smem, "device_times", times)
    monkeypatch.setattr(
        bench_smem, "flash_attn_func", lambda *a, **o: attend(extension.limits[-1], real(*a, **o))
    )
    make = bench_smem.make_call
    monkeypatch.setattr(bench_smem, "make_call", lambda *a: make(*a, device="cpu"))
    args = bench_smem.parse_args(["--head-dims", "192", "--tokens", "16"])
    monkeypatch.setattr(bench_smem, "cells", lambda head_dims: [Cell("fwd", 192)])
    return bench_smem.run(extension, [163, 99], args)


def test_cells_are_timed_in_turns(monkeypatch):
    found = run(monkeypatch, lambda kb, out: out)
    assert found["wrong"] == [] and found["rows"][0]["ratios"] == {"163": 1.0, "99": 1.0}


def test_tiles_with_other_results_are_not_timed(monkeypatch):
    found = run(monkeypatch, lambda kb, out: out * (1.1 if kb == 99 else 1))
    assert found["rows"] == [] and "99" in found["wrong"][0] and "163" not in found["wrong"][0]


def test_isas_without_small_tiles_are_left_out():
    extension = Extension()
    with bench_smem.sm80_alone(extension):
        assert extension.pins == ["sm80"]
    assert extension.pins == ["sm80", ""]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu(capsys):
    assert bench_smem.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tokens", "--repeats"])
def test_arguments_that_measure_nothing_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        bench_smem.parse_args([option, "0"])
    assert f"{option}: must be at least 1" in capsys.readouterr().err


def test_readme_table_has_the_files_ratios(tmp_path):
    (tmp_path / "results").mkdir()
    facts = {"device": "a GPU", "torch": "2.11", "cuda": "13.0", "date": "2026-01-01"}
    result = {"environment": facts, "command": "python3 bench_smem.py", "dtype": "bf16"}
    rows = [make_row(Cell("bwd", 128), TIMES), make_row(Cell("decode", 64), {0: 1.0, 99: 1.0})]
    result |= {"device_kb": 227, "target": 1.3, "rows": rows}
    (tmp_path / "results" / "smem.json").write_text(json.dumps(result))
    marks = "".join(f"<!-- begin {n} -->\n<!-- end {n} -->" for n in ("decode", "smem"))
    text = update_readme.updated(marks, tmp_path, "benchmarks/README.md")
    assert "| backward, head_dim 128, causal | 2.000 | 1.10 | 1.40 |" in text
    assert "| decoding, head_dim 64 | 1.000 | - | 1.00 |" in text
    assert "at most 1.3: missed by backward, head_dim 128, causal" in text
