"""Collectives and the divided cross entropy: two processes with gloo, or with NCCL on two GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes

from flash_attn.utils.distributed import all_gather, get_dim_for_local_rank


@pytest.fixture(scope="module")
def failures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What failed in either process, by the name of the check; all run once for each device."""
    device = request.param
    if device == "cuda" and torch.cuda.device_count() < two_processes.WORLD:
        pytest.skip(f"needs {two_processes.WORLD} GPUs")
    folder = tmp_path_factory.mktemp("processes")
    tests = Path(__file__).resolve().parent
    env = os.environ | {"PYTHONPATH": str(tests.parent)}
    script = [sys.executable, str(tests / "two_processes.py")]
    processes = [
        subprocess.Popen([*script, str(rank), str(folder), device], env=env)
        for rank in range(two_processes.WORLD)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0] * len(processes)
    found: dict[str, str] = {}
    for rank in range(two_processes.WORLD):
        for name, text in json.loads((folder / f"{rank}.json").read_text()).items():
            found[name] = found.get(name, "") + f"process {rank}:\n{text}"
    return found


@pytest.mark.parametrize(
    "failures", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True
)
@pytest.mark.parametrize("name", two_processes.CHECKS)
def test_in_two_processes(name: str, failures: dict) -> None:
    assert name not in failures, failures[name]


def test_dimension_is_divided_in_multiples() -> None:
    assert [get_dim_for_local_rank(10, 4, rank) for rank in range(4)] == [3, 3, 2, 2]
    assert [get_dim_for_local_rank(96, 4, rank, 16) for rank in range(4)] == [32, 32, 16, 16]
    assert [get_dim_for_local_rank(2, 3, rank) for rank in range(3)] == [1, 1, 0]


def test_number_cannot_be_gathered() -> None:
    with pytest.raises(RuntimeError, match="input_ must have at least one dimension"):
        all_gather(torch.ones(()), None)
