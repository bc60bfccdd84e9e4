"""The benchmark of the CPU backend: what it runs, and what is written of its results."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_cpu

ROOT = Path(__file__).resolve().parents[1]


def test_it_measures_every_case_and_writes_it(tmp_path, capsys):
    path, threads = tmp_path / "cpu.json", torch.get_num_threads()
    sizes = "--seqlens 8 16 --batch 1 --heads 2 --head-dim 8 --rounds 2".split()
    assert bench_cpu.main([*sizes, "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    result = json.loads(path.read_text())
    found = {(r["dtype"], r["seqlen"], r["causal"], r["direction"]) for r in result["rows"]}
    assert len(found) == len(result["rows"]) == 3 * 2 * 2 * 2
    assert all(
        row["ratio"] > 0 and row["torch_min_ms"] <= row["torch_ms"] for row in result["rows"]
    )
    assert bench_cpu.table(result) in capsys.readouterr().out


def test_both_compute_the_same():
    q, k, v = torch.randn(3, 1, 20, 2, 8)
    for causal in (False, True):
        torch.testing.assert_close(
            bench_cpu.our_attention(q, k, v, causal), bench_cpu.torch_attention(q, k, v, causal)
        )


def test_readme_shows_the_committed_results():
    result = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    assert bench_cpu.table(result) in (ROOT / "benchmarks" / "README.md").read_text()
    assert {row["seqlen"] for row in result["rows"]} == {512, 2048}
