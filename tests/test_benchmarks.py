"""The benchmarks' own logic, without a GPU: shapes, timing method, tables, text, training loop."""

import dataclasses
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench  # noqa: E402
import bench_fwd_bwd  # noqa: E402
import bench_train  # noqa: E402
import corpus as corpus_module  # noqa: E402
import gpt  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
import train as train_script  # noqa: E402
import training  # noqa: E402
import training_speed  # noqa: E402
import update_readme  # noqa: E402

CPU = training.Precision(torch.device("cpu"), torch.float32)
TINY = gpt.Preset(
    layers=2, width=32, heads=2, context=32, batch=4, learning_rate=1e-2, max_steps=50
)


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def fake_cell(direction, head_dim, causal, seqlen, **milliseconds):
    heads, batch = 2048 // head_dim, 16384 // seqlen
    flops = report.attention_flops(direction, batch, heads, seqlen, head_dim, causal)
    providers = {
        name: {"median_ms": ms, "min_ms": ms, "repeats": 24, "tflops": flops / ms / 1e9}
        for name, ms in milliseconds.items()
    }
    return {
        "direction": direction,
        "batch": batch,
        "seqlen": seqlen,
        "heads": heads,
        "head_dim": head_dim,
        "causal": causal,
        "providers": providers,
    }


@pytest.fixture
def result():
    return {
        "environment": {
            "device": "Some GPU",
            "torch": "2.11.0",
            "cuda": "13.0",
            "date": "2026-01-02",
        },
        "command": "python3 benchmarks/bench_fwd_bwd.py",
        "dtype": "bf16",
        "cells": [
            fake_cell("fwd", 128, True, 4096, flash_attn=1.0, fa2=2.0, cudnn=0.5),
            fake_cell("fwd", 128, True, 8192, flash_attn=2.0, fa2=1.0),
            fake_cell("bwd", 128, True, 4096, flash_attn=4.0, fa2=5.0, cudnn=3.0),
        ],
        "host_us": {"flash_attn": {"fwd": 21.0, "fwd_bwd": 99.0}},
    }


# Shapes and command line


def test_default_table_has_36_cells_of_the_same_work():
    args = bench_fwd_bwd.parse_args([])
    shapes = list(bench_fwd_bwd.shapes(args))
    assert len(set(shapes)) == 36
    assert {s.batch * s.seqlen for s in shapes} == {16384}
    assert {s.heads * s.head_dim for s in shapes} == {2048}
    assert bench_fwd_bwd.PASSES[args.passes] == ("fwd", "bwd")


def test_arguments_select_a_part_of_the_table():
    words = "--pass bwd --head-dims 64 --causal --seqlens 512 1024 --dtype fp16 --repeats 5"
    args = bench_fwd_bwd.parse_args(words.split())
    assert list(bench_fwd_bwd.shapes(args)) == [
        bench_fwd_bwd.Shape(32, 512, 32, 64, True),
        bench_fwd_bwd.Shape(16, 1024, 32, 64, True),
    ]
    assert (args.passes, args.dtype, args.repeats) == ("bwd", "fp16", 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seqlens", "1000"], "--seqlens"),
        (["--head-dims", "96"], "--head-dims"),
        (["--repeats", "0"], "--repeats"),
        (["--causal", "--full"], "not allowed with"),
    ],
)
def test_arguments_that_give_no_shape_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        bench_fwd_bwd.parse_args(words)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_kernel_benchmark_says_that_it_needs_a_gpu(capsys):
    assert bench_fwd_bwd.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_recorded_command_has_no_absolute_path():
    line = bench.command_line("bench_fwd_bwd.py", ["--json", "/some/where/x.json", "--causal"])
    assert line == "python3 benchmarks/bench_fwd_bwd.py --json x.json --causal"


# Timing


