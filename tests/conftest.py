"""Devices, markers and the seed of the test run.

Tests marked `cuda` are collected only where a GPU and the extension are there; those that are `slow`
as well run only when -m names it (`-m slow`, `-m "slow or not slow"`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cases
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # small cases: waiting for other threads would cost most of the time
    config.addinivalue_line("markers", "slow: long or large; where also `cuda`, only with -m slow")
    config.addinivalue_line("markers", "cuda: needs a GPU and the extension; else not collected")
    config.addinivalue_line("markers", "gpus(count): skipped with fewer GPUs")


def pytest_report_header(config: pytest.Config) -> str:
    limit = f", FLASH_ATTN_TEST_SMEM_KB={cases.SMEM_LIMIT_KB}" if cases.SMEM_LIMIT_KB else ""
    return f"attention: devices {cases.devices()}, FLASH_ATTN_TEST_SEED={cases.SEED}{limit}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marked = [mark for mark in metafunc.definition.iter_markers("parametrize")]
    names = {n.strip() for m in marked for n in _names(m.args[0])}
    if "device" in metafunc.fixturenames and "device" not in names:
        cuda_only = metafunc.definition.get_closest_marker("cuda") is not None
        metafunc.parametrize("device", ["cuda"] if cuda_only else cases.devices())


def _names(argnames: str | tuple[str, ...] | list[str]) -> list[str]:
    return argnames.split(",") if isinstance(argnames, str) else list(argnames)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if cases.why_no_cuda():
        items[:] = [item for item in items if item.get_closest_marker("cuda") is None]
    if "slow" not in (config.getoption("markexpr") or ""):
        later = [i for i in items if i.get_closest_marker("slow") and i.get_closest_marker("cuda")]
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in later]


def pytest_runtest_setup(item: pytest.Item) -> None:
    mark = item.get_closest_marker("gpus")
    if mark is not None:
        if torch.cuda.device_count() < mark.args[0]:
            pytest.skip(f"needs {mark.args[0]} GPUs, has {torch.cuda.device_count()}")


@pytest.fixture
def pin_isa() -> Iterator[Callable[[str], None]]:
    """Limits CUDA calls to the kernels of one isa until the test ends: pin_isa("sm80")."""
    extension = pytest.importorskip("flash_attn_2_cuda")
    before = extension.build_info()["isa"]
    yield extension.pin_isa
    extension.pin_isa(before)


@pytest.fixture
def pinned_to_sm90(pin_isa: Callable[[str], None]) -> None:
    """CUDA calls take sm90's kernels, or are errors."""
    pin_isa("sm90")


@pytest.fixture
def limit_smem() -> Iterator[Callable[[int], None]]:
    """Lowers the shared memory of thread blocks until the test ends: limit_smem(99)."""
    extension = pytest.importorskip("flash_attn_2_cuda")
    yield extension.limit_smem_kb
    extension.limit_smem_kb(cases.SMEM_LIMIT_KB)


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """What a test allocates first holds NaN, so that reading it before writing shows."""
    if cases.cuda_build() is not None:
        from harness import poison

        poison("cuda")
