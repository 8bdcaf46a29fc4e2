# SPDX-License-Identifier: Apache-2.0
"""The timeline of one request, and the statistics of many."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch

_SHARES = (0.5, 0.9, 0.95, 0.99)


@dataclass
class Answer:
    """One request of a run and its answer. Times are in seconds from the start of the run.

    A token arrives with the event that carries its text; a token without text of its own (a part of a character, a
    special token) arrives with the next event. So several tokens may arrive at once.
    """

    num_prompt_tokens: int
    num_asked: int
    scheduled: float = 0.0  # by the Poisson process
    due: float = 0.0  # the same, or later if --max-concurrency held the request back
    sent: float = 0.0
    end: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of events with tokens
    num_tokens: int = 0  # by the server's usage; for an answer that broke off, the number of events
    text: str = ""
    finish_reason: str | None = None
    status: int | None = None  # of HTTP; None without an answer
    error: str | None = None  # the server's code, or the reason why the answer broke off
    message: str = ""  # the server's, with an error status

    @property
    def is_finished(self) -> bool:
        return self.error is None

    @property
    def is_refused(self) -> bool:
        """Whether it was answered with an error status, so that nothing was generated."""
        return self.error is not None and self.status not in (None, 200)

    @property
    def is_broken(self) -> bool:
        """Whether it was neither answered nor refused: how much the server generated for it is unknown."""
        return self.error is not None and not self.is_refused

    @property
    def is_short(self) -> bool:
        return self.is_finished and self.num_tokens < self.num_asked

    @property
    def failure(self) -> str:
        """Name of its error in tables."""
        return f"{self.status} {self.error}" if self.is_refused else str(self.error)

    @property
    def content(self) -> tuple[str, int, str | None]:
        """The part that must not depend on other requests."""
        return self.text, self.num_tokens, self.finish_reason

    @property
    def num_shared(self) -> int:
        """Number of tokens that arrived in the event of another token."""
        return max(0, self.num_tokens - len(self.arrivals))

    def gaps(self) -> list[float]:
        """Time between each token and the next; 0 between tokens of one event."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)] + [0.0] * (
            self.num_shared if self.arrivals else 0
        )


@dataclass(frozen=True)
class Distribution:
    """Statistics of many values; percentiles are interpolated between the two nearest ones."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Distribution | None":
        """Return the statistics of `values`; None if there are none."""
        all_values = torch.tensor(list(values), dtype=torch.float64)
        if not len(all_values):
            return None
        p50, p90, p95, p99 = all_values.quantile(torch.tensor(_SHARES, dtype=torch.float64)).tolist()
        return cls(len(all_values), float(all_values.mean()), p50, p90, p95, p99, float(all_values.max()))


@dataclass(frozen=True)
class Comparison:
    """A figure of the server's /metrics, and the range that the answers imply.

    `lowest` and `highest` differ only by what answers that broke off leave open.
    """

    name: str
    lowest: int
    highest: int
    server: int

    @property
    def agrees(self) -> bool:
        return self.lowest <= self.server <= self.highest


@dataclass(frozen=True)
class ServingRow:
    """One run. Times in seconds; `rate` in requests per second.

    Latencies count from the moment when a request was sent. The time to the first token is known of every answer that
    brought one, the time to the end of every one that finished.
    """

    rate: float
    planned: int  # requests of the workload
    sent: int
    finished: int
    short: int  # finished with fewer tokens than requested
    failed: int
    errors: dict[str, int]  # failed requests by kind
    prompt_tokens: int  # of finished requests
    tokens_asked: int  # of all requests
    tokens_received: int
    tokens_sharing_an_event: int
    seconds: float  # from the first request to the end of the last answer
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    ttft: Distribution | None  # time to first token
    itl: Distribution | None  # inter-token times: every gap of every answer
    tpot: Distribution | None  # time per output token after the first, a value per answer
    e2e: Distribution | None
    lag: Distribution | None  # delay of the client behind its schedule
    held: Distribution | None  # delay by --max-concurrency
    compared: int  # answers compared with those that the same requests got alone
    equal: int
    metrics: Sequence[Comparison] | None  # None if the server is not xgdn

    @classmethod
    def of(
        cls,
        rate: float,
        planned: int,
        answers: Sequence[Answer],
        equal: Sequence[bool],
        metrics: Sequence[Comparison] | None,
    ) -> "ServingRow":
        finished = [answer for answer in answers if answer.is_finished]
        failed = [answer for answer in answers if not answer.is_finished]
        started = [answer for answer in answers if answer.arrivals]
        seconds = max(a.end for a in answers) - min(a.sent for a in answers) if answers else 0.0
        received = sum(answer.num_tokens for answer in answers)
        prompts = sum(answer.num_prompt_tokens for answer in finished)

        def per_second(count: int) -> float:
            return count / seconds if seconds else 0.0

        return cls(
            rate=rate,
            planned=planned,
            sent=len(answers),
            finished=len(finished),
            short=sum(answer.is_short for answer in finished),
            failed=len(failed),
            errors=dict(sorted(Counter(answer.failure for answer in failed).items())),
            prompt_tokens=prompts,
            tokens_asked=sum(answer.num_asked for answer in answers),
            tokens_received=received,
            tokens_sharing_an_event=sum(answer.num_shared for answer in answers),
            seconds=seconds,
            requests_per_second=per_second(len(finished)),
            output_tokens_per_second=per_second(received),
            total_tokens_per_second=per_second(prompts + received),
            ttft=Distribution.of(answer.arrivals[0] - answer.sent for answer in started),
            itl=Distribution.of(gap for answer in started for gap in answer.gaps()),
            tpot=Distribution.of(
                (a.arrivals[-1] - a.arrivals[0]) / (a.num_tokens - 1) for a in started if a.num_tokens > 1
            ),
            e2e=Distribution.of(answer.end - answer.sent for answer in finished),
            lag=Distribution.of(answer.sent - answer.due for answer in answers),
            held=Distribution.of(answer.due - answer.scheduled for answer in answers),
            compared=len(equal),
            equal=sum(equal),
            metrics=metrics,
        )

    def document(self) -> dict[str, Any]:
        # JSON has no infinity.
        return {**asdict(self), "rate": "inf" if self.rate == float("inf") else self.rate}
