# SPDX-License-Identifier: Apache-2.0
"""A load on a server with OpenAI's interface: `xgdn bench serving`.

A sample of the requests is answered alone first; under load their answers must be the same.
"""

import asyncio
from collections.abc import Callable, Sequence

from xgdn.bench.client import LoadClient, ServerError, Target, first_model
from xgdn.bench.server_metrics import compare, scrape
from xgdn.bench.timeline import Answer, ServingRow
from xgdn.bench.workload import LoadPlan, Workload


class WrongAnswer(RuntimeError):
    """Too many answers under load differ from those that the same requests get alone."""


class ServingBenchmark:
    """Drives `target` with one workload.

    Raises:
        ServerError: the server does not answer, or refuses a request of the sample.
        WrongAnswer: answers under load differ from those alone, before anything was measured.
    """

    def __init__(self, target: Target, workload: Workload, plan: LoadPlan) -> None:
        self._target = target
        self._workload = workload
        self._plan = plan
        self._sample = workload.sample(plan.check)

    def run(self, on_progress: Callable[[int, int], object] = lambda done, all: None) -> list[ServingRow]:
        """Run the workload at every rate and return a row for each."""
        return asyncio.run(self._run(on_progress))

    async def _run(self, on_progress: Callable[[int, int], object]) -> list[ServingRow]:
        async with self._target.connect() as http:
            name = self._target.model_name or await first_model(http)
            client = LoadClient(http, name, ignore_eos=self._target.ignore_eos)
            total = 2 * len(self._sample) + len(self._plan.rates) * len(self._workload.requests)
            done = 0

            def count() -> None:
                nonlocal done
                done += 1
                on_progress(done, total)

            expected = await self._answer_sample(client, count)
            rows = []
            for rate in self._plan.rates:
                before = await scrape(http)
                answers = await client.run(
                    self._workload.requests,
                    self._workload.arrivals(rate),
                    max_concurrency=self._plan.max_concurrency,
                    on_answer=count,
                )
                after = await scrape(http)
                metrics = None if before is None or after is None else compare(before, after, answers)
                got = [answers[index] for index in self._sample]
                rows.append(ServingRow.of(rate, len(self._workload.requests), answers, _equal(got, expected), metrics))
            return rows

    async def _answer_sample(self, client: LoadClient, on_answer: Callable[[], object]) -> list[Answer]:
        """Return the sample's answers alone, once they equal those to all at once, which also warms the server up."""
        requests = [self._workload.requests[index] for index in self._sample]
        at_once = [0.0] * len(requests)
        alone = await client.run(requests, at_once, max_concurrency=1, on_answer=on_answer)
        together = await client.run(requests, at_once, max_concurrency=self._plan.max_concurrency, on_answer=on_answer)
        for answer in (*alone, *together):
            if not answer.is_finished:
                why = f"{answer.failure}: {answer.message}" if answer.message else answer.failure
                raise ServerError(f"{self._target.url}: a request of the sample failed: {why}")
        if problem := inequality(_equal(together, alone), self._plan.min_equal):
            raise WrongAnswer(problem)
        return alone


def _equal(got: Sequence[Answer], expected: Sequence[Answer]) -> list[bool]:
    """Return, for the answers that finished, whether they are equal to the expected ones."""
    return [a.content == b.content for a, b in zip(got, expected, strict=True) if a.is_finished]


def inequality(equal: Sequence[bool], min_equal: float) -> str | None:
    """Return an error message if too few answers are equal."""
    if sum(equal) >= min_equal * len(equal):
        return None
    return (
        f"{len(equal) - sum(equal)} of {len(equal)} answers under load differ from those to the same requests alone. "
        "In bfloat16 sums may be rounded differently in another batch: measure in float32, or set with --min-equal "
        "the share that must be equal"
    )


def problems(row: ServingRow, min_equal: float) -> list[str]:
    """Return error messages for a row that cannot be trusted; empty if it is sound."""
    found = []
    if row.sent != row.planned:
        found.append(f"{row.planned} requests were to be sent, {row.sent} are accounted for")
    if problem := inequality([True] * row.equal + [False] * (row.compared - row.equal), min_equal):
        found.append(problem)
    for figure in row.metrics or ():
        if not figure.agrees:
            want = str(figure.lowest)
            if figure.highest != figure.lowest:
                want += f" to {figure.highest}"
            found.append(f"the server's {figure.name} grew by {figure.server}, by the answers it must be {want}")
    return [f"rate {row.rate:g}: {problem}" for problem in found]
