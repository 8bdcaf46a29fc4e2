# SPDX-License-Identifier: Apache-2.0
"""The thread that steps the engine. All methods but `_run` belong to the event loop's thread."""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from xgdn.engine import Engine, FinishReason, RequestEvent
from xgdn.errors import Error
from xgdn.server.api_error import ApiError, bad_request
from xgdn.server.metrics import Metrics
from xgdn.server.sequence import TextSequence

_PAUSE_AFTER_FAILURE = 0.1  # seconds; a step that keeps failing shall not take the processor

_log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class _Pools:
    """What is free; read between two steps."""

    slots: int
    kv_blocks: int


class EngineThread:
    def __init__(self, engine: Engine, metrics: Metrics, max_queue: int) -> None:
        self._engine = engine
        self._metrics = metrics
        self._total = self._free()
        self.capacity = self._total.slots + max_queue  # sequences that run or wait
        self._sequences: dict[int, TextSequence] = {}  # until the engine's last event, also when dropped before
        self._work = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="xgdn-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._publish(self._total)

    def start(self) -> None:
        """Begin to step, with events delivered to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Return when the step under way is done; sequences that are left end with an error."""
        self._is_stopping = True
        self._work.set()
        await asyncio.to_thread(self._thread.join)
        self._fail_all("the server was shut down")

    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_stopping

    def check_room(self, count: int) -> None:
        """Raise ApiError when `count` further sequences are too many."""
        if self._is_stopping:
            raise ApiError(503, "shutting_down", "The server is shutting down.")
        if count > self.capacity:
            raise bad_request(f"Expected at most {self.capacity} sequences (prompts x n), got {count}.")
        if len(self._sequences) + count > self.capacity:
            message = f"The queue is full: {len(self._sequences)} of {self.capacity} sequences run or wait."
            raise ApiError(429, "queue_full", message, headers={"Retry-After": "1"})

    def submit(self, sequences: Sequence[TextSequence]) -> None:
        """Queue all or none, after `check_room`; raises ApiError."""
        ids: list[int] = []
        try:
            for sequence in sequences:
                ids.append(self._engine.submit(sequence.request))
        except Error as error:
            for request_id in ids:
                self._engine.cancel(request_id)
            raise bad_request(str(error)) from None
        finally:
            self._work.set()
        self._sequences.update(zip(ids, sequences, strict=True))
        self._publish_requests()

    def _run(self) -> None:
        assert self._loop is not None
        while not self._is_stopping:
            self._work.clear()
            if self._engine.is_idle():
                self._work.wait()
                continue
            try:
                events = self._engine.step()
                self._loop.call_soon_threadsafe(self._deliver, events, self._free(), time.perf_counter())
            except Exception as error:  # whatever it was, the requests end and the server goes on
                _log.exception("a step failed")
                self._loop.call_soon_threadsafe(self._fail_all, str(error))
                time.sleep(_PAUSE_AFTER_FAILURE)

    def _deliver(self, events: Sequence[RequestEvent], free: _Pools, now: float) -> None:
        for event in events:
            sequence = self._sequences.get(event.id)
            if sequence is None:
                continue
            try:
                sequence.apply(event, now)
            except Exception as error:  # what one text meets shall not cost the others their events
                _log.exception("an event failed")
                sequence.fail(str(error))
            if event.finish_reason != FinishReason.RUNNING:
                del self._sequences[event.id]
        self._cancel_finished()
        self._publish(free)

    def _fail_all(self, message: str) -> None:
        for sequence in self._sequences.values():
            if not sequence.is_finished:
                sequence.fail(message)
        self._cancel_finished()
        self._sequences.clear()
        self._publish_requests()

    def _cancel_finished(self) -> None:
        """Free what the engine holds for sequences that ended on this side: by a stop string, by a client's leaving."""
        for request_id, sequence in self._sequences.items():
            if sequence.is_finished:
                self._engine.cancel(request_id)

    def _free(self) -> _Pools:
        return _Pools(self._engine.num_free_slots, self._engine.num_free_kv_blocks)

    def _publish(self, free: _Pools) -> None:
        self._metrics.slots_total.set(self._total.slots)
        self._metrics.slots_used.set(self._total.slots - free.slots)
        self._metrics.kv_blocks_total.set(self._total.kv_blocks)
        self._metrics.kv_blocks_used.set(self._total.kv_blocks - free.kv_blocks)
        self._publish_requests()

    def _publish_requests(self) -> None:
        num_running = sum(sequence.has_begun for sequence in self._sequences.values())
        self._metrics.requests_running.set(num_running)
        self._metrics.requests_waiting.set(len(self._sequences) - num_running)
