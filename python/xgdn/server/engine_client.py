# SPDX-License-Identifier: Apache-2.0
"""The server's side of the engine loop: who may come in, which sequence an event is for, what is counted.

All methods but the loop's hooks belong to the event loop's thread.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from xgdn.engine import Engine, EngineCounters, EngineLoop, FinishReason, Request, RequestEvent
from xgdn.errors import Error, StoppedError
from xgdn.server.api_error import ApiError, bad_request
from xgdn.server.history import Levels
from xgdn.server.metrics import Metrics
from xgdn.server.sequence import TextSequence

_log = logging.getLogger("xgdn.server.engine")


def _shutting_down() -> ApiError:
    # So that a client, or what balances the load, asks another server.
    headers = {"Retry-After": "1", "Connection": "close"}
    return ApiError(503, "shutting_down", "The server is shutting down.", headers=headers)


@dataclass
class _UnderWay:
    """A request that waits or runs."""

    choices: Sequence[TextSequence]
    branches: dict[int, TextSequence]  # choices by branch, each until its last event, also when dropped before
    accepted: float  # time.perf_counter()
    num_prefilled: int = 0

    def advance(self, event: RequestEvent) -> int:
        """Note how far the prompt is; return how many of its tokens were computed."""
        num_computed = max(event.num_prefilled - max(self.num_prefilled, event.num_cached), 0)
        self.num_prefilled = event.num_prefilled
        return num_computed

    def description(self) -> dict[str, Any]:
        """Return its state without its text."""
        return {
            "state": self._state(),
            "prompt_tokens": self.choices[0].num_prompt_tokens,
            "prefilled_tokens": self.num_prefilled,
            "cached_tokens": max(sequence.num_cached for sequence in self.choices),
            "generated_tokens": sum(sequence.num_tokens for sequence in self.choices),
            "choices": len(self.choices),
            "seconds": time.perf_counter() - self.accepted,
        }

    def _state(self) -> str:
        if all(sequence.is_finished for sequence in self.choices):  # for its client; the next step frees what it holds
            return "ending"
        if not any(sequence.has_begun for sequence in self.choices):
            return "waiting"
        return "prefill" if self.num_prefilled < self.choices[0].num_prompt_tokens else "decoding"


class EngineClient:
    def __init__(self, engine: Engine, metrics: Metrics, max_queue: int) -> None:
        self._engine = engine
        self._metrics = metrics
        self._idle = self._last = engine.counters
        self.capacity = self._idle.num_free_slots + max_queue  # sequences that run or wait
        self._requests: dict[int, _UnderWay] = {}
        self._is_stopping = False
        self._failure = ""  # why it steps in vain
        self._engine_loop: EngineLoop | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._events: list[RequestEvent] = []  # of the step under way; the engine loop's thread alone uses it
        self._publish(self._idle)
        metrics.healthy.set_function(lambda: not self._failure)

    def start(self) -> None:
        """Begin to step, with events delivered to the running event loop."""
        self._event_loop = asyncio.get_running_loop()
        self._engine_loop = self._engine.loop(after_step=self._hand_over, on_error=_log.error)

    async def stop(self) -> None:
        """Return when the step under way is done; sequences that are left end with an error."""
        self.begin_drain()
        await asyncio.to_thread(self._loop().stop)
        self.end_all()

    def begin_drain(self) -> None:
        """Take no more requests; those that were taken go on. A signal handler may call it."""
        self._is_stopping = True

    def end_all(self) -> None:
        """End what still runs or waits with an error."""
        self._fail_all("the server was shut down")

    @property
    def failure(self) -> str:
        """Why the engine has stopped; empty while it has not."""
        return self._failure

    @property
    def is_idle(self) -> bool:
        return not self._requests

    @property
    def readiness(self) -> str:
        """`ready` when a request would be taken, else why not, in a word."""
        if refusal := self.refusal():
            return refusal.code
        return "ready" if len(self._sequences()) < self.capacity else "queue_full"

    def refusal(self) -> ApiError | None:
        """What every request is told, whatever it asks for; None while requests are served."""
        if self._is_stopping:
            return _shutting_down()
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

    def submit(self, requests: Sequence[tuple[Request, Sequence[TextSequence]]]) -> list[int]:
        """Queue all or none, each with a sequence per branch, after `check_room`; return their ids.

        Raises ApiError.
        """
        ids: list[int] = []
        try:
            for request, _ in requests:
                ids.append(self._loop().submit(request, self._keep))
        except Error as error:
            for request_id in ids:
                self._loop().cancel(request_id)
            raise (_shutting_down() if isinstance(error, StoppedError) else bad_request(str(error))) from None
        now = time.perf_counter()
        for request_id, (_, sequences) in zip(ids, requests, strict=True):
            self._requests[request_id] = _UnderWay(sequences, dict(enumerate(sequences)), now)
        self._publish_requests()
        return ids

    def drop(self, request_ids: Sequence[int]) -> None:
        """End what is unfinished of these requests, for a client that is gone."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            for branch, sequence in request.branches.items() if request is not None else ():
                if not sequence.is_finished:
                    sequence.drop()
                    self._loop().cancel(request_id, branch)

    def under_way(self, limit: int) -> list[dict[str, Any]]:
        """Describe the oldest requests that wait or run, at most `limit` of them."""
        oldest = islice(self._requests.items(), limit)
        return [{"id": request_id, **request.description()} for request_id, request in oldest]

    @property
    def num_requests(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def _loop(self) -> EngineLoop:
        assert self._engine_loop is not None, "start() comes first"
        return self._engine_loop

    def _keep(self, event: RequestEvent) -> None:
        self._events.append(event)

    def _hand_over(self, counters: EngineCounters) -> None:
        assert self._event_loop is not None
        events, self._events = self._events, []
        self._event_loop.call_soon_threadsafe(self._deliver, events, counters, time.perf_counter())

    def _deliver(self, events: Sequence[RequestEvent], counters: EngineCounters, now: float) -> None:
        self._metrics.steps.inc()
        self._metrics.step_seconds.inc(counters.last_step.seconds)
        self._metrics.forward_seconds.inc(counters.last_step.forward_seconds)
        self._metrics.history.advance(now)
        for event in events:
            request = self._requests.get(event.id)
            if request is None:
                continue
            branches = request.branches
            self._metrics.history.count_prompt_tokens(computed=request.advance(event))
            if event.finish_reason != FinishReason.CANCELLED:  # which may have been waiting
                for sequence in branches.values():
                    sequence.begin_time = sequence.begin_time or now
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
            elif sequence.is_finished:  # by a stop string, or because it failed
                self._loop().cancel(event.id, event.branch)
        self._publish(counters)
        if counters.device_error and not self._failure:
            _log.error("%s", counters.device_error)
            self._failure = counters.device_error  # nobody is served from now on
            self._fail_all(self._failure)

    def _fail_all(self, message: str) -> None:
        for request_id, request in self._requests.items():
            for sequence in request.branches.values():
                if not sequence.is_finished:
                    sequence.fail(message)
            self._loop().cancel(request_id)
        self._requests.clear()
        self._publish_requests()

    def _sequences(self) -> list[TextSequence]:
        return [sequence for request in self._requests.values() for sequence in request.branches.values()]

    def _publish(self, now: EngineCounters) -> None:
        self._metrics.slots_total.set(self._idle.num_free_slots)
        self._metrics.slots_used.set(self._idle.num_free_slots - now.num_free_slots)
        self._metrics.kv_blocks_total.set(self._idle.num_free_kv_blocks)
        self._metrics.kv_blocks_used.set(self._idle.num_free_kv_blocks - now.num_free_kv_blocks)
        self._metrics.preemptions.inc(now.num_preemptions - self._last.num_preemptions)
        prefixes, before = now.prefix_cache, self._last.prefix_cache
        self._metrics.prefixes.set(prefixes.num_prefixes)
        self._metrics.prefix_bytes.set(prefixes.bytes)
        num_looked_up, num_found = prefixes.num_looked_up - before.num_looked_up, prefixes.num_found - before.num_found
        self._metrics.prefix_queries.inc(num_looked_up)
        self._metrics.prefix_hits.inc(num_found)
        self._metrics.history.count_prompt_tokens(looked_up=num_looked_up, found=num_found)
        self._metrics.prefix_evictions.inc(prefixes.num_evictions - before.num_evictions)
        source, last = self._engine.speculation, self._last.speculation
        self._metrics.drafted.labels(source).inc(now.speculation.num_drafted - last.num_drafted)
        self._metrics.accepted.labels(source).inc(now.speculation.num_right - last.num_right)
        self._last = now
        self._publish_requests()

    def _publish_requests(self) -> None:
        sequences = self._sequences()
        num_running = sum(sequence.has_begun for sequence in sequences)
        self._metrics.requests_running.set(num_running)
        self._metrics.requests_waiting.set(len(sequences) - num_running)
        self._metrics.history.set_levels(
            Levels(
                requests_running=num_running,
                requests_waiting=len(sequences) - num_running,
                slots_used=self._idle.num_free_slots - self._last.num_free_slots,
                kv_blocks_used=self._idle.num_free_kv_blocks - self._last.num_free_kv_blocks,
            )
        )
