"""The decoding benchmark's own logic, and the example with a Hugging Face model, without a GPU."""

import dataclasses
import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_decode
import bench_fwd_bwd
import decode_calls
import decode_rows
import decode_tables
import update_readme
from decode_rows import HEAD_DIM, ROWS, Row, make_inputs, make_pool
from report import OURS

ROOT = Path(__file__).resolve().parents[1]
L2 = 60 * 2**20
SMALL = Row(3, 32, 4, 2, target_share=0.9, fa3_share=0.95)
SMALL_PAGED = Row(2, 64, 4, 2, page_size=16, target_us=5.0)
SMALL_RAGGED = Row(4, 96, 4, 4, ragged=True)


@pytest.fixture(scope="module")
def pool():
    return make_pool(2**20, 0, "cpu")


def small_inputs(row, pool):
    return make_inputs(row, pool, 0, seed=0)


@pytest.fixture
def setting(pool):
    return bench_decode.Setting(pool, 0, 1e12, repeats=None, peers=True, seed=0)


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """Calls each measured function once per cache; ours takes 2 us, every other 4 us."""

    def times(calls, caches, repeats):
        for call in calls.values():
            for number in range(caches):
                call(number)
        us = {name: 2.0 if name in (OURS, "plain") else 4.0 for name in calls}
        return {
            name: {"median_us": us[name], "min_us": us[name], "repeats": 24, "calls": caches}
            for name in calls
        }

    monkeypatch.setattr(bench_decode, "time_calls", times)
    monkeypatch.setattr(bench_decode, "call_seconds", lambda call: 1e-5)
    monkeypatch.setattr(bench_decode, "refusal", lambda call: None)

    def peer(inputs):
        arguments = [inputs.arguments(i) for i in range(len(inputs.k_caches))]
        return lambda number: arguments[number]["q"]

    monkeypatch.setattr(bench_decode, "decode_torch", peer)


# Rows


def test_rows_are_those_of_the_targets():
    assert [(row.name, row.target_share, row.target_us) for row in ROWS] == [
        ("16x8k-8/8", 0.96, None),
        ("16x8k-32/8", 0.96, None),
        ("16x8k-32/32", 1.04, None),
        ("64x8k-32/8", 1.00, None),
        ("64x8k-64/8", 1.00, None),
        ("128x8k-32/32", 1.04, None),
        ("64x8k-32/8-page16", 0.99, None),
        ("64x8k-32/8-page64", 0.99, None),
        ("64x8k-32/8-page256", 0.99, None),
        ("64x64..16k-32/8", 1.03, None),
        ("8x2k-32/8", None, 27.9),
        ("1x1k-32/8", None, 8),
        ("1x1k-16/1", None, 8),
        ("1x8k-32/8", None, 15),
        ("1x8k-16/1", None, 12),
        ("1x128k-32/8", None, 132),
        ("1x128k-16/1", None, 25),
    ]
    assert all(row.fa3_share or row.fa3_us for row in ROWS)
    curve = [row.seqlen for row in decode_rows.curve_rows()]
    assert (curve[0], curve[-1], len(curve)) == (256, 131072, 10)
    assert [row.batch for row in decode_rows.append_rows()] == [1, 16, 64]


def test_bytes_are_those_of_k_and_v():
    megabytes = {row.name: row.read_bytes / 1e6 for row in ROWS}
    assert megabytes["16x8k-8/8"] == pytest.approx(537, abs=0.5)
    assert megabytes["64x8k-64/8"] == pytest.approx(2147, abs=1)
    assert megabytes["64x8k-32/8-page16"] == megabytes["64x8k-64/8"]
    assert megabytes["128x8k-32/32"] == pytest.approx(17180, abs=1)
    assert megabytes["8x2k-32/8"] == pytest.approx(67, abs=0.5)
    assert megabytes["1x1k-16/1"] == pytest.approx(0.52, abs=0.01)
    assert megabytes["1x128k-16/1"] == pytest.approx(67, abs=0.5)


def test_ragged_lengths_are_repeatable_and_count_as_drawn():
    row = next(row for row in ROWS if row.ragged)
    lengths = row.lengths
    assert lengths == row.lengths and len(set(lengths)) > 50
    assert min(lengths) >= 64 and max(lengths) <= 16384
    assert row.read_bytes == 2 * sum(lengths) * 8 * HEAD_DIM * 2
    assert row.read_bytes == pytest.approx(2.1e9, rel=0.1)


