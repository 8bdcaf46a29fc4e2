# SPDX-License-Identifier: Apache-2.0
"""Where a step's time goes, op by op: `xgdn bench model --profile`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from xgdn import _C

_T = TypeVar("_T")


@dataclass(frozen=True)
class OpRow:
    """The calls of one op with sizes of one kind: means per step, times in microseconds."""

    op: str
    sizes: tuple[int, ...]  # of heads, experts or weights (outputs x inputs), not of tokens
    calls: float
    inside: float
    before: float  # from the end of the op before, or from the start of the step


@dataclass(frozen=True)
class StepProfile:
    """Means over `steps` steps, times in microseconds. What is in and before the ops, and `after`, add up to `step`."""

    kind: str  # "decode" or "prompt"
    steps: int
    tokens: float  # of a step
    step: float
    ops: list[OpRow]  # in the order of their first calls
    after: float  # from the end of the last op to the end of the step

    @property
    def between(self) -> float:
        """Time between the ops, and before the first."""
        return sum(row.before for row in self.ops)


@dataclass(frozen=True)
class RecordedStep:
    """One step: its ops, and the time of all of it in seconds."""

    tokens: int
    seconds: float
    ops: list[_C.OpTime]


def record_ops(call: Callable[[], _T]) -> tuple[_T, float, list[_C.OpTime]]:
    """Return what `call` returns, its seconds, and the ops that it calls in this thread."""
    start = perf_counter()
    _C.start_op_profile()
    try:
        result = call()
        seconds = perf_counter() - start
    finally:
        ops = _C.stop_op_profile()
    return result, seconds, ops


def step_profile(kind: str, steps: Sequence[RecordedStep]) -> StepProfile:
    """Return the means over `steps`."""
    count = len(steps)
    sums: dict[tuple[str, tuple[int, ...]], list[float]] = {}
    for step in steps:
        for op in step.ops:
            row = sums.setdefault((op.op, tuple(op.sizes)), [0.0, 0.0, 0.0])
            for i, value in enumerate((op.calls, 1e6 * op.seconds, 1e6 * op.seconds_before)):
                row[i] += value / count
    ops = [OpRow(op, sizes, *row) for (op, sizes), row in sums.items()]
    whole = 1e6 * sum(step.seconds for step in steps) / count
    return StepProfile(
        kind=kind,
        steps=count,
        tokens=sum(step.tokens for step in steps) / count,
        step=whole,
        ops=ops,
        after=whole - sum(row.inside + row.before for row in ops),
    )
