# SPDX-License-Identifier: Apache-2.0
"""The thread that steps the engine. All methods but `_run` belong to the event loop's thread."""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from xgdn.engine import Engine, FinishReason, Request, RequestEvent
from xgdn.errors import Error
from xgdn.server.api_error import ApiError, bad_request
from xgdn.server.metrics import Metrics
from xgdn.server.sequence import TextSequence

_PAUSE_AFTER_FAILURE = 0.1  # seconds; a step that keeps failing shall not take the processor

_log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class _Reading:
    """Snapshot of the engine's counters, taken between steps."""

    free_slots: int
    free_kv_blocks: int
    num_preemptions: int
    device_error: str


class EngineThread:
    def __init__(self, engine: Engine, metrics: Metrics, max_queue: int) -> None:
        self._engine = engine
        self._metrics = metrics
        self._idle = self._last = self._read()
        self.capacity = self._idle.free_slots + max_queue  # sequences that run or wait
        # Branches by request, each until the engine's last event of it, also when dropped before.
        self._requests: dict[int, dict[int, TextSequence]] = {}
        self._work = threading.Event()
        self._is_stopping = False
        self._failure = ""  # why it steps no more, or in vain
        self._thread = threading.Thread(target=self._run, name="xgdn-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._publish(self._idle)
        metrics.healthy.set_function(lambda: self.refusal() is None)

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

    def refusal(self) -> ApiError | None:
        """What every request is told, whatever it asks for; None while requests are served."""
        if self._is_stopping:
            return ApiError(503, "shutting_down", "The server is shutting down.")
        if self._failure:
            return ApiError(503, "engine_stopped", f"The engine has stopped: {self._failure}")
        return None

    def check_room(self, count: int) -> None:
        """Raise ApiError when `count` further sequences are too many, or nothing is served."""
        if refusal := self.refusal():
            raise refusal
        if count > self.capacity:
            raise bad_request(f"Expected at most {self.capacity} sequences (prompts x n), got {count}.")
        num_sequences = len(self._sequences())
        if num_sequences + count > self.capacity:
            message = f"The queue is full: {num_sequences} of {self.capacity} sequences run or wait."
            raise ApiError(429, "queue_full", message, headers={"Retry-After": "1"})

    def submit(self, requests: Sequence[tuple[Request, Sequence[TextSequence]]]) -> None:
        """Queue all or none, each with a sequence per branch, after `check_room`; raises ApiError."""
        ids: list[int] = []
        try:
            for request, _ in requests:
                ids.append(self._engine.submit(request))
        except Error as error:
            for request_id in ids:
                self._engine.cancel(request_id)
            raise bad_request(str(error)) from None
        finally:
            self._work.set()
        for request_id, (_, sequences) in zip(ids, requests, strict=True):
            self._requests[request_id] = dict(enumerate(sequences))
        self._publish_requests()

    def cancel_finished(self) -> None:
        """Free what the engine holds for sequences that ended on this side: by a stop string, by a client's leaving."""
        for request_id, branches in self._requests.items():
            for branch, sequence in branches.items():
                if sequence.is_finished:
                    self._engine.cancel(request_id, branch)

    def _run(self) -> None:
        assert self._loop is not None
        try:
            self._step_until_stopped(self._loop)
        except BaseException as error:
            _log.exception("the engine's thread ends")
            self._loop.call_soon_threadsafe(self._halt, f"its thread ended with {error!r}")

    def _step_until_stopped(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self._is_stopping:
            self._work.clear()
            if self._engine.is_idle():
                self._work.wait()
                continue
            try:
                events = self._engine.step()
                loop.call_soon_threadsafe(self._deliver, events, self._read(), time.perf_counter())
            except Exception as error:  # whatever it was, the requests end and the server goes on
                _log.exception("a step failed")
                loop.call_soon_threadsafe(self._fail_all, str(error))
                time.sleep(_PAUSE_AFTER_FAILURE)

    def _deliver(self, events: Sequence[RequestEvent], reading: _Reading, now: float) -> None:
        self._metrics.steps.inc()
        for event in events:
            branches = self._requests.get(event.id)
            if branches is None:
                continue
            if event.finish_reason != FinishReason.CANCELLED:  # which may have been waiting
                for sequence in branches.values():
                    sequence.has_begun = True
            sequence = branches[event.branch]
            try:
                sequence.apply(event, now)
            except Exception as error:  # what one text meets shall not cost the others their events
                _log.exception("an event failed")
                sequence.fail(str(error))
            if event.finish_reason != FinishReason.RUNNING:
                del branches[event.branch]
                if not branches:
                    del self._requests[event.id]
        self.cancel_finished()
        self._publish(reading)
        if reading.device_error and not self._failure:
            _log.error("%s", reading.device_error)
            self._halt(reading.device_error)

    def _halt(self, reason: str) -> None:
        """Serve nobody from now on."""
        self._failure = reason
        self._fail_all(reason)

    def _fail_all(self, message: str) -> None:
        for sequence in self._sequences():
            if not sequence.is_finished:
                sequence.fail(message)
        self.cancel_finished()
        self._requests.clear()
        self._publish_requests()

    def _sequences(self) -> list[TextSequence]:
        return [sequence for branches in self._requests.values() for sequence in branches.values()]

    def _read(self) -> _Reading:
        engine = self._engine
        return _Reading(engine.num_free_slots, engine.num_free_kv_blocks, engine.num_preemptions, engine.device_error)

    def _publish(self, now: _Reading) -> None:
        self._metrics.slots_total.set(self._idle.free_slots)
        self._metrics.slots_used.set(self._idle.free_slots - now.free_slots)
        self._metrics.kv_blocks_total.set(self._idle.free_kv_blocks)
        self._metrics.kv_blocks_used.set(self._idle.free_kv_blocks - now.free_kv_blocks)
        self._metrics.preemptions.inc(now.num_preemptions - self._last.num_preemptions)
        self._last = now
        self._publish_requests()

    def _publish_requests(self) -> None:
        sequences = self._sequences()
        num_running = sum(sequence.has_begun for sequence in sequences)
        self._metrics.requests_running.set(num_running)
        self._metrics.requests_waiting.set(len(sequences) - num_running)