@pytest.mark.parametrize("row", [*ROWS, *decode_rows.curve_rows()], ids=lambda row: row.name)
def test_caches_in_turns_are_larger_than_l2(row):
    caches = row.caches(L2)
    if row.read_bytes >= decode_rows.ONE_IS_ENOUGH:
        assert caches == 1 and row.read_bytes > 50 * L2
    else:
        assert caches >= 2 and caches * row.read_bytes >= 3 * L2
    assert row.pool_elements(L2) * decode_rows.ELEMENT_BYTES <= 18e9
    count = bench_decode.calls_per_graph(1e-5, caches)
    assert count % caches == 0 and count >= caches


def test_a_graph_holds_calls_for_its_time():
    assert bench_decode.calls_per_graph(1e-5, 3) == 501
    assert bench_decode.calls_per_graph(1e-3, 800) == 800
    assert bench_decode.calls_per_graph(1.0, 1) == 1
    assert bench_decode.calls_per_graph(0.0, 2) == bench_decode.MAX_CALLS


# Command line


def test_patterns_select_rows_and_leave_out_the_rest():
    args = bench_decode.parse_args(["--rows", "1x*-16/1", "*page16"])
    names = [row.name for row in args.selected]
    assert names == ["64x8k-32/8-page16", "1x1k-16/1", "1x8k-16/1", "1x128k-16/1"]
    parts = bench_decode.planned(args)
    assert (len(parts["rows"]), parts["append"], parts["curve"]) == (4, [], [])
    everything = bench_decode.planned(bench_decode.parse_args([]))
    assert [len(rows) for rows in everything.values()] == [17, 3, 10]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rows", "2x*"], "--rows: no row matches 2x*"),
        (["--repeats", "0"], "--repeats: must be at least 1"),
        (["--rows", "1x*", "--plot"], "--plot: draws the curve"),
    ],
)
def test_arguments_that_measure_nothing_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        bench_decode.parse_args(words)
    assert message in capsys.readouterr().err


def test_list_names_the_rows(capsys):
    assert bench_decode.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == [row.name for row in ROWS]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu(capsys):
    assert bench_decode.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_rows_that_do_not_fit_are_named():
    parts = {"rows": [ROWS[5], ROWS[-1]], "append": [], "curve": []}
    fits, left_out = bench_decode.fitting(parts, 10**9, L2)
    assert fits["rows"] == [ROWS[-1]]
    assert left_out == ["128x8k-32/32"]


# Inputs


def test_the_pool_repeats_random_numbers(monkeypatch):
    monkeypatch.setattr(decode_rows, "RANDOM_ELEMENTS", 1001)
    pool = make_pool(2500, 0, "cpu")
    assert torch.equal(pool[:1001], pool[1001:2002])
    assert torch.equal(pool[:498], pool[2002:])
    assert pool[:1001].float().std() == pytest.approx(1, abs=0.1)


def test_caches_are_distinct_parts_of_the_pool(pool):
    inputs = small_inputs(SMALL, pool)
    starts = {x.data_ptr() for x in (*inputs.k_caches, *inputs.v_caches)}
    assert len(starts) == 4
    assert inputs.k_caches.shape == (2, 3, 32, 2, HEAD_DIM)
    assert inputs.arguments(3)["k_cache"].data_ptr() == inputs.k_caches[1].data_ptr()
    assert inputs.cache_seqlens.tolist() == [32] * 3


def test_pages_are_a_random_order_of_all_blocks(pool):
    inputs = small_inputs(SMALL_PAGED, pool)
    assert inputs.block_table.shape == (2, 2, 4)
    for table in inputs.block_table:
        assert sorted(table.flatten().tolist()) == list(range(8))
    assert inputs.block_table[0].flatten().tolist() != list(range(8))
    k, _ = inputs.sequence(1, 1)
    page = inputs.block_table[1, 1, 2]
    assert torch.equal(k[32:48], inputs.k_caches[1, page])


# Results


