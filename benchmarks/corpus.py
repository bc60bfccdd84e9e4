"""Real text that every machine has: the sources and documentation in Python's standard library.

Files are split into a training and a held-out part, never within a file. The order and the split
depend on the relative paths alone, so two machines with the same Python get the same bytes.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = (".py", ".rst", ".txt", ".md")
# encodings/ is generated tables, not text one would want to learn.
SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "encodings")
MAX_FILE_BYTES = 256 * 1024
HELD_OUT_SHARE = 0.05
HELD_OUT_MAX_BYTES = 512 * 1024
SEPARATOR = b"\0"


@dataclass(frozen=True)
class Corpus:
    """Bytes as uint8 tensors, and how many files each part came from."""

    train: Tensor
    held_out: Tensor
    train_files: int
    held_out_files: int

    def to(self, device: torch.device) -> Corpus:
        """The same corpus with both parts on `device`."""
        parts = self.train.to(device), self.held_out.to(device)
        return Corpus(*parts, self.train_files, self.held_out_files)


def standard_library() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def text_files(folder: Path) -> list[Path]:
    """Text files under `folder`, in an order that is fixed but mixes the subfolders."""
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES
        and not set(SKIPPED_FOLDERS) & set(path.relative_to(folder).parts)
        and path.is_file()
    ]
    key = {path: path.relative_to(folder).as_posix().encode() for path in found}
    return sorted(found, key=lambda path: (hashlib.sha1(key[path]).digest(), key[path]))


def load_corpus(folder: Path, max_bytes: int) -> Corpus:
    """Read at most `max_bytes` of text and split it by file.

    Raises ValueError when `folder` has fewer than two text files.
    """
    texts: list[bytes] = []
    total = 0
    for path in text_files(folder):
        text = path.read_bytes()[:MAX_FILE_BYTES]
        if not text.strip() or b"\0" in text:
            continue
        if total + len(text) > max_bytes and len(texts) >= 2:
            break
        texts.append(text + SEPARATOR)
        total += len(texts[-1])
    if len(texts) < 2:
        raise ValueError(
            f"data: needs at least two non-empty text files ({', '.join(SUFFIXES)}) to split; "
            f"found {len(texts)} under {folder}"
        )
    wanted = min(HELD_OUT_SHARE * total, HELD_OUT_MAX_BYTES)
    held_out_files, held_out_bytes = 0, 0
    while held_out_bytes < wanted and held_out_files < len(texts) - 1:
        held_out_bytes += len(texts[held_out_files])
        held_out_files += 1
    return Corpus(
        train=_as_tensor(texts[held_out_files:]),
        held_out=_as_tensor(texts[:held_out_files]),
        train_files=len(texts) - held_out_files,
        held_out_files=held_out_files,
    )


def _as_tensor(texts: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)


def unigram_loss(train: Tensor, target: Tensor) -> float:
    """Nats per byte of `target` under the byte frequencies of `train` (add-one smoothing)."""
    counts = torch.bincount(train.flatten().long(), minlength=256).double() + 1
    log_p = (counts / counts.sum()).log()
    return -log_p[target.flatten().long()].mean().item()


def random_windows(data: Tensor, batch: int, context: int, generator: torch.Generator) -> Tensor:
    """(batch, context + 1) uint8 windows at random places; `generator` lives on the CPU."""
    start = torch.randint(len(data) - context, (batch, 1), generator=generator)
    return data[start.to(data.device) + torch.arange(context + 1, device=data.device)]


def even_windows(data: Tensor, count: int, context: int) -> Tensor:
    """(count, context + 1) uint8 windows spread evenly over `data`; the same on every call."""
    start = torch.linspace(0, len(data) - context - 1, count, dtype=torch.float64).long()
    return data[start.to(data.device).unsqueeze(1) + torch.arange(context + 1, device=data.device)]
