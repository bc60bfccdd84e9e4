"""The feature benchmark's own logic, without a GPU."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench
import bench_features
from bench_features import SHORTEST, Feature, make_row, targets, visible_pairs

SMALL = ["--tokens", "128", "--seqlen", "64", "--hidden", "32", "--head-dims", "16"]


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """Calls each measured function once; our dropout stands in for torch's."""

    def times(calls, target_seconds, repeats):
        for call in calls.values():
            call()
        return {name: bench.Times(1.0, 1.0, 1) for name in calls}

    dropout = bench_features.with_options(dropout_p=bench_features.DROPOUT)
    monkeypatch.setattr(bench_features, "device_times", times)
    monkeypatch.setattr(bench_features, "torch_dropout", dropout)


def test_defaults_are_the_sizes_of_the_targets():
    args = bench_features.parse_args([])
    assert (args.tokens, args.seqlen, args.hidden, args.head_dims) == (16384, 4096, 2048, [64, 128])
    found = [
        (group.batch, group.seqlen, group.causal, [f.name for f in group.features])
        for group in bench_features.groups(args, 64, "cpu")
    ]
    assert found == [
        (1, 16384, True, ["window 1024"]),
        (4, 4096, True, ["alibi", "softcap 50", "dropout 0.1"]),
        (4, 4096, False, ["varlen equal"]),
        (16, 4096, False, ["varlen mixed"]),
        (4, 4096, True, ["varlen equal"]),
        (16, 4096, True, ["varlen mixed"]),
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seqlen", "3000"], "--seqlen: must divide --tokens 16384"),
        (["--head-dims", "96"], "--head-dims: must divide --hidden 2048"),
        (["--repeats", "0"], "--repeats: must be at least 1"),
    ],
)
def test_arguments_that_give_no_shape_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        bench_features.parse_args(words)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu(capsys):
    assert bench_features.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("seqlen", [1, 2, 5, 8])
def test_visible_pairs_are_those_counted_one_by_one(seqlen):
    pairs = [(i, j) for i in range(seqlen) for j in range(seqlen)]
    assert visible_pairs(seqlen, False) == len(pairs)
    assert visible_pairs(seqlen, True) == sum(j <= i for i, j in pairs)
    for left in range(seqlen + 2):
        assert visible_pairs(seqlen, True, left) == sum(i - left <= j <= i for i, j in pairs)


@pytest.mark.parametrize("total", [64, 100, 128, 1000, 65536])
def test_lengths_are_in_range_repeatable_and_add_up(total):
    for seed in range(20):
        lengths = bench_features.log_uniform_lengths(total, seed)
        assert sum(lengths) == total
        assert min(lengths) >= SHORTEST and max(lengths) <= bench_features.LONGEST
        assert lengths == bench_features.log_uniform_lengths(total, seed)


def test_lengths_are_log_uniform():
    lengths = bench_features.log_uniform_lengths(2**23, seed=0)
    for low in (64, 512, 2048):  # each interval of a factor 4 is 2 of 7 doublings
        within = sum(low <= n < 4 * low for n in lengths) / len(lengths)
        assert within == pytest.approx(2 / 7, abs=0.03)


def test_row_compares_the_time_with_its_share_and_with_torch():
    window = Feature("window", bench_features.plain, targets(1.3, 1.2), share=0.125)
    row = make_row(window, "fwd", {"window": 0.5, "plain": 3.2})
    assert row["ratio"] == pytest.approx(1.25) and row["met"]
    assert not make_row(window, "fwd", {"window": 0.5, "plain": 3.0})["met"]
    assert not make_row(window, "bwd", {"window": 0.5, "plain": 3.2})["met"]
    dropout = Feature("dropout", bench_features.plain, targets(1.35, 1.35))
    for other in ("torch", "sm80"):
        times = {"dropout": 1.3, "plain": 1.0, f"{other} dropout": 1.3}
        assert make_row(dropout, "fwd", times)["met"]
        assert not make_row(dropout, "fwd", {**times, f"{other} dropout": 1.2})["met"]
        slow = {**times, "dropout": 1.4, f"{other} dropout": 2.0}
        assert not make_row(dropout, "fwd", slow)["met"]


def test_the_call_on_sm80_is_pinned_and_released(monkeypatch):
    pins, seen = ["sm90"], []
    extension = ModuleType("flash_attn_2_cuda")
    extension.build_info = lambda: {"isa": pins[-1]}
    extension.pin_isa = pins.append
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", extension)
    attend = bench_features.on_sm80(lambda q, k, v, causal: seen.append(pins[-1]))
    attend(None, None, None, True)
    assert seen == ["sm80"] and pins[-1] == "sm90"


def test_lines_are_aligned_and_name_a_missed_target():
    feature = Feature("dropout 0.1", bench_features.plain, targets(1.5, 1.35))
    shape = {"head_dim": 64, "pass": "bwd", "causal": True}
    times = {"dropout 0.1": 1.0, "plain": 1.0}
    met = bench_features.row_line({**shape, **make_row(feature, "bwd", times)})
    slow = {"dropout 0.1": 10.0, "plain": 1.0, "torch dropout 0.1": 9.0}
    missed = bench_features.row_line({**shape, **make_row(feature, "bwd", slow)})
    head = bench_features.LINE.format(*bench_features.COLUMNS, "").rstrip()
    assert len(head) == len(met) == missed.index("MISSED") - 2
    assert met.split() == "64 bwd causal dropout 0.1 1.000 1.000 - - 1.000 1.350".split()


def test_varlen_of_one_length_is_the_dense_attention():
    q, k, v, _ = bench_features.make_inputs((2, 8, 2, 16), torch.float32, 0, "cpu")
    out = bench_features.varlen([8, 8], "cpu")(q, k, v, True)
    torch.testing.assert_close(out, bench_features.plain(q, k, v, True))


@pytest.mark.parametrize(
    "capability, isa, kernels, expected",
    [
        ((9, 0), "", [("sm90", "fwd", 64, 64, "bf16"), ("sm80", "bwd", 64, 64, "bf16")], True),
        ((9, 0), "sm80", [("sm90", "fwd", 64, 64, "bf16")], False),
        ((9, 0), "", [("sm80", "fwd", 64, 64, "bf16"), ("sm90", "bwd", 64, 64, "bf16")], False),
        ((8, 9), "", [("sm90", "fwd", 64, 64, "bf16")], False),
    ],
)
def test_sm80_is_timed_where_sm90_serves(monkeypatch, capability, isa, kernels, expected):
    extension = ModuleType("flash_attn_2_cuda")
    extension.build_info = lambda: {"isa": isa, "kernels": kernels}
    monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", extension)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert bench_features.has_sm90_forward() == expected


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_every_group_runs_and_gives_a_row_per_feature(no_gpu_needed, direction):
    args = bench_features.parse_args(SMALL)
    rows = []
    for group in bench_features.groups(args, 16, "cpu"):
        rows += bench_features.measure(group, 16, direction, args, device="cpu")
    assert len(rows) == 8
    assert {row["pass"] for row in rows} == {direction}
    assert [row["name"] for row in rows if row["torch_ms"] is not None] == ["dropout 0.1"]
    json.dumps(rows)