@pytest.mark.parametrize("row", [SMALL, SMALL_PAGED, SMALL_RAGGED], ids=lambda row: row.name)
def test_reference_is_torchs_attention_and_ours_agrees(row, pool):
    inputs = small_inputs(row, pool)
    calls = {OURS: decode_calls.decode(inputs), "one": decode_calls.decode(inputs, num_splits=1)}
    decode_calls.check(calls, inputs)
    k, v = (x.float().transpose(0, 1) for x in inputs.sequence(0, 1))
    q = inputs.q[1].float().transpose(0, 1)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, 0]
    found = decode_calls.reference(inputs.q[1, 0], *inputs.sequence(0, 1))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spoil", ["scale", "other cache", "nan"])
def test_check_finds_a_wrong_result(spoil, pool):
    inputs = small_inputs(SMALL, pool)
    right = decode_calls.decode(inputs)

    def wrong(number):
        out = right(number + 1 if spoil == "other cache" else number)
        return out * {"scale": 1.05, "nan": math.nan, "other cache": 1}[spoil]

    with pytest.raises(bench_fwd_bwd.WrongResultError, match="differs from float32"):
        decode_calls.check({OURS: wrong}, inputs)


@pytest.fixture
def appended():
    pool = make_pool(2**18, 3, "cpu")
    inputs = small_inputs(Row(3, 32, 4, 2), pool)
    k, v = torch.randn(2, 3, 1, 2, HEAD_DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    return inputs, k, v


def test_appending_writes_the_last_row_and_is_checked(appended, monkeypatch):
    inputs, k, v = appended
    before = inputs.k_caches.clone()
    decode_calls.check_append(inputs, k, v)
    assert torch.equal(inputs.v_caches[0, :, -1], v[:, 0])
    assert torch.equal(inputs.k_caches[0, :, :-1], before[0, :, :-1])
    assert torch.equal(inputs.k_caches[1], before[1])
    monkeypatch.setattr(decode_calls, "decode_append", lambda inputs, k, v: lambda _: inputs.q)
    k += 1
    with pytest.raises(bench_fwd_bwd.WrongResultError, match="appended k"):
        decode_calls.check_append(inputs, k, v)


def test_rotation_keeps_lengths_and_turns_with_the_position():
    x = torch.randn(2, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decode_calls.rotate(x, 0), x)
    turned = decode_calls.rotate(x, 7)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-2, atol=0)
    angle = torch.atan2(turned[:, 64], turned[:, 0]) - torch.atan2(x[:, 64], x[:, 0])
    torch.testing.assert_close(angle.cos(), torch.tensor(7.0).cos().expand(2), rtol=0, atol=1e-2)


# Figures


def test_a_row_has_shares_targets_and_the_cost_of_splits(no_gpu_needed, setting):
    row = bench_decode.measure(SMALL, setting)
    assert list(row["providers"]) == [OURS, "one_split", "fa2"]
    read = 2 * 3 * 32 * 2 * HEAD_DIM * 2
    assert row["bytes"] == read and row["caches"] == 2
    assert row["providers"][OURS]["share"] == pytest.approx(read / 2e-6 / 1e12)
    assert row["met"] is False and row["splits_met"] is True
    assert row["splits_ratio"] == 0.5
    paged = bench_decode.measure(SMALL_PAGED, setting)
    assert list(paged["providers"]) == [OURS]
    assert paged["met"] is True and paged["splits_met"] is None
    ragged = bench_decode.measure(SMALL_RAGGED, dataclasses.replace(setting, peers=False))
    assert list(ragged["providers"]) == [OURS, "one_split"]
    assert ragged["met"] is None
    json.dumps([row, paged, ragged])


def test_slow_rows_are_not_timed_with_one_split(no_gpu_needed, setting, monkeypatch):
    monkeypatch.setattr(bench_decode, "call_seconds", lambda call: 0.021)
    row = bench_decode.measure(SMALL, setting)
    assert list(row["providers"]) == [OURS, "fa2"]
    assert row["splits_ratio"] is None and row["splits_met"] is None


def fake_row(row, caches=2, one_split=None, torch_us=None, us=2.0, share=0.5):
    times = {OURS: us, "one_split": one_split, "fa2": torch_us}
    providers = {
        name: {"median_us": t, "min_us": t, "repeats": 24, "calls": 10, "share": share}
        for name, t in times.items()
        if t is not None
    }
    return bench_decode.make_row(row, caches, providers)


