"""The study of parallelism without a GPU: formulas, version 1's rule, tables and page on made-up times, compiling."""

import ctypes
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from csrc import build_config  # noqa: E402
from studies.parallelism import __main__ as command  # noqa: E402
from studies.parallelism import (  # noqa: E402
    build,
    check,
    formulas,
    library,
    paper,
    profiler,
    report,
    variants,
)
from studies.parallelism.formulas import Waves, row_splits  # noqa: E402
from studies.parallelism.variants import BackwardVariant  # noqa: E402
from third_party.fetch_cutlass import Cutlass, find_cutlass  # noqa: E402

BLOCK_M, BLOCK_N = variants.FORWARD_BLOCK_M, variants.FORWARD_BLOCK_N
ENVIRONMENT = {"device": "Some GPU", "torch": "2.11.0", "cuda": "13.0", "date": "2026-01-02"}


# Grids


def test_version_2_grid_does_not_depend_on_the_gpu_and_version_1_does():
    shape = {"pairs": 20, "query_blocks": 16}
    grids = {
        formulas.grid_blocks("tile_grid", **shape, splits=1, sms=s, per_sm=2) for s in (8, 132)
    }
    assert grids == {320}
    assert row_splits(20, 132, 2, 16) != row_splits(20, 8, 2, 16)


@pytest.mark.parametrize("sms, per_sm", [(132, 2), (108, 1), (8, 3)])
def test_row_splits_are_the_fewest_that_fill_the_gpu(sms, per_sm):
    for query_blocks in (1, 4, 32, 512):
        for pairs in range(1, 600, 7):
            allowed = range(1, min(30, query_blocks) + 1)
            filled = {n: Waves(pairs * n, sms, per_sm).efficiency for n in allowed}
            count = row_splits(pairs, sms, per_sm, query_blocks)
            assert filled[count] >= 0.95 * max(filled.values())
            assert all(filled[n] < 0.95 * max(filled.values()) for n in allowed if n < count)


def test_row_splits_of_known_shapes():
    assert row_splits(264, 132, 2, 32) == 1
    assert row_splits(66, 132, 2, 32) == 4
    assert row_splits(1, 132, 2, 4) == 4  # no more than there are query blocks
    assert row_splits(1, 132, 2, 512) == 29  # of at most 30


def test_waves_count_whole_waves_and_the_idle_sms_of_the_last():
    one = Waves(16, sms=132, per_sm=2)
    assert (one.waves, one.idle_sms) == (16 / 264, 116)
    assert one.efficiency == pytest.approx(16 / 264)
    two = Waves(265, sms=132, per_sm=2)
    assert two.idle_sms == 131
    assert two.efficiency == pytest.approx(265 / 528)
    assert Waves(528, 132, 2).efficiency == 1.0
    assert Waves(528, 132, 2).idle_sms == 0


def test_grids_of_all_mappings():
    shape = {"pairs": 6, "query_blocks": 10, "splits": 3, "sms": 8, "per_sm": 2}
    grids = {name: formulas.grid_blocks(name, **shape) for name in variants.MAPPINGS}
    assert grids == {
        "per_head": 6,
        "row_splits": 18,
        "tile_grid": 60,
        "ordered": 60,
        "persistent": 16,
    }


