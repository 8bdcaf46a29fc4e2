# SPDX-License-Identifier: Apache-2.0
"""Providers of one case, checked and timed in turns with its roofline."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from xgdn.bench.turns import take_turns


class WrongResult(RuntimeError):
    """A provider's result is further from float64 than its tolerance."""


@dataclass(frozen=True)
class Provider:
    """An implementation of a case.

    `call(i)` works on the i-th part of the memory that the case rotates over. `result()`, after `call(0)` on fresh
    memory, returns `out [T, HV, V]` and the states that were written, `[N, HV, V, K]`.
    """

    name: str
    call: Callable[[int], object]
    result: Callable[[], tuple[Tensor, Tensor]]
    out_tolerance: float
    state_tolerance: float


class Case(Protocol):
    """Inputs, what must come out, and the best that the machine could do."""

    title: str
    work: float  # bytes or flops of one call
    unit: str  # GB/s or GFLOP/s
    roofline_scale: float  # the roofline is this times the time of roofline(i)

    def roofline(self, i: int) -> object:
        """Move as many bytes, or do flops at the best known rate; timed in turns with the providers."""

    def truth(self) -> tuple[Tensor, Tensor]:
        """`out` and the last states in float64 arithmetic."""


@dataclass(frozen=True)
class Row:
    """One provider's figures; times in microseconds."""

    case: str
    threads: int
    provider: str
    min: float
    median: float
    rate: float  # of the median, in `unit`
    unit: str
    roofline: float  # median
    out_error: float  # ||got - truth|| / ||truth||
    state_error: float

    @property
    def share(self) -> float:
        """Fraction of the roofline's speed."""
        return self.roofline / self.median

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check(provider: Provider, truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the errors of out and of the states. Raises WrongResult where one exceeds its tolerance or is NaN."""
    provider.call(0)
    out, states = provider.result()
    errors = relative_error(out, truth[0]), relative_error(states, truth[1])
    if not (errors[0] <= provider.out_tolerance and errors[1] <= provider.state_tolerance):
        raise WrongResult(
            f"it differs from the float64 recurrence: out {errors[0]:.1e} (at most "
            f"{provider.out_tolerance:.1e}), states {errors[1]:.1e} (at most {provider.state_tolerance:.1e})"
        )
    return errors


def compare(
    case: Case,
    threads: int,
    providers: Sequence[Provider],
    errors: Sequence[tuple[float, float]],
    seconds: float,
) -> list[Row]:
    """Time providers that have been checked; `errors` in their order."""
    times = take_turns([case.roofline, *(provider.call for provider in providers)], seconds)
    roofline = case.roofline_scale * statistics.median(times[0])
    return [
        Row(
            case=case.title,
            threads=threads,
            provider=provider.name,
            min=min(taken),
            median=statistics.median(taken),
            rate=case.work / statistics.median(taken) / 1e3,
            unit=case.unit,
            roofline=roofline,
            out_error=out_error,
            state_error=state_error,
        )
        for provider, (out_error, state_error), taken in zip(providers, errors, times[1:], strict=True)
    ]
