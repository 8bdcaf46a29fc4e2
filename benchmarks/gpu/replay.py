# SPDX-License-Identifier: Apache-2.0
"""Times of calls that are captured in a CUDA graph and replayed."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_BUDGET_MS = 30.0  # of one measurement
_MIN_REPLAYS, _MAX_REPLAYS = 5, 25
_WARM_UP = 2  # calls before the capture: they load kernels and choose among them


@dataclass(frozen=True)
class Times:
    """Microseconds per call."""

    min: float
    median: float


def per_call(replays_ms: Sequence[float], calls: int) -> Times:
    """Return the times of a call from those of replays of `calls` of them."""
    return Times(min=1e3 * min(replays_ms) / calls, median=1e3 * statistics.median(replays_ms) / calls)


def time_replays(call: Callable[[int], object], parts: int) -> Times:
    """Time `call(0)` ... `call(parts - 1)` in one graph, each on memory of its own, so that no cache has it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(min(parts, _WARM_UP)):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [call(i) for i in range(parts)]  # kept, so that no call writes to the memory of another's result
    with torch.cuda.stream(stream):
        graph.replay()
        first = _elapsed(graph.replay, stream)
        count = int(max(_MIN_REPLAYS, min(_MAX_REPLAYS, _BUDGET_MS / max(first, 1e-3))))
        times = [_elapsed(graph.replay, stream) for _ in range(count)]
    del results
    return per_call(times, parts)


def _elapsed(run: Callable[[], None], stream: torch.cuda.Stream) -> float:
    """Return the milliseconds of `run` on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end))
