# SPDX-License-Identifier: Apache-2.0
"""The launch ledger and the switches of the emulated CANN, over its C interface."""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_library = ctypes.CDLL("libascendcl.so")
_library.emulated_cann_ledger.restype = ctypes.c_char_p
_library.emulated_cann_set.argtypes = [ctypes.c_char_p, ctypes.c_char_p]

Entry = dict[str, Any]


class Ledger:
    """What reached the emulated CANN, in order.

    An entry's `kind` is op (name, args), copy (direction, bytes, async), sync (what), fill, alloc, free, communicator
    (rank, world, device), collective (name, count, dtype, root) or refusal (status, message). A tensor among the args
    has shape, strides, dtype and data (its address).
    """

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries

    def of(self, kind: str) -> list[Entry]:
        return [entry for entry in self.entries if entry["kind"] == kind]

    @property
    def launches(self) -> list[str]:
        """Names of the aclnn calls, without their prefix."""
        return [entry["name"].removeprefix("aclnn") for entry in self.of("op")]

    @property
    def copies(self) -> list[str]:
        return [entry["direction"] for entry in self.of("copy")]

    @property
    def syncs(self) -> list[str]:
        return [entry["what"] for entry in self.of("sync")]

    def args(self, name: str) -> list[list[Any]]:
        """The arguments of every call of an op."""
        return [entry["args"] for entry in self.of("op") if entry["name"] == "aclnn" + name]

    def table(self) -> str:
        """How often each op was launched, most first, then copies and synchronisations."""
        rows = [*Counter(self.launches).most_common()]
        rows += [(f"copy {direction}", n) for direction, n in sorted(Counter(self.copies).items())]
        rows += [(f"sync {what}", n) for what, n in sorted(Counter(self.syncs).items())]
        return "\n".join(f"{count:5}  {name}" for name, count in rows)


def reset() -> None:
    _library.emulated_cann_ledger_reset()


def read() -> Ledger:
    return Ledger([json.loads(line) for line in _library.emulated_cann_ledger().decode().splitlines()])


@contextmanager
def recorded() -> Iterator[Ledger]:
    """The ledger of the block; complete when the block has ended."""
    ledger = Ledger([])
    reset()
    try:
        yield ledger
    finally:
        ledger.entries = read().entries


@contextmanager
def switched(**switches: str) -> Iterator[None]:
    """Switches of the emulation for the block, by their names without EMULATED_CANN_."""
    for name, value in switches.items():
        _library.emulated_cann_set(name.encode(), value.encode())
    try:
        yield
    finally:
        for name in switches:
            _library.emulated_cann_set(name.encode(), None)
