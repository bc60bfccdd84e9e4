"""compute-sanitizer finds nothing in one case of each kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import SMEM_LIMIT_KB, built_isas, built_smem_kb, cuda_build
from run_sanitizer import find_sanitizer

pytestmark = [pytest.mark.cuda, pytest.mark.slow]
SCRIPT = Path(__file__).resolve().parent / "run_sanitizer.py"


# Which kernels run: without a variable those that calls take, then those of each older isa and of the tiles for
# each smaller size of shared memory.  A run of all tests under a limit has this limit here too.
VARIABLES = [
    ("", ""),
    *(("FLASH_ATTN_ISA", isa) for isa in built_isas("fwd")[1:]),
    *(("FLASH_ATTN_TEST_SMEM_KB", str(kb)) for kb in built_smem_kb() if not SMEM_LIMIT_KB),
]
each_kind = pytest.mark.parametrize(
    "name, value", VARIABLES, ids=[v or "own" for _, v in VARIABLES]
)


def run_script(name: str, value: str, *arguments: str) -> None:
    """run_sanitizer.py with this process's packages, wherever they come from, and a variable."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    env |= {name: value} if name else {}
    command = [sys.executable, str(SCRIPT), *arguments]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]


@pytest.mark.skipif(find_sanitizer() is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
@pytest.mark.parametrize("head_dim", (cuda_build() or {"head_dims": []})["head_dims"])
@each_kind
def test_sanitizer(device: str, tool: str, head_dim: int, name: str, value: str) -> None:
    run_script(name, value, "--tool", tool, "--head-dim", str(head_dim))


@each_kind
def test_the_cases_run_without_it(device: str, name: str, value: str) -> None:
    run_script(name, value)
