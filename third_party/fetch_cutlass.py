"""CUTLASS headers for the build: from CUTLASS_PATH, or from the pinned wheel, downloaded once by hash.

python third_party/fetch_cutlass.py     prints the include folder, downloading it first if it is not there
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

VERSION = "4.2.0"
REQUIREMENT = "nvidia-cutlass==4.2.0.0"
WHEEL = "nvidia_cutlass-4.2.0.0-py3-none-any.whl"
SHA256 = "f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6"
INCLUDE_IN_WHEEL = "cutlass_library/source/include/"
MINIMUM = (4, 2)
FOLDER = Path(__file__).resolve().parent / "cutlass"


class CutlassError(Exception):
    """The headers are missing, too old, or could not be downloaded."""


@dataclass(frozen=True)
class Cutlass:
    include: Path
    version: str


def read_version(include: Path) -> str | None:
    """Version in cutlass/version.h, or None where include holds no CuTe headers."""
    header = include / "cutlass" / "version.h"
    if not (include / "cute" / "tensor.hpp").is_file() or not header.is_file():
        return None
    text = header.read_text()
    numbers = [
        re.search(rf"#define\s+CUTLASS_{part}\s+(\d+)", text)
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    return ".".join(n.group(1) for n in numbers) if all(numbers) else None


def find_cutlass(env: Mapping[str, str] = os.environ) -> Cutlass | None:
    """Headers that are on disk already: CUTLASS_PATH, then third_party/cutlass.  None when there are none.

    Raises CutlassError when CUTLASS_PATH is set but holds no usable CUTLASS.
    """
    given = env.get("CUTLASS_PATH")
    if not given:
        version = read_version(FOLDER / "include")
        return Cutlass(FOLDER / "include", version) if version == VERSION else None
    root = Path(given).resolve()
    for include in (root / "include", root, root / INCLUDE_IN_WHEEL):
        version = read_version(include)
        if version is None:
            continue
        if tuple(int(n) for n in version.split(".")[:2]) < MINIMUM:
            raise CutlassError(f"CUTLASS_PATH={given} is CUTLASS {version}; 4.2 or later is needed")
        return Cutlass(include, version)
    raise CutlassError(
        f"CUTLASS_PATH={given} holds no CUTLASS: neither it nor its include folder has cute/tensor.hpp"
    )


def _pip_command() -> list[str]:
    # In an isolated build pip runs from outside the build environment, whose path hides it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "pip"]
    if (
        subprocess.run([*command, "--version"], env=environment, capture_output=True).returncode
        == 0
    ):
        return command
    spec = importlib.util.find_spec("ensurepip")  # some distributions of Python leave it out
    bundled = sorted(Path(spec.origin).parent.glob("_bundled/pip-*.whl")) if spec else []
    if not bundled:
        raise CutlassError(
            "pip is not available to download CUTLASS; set CUTLASS_PATH to one on disk"
        )
    return [sys.executable, f"{bundled[-1]}/pip"]


def _download(folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    options = [
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    command = [
        *_pip_command(),
        "download",
        *options,
        "-q",
        "-d",
        str(folder),
        "-r",
        str(requirements),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise CutlassError(
            f"could not download {REQUIREMENT} (set CUTLASS_PATH to use one on disk):\n"
            f"{result.stderr.strip()}"
        )
    wheel = folder / WHEEL
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise CutlassError(f"{WHEEL} has sha256 {digest}, not {SHA256}")
    return wheel


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(INCLUDE_IN_WHEEL) and not name.endswith("/"):
                target = folder / "include" / name.removeprefix(INCLUDE_IN_WHEEL)
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise CutlassError(f"{wheel.name}: {name} leaves its folder")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


def fetch_cutlass(env: Mapping[str, str] = os.environ) -> Cutlass:
    """Headers on disk, or the pinned wheel's, unpacked into third_party/cutlass.

    The folder appears by one rename, complete: a download that breaks off or runs twice leaves no broken tree.
    """
    found = find_cutlass(env)
    if found is not None:
        return found
    print(f"flash_attn: downloading {REQUIREMENT} into {FOLDER.parent.name}/", flush=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix=".cutlass-") as scratch:
        unpacked = Path(scratch) / "cutlass"
        _unpack(_download(Path(scratch)), unpacked)
        if read_version(unpacked / "include") != VERSION:
            raise CutlassError(f"{WHEEL} does not hold CUTLASS {VERSION}")
        if FOLDER.exists() and find_cutlass({}) is None:
            shutil.move(str(FOLDER), str(Path(scratch) / "replaced"))
        try:
            os.rename(unpacked, FOLDER)
        except OSError:
            pass  # another build was faster: its tree is checked below
    found = find_cutlass({})
    if found is None:
        raise CutlassError(f"could not write {FOLDER}")
    return found


if __name__ == "__main__":
    try:
        print(fetch_cutlass().include)
    except CutlassError as error:
        sys.exit(str(error))