# Bytes


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen, tiles", [(512, (128, 64)), (1000, (128, 64)), (1000, (16, 256))])
def test_visits_are_those_counted_one_by_one(seqlen, tiles, causal):
    block_m, block_n = tiles
    count = 0
    for m in range(0, seqlen, block_m):
        last_query = min(seqlen, m + block_m) - 1
        count += sum(not causal or n <= last_query for n in range(0, seqlen, block_n))
    assert formulas.visits(seqlen, block_m, block_n, causal) == count


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_bytes_of_both_loop_orders_are_those_of_the_loops(splits, causal):
    seqlen, d, pairs = 1024, 64, 5
    query_tile, key_tile = BLOCK_M * d * 2, 2 * BLOCK_N * d * 2
    partial_tile = BLOCK_M * (d + 2) * 4
    sees = [
        [not causal or n * BLOCK_N <= m * BLOCK_M + BLOCK_M - 1 for n in range(seqlen // BLOCK_N)]
        for m in range(seqlen // BLOCK_M)
    ]
    final = BLOCK_M * (d * 2 + 4)
    read = written = 0
    for row in sees:
        read += query_tile + sum(row) * key_tile
        written += final
    outside = formulas.queries_outside_bytes(pairs, seqlen, d, causal)
    assert outside == (pairs * read, pairs * written)

    read = written = 0
    for split in range(splits):
        for n in range(seqlen // BLOCK_N):
            mine = [m for m in range(split, len(sees), splits) if sees[m][n]]
            read += key_tile if mine else 0
            for m in mine:
                read += query_tile + (partial_tile if n > 0 else 0)
                is_last = n == max(i for i, seen in enumerate(sees[m]) if seen)
                written += final if is_last else partial_tile
    inside = formulas.keys_outside_bytes(pairs, seqlen, d, causal, splits)
    assert inside == (pairs * read, pairs * written)


def test_least_bytes_touch_every_tensor_once():
    matrix = 3 * 1024 * 128 * 2
    assert formulas.least_bytes(3, 1024, 128) == (3 * matrix, matrix + 3 * 1024 * 4)


@pytest.mark.parametrize("head_dim", variants.HEAD_DIMS)
def test_split_sums_cost_shared_memory_and_nothing_else_changes(head_dim):
    plain, split = BackwardVariant(head_dim), BackwardVariant(head_dim, split_k=True)
    read, written = formulas.shared_step_bytes(plain)
    split_read, split_written = formulas.shared_step_bytes(split)
    partial = plain.warps * plain.block_m * head_dim * 4
    assert split_written - written == partial
    assert split_read - read > partial / 2
    # dQ alone: dS per column of warps, K^T per row of warps.
    dq = plain.warps // 2 * 64 * 128 * 2 + 2 * 128 * head_dim * 2
    dq_split = 64 * 128 * 2 + 4 * 128 * head_dim * 2 + partial
    assert split_read - read == dq_split - dq


def test_shared_bytes_grow_with_the_visits():
    variant = BackwardVariant(64)
    read, written = formulas.shared_bytes(variant, 2, 1024, causal=False)
    step_read, step_written = formulas.shared_step_bytes(variant)
    tile = 2 * 128 * 64 * 2
    assert read == 2 * (16 * 8 * step_read + 8 * tile)
    assert written == 2 * (16 * 8 * step_written + 8 * 2 * tile)


# Variants


def test_variants_that_cannot_be_built_say_why():
    why = BackwardVariant(128, block_m=16, block_n=256).why_not()
    assert why and "256 of a thread's 255 registers" in why
    large = BackwardVariant(128, block_m=128, split_k=True).why_not()
    assert large and "shared memory" in large
    for head_dim in variants.HEAD_DIMS:
        assert all(v.why_not() is None for v in variants.backward_variants(head_dim))


@pytest.mark.parametrize("head_dim", variants.HEAD_DIMS)
def test_factors_change_one_thing_and_the_ladder_one_after_the_other(head_dim):
    def differences(a, b):
        return [name for name in vars(a) if getattr(a, name) != getattr(b, name)]

    start, *changed = variants.factors(head_dim).values()
    assert start == variants.base(head_dim)
    for variant in changed:
        names = differences(start, variant)
        assert len(names) == 1 or names == ["block_m", "block_n"]
    steps = list(variants.ladder(head_dim).values())
    assert steps[-1] == start
    assert all(len(differences(a, b)) == 1 for a, b in itertools.pairwise(steps))


def test_every_unit_exports_its_two_functions():
    units = variants.units()
    for name, text in units.items():
        if name != "support":
            assert f"int {name}_run(" in text and f"int {name}_facts(" in text
    for head_dim in variants.HEAD_DIMS:
        for variant in variants.backward_variants(head_dim):
            assert variant.traits in units[variant.unit]
        for name in (*variants.MAPPINGS, "keys_outside"):
            assert library.forward_unit(name, head_dim)[0] in units


# Operations


def test_operations_and_utilisation_follow_the_papers():
    assert formulas.forward_flops(3, 1024, 64, False) == 4 * 3 * 1024**2 * 64
    assert formulas.backward_flops(3, 1024, 64, True) == 2.5 * 2 * 3 * 1024**2 * 64
    parameters = 12 * 12 * 768**2 + 256 * 768
    assert formulas.model_parameters(12, 768) == parameters
    flops = 6 * parameters + 12 * 12 * 768 * 2048
    assert formulas.utilisation(12, 768, 2048, 1e5) == pytest.approx(flops * 1e5 / 989e12)


def test_unfused_attention_and_the_reference_are_torchs():
    q, k, v = (torch.randn(2, 33, 3, 16, dtype=torch.float64).float() for _ in range(3))
    for causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
        ).transpose(1, 2)
        torch.testing.assert_close(paper.unfused(q, k, v, causal), expected)
        found = library.reference(q, k, v, causal, dout=torch.ones_like(q))
        torch.testing.assert_close(found["out"], expected)
        assert {name: tuple(x.shape) for name, x in found.items()} == {
            "out": (2, 33, 3, 16),
            "lse": (2, 3, 33),
            **dict.fromkeys(("dq", "dk", "dv"), (2, 33, 3, 16)),
        }


def test_check_sees_wrong_and_missing_values():
    right = torch.randn(2, 8, 3, 16)
    lse = torch.randn(2, 3, 8)
    expected = {"out": right, "lse": lse}
    assert check.wrong({"out": right.bfloat16(), "lse": lse}, expected) is None
    assert "out" in (check.wrong({"out": right * 1.1}, expected) or "")
    assert "lse" in (check.wrong({"lse": lse + 0.01}, expected) or "")
    missing = right.clone()
    missing[0, 0, 0, 0] = torch.nan
    assert "out" in (check.wrong({"out": missing}, expected) or "")


def test_a_check_that_ends_early_is_wrong_and_says_why(tmp_path, capsys):
    cases = [check.forward_case("tile_grid", 64, True)]
    (why,) = check.failures(tmp_path / "no-such-library.so", cases)
    assert why and "no-such-library" in why
    assert "WRONG" in capsys.readouterr().out


# Counters

CSV = """\
==PROF== Connected to process 7
==PROF== Profiling "keys_outside_kernel": 0%....50%....100% - 2 passes
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","keys_outside_kernel","Command line profiler metrics","dram__bytes_read.sum","byte","1,024"
"0","7","keys_outside_kernel","Command line profiler metrics","dram__bytes_write.sum","byte","512"
"1","7","forward_grid_kernel","Command line profiler metrics","dram__bytes_read.sum","byte","2048"
"1","7","forward_grid_kernel","Command line profiler metrics","smsp__sass_data_bytes_mem_shared.sum","","90"
"1","7","forward_grid_kernel","x","smsp__sass_data_bytes_mem_shared_op_st.sum","","10"
"1","7","forward_grid_kernel","x","smsp__sass_data_bytes_mem_shared_op_stsm.sum","","5"
"1","7","forward_grid_kernel","x","smsp__sass_data_bytes_mem_shared_op_ldgsts.sum","","20"
"1","7","forward_grid_kernel","x","l1tex__data_pipe_lsu_wavefronts_mem_shared.sum","","3"
"1","7","forward_grid_kernel","Command line profiler metrics","dram__bytes_write.sum","byte","n/a"
"""


def test_counters_are_read_by_launch_and_turned_into_bytes():
    first, second = profiler.parse_counters(CSV)
    assert profiler.summarise(first) == {
        "metrics": first,
        "dram_read": 1024.0,
        "dram_written": 512.0,
    }
    assert profiler.summarise(second) == {
        "metrics": second,
        "dram_read": 2048.0,
        "shared_wavefronts": 3 * 128.0,
        "shared_written": 35.0,
        "shared_read": 55.0,
    }
    assert profiler.parse_counters("==ERROR== nothing\n") == []
    assert profiler.first_complaint("x\n==ERROR== no permission\n") == "no permission"


@pytest.mark.parametrize("program", [None, "exit 0", "echo '==ERROR== no permission'"])
def test_without_counters_the_formulas_are_left(program, tmp_path, monkeypatch, capsys):
    if program:
        fake = tmp_path / "ncu"
        fake.write_text(f"#!/bin/sh\n{program}\n")
        fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if program else str(tmp_path))
    cases = [{"kind": "forward"}, {"kind": "forward"}]
    counters, notice = profiler.Profiler(tmp_path / "library.so").count(cases)
    assert counters == [None, None]
    assert notice and notice.startswith("formula only")
    assert notice in capsys.readouterr().out


# Tables, page, plots


def fake_mapping():
    cells = []
    for head_dim in variants.HEAD_DIMS:
        for causal in (False, True):
            for pairs, seqlen in ((1, 512), (16, 2048), (64, 2048)):
                mappings = {
                    name: {
                        "splits": 2,
                        "blocks": 8,
                        "waves": 0.5,
                        "idle_sms": 100,
                        "ms": float(i),
                        "tflops": 100.0 / i,
                    }
                    for i, name in enumerate(variants.MAPPINGS, start=1)
                }
                cells.append(
                    {
                        "pairs": pairs,
                        "seqlen": seqlen,
                        "head_dim": head_dim,
                        "causal": causal,
                        "mappings": mappings,
                    }
                )
    return {"sms": 132, "wrong": {"persistent d64 full": "b1: out differs"}, "cells": cells}


def fake_loop_order():
    def order(counters):
        return {
            "read": 6_000_000_000,
            "written": 1_000_000_000,
            "counters": counters,
            "ms": 1.0,
            "tflops": 123.4,
        }

    counted = {"dram_read": 1e9, "dram_written": 5e8, "l2": 8e9}
    cell = {
        "pairs": 64,
        "seqlen": 4096,
        "head_dim": 64,
        "causal": False,
        "splits": 4,
        "least_read": 3_000_000,
        "least_written": 1_000_000,
        "orders": {"row_splits": order(counted), "keys_outside": order(None)},
    }
    return {"sms": 132, "wrong": {}, "notice": "formula only, no counters: x", "cells": [cell]}


def fake_backward():
    section = {"wrong": {}, "notice": None, "variants": {}, "cells": []}
    facts = {
        "registers": 250,
        "local_bytes": 0,
        "smem_bytes": 82944,
        "threads": 128,
        "blocks_per_sm": 2,
    }
    for head_dim in variants.HEAD_DIMS:
        keys = [
            v.unit + ("" if v.key_parallel else "_per_head")
            for v in variants.backward_variants(head_dim)
        ]
        section["variants"][str(head_dim)] = {
            key: {
                "facts": facts,
                "counters": {"shared_read": 3e9, "shared_written": 1e9},
                "shared_read": 10**9,
                "shared_written": 10**9,
            }
            for key in keys
        }
        for causal in (False, True):
            speeds = {
                key: {"ms": 1.0, "tflops": 100.0 + i} for i, key in enumerate([*keys, "shipped"])
            }
            section["cells"].append(
                {
                    "batch": 8,
                    "seqlen": 2048,
                    "heads": 2048 // head_dim,
                    "head_dim": head_dim,
                    "causal": causal,
                    "variants": speeds,
                }
            )
    return section


@pytest.fixture
def result():
    times = {"flash_attn": 1.0, "fa2": 2.0, "unfused": 9.0}
    cells = [
        {
            "direction": direction,
            "head_dim": 64,
            "causal": True,
            "seqlen": seqlen,
            "batch": 1,
            "heads": 32,
            "providers": {n: {"median_ms": t, "tflops": 100 / t} for n, t in times.items()},
        }
        for direction in paper.DIRECTIONS
        for seqlen in (512, 1024)
    ]
    speeds = [
        {
            "model": "85M, d 64",
            "attention": name,
            "context": 2048,
            "batch": 8,
            "tokens_per_second": 4e5,
            "utilisation": 0.25,
        }
        for name in ("flash", "sdpa")
    ]
    memory = [{"seqlen": 512, "bytes": {"flash_attn": 2**21, "unfused": None}}]
    sections = {
        "mapping": fake_mapping(),
        "loop_order": fake_loop_order(),
        "backward": fake_backward(),
        "tables": {"cells": cells, "wrong": {}},
        "training": {"peak_tflops": 989.0, "speeds": speeds},
        "memory": {"heads": 8, "head_dim": 128, "total_bytes": 2**37, "cells": memory},
    }
    common = {"environment": ENVIRONMENT, "command": "python3 -m studies.parallelism"}
    return {"build": None, "sections": {n: {**common, **s} for n, s in sections.items()}}


def test_tables_hold_the_numbers(result):
    text = report.text_report(json.loads(json.dumps(result)))
    row = next(line for line in text.splitlines() if line.startswith("16, 2048"))
    assert row.split()[2:5] == ["100", "(0.50,", "100)"]
    parting = next(x for x in text.splitlines() if x.startswith("version 2: tile grid / version 1"))
    assert parting.split("causal")[1].split()[:3] == ["3", "0.67", "0.67"]  # 2 ms over 3 ms
    loop = next(line for line in text.splitlines() if line.startswith("64 x 4096, d 64 full"))
    assert loop.split()[6:] == "4 0.004 7 8 1.5 123 7 - - 123 - - - -".split()
    assert "tile 16 x 256: dK and dV alone take" in text
    assert "+ tile 64 x 128" in text
    assert "d 64 causal, flash_attn" in text and "85M, d 64, 2048, 8" in text
    assert "Left out, wrong: persistent d64 full" in text
    assert "Counters: formula only" in text


def test_page_is_filled_once_and_says_what_is_missing(result):
    page = report.DOCS.read_text(encoding="utf-8")
    empty = report.filled(page, {"sections": {}})
    assert empty.count("not measured yet") == len(report.BLOCKS)
    full = report.filled(empty, result)
    assert "not measured yet" not in full
    assert report.filled(full, result) == full
    assert "Some GPU, torch 2.11.0, CUDA 13.0, 2026-01-02" in full
    assert "![backward](../studies/parallelism/results/backward.png)" in full
    part = {"sections": {"memory": result["sections"]["memory"]}}
    assert report.filled(full, part).count("not measured yet") == len(report.BLOCKS) - 1


def test_page_shows_the_committed_results():
    result = command.read_result(ROOT / report.RESULT_FILE)
    assert report.update_docs(result, check=True), "python3 -m studies.parallelism --show --docs"
    page = report.DOCS.read_text(encoding="utf-8")
    for name in report.SECTIONS:
        file = report.PLOT_NAME.format(name)
        assert file not in page or (report.RESULTS / file).is_file()


def test_first_paragraph_answers_the_question():
    first = report.DOCS.read_text(encoding="utf-8").split("\n\n")[1]
    for words in ("(query blocks, batch, heads)", "the shape of the problem alone", "`num_splits`"):
        assert words in first
    assert "docs/parallelism.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_plots_are_drawn_from_the_result_alone(result, tmp_path):
    pytest.importorskip("matplotlib")
    from studies.parallelism import plots

    written = plots.draw(result, tmp_path)
    assert {p.name for p in written} == {report.PLOT_NAME.format(n) for n in plots.PLOTS}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)
    assert {s for s, _, has_plot in report.BLOCKS.values() if has_plot} == set(plots.PLOTS)


def test_command_shows_a_result_without_a_gpu(result, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert command.main(["--show", "--json", str(path)]) == 2
    command.write_json(result, path)
    assert command.main(["--show", "--json", str(path)]) == 1  # a variant was wrong
    shown = capsys.readouterr()
    assert "keys outside" in shown.out and "persistent d64 full" in shown.err
    line = command.command_line(["--json", "/some/where/x.json", "--only", "memory"])
    assert line == "python3 -m studies.parallelism --json x.json --only memory"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_measuring_says_that_it_needs_a_gpu(capsys):
    assert command.main(["--only", "mapping"]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


# Compilation

ONE_OF_EACH = """\
#include <cstddef>

#include "keys_outside.cuh"
#include "backward.cuh"
#include "forward_mapping.cuh"
using namespace parallelism;
using Traits = FwdTraits<64, cutlass::bfloat16_t>;
constexpr MaskKind kMask = MaskKind::kCausal;
void const* const kernels[] = {
    reinterpret_cast<void const*>(&forward_grid_kernel<Traits, kMask>),
    reinterpret_cast<void const*>(&forward_walk_kernel<Traits, kMask>),
    reinterpret_cast<void const*>(&keys_outside_kernel<Traits, kMask>),
    reinterpret_cast<void const*>(&backward_kernel<BACKWARD>),
};
"""


def _assertions() -> str:
    """What Python and C++ must agree on."""
    lines = []
    for head_dim in variants.HEAD_DIMS:
        lines += [
            f"static_assert({v.traits}::kSmemBytes == {v.smem_bytes});"
            for v in variants.backward_variants(head_dim)
        ]
        traits = f"FwdTraits<{head_dim}, cutlass::bfloat16_t>"
        lines.append(f"static_assert({traits}::kBlockM == {BLOCK_M});")
        lines.append(f"static_assert({traits}::kBlockN == {BLOCK_N});")
    for structure in (library.ForwardCall, library.BackwardCall, library.KernelFacts):
        name = structure.__name__
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});")
        lines += [
            f"static_assert(offsetof({name}, {field}) == {getattr(structure, field).offset});"
            for field, _ in structure._fields_
        ]
    parts = {"kPrepare": library.PREPARE, "kMain": library.MAIN, "kFinish": library.FINISH}
    lines += [f"static_assert(int({name}) == {value});" for name, value in parts.items()]
    mappings = {"kRowSplits": "ROW_SPLITS", "kTileGrid": "TILE_GRID", "kPersistent": "PERSISTENT"}
    lines += [
        f"static_assert(int(Mapping::{name}) == {variants.Mapping[other].value});"
        for name, other in mappings.items()
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_one_kernel_of_each_kind_compiles_without_spills(tmp_path):
    toolkit, cutlass = build_config.find_toolkit(), find_cutlass()
    if toolkit is None:
        pytest.skip("needs nvcc")
    if cutlass is None:
        pytest.skip("needs CUTLASS: python3 third_party/fetch_cutlass.py")
    traits = BackwardVariant(64, block_m=16, split_k=True, async_copies=False).traits
    text = ONE_OF_EACH.replace("BACKWARD", traits) + _assertions()
    built = build.compile_unit("one_of_each", text, toolkit, cutlass, 90, tmp_path)
    assert len(built.kernels) == 4
    assert all(kernel.is_clean for kernel in built.kernels), built.kernels


def test_kernels_include_nothing_of_csrc_and_nothing_is_left_over():
    """The study has what it needs of the extension's kernels as of one commit: csrc may change."""
    toolkit = build_config.Toolkit(Path("toolkit"), "13.0")
    flags = build.compile_flags(toolkit, Cutlass(Path("cutlass"), "4.2.1"), 90)
    folders = [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    assert folders == [build.KERNELS, build.EXTENSION]
    text = "".join(variants.units().values()) + "".join(p.read_text() for p in build.COMMON)
    seen, pending = set(build.COMMON), [text]
    while pending:
        for name in re.findall(r'#include "([^"]+)"', pending.pop()):
            path = next(f / name for f in folders if (f / name).is_file())
            if path not in seen:
                seen.add(path)
                pending.append(path.read_text())
    assert seen == set(build.headers())


def test_extension_is_built_without_the_variants():
    sources = build_config.handwritten_sources()
    assert not [path for path in sources if "parallelism" in str(path)]