@pytest.fixture
def result():
    append = {
        "name": "1x2k-32/8",
        "providers": {"plain": {"median_us": 8.0}, "append": {"median_us": 9.5}},
        **{"added_us": 1.5, "target_us": 3.0, "met": True},
    }
    curve = decode_rows.curve_rows()
    return {
        "environment": {"device": "GPU", "torch": "2.11", "cuda": "13.0", "date": "2026-01-02"},
        **{"command": "python3 benchmarks/bench_decode.py", "dtype": "bf16", "head_dim": 128},
        **{"copy_bytes_per_second": 4.2e12, "copy_bytes_per_second_after": 4.1e12},
        "rows": [
            fake_row(ROWS[0], us=129.0, share=0.991, one_split=120.0, torch_us=130.2),
            fake_row(ROWS[6], us=520.0, share=0.98),
            fake_row(ROWS[11], us=7.512, one_split=9.0, torch_us=11.1),
        ],
        "append": [append],
        "curve": [fake_row(row, us=10.0 * (i + 1), torch_us=20.0) for i, row in enumerate(curve)],
        **{"wrong": [], "left_out": ["128x8k-32/32"]},
    }


def test_lines_are_aligned_and_name_what_is_missed(result):
    lines = [decode_tables.row_line(row) for row in result["rows"]]
    assert lines[0].endswith("SLOWER THAN ONE SPLIT")
    assert lines[1].endswith("MISSED")
    ends = {line.index(word) + len(word) for line, word in zip(lines, ("149 us", "99 %  "))}
    assert len(lines[2]) == len(decode_tables.ROW_HEADER)
    assert len(decode_tables.ROW_HEADER) in ends
    assert lines[2].split() == (
        "1x1k-32/8 4.2 7.51 7.51 50.0 % 8 us 0.83 11.1 50.0 % 12.9 us".split()
    )


def test_summary_marks_fa3_and_counts_what_is_met(result):
    text = decode_tables.summary(result)
    assert "reference figure, same GPU, not measured in this run" in text
    assert "4.200 TB/s before, 4.100 TB/s after" in text
    assert "targets met: 2 of 3" in text
    assert "at least as fast as FA3's figure: 2 of 3" in text
    assert "not slower than one split: 1 of 2" in text
    assert "append and rotary, at most 3 us: 1 of 1 (1x2k-32/8 1.50 us)" in text
    assert "left out, for memory or time: 128x8k-32/32" in text
    assert "MISSED" in decode_tables.append_line({**result["append"][0], "met": False})


def test_everything_is_measured_into_the_result(no_gpu_needed, setting, monkeypatch, capsys):
    spoiled = dataclasses.replace(SMALL, batch=2)
    check = bench_decode.check

    def wrong(calls, inputs):
        if inputs.q.shape[0] == 2:
            raise bench_fwd_bwd.WrongResultError("out differs")
        check(calls, inputs)

    monkeypatch.setattr(bench_decode, "check", wrong)
    parts = {"rows": [SMALL, spoiled], "append": [Row(1, 32, 4, 2)], "curve": [SMALL]}
    result = {key: [] for key in ("rows", "append", "curve", "wrong", "left_out")}
    bench_decode.run_parts(parts, setting, result, time.perf_counter() + 1000)
    assert [len(result[key]) for key in ("rows", "append", "curve")] == [1, 1, 1]
    assert result["wrong"] == [f"rows {spoiled.name}: out differs"]
    assert list(result["curve"][0]["providers"]) == [OURS, "fa2"]
    assert result["append"][0]["added_us"] == 2.0 and result["append"][0]["met"]
    assert "WRONG" in capsys.readouterr().out
    json.dumps(result)
    late = {key: [] for key in result}
    bench_decode.run_parts(parts, setting, late, time.perf_counter() - 1)
    assert len(late["rows"]) == 1
    assert late["left_out"] == ["1x32-4/2", SMALL.name]


