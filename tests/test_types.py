"""mypy on the package, whose annotations are for its users too (py.typed)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_no_file_is_left_out() -> None:
    assert "ignore_errors" not in (ROOT / "pyproject.toml").read_text()


def test_package_follows_mypy() -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("needs mypy")
    command = [sys.executable, "-m", "mypy"]  # pyproject.toml says of what, and how
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"python3 -m mypy\n{result.stdout[-5000:]}{result.stderr}"
