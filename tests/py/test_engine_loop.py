# SPDX-License-Identifier: Apache-2.0
"""The engine loop from Python: callbacks, errors, the lock of the interpreter, and the interpreter's end."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import forked
import xgdn
from xgdn import errors
from xgdn.engine import EngineCounters, FinishReason, Request, RequestEvent

CHECKPOINT = Path(__file__).parents[2] / "examples/tiny_model/checkpoint"
SECONDS = 60
FOREVER = 3000  # tokens


@pytest.fixture(scope="module")
def engine() -> xgdn.Engine:
    return xgdn.Engine(CHECKPOINT, runner=xgdn.RunnerOptions(max_batch_size=4, max_cached_tokens=4096))


@pytest.fixture(autouse=True)
def all_is_free(engine: xgdn.Engine) -> Iterator[None]:
    yield
    while not engine.is_idle():  # a loop that was stopped leaves cancelled requests to the next step
        engine.step()
    assert engine.num_free_slots == 4


def request(first: int, count: int, n: int = 1) -> Request:
    return Request([first, 7, 9], max_new_tokens=count, ignore_eos=True, n=n)


class Inbox:
    """What came for a request of one branch."""

    def __init__(self) -> None:
        self.events: list[RequestEvent] = []
        self._ended = threading.Event()
        self.begun = threading.Event()

    def __call__(self, event: RequestEvent) -> None:
        self.events.append(event)
        if event.tokens:
            self.begun.set()
        if event.finish_reason != FinishReason.RUNNING:
            self._ended.set()

    def wait(self) -> list[int]:
        assert self._ended.wait(SECONDS)
        assert [event.finish_reason == FinishReason.RUNNING for event in self.events].count(False) == 1
        return [token for event in self.events for token in event.tokens]


def test_callbacks_get_the_events_of_their_own_requests(engine: xgdn.Engine) -> None:
    requests = [request(i, 5 + i) for i in range(8)]
    want = [engine.generate([r.prompt], max_new_tokens=r.max_new_tokens, ignore_eos=True)[0].tokens for r in requests]
    counters: list[EngineCounters] = []
    loop = engine.loop(after_step=counters.append)
    inboxes = [Inbox() for _ in requests]
    ids = [0] * len(requests)

    def submit(i: int) -> None:
        ids[i] = loop.submit(requests[i], inboxes[i])

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [inbox.wait() for inbox in inboxes] == want
    loop.drain()
    assert [{event.id for event in inbox.events} for inbox in inboxes] == [{i} for i in ids]
    assert loop.num_requests == 0
    assert loop.counters.num_free_slots == counters[-1].num_free_slots == engine.counters.num_free_slots == 4
    assert counters[-1].device_error == ""
    with pytest.raises(errors.StoppedError, match="submit"):
        loop.submit(requests[0], Inbox())


def test_requests_are_cancelled_by_id(engine: xgdn.Engine) -> None:
    loop = engine.loop()
    left, other = Inbox(), Inbox()
    request_id = loop.submit(request(1, FOREVER), left)
    loop.submit(request(2, 30), other)
    assert left.begun.wait(SECONDS)
    assert loop.cancel(request_id)
    left.wait()
    assert left.events[-1].finish_reason == FinishReason.CANCELLED
    assert len(other.wait()) == 30
    assert not loop.cancel(request_id)
    loop.stop()


def test_drain_cancels_what_takes_too_long(engine: xgdn.Engine) -> None:
    loop = engine.loop()
    inbox = Inbox()
    loop.submit(request(1, FOREVER), inbox)
    loop.drain(0.01)
    assert inbox.events[-1].finish_reason == FinishReason.CANCELLED


def test_stop_ends_what_runs(engine: xgdn.Engine) -> None:
    loop = engine.loop()
    inbox = Inbox()
    loop.submit(request(1, FOREVER), inbox)
    assert inbox.begun.wait(SECONDS)
    loop.stop()
    assert (inbox.events[-1].finish_reason, inbox.events[-1].error) == (
        FinishReason.ERROR,
        "the engine loop was stopped",
    )


@pytest.mark.parametrize("failure", [RuntimeError("no ear"), SystemExit("no ear")], ids=repr)
def test_what_a_callback_raises_costs_its_own_request_alone(engine: xgdn.Engine, failure: BaseException) -> None:
    reported: list[str] = []
    loop = engine.loop(on_error=reported.append)
    other = Inbox()

    def fail(event: RequestEvent) -> None:
        raise failure

    loop.submit(request(1, FOREVER), fail)
    loop.submit(request(2, 20), other)
    assert len(other.wait()) == 20
    loop.drain()  # which the request that failed would not let return
    (message,) = reported
    assert "callback failed" in message
    assert "no ear" in message


def test_what_a_hook_raises_fails_the_step_or_is_reported(engine: xgdn.Engine) -> None:
    reported: list[str] = []
    is_broken = [True]

    def before_step() -> None:
        if is_broken.pop() if is_broken else False:
            raise ValueError("a broken step")

    def after_step(_: EngineCounters) -> None:
        raise ValueError("a broken hook")

    loop = engine.loop(before_step=before_step, after_step=after_step, on_error=reported.append)
    failed, good = Inbox(), Inbox()
    loop.submit(request(1, FOREVER), failed)
    assert failed.wait() == []
    assert "a broken step" in failed.events[-1].error
    loop.submit(request(2, 3), good)
    assert len(good.wait()) == 3
    loop.drain()
    assert "a broken step" in reported[0]
    assert all("a broken hook" in message for message in reported[1:])


def test_callbacks_may_call_the_loop(engine: xgdn.Engine) -> None:
    loop = engine.loop()
    second = Inbox()
    refused: list[Exception] = []

    def first(event: RequestEvent) -> None:
        if event.finish_reason == FinishReason.RUNNING:
            return
        loop.submit(request(2, 2), second)
        try:
            loop.drain()
        except errors.Error as error:
            refused.append(error)

    loop.submit(request(1, 2), first)
    assert len(second.wait()) == 2
    assert "another thread" in str(refused[0])
    loop.stop()


def test_a_finished_request_lets_go_of_its_callback(engine: xgdn.Engine) -> None:
    loop = engine.loop()
    inbox = Inbox()
    gone = weakref.ref(inbox)
    loop.submit(request(1, 2), inbox)
    inbox.wait()
    loop.drain()
    del inbox
    gc.collect()
    assert gone() is None


def count_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_loop_that_nobody_holds_ends(engine: xgdn.Engine) -> None:
    engine.generate([[1]], max_new_tokens=1)  # torch's threads are there
    before = count_threads()
    loop = engine.loop()
    inbox = Inbox()
    loop.submit(request(1, FOREVER), inbox)
    assert inbox.begun.wait(SECONDS)
    assert count_threads() > before
    del loop
    gc.collect()
    assert inbox.events[-1].error == "the engine loop was stopped"
    deadline = time.monotonic() + SECONDS
    while count_threads() > before:  # OpenMP's of the loop's thread end a little later
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_last_reference_may_go_in_a_callback(engine: xgdn.Engine) -> None:
    inbox = Inbox()
    loops = [engine.loop()]

    def callback(event: RequestEvent) -> None:
        loops.clear()
        inbox(event)

    submit: Callable[[Request, Callable[[RequestEvent], None]], int] = loops[0].submit
    submit(request(1, FOREVER), callback)
    del submit
    inbox.wait()
    assert inbox.events[-1].error == "the engine loop was stopped"


END = """
import threading
engine = xgdn.Engine({checkpoint!r})
begun = threading.Event()
loop = engine.loop(after_step=lambda _: sum(range(1000)))
def callback(event):
    begun.set()
    if event.error:
        print(event.error, flush=True)
for i in range(8):
    loop.submit(xgdn.Request([i], max_new_tokens=4000, ignore_eos=True), callback)
assert begun.wait(60)
{end}
"""


def test_the_interpreter_ends_while_requests_run() -> None:
    ends = ["", "callback.loop = loop", "raise SystemExit(0)", "del engine"]
    programs = [(END.format(checkpoint=str(CHECKPOINT), end=end), {}) for end in ends]
    for end, ended in zip(ends, forked.run(programs, SECONDS), strict=True):
        assert (ended.status, ended.stderr) == (0, ""), end
        assert ended.stdout == "the engine loop was stopped\n" * 8, end