def test_a_run_writes_its_result(no_gpu_needed, pool, monkeypatch, tmp_path, capsys):
    """The whole of main() with small rows; the GPU's part is what no_gpu_needed replaces."""
    properties = SimpleNamespace(L2_cache_size=0)
    facts = {"device": "GPU", "torch": "2.11", "cuda": "13.0", "date": "2026-01-02"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**33))
    monkeypatch.setattr(bench_decode, "environment", lambda device: dict(facts))
    monkeypatch.setattr(bench_decode, "make_pool", lambda elements, seed, device: pool)
    monkeypatch.setattr(bench_decode, "copy_rate", lambda pool, repeats: 1e12)
    monkeypatch.setattr(bench_decode, "ROWS", (SMALL, SMALL_PAGED, ROWS[5]))
    monkeypatch.setattr(bench_decode, "append_rows", lambda: [Row(1, 32, 4, 2)])
    monkeypatch.setattr(bench_decode, "curve_rows", lambda: [SMALL])
    path = tmp_path / "new" / "decode.json"
    assert bench_decode.main(["--json", str(path), "--repeats", "2"]) == 0
    found = json.loads(path.read_text())
    assert [len(found[key]) for key in ("rows", "append", "curve", "wrong")] == [2, 1, 1, 0]
    assert found["left_out"] == ["128x8k-32/32"]
    assert found["command"] == "python3 benchmarks/bench_decode.py --json decode.json --repeats 2"
    printed = capsys.readouterr().out
    assert "copy, read plus written: 1.000 TB/s" in printed
    assert "targets met: 1 of 2" in printed
    assert "| no | 0.50 |" in update_readme.decode_section(found, "results/decode.json")


def test_torchs_call_takes_the_same_caches(pool):
    inputs = small_inputs(SMALL, pool)
    call = decode_calls.decode_torch(inputs)
    reason = decode_calls.refusal(call)
    if reason:
        pytest.skip(f"torch's backend: {reason}")
    decode_calls.check({"fa2": call}, inputs)


# README and plot


def test_benchmarks_readme_shows_the_committed_results():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    filled = update_readme.updated(text, ROOT / "benchmarks", "benchmarks/README.md")
    assert filled == text, "run python3 benchmarks/update_readme.py"


def test_without_results_the_readme_has_no_figures(tmp_path):
    marks = "".join(f"<!-- begin {n} -->old<!-- end {n} -->" for n in ("decode", "smem"))
    text = update_readme.updated(marks, tmp_path, "benchmarks/README.md")
    assert "Decoding: not measured yet." in text and "old" not in text


def test_readme_table_has_the_files_numbers(result, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "decode.json").write_text(json.dumps(result))
    marks = "".join(f"<!-- begin {n} -->\n<!-- end {n} -->" for n in ("decode", "smem"))
    text = update_readme.updated(marks, tmp_path, "benchmarks/README.md")
    row = "| 16x8k-8/8 | 536.9 | 129 | 99.1 % | 96 % | yes | 1.07 | 130 | 86 % 149 us |"
    assert row in text
    assert "FA3 (reference figure, same GPU)" in text
    assert "[results/decode.json](results/decode.json)" in text
    assert "(results/decode.png)" in text
    assert update_readme.updated(text, tmp_path, "benchmarks/README.md") == text
    without = update_readme.decode_section({**result, "curve": []}, "results/decode.json")
    assert ".png" not in without


def test_plot_of_the_curve_is_written(result, tmp_path):
    pytest.importorskip("matplotlib")
    import plot

    plot.plot_decode(result, tmp_path / "decode.png")
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


# Example


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("transformers")
    path = ROOT / "examples" / "generate_with_kvcache.py"
    spec = importlib.util.spec_from_file_location("generate_with_kvcache", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_example_runs_on_the_cpu(example, capsys):
    assert example.main(["--device", "cpu", "--new-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("largest error" in line for line in lines) == 3
    assert any(line.startswith("generate_batch:") for line in lines)


def test_example_finds_a_wrong_cache(example, monkeypatch, capsys):
    attend = example.flash_attn_with_kvcache

    def forgetful(*args, cache_seqlens, **options):
        return attend(*args, cache_seqlens=(cache_seqlens - 1).clamp_min(0), **options)

    monkeypatch.setattr(example, "flash_attn_with_kvcache", forgetful)
    assert example.main(["--device", "cpu", "--new-tokens", "4"]) == 1
    assert "FAILED: the logits are wrong" in capsys.readouterr().err
