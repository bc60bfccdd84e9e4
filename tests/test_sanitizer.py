"""compute-sanitizer finds nothing in one case of each kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cases import cuda_build
from run_sanitizer import find_sanitizer

pytestmark = [pytest.mark.cuda, pytest.mark.slow]
SCRIPT = Path(__file__).resolve().parent / "run_sanitizer.py"


@pytest.mark.skipif(find_sanitizer() is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("head_dim", (cuda_build() or {"head_dims": []})["head_dims"])
def test_sanitizer(device: str, tool: str, head_dim: int) -> None:
    command = [sys.executable, str(SCRIPT), "--tool", tool, "--head-dim", str(head_dim)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]


def test_the_cases_run_without_it(device: str) -> None:
    ran = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
