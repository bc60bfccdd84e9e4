"""Keeps what a caller has set away from the CPU backend.

Used by ``register``: every operator runs ``isolated``, so that its result is a function of its
arguments alone.  The kernels on CUDA see nothing of these settings, and so may the CPU not.

Left as they are: the number of threads, which is the caller's to choose; inference mode, which marks
the results and changes no value; deterministic algorithms, which fill new memory and change no value.
"""

import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# What products of fp32 matrices may be computed in; other settings round the factors to 16 or 19 bits.
EXACT = ("ieee", "none")
_MATMUL = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch adds it at run time
_SMALLEST_NORMAL = sys.float_info.min


class _ExactProducts:
    """While any thread is inside, products of fp32 matrices are computed in fp32.

    torch.set_float32_matmul_precision and torch.backends set this for the whole process.  The first
    thread that enters changes the setting, the last one that leaves restores it.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._outer = EXACT[0]

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._outer = _MATMUL.fp32_precision
                if self._outer not in EXACT:
                    _MATMUL.fp32_precision = EXACT[0]
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore()

    def _restore(self) -> None:
        if self._outer not in EXACT:
            # "none" is what follows torch.backends.mkldnn.fp32_precision.
            follows = self._outer == torch.backends.mkldnn.fp32_precision
            _MATMUL.fp32_precision = "none" if follows else self._outer

    def start_in_child(self) -> None:
        """After a fork, which keeps none of the other threads."""
        if self._inside:
            self._restore()
        self._start()


_exact_products = _ExactProducts()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_exact_products.start_in_child)


def _flushes_denormals() -> bool:
    """Whether this thread's arithmetic takes numbers below the normal ones for 0."""
    return _SMALLEST_NORMAL / 2 == 0


def isolated(function: Callable[P, R]) -> Callable[P, R]:
    """function, which sees none of this in its caller: grad mode, autocast, modes that intercept torch
    functions (the default device is one), reduced precision of fp32 products, flushed denormals."""

    @functools.wraps(function)
    def run(*arguments: P.args, **keywords: P.kwargs) -> R:
        records, casts = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        flushes = _flushes_denormals()
        with torch._C.DisableTorchFunction(), _exact_products:
            torch._C._set_grad_enabled(False)
            if casts:
                torch.set_autocast_enabled("cpu", False)
            if flushes:
                torch.set_flush_denormal(False)
            try:
                return function(*arguments, **keywords)
            finally:
                torch._C._set_grad_enabled(records)
                if casts:
                    torch.set_autocast_enabled("cpu", True)
                if flushes:
                    torch.set_flush_denormal(True)

    return run
