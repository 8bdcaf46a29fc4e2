# SPDX-License-Identifier: Apache-2.0
"""Threads for work whose time grows with the size of a body, so that the event loop stays responsive."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_LONG_BYTES = 64 * 2**10
_NUM_SHORT, _NUM_LONG = 8, 2  # few for long work: each thread takes its share of Python's lock

_Result = TypeVar("_Result")


class Workers:
    """Two thread pools, so that short work never waits for long work."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(_NUM_SHORT, "xgdn-short")
        self._long = ThreadPoolExecutor(_NUM_LONG, "xgdn-long")

    async def run(self, num_bytes: int, work: Callable[[], _Result]) -> _Result:
        """Return the result of work on `size` bytes. The work continues even if its caller stops waiting."""
        pool = self._long if num_bytes > _LONG_BYTES else self._short
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    async def run_long(self, work: Callable[[], _Result]) -> _Result:
        """Return the result of work that takes long, however few bytes it is about."""
        return await self.run(_LONG_BYTES + 1, work)

    def stop(self) -> None:
        """Start no further work."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)
