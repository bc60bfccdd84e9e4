"""Stands for nvcc in the build: compiles a generated unit for its own targets, other files as they come.

    python csrc/nvcc_of_unit.py [ccache] nvcc ... -gencode <target> ... -c file.cu -o file.o

torch gives all .cu files of an extension the same flags, but an sm90 unit is for sm_90a alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from csrc.build_config import gencode
from csrc.kernels.generate import targets_of


def command_for_unit(command: Sequence[str]) -> list[str]:
    """The command with the targets that its source asks for."""
    source = Path(command[command.index("-c") + 1]) if "-c" in command else None
    targets = targets_of(source) if source is not None else None
    if targets is None:
        return list(command)
    others = [
        word
        for before, word in zip(["", *command], command, strict=False)
        if "-gencode" not in (before, word)
    ]
    return [*others, *(flag for arch in targets for flag in gencode(arch))]


if __name__ == "__main__":
    command = command_for_unit(sys.argv[1:])
    os.execvp(command[0], command)
