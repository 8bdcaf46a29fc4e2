# SPDX-License-Identifier: Apache-2.0
"""Contestants take turns; each is checked first."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

FEWEST_CALLS = 5


class WrongResult(RuntimeError):
    """A contestant's result is further from float64 than it may be."""


@dataclass(frozen=True)
class Contestant:
    """Something that solves a problem.

    `call(i)` works on the i-th part of the memory that the problem rotates over. `result()`, after `call(0)` on fresh
    memory, returns `out [T, HV, V]` and the states that were written, `[N, HV, V, K]`.
    """

    name: str
    call: Callable[[int], object]
    result: Callable[[], tuple[Tensor, Tensor]]
    out_tolerance: float
    state_tolerance: float


class Problem(Protocol):
    """What contestants solve, and what the machine could do at best."""

    title: str
    work: float  # bytes or flops of one call
    unit: str  # GB/s or GFLOP/s
    limit_scale: float  # times the time of limit(i) is the limit

    def limit(self, i: int) -> object:
        """Takes turns with the contestants."""

    def truth(self) -> tuple[Tensor, Tensor]:
        """`out` and the last states in float64 arithmetic."""


@dataclass(frozen=True)
class Row:
    """One contestant's figures; times in microseconds."""

    problem: str
    threads: int
    contestant: str
    min: float
    median: float
    rate: float  # of the median, in `unit`
    unit: str
    limit: float  # median
    out_error: float  # ||got - truth|| / ||truth||
    state_error: float

    @property
    def share(self) -> float:
        """Of the limit's speed; 1 is the machine's limit."""
        return self.limit / self.median

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check(contestant: Contestant, truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Errors of out and of the states. Raises WrongResult where one is above its tolerance (or not a number)."""
    contestant.call(0)
    out, states = contestant.result()
    errors = relative_error(out, truth[0]), relative_error(states, truth[1])
    if not (errors[0] <= contestant.out_tolerance and errors[1] <= contestant.state_tolerance):
        raise WrongResult(
            f"it differs from the float64 recurrence: out {errors[0]:.1e} (at most "
            f"{contestant.out_tolerance:.1e}), states {errors[1]:.1e} (at most {contestant.state_tolerance:.1e})"
        )
    return errors


def _microseconds(call: Callable[[int], object], i: int) -> float:
    start = time.perf_counter()
    call(i)
    return (time.perf_counter() - start) * 1e6


def take_turns(calls: Sequence[Callable[[int], object]], seconds: float) -> list[list[float]]:
    """Microseconds of each call; every one gets about `seconds`, and at least FEWEST_CALLS turns."""
    counts = [max(FEWEST_CALLS, int(seconds * 1e6 / _microseconds(call, 1))) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(max(counts)):
        for call, count, taken in zip(calls, counts, times, strict=True):
            # Those with few turns take them spread over the whole run.
            if (turn + 1) * count // max(counts) > len(taken):
                taken.append(_microseconds(call, turn + 2))
    return times


def compare(
    problem: Problem,
    threads: int,
    contestants: Sequence[Contestant],
    errors: Sequence[tuple[float, float]],
    seconds: float,
) -> list[Row]:
    """Rows of contestants that have been checked, `errors` in their order."""
    times = take_turns([problem.limit, *(contestant.call for contestant in contestants)], seconds)
    limit = problem.limit_scale * statistics.median(times[0])
    return [
        Row(
            problem=problem.title,
            threads=threads,
            contestant=contestant.name,
            min=min(taken),
            median=statistics.median(taken),
            rate=problem.work / statistics.median(taken) / 1e3,
            unit=problem.unit,
            limit=limit,
            out_error=out_error,
            state_error=state_error,
        )
        for contestant, (out_error, state_error), taken in zip(contestants, errors, times[1:], strict=True)
    ]
