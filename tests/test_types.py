"""mypy on the package, whose annotations are for its users too (py.typed)."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_no_file_is_left_out() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    sections = [s for s in re.split(r"^(?=\[)", text, flags=re.M) if re.match(r"\[+tool\.mypy", s)]
    settings = "".join(sections)
    assert 'files = ["flash_attn"]\n' in settings
    assert not re.search(r"^(exclude|ignore_errors|disable_error_code)\b", settings, re.M)
    modules = re.findall(r'"([\w.*]+)"', "".join(re.findall(r"^module = (.*)", settings, re.M)))
    assert modules and not any(re.match(r"flash_attn(\.|$)|\*", name) for name in modules)


def test_package_follows_mypy() -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("needs mypy")
    command = [sys.executable, "-m", "mypy"]  # pyproject.toml says of what, and how
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"python3 -m mypy\n{result.stdout[-5000:]}{result.stderr}"