class FakeGpu:
    """A device with a queue, and a host whose launches take time; both in seconds."""

    def __init__(self):
        self.host = self.free = 0.0
        fake = self

        class Event:
            def __init__(self, enable_timing=False):
                self.at = math.inf

            def record(self):
                self.at = max(fake.host, fake.free)

            def query(self):
                return fake.host >= self.at

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        self.cuda = SimpleNamespace(Event=Event, _sleep=self.spin, synchronize=self.synchronize)

    def spin(self, cycles):
        self.free = max(self.host, self.free) + cycles / bench.CYCLES_PER_SECOND

    def synchronize(self):
        self.host = max(self.host, self.free)

    def launch(self, host_seconds, device_seconds):
        self.host += host_seconds
        self.free = max(self.host, self.free) + device_seconds

    def perf_counter(self):
        return self.host


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()
    monkeypatch.setattr(bench, "torch", fake)
    monkeypatch.setattr(bench, "time", fake)
    return fake


def test_device_times_leave_out_launches_slower_than_the_gpu(gpu):
    calls = {
        "short": lambda: gpu.launch(400e-6, 10e-6),
        "long": lambda: gpu.launch(300e-6, 30e-6),
    }
    times = bench.device_times(calls, 0.1, flush=False)
    assert times["short"].median_ms == pytest.approx(0.010)
    assert times["long"].min_ms == pytest.approx(0.030)
    assert times["short"].repeats == bench.MAX_REPEATS


def test_device_times_repeat_as_often_as_asked(gpu):
    counted = []

    def call():
        counted.append(1)
        gpu.launch(1e-6, 1e-3)

    assert bench.device_times({"one": call}, 0.1, repeats=7, flush=False)["one"].repeats == 7
    assert len(counted) == bench.WARMUP_CALLS + 1 + 7  # warm-up, probe, measured


def test_device_times_refuse_a_call_that_waits_for_the_gpu(gpu):
    def call():
        gpu.launch(1e-6, 1e-3)
        gpu.synchronize()

    with pytest.raises(RuntimeError, match="waits for the GPU"):
        bench.device_times({"one": call}, 0.1, flush=False)


def test_host_time_is_the_mean_over_a_batch_of_calls(gpu):
    calls = {"a": lambda: gpu.launch(20e-6, 1e-6), "b": lambda: gpu.launch(35e-6, 1e-6)}
    assert bench.host_microseconds(calls) == pytest.approx({"a": 20.0, "b": 35.0})


def test_repeats_fill_the_time_within_bounds():
    assert bench.choose_repeats(2e-3, 0.1, 24, 100) == 50
    assert bench.choose_repeats(1.0, 0.1, 24, 100) == 24
    assert bench.choose_repeats(0.0, 0.1, 24, 100) == 100


def test_clock_samples_that_are_not_numbers_are_left_out():
    text = "1500, 3201, 400.5\n[N/A], 3201, 1\n1980, 3201, 650\n1700, 3201, 690.25\n17"
    assert bench.clock_summary(text) == {
        "clocks.sm": [1500, 1700, 1980],
        "clocks.mem": [3201, 3201, 3201],
        "power.draw": [400.5, 650, 690.25],
    }
    assert bench.clock_summary("") == {}


# What is timed


def cpu_inputs():
    return bench_fwd_bwd.make_inputs((1, 33, 2, 16), torch.float32, seed=0, device="cpu")


@pytest.mark.parametrize("causal", [False, True])
def test_providers_agree_and_backward_calls_give_three_gradients(causal):
    providers = {name: bench_fwd_bwd.load_provider(name) for name in ("flash_attn", "math")}
    inputs = cpu_inputs()
    results = bench_fwd_bwd.run_providers(providers, inputs, causal, backward=True)
    bench_fwd_bwd.check(results, "fp16")
    for direction, count in (("bwd", 3), ("fwd_bwd", 3)):
        calls = bench_fwd_bwd.timed_calls(direction, providers, results, inputs, causal)
        for name, call in calls.items():
            for _ in range(2):
                gradients = call()
            assert len(gradients) == count
            for got, want in zip(gradients, results[name][1:], strict=True):
                torch.testing.assert_close(got, want)
    forward = bench_fwd_bwd.timed_calls("fwd", providers, results, inputs, causal)
    assert not forward["flash_attn"]().requires_grad
    torch.testing.assert_close(forward["flash_attn"](), forward["math"]())


