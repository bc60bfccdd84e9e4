"""The Triton kernels in Triton's interpreter: what a machine without a GPU can check."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_in_the_interpreter() -> None:
    """In a process of its own: kernels are interpreted if triton was imported so."""
    tests = Path(__file__).resolve().parent
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = str(tests.parent)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(tests / "interpreted_kernels.py")]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tests.parent)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout.splitlines()[-1]
