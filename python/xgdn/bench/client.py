# SPDX-License-Identifier: Apache-2.0
"""A client that sends a workload to /v1/completions, each request when it is due, and times the answers."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from xgdn.bench.timeline import Answer
from xgdn.bench.workload import LoadRequest

_KEEP_SECONDS = (
    2.0  # less than the 5 s after which servers close idle connections, so that none is closed as it is reused
)


class ServerError(RuntimeError):
    """A server that cannot be benchmarked; the message says why."""


@dataclass(frozen=True)
class Target:
    """A server with OpenAI's interface: `url` without /v1."""

    url: str
    model_name: str | None = None  # default: the first that it lists
    api_key: str | None = None
    ignore_eos: bool = True  # an extension of OpenAI's interface that xgdn, vLLM and SGLang support
    timeout: float = 600.0  # seconds without data after which a request has failed

    def connect(self) -> httpx.AsyncClient:
        """Return a client without a maximum number of connections."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_SECONDS)
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=self.timeout, limits=limits)
        except httpx.InvalidURL as error:
            raise ServerError(
                f"--url: expected an address like http://127.0.0.1:8000, got {self.url!r}: {error}"
            ) from None


async def first_model(http: httpx.AsyncClient) -> str:
    try:
        response = await http.get("/v1/models")
        return str(response.raise_for_status().json()["data"][0]["id"])
    except httpx.TransportError as error:
        raise ServerError(f"{http.base_url} does not answer: {error!r}") from None
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError) as error:
        raise ServerError(f"{http.base_url}: /v1/models names no model: {error!r}; give --model-name") from None


class LoadClient:
    def __init__(self, http: httpx.AsyncClient, model_name: str, *, ignore_eos: bool) -> None:
        self._http = http
        self._options: Mapping[str, Any] = {
            "model": model_name,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if ignore_eos else {}),
        }

    async def run(
        self,
        requests: Sequence[LoadRequest],
        arrivals: Sequence[float],
        *,
        max_concurrency: int | None = None,
        on_answer: Callable[[], object] = lambda: None,
    ) -> list[Answer]:
        """Send the requests and return an answer for each, in order; the failure of a request is in its answer.

        With `max_concurrency` a request whose time has come waits until fewer are under way.
        """
        bodies = [self._body(request) for request in requests]  # before the clock starts
        start = time.perf_counter()
        places: asyncio.Queue[float] = asyncio.Queue()  # when each of them became free
        for _ in range(len(requests) if max_concurrency is None else max_concurrency):
            places.put_nowait(0.0)

        async def answer(request: LoadRequest, body: bytes, scheduled: float) -> Answer:
            await asyncio.sleep(start + scheduled - time.perf_counter())
            free_since = await places.get()
            result = Answer(len(request.prompt), request.max_tokens, scheduled, max(scheduled, free_since))
            await _Exchange(self._http, result, start).run(body)
            places.put_nowait(result.end)
            on_answer()
            return result

        return await asyncio.gather(*map(answer, requests, bodies, arrivals))

    def _body(self, request: LoadRequest) -> bytes:
        document = {**self._options, "prompt": list(request.prompt), "max_tokens": request.max_tokens}
        return json.dumps(document).encode()


class _Exchange:
    """One request and the events that answer it."""

    def __init__(self, http: httpx.AsyncClient, answer: Answer, start: float) -> None:
        self._http = http
        self._answer = answer
        self._start = start
        self._finish_time: float | None = None  # time of a last event without text
        self._is_done = False
        self._has_usage = False

    async def run(self, body: bytes) -> None:
        answer = self._answer
        answer.sent = self._now()
        try:
            headers = {"Content-Type": "application/json"}
            async with self._http.stream("POST", "/v1/completions", content=body, headers=headers) as response:
                answer.status = response.status_code
                if response.status_code == 200:
                    async for line in response.aiter_lines():
                        self._read(line)
                else:
                    await response.aread()
                    answer.error, answer.message = _refusal(response)
        except httpx.HTTPError as error:
            answer.error = type(error).__name__
        answer.end = self._now()
        if answer.error is None:
            answer.error = self._what_is_missing()
        if answer.is_broken:
            answer.num_tokens = len(answer.arrivals)
        elif self._finish_time is not None and answer.num_shared:
            answer.arrivals.append(self._finish_time)

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _read(self, line: str) -> None:
        if not line.startswith("data:"):
            return
        content = line.removeprefix("data:").strip()
        if content == "[DONE]":
            self._is_done = True
            return
        try:
            self._apply(json.loads(content))
        except (ValueError, LookupError, TypeError, AttributeError):
            self._answer.error = "an event that is none of OpenAI's"

    def _apply(self, event: dict[str, Any]) -> None:
        answer = self._answer
        if "error" in event:
            answer.error = str(event["error"].get("code") or event["error"]["message"])
            return
        if event.get("usage"):
            answer.num_tokens = event["usage"]["completion_tokens"]
            self._has_usage = True
        for choice in event["choices"]:
            text, reason = choice.get("text"), choice.get("finish_reason")
            if text:
                answer.arrivals.append(self._now())
                answer.text += text
            if reason:
                answer.finish_reason = reason
                self._finish_time = None if text else self._now()

    def _what_is_missing(self) -> str | None:
        if not self._is_done or self._answer.finish_reason is None:
            return "a stream without an end"
        return None if self._has_usage else "a stream without usage"


def _refusal(response: httpx.Response) -> tuple[str, str]:
    """Return the server's code and message."""
    try:
        error = response.json()["error"]
        return str(error["code"]), str(error.get("message", ""))
    except (ValueError, LookupError, TypeError):
        return response.reason_phrase, response.text[:200]