@pytest.mark.parametrize("spoil", ["scale", "one element", "nan"])
def test_check_finds_a_wrong_result(spoil):
    right = torch.randn(2, 64, 4, 32, generator=torch.Generator().manual_seed(0))
    wrong = right * 1.05 if spoil == "scale" else right.clone()
    if spoil == "one element":
        wrong[0, 3, 1, 5] += 1.0
    if spoil == "nan":
        wrong[1, 63, 3, 31] = math.nan
    bench_fwd_bwd.check({"flash_attn": [right], "fa2": [right]}, "bf16")
    with pytest.raises(bench_fwd_bwd.WrongResultError, match="out differs from fa2"):
        bench_fwd_bwd.check({"flash_attn": [wrong], "fa2": [right]}, "bf16")


def test_a_torch_backend_that_refuses_is_left_out_but_ours_is_not(capsys):
    def refuse(q, k, v, causal):
        raise RuntimeError("no kernel\nmore")

    inputs = cpu_inputs()
    math_only = bench_fwd_bwd.load_provider("math")
    results = bench_fwd_bwd.run_providers(
        {"cudnn": refuse, "math": math_only}, inputs, False, backward=False
    )
    assert list(results) == ["math"]
    assert capsys.readouterr().out == "  cudnn: no kernel\n"
    with pytest.raises(RuntimeError, match="no kernel"):
        bench_fwd_bwd.run_providers({"flash_attn": refuse}, inputs, False, backward=False)


# Numbers and tables


def test_operations_follow_the_papers_formula():
    forward = report.attention_flops("fwd", 2, 16, 1024, 128, False)
    assert forward == 4 * 2 * 16 * 1024 * 1024 * 128
    assert report.attention_flops("fwd", 2, 16, 1024, 128, True) == forward / 2
    assert report.attention_flops("bwd", 2, 16, 1024, 128, False) == 2.5 * forward
    assert report.attention_flops("fwd_bwd", 2, 16, 1024, 128, False) == 3.5 * forward


