# SPDX-License-Identifier: Apache-2.0
"""Comparison of a server's /metrics with what its clients have seen."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import httpx
from prometheus_client.parser import text_string_to_metric_families

from xgdn.bench.client import ServerError
from xgdn.bench.timeline import Answer, Comparison

_PROMPT_TOKENS = "xgdn_prompt_tokens_total"
_GENERATED_TOKENS = "xgdn_generated_tokens_total"
_FIRST_TOKENS = "xgdn_time_to_first_token_seconds_count"
_GAPS = "xgdn_inter_token_seconds_count"
_FINISHED = 'xgdn_finished_total{reason="%s"}'
_ERRORS = 'xgdn_errors_total{type="%s"}'
_AT_WORK = ("xgdn_requests_waiting", "xgdn_requests_running")

_REST_SECONDS = 60.0  # the running step may take long

Samples = Mapping[str, int]


async def scrape(http: httpx.AsyncClient) -> Samples | None:
    """Return the counters and gauges of an xgdn server once it is idle; None for another server."""
    deadline = time.monotonic() + _REST_SECONDS
    while True:
        try:
            response = await http.get("/metrics")
        except httpx.HTTPError as error:
            raise ServerError(f"{http.base_url}: /metrics does not answer: {error!r}") from None
        samples = _parse(response.text) if response.status_code == 200 else {}
        if _GENERATED_TOKENS not in samples:
            return None
        if not any(samples[name] for name in _AT_WORK):
            return samples
        if time.monotonic() > deadline:
            raise ServerError(f"{http.base_url}: requests of others, or of a run before, are still under way")
        await asyncio.sleep(0.05)


def _parse(text: str) -> dict[str, int]:
    try:
        families = list(text_string_to_metric_families(text))
    except ValueError:  # not the text format of Prometheus
        return {}
    return {
        sample.name + "".join(f'{{{name}="{value}"}}' for name, value in sample.labels.items()): int(sample.value)
        for family in families
        for sample in family.samples
        if sample.name.startswith("xgdn_") and not sample.name.endswith(("_bucket", "_sum", "_created"))
    }


def compare(before: Samples, after: Samples, answers: Sequence[Answer]) -> list[Comparison]:
    """Compare what the server counted between the two scrapes with what the answers imply.

    Of an answer that broke off the server may have counted anything from nothing to all that was asked for.
    """
    finished = [answer for answer in answers if answer.is_finished]
    broken = [answer for answer in answers if answer.is_broken]
    reasons = Counter(_FINISHED % answer.finish_reason for answer in finished)
    refusals = Counter(_ERRORS % answer.error for answer in answers if answer.is_refused)

    def gained(name: str) -> int:
        return after.get(name, 0) - before.get(name, 0)

    def comparison(name: str, known: int, open_: int) -> Comparison:
        return Comparison(name, known, known + open_, gained(name))

    labelled = {name for name in after if name.startswith(("xgdn_finished_total", "xgdn_errors_total"))}
    return [
        comparison(
            _PROMPT_TOKENS, sum(a.num_prompt_tokens for a in finished), sum(a.num_prompt_tokens for a in broken)
        ),
        comparison(_GENERATED_TOKENS, sum(a.num_tokens for a in finished), sum(a.num_asked for a in broken)),
        comparison(_FIRST_TOKENS, sum(bool(a.arrivals) for a in finished), len(broken)),
        comparison(_GAPS, sum(len(a.gaps()) for a in finished), sum(a.num_asked for a in broken)),
        *(
            comparison(name, (reasons + refusals)[name], len(broken))
            for name in sorted(labelled | {*reasons, *refusals})
        ),
    ]
