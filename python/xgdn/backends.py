# SPDX-License-Identifier: Apache-2.0
"""Which backend serves which op."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from xgdn import _C

_PHASES = ("prefill", "decode")


class BackendReport(NamedTuple):
    """Whether `backend` serves `op` on this machine; if not, `why_not` is the reason.

    `is_batch_invariant` holds for a call of typical shape in bfloat16; see `last_is_batch_invariant`.
    """

    op: str
    backend: str
    why_not: str | None
    is_selected: bool
    is_batch_invariant: bool


def available_backends() -> list[str]:
    """Return the names of the backends in this build, in order of preference."""
    return list(torch.ops.xgdn.available_backends())


def last_backend(op: str) -> str:
    """Return the backend that served the last call of `op` in this process; empty before the first."""
    return str(torch.ops.xgdn.last_backend(op))


def last_is_batch_invariant(op: str) -> bool:
    """Return whether the last call of `op` in this process was batch-invariant.

    If so, each of its sequences (tokens, if the op has no sequences) has the same bits as alone, in any other batch,
    and with any number of threads. Promised where a backend's own kernel serves the call, never where a
    library makes a product. False before the first call.
    """
    return bool(torch.ops.xgdn.last_is_batch_invariant(op))


def doctor() -> list[BackendReport]:
    """Report for every op and backend whether it can serve the op on this machine, and which one is selected.

    Raises:
        xgdn.errors.UnsupportedError: `XGDN_CPU_ISA` names no instruction set.
    """
    return [BackendReport(*row) for row in _C.doctor()]


@contextmanager
def use_backend(name: str | None = None, *, prefill: str | None = None, decode: str | None = None) -> Iterator[None]:
    """Choose the backend of every op called with `backend="auto"`, per phase, and restore the choice afterwards.

    `name` stands for both phases. The choice belongs to the process, not to the thread. `chunk_gated_delta_rule` and
    `causal_conv1d` belong to prefill, all other ops to decode.
    """
    wanted = {"prefill": prefill or name, "decode": decode or name}
    before = {phase: torch.ops.xgdn.default_backend(phase) for phase in _PHASES}
    try:
        for phase in _PHASES:
            if wanted[phase] is not None:
                torch.ops.xgdn.set_default_backend(phase, wanted[phase])
        yield
    finally:
        for phase in _PHASES:
            torch.ops.xgdn.set_default_backend(phase, before[phase])
