"""compute-sanitizer finds nothing in one case of each kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import cuda_build
from run_sanitizer import find_sanitizer

pytestmark = [pytest.mark.cuda, pytest.mark.slow]
SCRIPT = Path(__file__).resolve().parent / "run_sanitizer.py"


def run_script(*arguments: str) -> None:
    """run_sanitizer.py with this process's packages, wherever they come from."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(SCRIPT), *arguments]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]


@pytest.mark.skipif(find_sanitizer() is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("head_dim", (cuda_build() or {"head_dims": []})["head_dims"])
def test_sanitizer(device: str, tool: str, head_dim: int) -> None:
    run_script("--tool", tool, "--head-dim", str(head_dim))


def test_the_cases_run_without_it(device: str) -> None:
    run_script()
