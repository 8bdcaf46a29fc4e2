# SPDX-License-Identifier: Apache-2.0
"""Every op against the roofline, and against the kernels of other libraries where there are some."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from kernels import xgdn_ops
from kernels.cases import DecodeCase, DecodeStepCase, PrefillCase, VerifyCase
from kernels.compare import Provider, Row, check, compare

DRAFTS = 4

C = TypeVar("C", DecodeCase, VerifyCase, PrefillCase)


class Library(Protocol):
    """A source of providers: an empty list where it has no such op."""

    def decode(self, case: DecodeCase) -> list[Provider]: ...
    def verify(self, case: VerifyCase) -> list[Provider]: ...
    def prefill(self, case: PrefillCase) -> list[Provider]: ...


@dataclass(frozen=True)
class Plan:
    """What to measure: batch sizes of decode, of verification with DRAFTS tokens each, prompt lengths."""

    decode: Sequence[int]
    verify: Sequence[int]
    prefill: Sequence[int]
    threads: Sequence[int]


class OpsBenchmark:
    """Runs cases. A wrong result or an error of xgdn raises; that of another library is noted in `refused`."""

    def __init__(self, others: Sequence[Library] = (), *, seconds: float = 1.0) -> None:
        self._libraries: Sequence[Library] = (xgdn_ops, *others)
        self._seconds = seconds
        self.refused: list[str] = []

    def run(self, plan: Plan, on_progress: Callable[[int, int], object] = lambda done, all: None) -> list[Row]:
        """Every case of the plan, with every number of threads."""
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
        case = DecodeCase(batch, state_dtype)
        return self._run(case, case, [library.decode for library in self._libraries], threads)

    def decode_step(self, batch: int, state_dtype: torch.dtype, threads: int) -> list[Row]:
        """The fused step beside the rule alone, on the same tokens and both kinds of states. Others have no such op."""
        torch.set_num_threads(threads)
        case = DecodeStepCase(batch, state_dtype)
        rule, step = xgdn_ops.decode(case)[1:], xgdn_ops.decode_step(case)
        errors = [check(c, case.truth()) for c in rule] + [check(c, case.truth_of_step()) for c in step]
        return compare(case, threads, [*rule, *step], errors, self._seconds)

    def verify(self, batch: int, state_dtype: torch.dtype, threads: int) -> list[Row]:
        case = VerifyCase(batch, DRAFTS, state_dtype)
        return self._run(case, case, [library.verify for library in self._libraries], threads)

    def prefill(self, lengths: Sequence[int], dtype: torch.dtype, threads: int) -> list[Row]:
        case = PrefillCase(lengths, dtype)
        return self._run(case, case.short(), [library.prefill for library in self._libraries], threads)

    def _run(self, case: C, checked: C, sources: Sequence[Callable[[C], list[Provider]]], threads: int) -> list[Row]:
        """Time the providers of `case`, after a check on `checked`: the case itself, or a shorter one of its kind."""
        torch.set_num_threads(threads)
        truth = checked.truth()
        admitted, errors = [], []
        for source in sources:
            providers = source(case)
            for provider, twin in zip(providers, providers if checked is case else source(checked), strict=True):
                try:
                    errors.append(check(twin, truth))
                    admitted.append(provider)
                except RuntimeError as error:
                    if source is sources[0]:
                        raise
                    self.refused.append(f"{case.title}, {threads} threads: {twin.name}: {error}")
        return compare(case, threads, admitted, errors, self._seconds)