def test_geometric_mean():
    assert report.geometric_mean([2.0, 0.5, 8.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no values"):
        report.geometric_mean([])


def test_summary_gives_ratios_means_and_the_slowest_cell(result):
    lines = report.summary(result).splitlines()
    assert lines[0].split() == ["s4096", "s8192"]
    table = {tuple(line.split()[:-2]): line.split()[-2:] for line in lines}
    assert table[tuple("fwd d128 causal ours / fa2".split())] == ["2.00", "0.50"]
    assert table[tuple("fwd d128 causal ours / cudnn".split())] == ["0.50", "-"]
    assert table[tuple("bwd d128 causal ours / fa2".split())] == ["1.25", "-"]
    assert table[tuple("fwd d128 causal flash_attn TFLOP/s".split())] == ["275", "275"]
    widths = {len(line) for line in lines[:9]}
    assert len(widths) == 1
    fwd = "forward: ours / fa2: geometric mean 1.000, minimum 0.500 (d128 causal s8192), 2 cells"
    assert fwd in lines
    assert "host time per call, flash_attn: fwd 21.0 us, fwd_bwd 99.0 us" in lines


def test_cell_line_names_shape_and_every_provider(result):
    line = report.cell_line(result["cells"][0])
    assert line.split()[:6] == ["fwd", "b4", "h16", "s4096", "d128", "causal"]
    assert [part.split()[-2] for part in line.split(" | ")] == ["274.9", "137.4", "549.8"]


def test_plot_of_a_result_is_written(result, tmp_path):
    plot.plot_speed(result, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_plot_shows_every_point_from_zero_on(result, tmp_path, monkeypatch):
    """Also where a later panel's values are larger than the first one's."""
    cells = result["cells"]
    larger = [{**cell, "head_dim": 2 * cell["head_dim"]} for cell in cells]
    for cell in larger:
        scaled = cell["providers"].items()
        cell["providers"] = {n: {**p, "tflops": 3 * p["tflops"]} for n, p in scaled}
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    plot.plot_speed({**result, "cells": cells + larger}, tmp_path / "speed.png")
    monkeypatch.undo()
    for axes in figures[0].axes:
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert all(max(line.get_ydata()) < top for line in axes.lines)
    plot.plt.close(figures[0])


# README


def test_readme_shows_the_committed_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert update_readme.updated(text, ROOT / "benchmarks") == text, (
        "run python3 benchmarks/update_readme.py"
    )


def test_sections_without_results_say_so(tmp_path):
    marks = "".join(f"<!-- begin {n} -->old<!-- end {n} -->" for n in ("speed", "training"))
    text = update_readme.updated(marks, tmp_path)
    assert text.count("not measured yet") == 2
    assert "old" not in text


def test_readme_table_has_the_files_numbers_and_its_command(result, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "fwd_bwd.json").write_text(json.dumps(result))
    marks = "".join(f"<!-- begin {n} -->\n<!-- end {n} -->" for n in ("speed", "training"))
    text = update_readme.updated(f"before {marks} after", tmp_path)
    row = next(line for line in text.splitlines() if "128, causal, 4096" in line)
    assert [cell.strip() for cell in row.split("|")[2:-1]] == "275 137 550 172 137 229".split()
    assert "Some GPU, torch 2.11.0, CUDA 13.0, 2026-01-02" in text
    assert "`python3 benchmarks/bench_fwd_bwd.py`" in text
    assert "geometric mean 1.250, minimum 1.250" in text
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert update_readme.updated(text, tmp_path) == text


def test_training_table_has_a_row_per_context():
    def speed(name, context):
        return dataclasses.asdict(
            training_speed.StepSpeed(name, context, 2, 0.5, 4096.4, 3 * 2**30)
        )

    result = {
        "environment": {"device": "Some CPU", "torch": "2.13.0", "date": "2026-01-02"},
        "command": "c",
        "dtype": "float32",
        "model": dataclasses.asdict(TINY),
        "speeds": [speed(name, c) for c in (256, 1024) for name in ("flash", "unfused")],
    }
    text = update_readme.training_section(result, "file.json")
    assert "| 256, batch 2 | 4,096 | 4,096 | 3.00 | 3.00 |" in text
    assert "| 1024, batch 2 |" in text


@pytest.mark.parametrize("text", ["no marks", "<!-- end a --><!-- begin a -->"])
def test_a_readme_without_marks_is_refused(text):
    with pytest.raises(ValueError, match="begin a"):
        update_readme.fill(text, "a", "x")


# Text


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        path = tmp_path / f"part{i % 3}" / f"file{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# marker {i} #\n" + f"x{i} = {i}\n" * 60)
    (tmp_path / "part0" / "binary.txt").write_bytes(b"a\0b" * 100)
    (tmp_path / "part0" / "image.png").write_bytes(b"png" * 100)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("foreign\n" * 100)
    return tmp_path


def test_corpus_is_split_by_file_and_repeatable(folder):
    first, second = (corpus_module.load_corpus(folder, 2**20) for _ in range(2))
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.held_out, second.held_out)
    parts = [bytes(first.train.tolist()), bytes(first.held_out.tolist())]
    for i in range(40):
        assert sum(f"# marker {i} #".encode() in part for part in parts) == 1
    assert first.train_files + first.held_out_files == 40
    assert 0.05 <= len(first.held_out) / (len(first.train) + len(first.held_out)) < 0.15
    assert b"foreign" not in parts[0] + parts[1]
    assert b"png" not in parts[0] + parts[1]


def test_corpus_keeps_its_size_limit(folder):
    small = corpus_module.load_corpus(folder, 4000)
    assert len(small.train) + len(small.held_out) <= 4000


def test_corpus_of_one_file_is_refused(tmp_path):
    (tmp_path / "only.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="at least two"):
        corpus_module.load_corpus(tmp_path, 1000)


def test_unigram_loss_is_the_entropy_of_the_bytes():
    data = torch.tensor([0, 1, 2, 3] * 100_000, dtype=torch.uint8)
    assert corpus_module.unigram_loss(data, data) == pytest.approx(math.log(4), abs=5e-3)
    unseen = torch.full((4,), 200, dtype=torch.uint8)
    assert corpus_module.unigram_loss(data, unseen) == pytest.approx(math.log(400_256))


def test_windows_reach_both_ends_of_the_data():
    data = torch.arange(100, dtype=torch.uint8)
    windows = corpus_module.even_windows(data, 5, 9)
    assert windows.shape == (5, 10)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 99
    drawn = corpus_module.random_windows(data, 2000, 9, torch.Generator().manual_seed(0))
    assert (drawn[:, 1:] - drawn[:, :-1] == 1).all()
    assert (drawn.min(), drawn.max()) == (0, 99)


# Model


def test_attention_implementations_give_the_same_loss_and_gradients():
    torch.manual_seed(0)
    window = torch.randint(256, (2, 48))
    model = gpt.GPT(TINY, gpt.load_attention("unfused"), 48, torch.float32)
    gradients = {}
    for name in gpt.ATTENTION_NAMES:
        model.attention = gpt.load_attention(name)
        model.zero_grad()
        loss = model.loss(window)
        loss.backward()
        gradients[name] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    for name in ("flash", "sdpa"):
        torch.testing.assert_close(gradients[name], gradients["unfused"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", gpt.ATTENTION_NAMES)
def test_model_does_not_see_later_bytes(name):
    torch.manual_seed(0)
    model = gpt.GPT(TINY, gpt.load_attention(name), 32, torch.float32)
    tokens = torch.randint(256, (1, 32))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_rotary_scores_depend_on_distance_alone():
    cos, sin = gpt.rotary_table(32, 16)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 32, 1, 16)
    scores = gpt.rotate(q, cos, sin)[0, :, 0] @ gpt.rotate(k, cos, sin)[0, :, 0].T
    torch.testing.assert_close(scores[5:, 5:], scores[:-5, :-5], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[0, 1:], scores[0, :-1], atol=1e-2)


# Training


def make_trainer(seed=0):
    torch.manual_seed(seed)
    return training.Trainer(TINY, "flash", TINY.context, CPU, TINY.learning_rate)


def text_corpus():
    words = [b"for ", b"x in ", b"range", b"(10):\n", b"    y = x\n"]
    choice = random.Random(0)
    data = b"".join(choice.choice(words) for _ in range(4000))
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return corpus_module.Corpus(whole[3000:], whole[:3000], 9, 1)


def test_learning_rate_warms_up_and_ends_small():
    rates = [training.learning_rate(i / 1000, 1.0) for i in range(1001)]
    top = rates.index(max(rates))
    assert 0 < rates[0] < 0.1
    assert 0.01 < top / 1000 < 0.1
    assert max(rates) > 0.95
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(training.FINAL_RATE)


def test_training_beats_the_unigram_model_and_repeats_by_its_seed():
    plan = training.Plan(4, TINY.context, 60, math.inf, TINY.learning_rate, seed=3)
    first, second = (training.train(make_trainer(), text_corpus(), plan) for _ in range(2))
    assert first.steps == 60
    assert first.held_out < first.unigram - 0.5
    assert first.learned
    assert first.curves.train == second.curves.train
    assert [step for step, _ in first.curves.held_out][-1] == 60
    assert len(first.curves.held_out) == training.EVALUATIONS + 1


def test_training_ends_by_its_time_with_the_schedule_complete(monkeypatch):
    trainer, now = make_trainer(), 0.0
    step = trainer.step

    def step_of_10_ms(window):
        nonlocal now
        now += 0.01
        return step(window)

    monkeypatch.setattr(trainer, "step", step_of_10_ms)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now))
    plan = training.Plan(4, TINY.context, 10**9, 1.5, TINY.learning_rate, seed=0)
    outcome = training.train(trainer, text_corpus(), plan)
    assert outcome.steps == pytest.approx(150, abs=1)
    assert outcome.seconds == pytest.approx(1.5, abs=0.02)
    rate = trainer.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(training.FINAL_RATE * TINY.learning_rate, rel=0.05)


def test_a_loss_that_is_not_a_number_has_not_learned():
    plan = training.Plan(4, TINY.context, 1, math.inf, TINY.learning_rate, seed=0)
    outcome = training.train(make_trainer(), text_corpus(), plan)
    assert not outcome.learned  # one step is not enough
    assert not dataclasses.replace(outcome, held_out=math.nan).learned


def test_batch_is_halved_until_it_fits(monkeypatch):
    trainer = make_trainer()
    seen = []
    loss = trainer.model.loss

    def limited(window):
        seen.append(len(window))
        if len(window) > 3:
            raise torch.OutOfMemoryError
        return loss(window)

    monkeypatch.setattr(trainer.model, "loss", limited)
    plan = training.Plan(12, TINY.context, 1, math.inf, 1e-3, seed=0)
    assert training.fit_batch(trainer, text_corpus().train, plan) == 3
    assert seen == [12, 6, 3]


def test_sample_starts_with_the_prompt_and_has_the_asked_length():
    text = training.generate(make_trainer(), "ab", 40, math.inf, seed=0)
    assert text.startswith("ab")
    assert training.generate(make_trainer(), "ab", 40, math.inf, seed=0) == text
    assert training.generate(make_trainer(), "ab", 40, -1.0, seed=0) == "ab"


def test_unfused_attention_needs_the_score_matrix_and_flash_does_not():
    context = 512
    speeds = training_speed.compare_attention(TINY, ("flash", "unfused"), context, 1, CPU, 0.0)
    flash, unfused = (speed.step_bytes for speed in speeds)
    scores = TINY.layers * TINY.heads * context**2 * 4
    assert unfused - flash > 0.9 * scores
    assert [s.attention for s in speeds] == ["flash", "unfused"]
    assert all(s.tokens_per_second == pytest.approx(context / s.step_seconds) for s in speeds)
    lines = training_speed.speed_table(speeds).splitlines()
    assert lines[2].split()[-3] == "1.00x"


def test_train_script_writes_its_outputs(folder, tmp_path, capsys):
    output = tmp_path / "out"
    words = f"--data {folder} --steps 40 --time-limit 0 --batch 4 --context 32 --threads 1"
    code = train_script.main([*words.split(), "--device", "cpu", "--output", str(output)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "unfused" in printed
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "sample.txt").read_text(encoding="utf-8").startswith("def ")
    record = json.loads((output / "run.json").read_text())
    assert record["outcome"]["held_out"] < record["outcome"]["unigram"]
    assert len(record["outcome"]["curves"]["train"]) == 40
    assert [s["context"] for s in record["attention_speed"]] == [32, 32, 256, 256]
    assert str(folder) not in json.dumps(record)


def test_train_script_fails_when_nothing_was_learned(folder, tmp_path, capsys):
    words = f"--data {folder} --steps 1 --time-limit 0 --context 32 --threads 1 --no-compare"
    code = train_script.main([*words.split(), "--device", "cpu", "--output", str(tmp_path / "o")])
    assert code == 1
    assert "FAILED: held-out loss" in capsys.readouterr().err


def test_train_script_refuses_fp32_flash_attention_on_a_gpu(capsys):
    with pytest.raises(SystemExit):
        train_script.parse_args(["--device", "cuda", "--dtype", "float32"])
    assert "--dtype float32" in capsys.readouterr().err


def test_training_benchmark_writes_what_the_readme_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench_train.PRESETS, "small", TINY)
    path = tmp_path / "speed.json"
    words = "--device cpu --size small --contexts 64 --tokens 128 --seconds 0 --json"
    assert bench_train.main([*words.split(), str(path)]) == 0
    result = json.loads(path.read_text())
    assert [s["attention"] for s in result["speeds"]] == list(gpt.ATTENTION_NAMES)
    assert {s["batch"] for s in result["speeds"]} == {2}
    assert "64, batch 2" in update_readme.training_section(result, "f")
