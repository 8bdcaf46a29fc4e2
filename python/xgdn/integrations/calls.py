# SPDX-License-Identifier: Apache-2.0
"""The count of hosts' calls: which were served here, which the host's own code took, and why."""

import atexit
import functools
import logging
import threading
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FunctionReport", "Report", "count", "log_at_exit", "report"]

_lock = threading.Lock()
_served: dict[tuple[str, str], int] = {}
_fallbacks: dict[tuple[str, str], dict[str, int]] = {}
_kept = torch.zeros(1)  # what the op of compiled graphs claims to write, so that it is not removed as useless


class FunctionReport(NamedTuple):
    """The calls of one function of a host."""

    host: str
    function: str
    served: int
    fallbacks: dict[str, int]  # the calls left to the host's own code, by reason


class Report(NamedTuple):
    """Every call of the replaced functions since the process began, or since the last `report(reset=True)`."""

    functions: tuple[FunctionReport, ...]

    @property
    def served(self) -> int:
        return sum(f.served for f in self.functions)

    @property
    def fallbacks(self) -> int:
        return sum(sum(f.fallbacks.values()) for f in self.functions)

    def __str__(self) -> str:
        if not self.functions:
            return "xgdn served no call of a host"
        lines = [f"xgdn served {self.served} of {self.served + self.fallbacks} calls of its hosts"]
        for f in self.functions:
            lines.append(f"  {f.host} {f.function}: {f.served} served, {sum(f.fallbacks.values())} not")
            lines += [f"    {count} not: {reason}" for reason, count in sorted(f.fallbacks.items())]
        return "\n".join(lines)


def report(*, reset: bool = False) -> Report:
    """Report how often each replaced function of a host was served here, how often not, and why.

    Calls inside `torch.compile` are counted as they run, on the CPU; on other devices only calls outside of it are.
    `reset` starts the count anew.
    """
    with _lock:
        names = sorted({*_served, *_fallbacks})
        result = Report(tuple(FunctionReport(*n, _served.get(n, 0), dict(_fallbacks.get(n, {}))) for n in names))
        if reset:
            _served.clear()
            _fallbacks.clear()
    return result


def count(host: str, function: str, reason: str | None, device: torch.device) -> None:
    """Count one call: as served, or with a `reason` as left to the host."""
    if not torch.compiler.is_compiling():
        _add(host, function, reason)
    elif device.type == "cpu":
        _count_in_graph(_kept, host, function, reason or "")


def _add(host: str, function: str, reason: str | None) -> None:
    name = (host, function)
    with _lock:
        if reason is None:
            _served[name] = _served.get(name, 0) + 1
        else:
            reasons = _fallbacks.setdefault(name, {})
            reasons[reason] = reasons.get(reason, 0) + 1


@torch.library.custom_op("xgdn_hosts::count", mutates_args=("kept",))
def _count_in_graph(kept: Tensor, host: str, function: str, reason: str) -> None:
    _add(host, function, reason or None)


@functools.cache
def log_at_exit(host: str, logger: str = "xgdn") -> None:
    """Log the calls of `host` once, when the process ends: as a warning if any was not served, or none at all."""
    atexit.register(_log_report, host, logging.getLogger(logger))


def _log_report(host: str, log: logging.Logger) -> None:
    final = Report(tuple(f for f in report().functions if f.host == host))
    log.log(logging.INFO if final.served and not final.fallbacks else logging.WARNING, "%s", final)
