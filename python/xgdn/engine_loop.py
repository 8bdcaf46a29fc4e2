# SPDX-License-Identifier: Apache-2.0
"""The thread that steps an engine, for programs that serve."""

import threading
import weakref
from collections.abc import Callable

from xgdn import _C
from xgdn._C import EngineCounters, Request, RequestEvent


class EngineLoop:
    """The thread that steps an engine, for programs that serve; made by `Engine.loop`.

    Requests come from any thread, and events go to callbacks on the loop's thread. Every method may be called from any
    thread at any time, from a callback too; none but `drain` and `stop` waits for a step. The loop stops when it is
    garbage-collected and when the interpreter ends.

    Args:
        before_step: called before each step; what it raises fails the step.
        after_step: called after each step and its callbacks with the engine's figures.
        on_error: called with what a step, a callback or a hook raised; default: a line on stderr.
    """

    def __init__(
        self,
        engine: _C.Engine,
        *,
        before_step: Callable[[], None] | None = None,
        after_step: Callable[[EngineCounters], None] | None = None,
        on_error: Callable[[str], None] | None = None,
    ) -> None:
        self._loop = _C.EngineLoop(engine, before_step=before_step, after_step=after_step, on_error=on_error)
        # At the interpreter's end, too: before it is finalized, while the thread can still deliver.
        self._finalizer = weakref.finalize(self, _end, self._loop)

    def submit(self, request: Request, callback: Callable[[RequestEvent], None]) -> int:
        """Queue a request and return its id; the first event may come before that.

        The callback gets every event of the request, in order. One that raises is not called again, and its request is
        cancelled; the others go on.

        Raises:
            xgdn.errors.RequestError, RangeError: it can never be served.
            xgdn.errors.StoppedError: the loop drains or was stopped.
        """
        return self._loop.submit(request, callback)

    def cancel(self, request_id: int, branch: int | None = None) -> bool:
        """End a request, or one of its branches, with the next step, as `Engine.cancel`."""
        return self._loop.cancel(request_id, branch)

    def drain(self, limit: float | None = None) -> None:
        """Take no more requests and return when all have ended; what is left after `limit` seconds is cancelled."""
        self._loop.drain(limit)

    def stop(self) -> None:
        """Take no more requests and end the thread after the step under way; requests that are left end with an error.

        On the loop's own thread it returns at once.
        """
        self._loop.stop()

    @property
    def counters(self) -> EngineCounters:
        """The engine's figures after the last step; never waits for one."""
        return self._loop.counters

    @property
    def num_requests(self) -> int:
        """Requests that wait or run."""
        return self._loop.num_requests


def _end(loop: _C.EngineLoop) -> None:
    """Stop a loop that nobody else holds, which may be in a callback of its own."""
    if loop.is_own_thread:  # it cannot wait for itself, nor be destroyed there
        threading.Thread(target=loop.stop, name="xgdn-engine-loop-end").start()
    else:
        loop.stop()
