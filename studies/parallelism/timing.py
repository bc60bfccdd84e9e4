"""Device times of variants whose speeds differ by orders of magnitude, within a bounded total."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from bench import Call, device_times

LONG_MS = 3.0  # launching takes no part in a call this long: no spin, few repeats
VERY_LONG_MS = 100.0  # one call is enough
LONG_REPEATS = 2
LEAST, MOST = 5, 15
TARGET_SECONDS = 10e-3


def one_time(call: Call) -> float:
    """Milliseconds of a call, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def times_in_turns(calls: Mapping[str, Call]) -> dict[str, float]:
    """Median milliseconds of each call; long calls in turns, short ones by bench.device_times.

    Kernels are loaded already where their facts were asked for, so that the first call is a
    measurement too where one is enough.
    """
    measured = {name: [one_time(call)] for name, call in calls.items()}
    for _ in range(LONG_REPEATS):
        for name, call in calls.items():
            if LONG_MS <= measured[name][0] < VERY_LONG_MS:
                measured[name].append(one_time(call))
    result = {name: sorted(values)[len(values) // 2] for name, values in measured.items()}
    short = {name: call for name, call in calls.items() if measured[name][0] < LONG_MS}
    if short:
        mean = sum(measured[name][0] for name in short) / len(short)
        repeats = max(LEAST, min(MOST, round(1e3 * TARGET_SECONDS / max(mean, 1e-3))))
        found = device_times(short, TARGET_SECONDS, repeats)
        result |= {name: times.median_ms for name, times in found.items()}
    return result
