# SPDX-License-Identifier: Apache-2.0
"""Timing of several calls in turns, so that noise of the machine meets all of them."""

import time
from collections.abc import Callable, Sequence

FEWEST_CALLS = 5
# What inputs have to exceed to come from memory: the last cache of some servers has 300 MiB.
BYTES_BEYOND_CACHES = 2**30


def _microseconds(call: Callable[[int], object], i: int) -> float:
    start = time.perf_counter()
    call(i)
    return (time.perf_counter() - start) * 1e6


def take_turns(calls: Sequence[Callable[[int], object]], seconds: float) -> list[list[float]]:
    """Return the microseconds of each call; every one gets about `seconds`, and at least FEWEST_CALLS turns."""
    counts = [max(FEWEST_CALLS, int(seconds * 1e6 / _microseconds(call, 1))) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(max(counts)):
        for call, count, taken in zip(calls, counts, times, strict=True):
            # Calls with few turns take them spread over the whole run.
            if (turn + 1) * count // max(counts) > len(taken):
                taken.append(_microseconds(call, turn + 2))
    return times
