"""compute-sanitizer finds nothing in one case of each kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import built_isas, cuda_build
from run_sanitizer import find_sanitizer

pytestmark = [pytest.mark.cuda, pytest.mark.slow]
SCRIPT = Path(__file__).resolve().parent / "run_sanitizer.py"


# Without a pin each call takes the newest isa that serves it: older ones run by themselves too.
each_isa = pytest.mark.parametrize("isa", ["", *built_isas("fwd")[1:]])


def run_script(isa: str, *arguments: str) -> None:
    """run_sanitizer.py with this process's packages, wherever they come from; isa: "" for no pin."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    env |= {"FLASH_ATTN_ISA": isa} if isa else {}
    command = [sys.executable, str(SCRIPT), *arguments]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]


@pytest.mark.skipif(find_sanitizer() is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("head_dim", (cuda_build() or {"head_dims": []})["head_dims"])
@each_isa
def test_sanitizer(device: str, tool: str, head_dim: int, isa: str) -> None:
    run_script(isa, "--tool", tool, "--head-dim", str(head_dim))


@each_isa
def test_the_cases_run_without_it(device: str, isa: str) -> None:
    run_script(isa)
