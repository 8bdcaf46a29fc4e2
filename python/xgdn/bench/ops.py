# SPDX-License-Identifier: Apache-2.0
"""Every op beside the machine's limit, and beside peers where there are some."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from xgdn.bench import ours
from xgdn.bench.measure import Contestant, Row, check, compare
from xgdn.bench.problems import DecodeProblem, DecodeStepProblem, PrefillProblem, VerifyProblem

DRAFTS = 4

P = TypeVar("P", DecodeProblem, VerifyProblem, PrefillProblem)


class Solver(Protocol):
    """Where contestants come from; none where it has no such op."""

    def decode(self, problem: DecodeProblem) -> list[Contestant]: ...
    def verify(self, problem: VerifyProblem) -> list[Contestant]: ...
    def prefill(self, problem: PrefillProblem) -> list[Contestant]: ...


@dataclass(frozen=True)
class Plan:
    """What to measure: batch sizes of decode, of verification with DRAFTS tokens each, prompt lengths."""

    decode: Sequence[int]
    verify: Sequence[int]
    prefill: Sequence[int]
    threads: Sequence[int]


class OpsBenchmark:
    """Runs problems. A wrong result or an error of xgdn raises; one of a peer is noted in `refused`."""

    def __init__(self, peers: Sequence[Solver] = (), *, seconds: float = 1.0) -> None:
        self._solvers: Sequence[Solver] = (ours, *peers)
        self._seconds = seconds
        self.refused: list[str] = []

    def run(self, plan: Plan, on_progress: Callable[[int, int], object] = lambda done, all: None) -> list[Row]:
        """Every problem of the plan, with every number of threads."""
        tasks: list[Callable[[], list[Row]]] = []
        for threads in plan.threads:
            for dtype in (torch.float32, torch.bfloat16):
                tasks += [partial(self.decode, batch, dtype, threads) for batch in plan.decode]
                tasks += [partial(self.decode_step, batch, dtype, threads) for batch in plan.decode]
                tasks += [partial(self.verify, batch, dtype, threads) for batch in plan.verify]
            for dtype in (torch.bfloat16, torch.float32):
                tasks += [partial(self.prefill, [length], dtype, threads) for length in plan.prefill]
        rows = []
        for i, task in enumerate(tasks):
            on_progress(i, len(tasks))
            rows += task()
        return rows

    def decode(self, batch: int, state_dtype: torch.dtype, threads: int) -> list[Row]:
        problem = DecodeProblem(batch, state_dtype)
        return self._run(problem, problem, [s.decode for s in self._solvers], threads)

    def decode_step(self, batch: int, state_dtype: torch.dtype, threads: int) -> list[Row]:
        """The fused step beside the rule alone, on the same tokens. Peers have no such op."""
        torch.set_num_threads(threads)
        problem = DecodeStepProblem(batch, state_dtype)
        rule, step = ours.decode(problem)[1:], ours.decode_step(problem)
        errors = [check(c, problem.truth()) for c in rule] + [check(c, problem.truth_of_step()) for c in step]
        return compare(problem, threads, [*rule, *step], errors, self._seconds)

    def verify(self, batch: int, state_dtype: torch.dtype, threads: int) -> list[Row]:
        problem = VerifyProblem(batch, DRAFTS, state_dtype)
        return self._run(problem, problem, [s.verify for s in self._solvers], threads)

    def prefill(self, lengths: Sequence[int], dtype: torch.dtype, threads: int) -> list[Row]:
        problem = PrefillProblem(lengths, dtype)
        return self._run(problem, problem.short(), [s.prefill for s in self._solvers], threads)

    def _run(
        self, problem: P, rehearsal: P, solvers: Sequence[Callable[[P], list[Contestant]]], threads: int
    ) -> list[Row]:
        """`rehearsal` is the problem itself or a shorter one, on which the contestants are checked."""
        torch.set_num_threads(threads)
        truth = rehearsal.truth()
        admitted, errors = [], []
        for solve in solvers:
            contestants = solve(problem)
            for contestant, rehearsing in zip(
                contestants, contestants if rehearsal is problem else solve(rehearsal), strict=True
            ):
                try:
                    errors.append(check(rehearsing, truth))
                    admitted.append(contestant)
                except RuntimeError as error:
                    if solve is solvers[0]:
                        raise
                    self.refused.append(f"{problem.title}, {threads} threads: {rehearsing.name}: {error}")
        return compare(problem, threads, admitted, errors, self._seconds)
