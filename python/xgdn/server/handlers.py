# SPDX-License-Identifier: Apache-2.0
"""The handlers of the HTTP routes."""

import asyncio
import gc
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json
from tokenizers import Tokenizer

from xgdn.engine import Engine
from xgdn.engine import Request as EngineRequest
from xgdn.server.api_error import ApiError, bad_request
from xgdn.server.api_keys import Client, Clients
from xgdn.server.engine_client import EngineClient
from xgdn.server.event_stream import EventStream
from xgdn.server.generation import Generation
from xgdn.server.metrics import Metrics
from xgdn.server.openapi import describe
from xgdn.server.order import Order
from xgdn.server.preparation import Preparation
from xgdn.server.request_record import RequestRecord, record_of
from xgdn.server.response_store import ResponseStore
from xgdn.server.schemas import StreamOptions, parse
from xgdn.server.session_schemas import CreateSessionBody, ForkSessionBody, SaveSessionBody, TruncateSessionBody
from xgdn.server.sessions import Sessions, Turn
from xgdn.server.settings import Settings
from xgdn.server.workers import Workers

CLIENT_GONE = 499  # nobody is left to read it
_COLLECT_AFTER = 50_000  # new objects between two collections
_NUMBER_BYTES = 24  # approximate size of a number in an answer
_REPORT_BYTES = 1024  # approximate size of a token's log-probabilities in an answer
_MAX_SHOWN = 64  # requests under way in /stats
_EXPIRY_SECONDS = 5.0  # at most, between two looks for idle sessions

_Result = TypeVar("_Result")


class Handlers:
    """The handlers of one engine's application."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: Settings) -> None:
        self.metrics = Metrics()
        self.engine = EngineClient(engine, self.metrics, settings.max_queue)
        self._responses = ResponseStore(settings.max_stored_responses)
        self.sessions = Sessions(engine, settings, self.metrics)
        self._preparation = Preparation(
            engine, tokenizer, settings, self.metrics, self._responses, self.sessions, self.engine.capacity
        )
        self.problem = self._preparation.chat_template.problem
        self._workers = Workers()
        self._settings = settings
        self._clients = Clients(settings.api_keys)
        self._openapi = describe(settings, engine.vocab_size)
        self._start_time = int(time.time())

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        expiring = asyncio.create_task(self._expire_sessions())
        with _rare_collections():
            yield
        expiring.cancel()
        await self.engine.stop()
        self._workers.stop()

    def check_key(self, request: Request) -> None:
        client = self._client(request)
        if client is None:
            message = "Expected one of the server's API keys as 'Authorization: Bearer KEY'."
            raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        record_of(request.scope).client = client
        if request.method == "POST":
            client.admit()

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, self._preparation.completion)

    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, self._preparation.chat)

    async def responses(self, request: Request) -> Response:
        return await self._generate(request, self._preparation.response)

    def stored_response(self, request: Request, response_id: str) -> Mapping[str, Any]:
        """Return a response that is kept, or forget it."""
        for name in request.query_params:
            raise bad_request(f"'{name}' is not supported.", name, "unsupported_parameter")
        client = _client_of(record_of(request.scope)).name
        if request.method != "DELETE":
            return self._responses.find(client, response_id).document
        self._responses.delete(client, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def all_sessions(self, request: Request) -> Response:
        """List the sessions of the client, or open one."""

        def create(client: Client, data: bytes) -> dict[str, Any]:
            return self.sessions.create(client, parse(CreateSessionBody, data))

        if request.method == "POST":
            return await self._change_session(request, create)
        client = _client_of(record_of(request.scope))
        return JSONResponse({"object": "list", "data": self.sessions.summaries(client)})

    def session(self, request: Request, session_id: str) -> dict[str, Any]:
        """Return a session, or close it."""
        client = _client_of(record_of(request.scope))
        if request.method != "DELETE":
            return self.sessions.describe(client, session_id)
        self.sessions.close(client, session_id)
        return {"id": session_id, "object": "session", "deleted": True}

    async def fork_session(self, request: Request, session_id: str) -> Response:
        def fork(client: Client, data: bytes) -> dict[str, Any]:
            return self.sessions.fork(client, session_id, parse(ForkSessionBody, data))

        return await self._change_session(request, fork)

    async def truncate_session(self, request: Request, session_id: str) -> Response:
        def truncate(client: Client, data: bytes) -> dict[str, Any]:
            return self.sessions.truncate(client, session_id, parse(TruncateSessionBody, data))

        return await self._change_session(request, truncate)

    async def save_session(self, request: Request, session_id: str) -> Response:
        def save(client: Client, data: bytes) -> dict[str, Any]:
            return self.sessions.save(client, session_id, parse(SaveSessionBody, data))

        return await self._change_session(request, save)

    def session_files(self, request: Request) -> dict[str, Any]:
        return {"object": "list", "data": self.sessions.files(_client_of(record_of(request.scope)))}

    def delete_session_file(self, request: Request, file: str) -> dict[str, Any]:
        self.sessions.delete_file(_client_of(record_of(request.scope)), file)
        return {"file": file, "object": "session.file", "deleted": True}

    async def _change_session(self, request: Request, change: Callable[[Client, bytes], dict[str, Any]]) -> Response:
        """Answer with what `change` makes of the body, which may wait for a step, and for a file."""
        if refusal := self.engine.refusal():
            raise refusal
        client = _client_of(record_of(request.scope))
        data = await self._read(request)
        return JSONResponse(await self._workers.run_long(lambda: change(client, data)))

    async def embeddings(self, request: Request) -> Response:
        data = await self._read(request)
        body, requests = await self._workers.run(len(data), lambda: self._preparation.embedding(data))
        record = record_of(request.scope)
        record.operation = "embeddings"
        record.parameters = {"model": body.model}
        with self._running(record, requests) as generation:
            if await _while_connected(request, generation.choices()) is None:
                return Response(status_code=CLIENT_GONE)
        states, num_tokens = generation.hidden_states(), generation.usage()["prompt_tokens"]
        size = sum(map(len, states)) * _NUMBER_BYTES
        content = await self._workers.run(size, lambda: self._preparation.pooling.document(states, num_tokens, body))
        return Response(content, media_type="application/json")

    async def tokenize(self, request: Request) -> Response:
        return await self._compute(request, self._preparation.tokenization.tokenize)

    async def detokenize(self, request: Request) -> Response:
        return await self._compute(request, self._preparation.tokenization.detokenize)

    def tokenizer_info(self) -> dict[str, Any]:
        return self._preparation.tokenization.info()

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model_card()]}

    def model(self, name: str) -> dict[str, Any]:
        self._preparation.check_model(name)
        return self._model_card()

    def health(self, request: Request) -> Response:
        """Tell whether this process can serve: 503 means that only a new one can. The reason is for who has a key."""
        if not self.engine.failure:
            return JSONResponse({"status": "ok"})
        reason = {"reason": self.engine.failure} if self._client(request) else {}
        return JSONResponse({"status": "stopped", **reason}, 503)

    def ready(self) -> Response:
        """Tell whether a request would be taken now."""
        readiness = self.engine.readiness
        return JSONResponse({"status": readiness}, 200 if readiness == "ready" else 503)

    def openapi(self) -> dict[str, Any]:
        return self._openapi

    def render_metrics(self) -> Response:
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def stats(self) -> dict[str, Any]:
        """Return the figures of this moment that the page shows."""
        gauges = ("requests_waiting", "requests_running", "slots_used", "slots_total")
        pools = ("kv_blocks_used", "kv_blocks_total", "prompt_tokens_total", "generated_tokens_total")
        values = {name: int(self.metrics.value(name)) for name in (*gauges, *pools)}
        refusal = self.engine.refusal()
        return {
            "model": self._settings.model_name,
            "time": time.perf_counter(),
            "stopped": "" if refusal is None else refusal.message,
            "has_chat_template": self._preparation.chat_template.is_usable,
            **values,
            "num_requests": self.engine.num_requests,
            "requests": self.engine.under_way(_MAX_SHOWN),
        }

    async def stats_history(self, since: str = "0") -> Response:
        """Return the samples of the last ten minutes that ended after `since`, a `time` of /stats."""
        try:
            begin = float(since)
        except ValueError:
            begin = math.nan
        if not math.isfinite(begin):
            raise bad_request(f"'since': expected a finite number of seconds, got '{since}'.", "since")
        now, history = time.perf_counter(), self.metrics.history
        history.advance(now)
        samples = [sample.document() for sample in history.since(begin)]
        document = {"time": now, "seconds": history.seconds, "max_samples": history.max_samples, "samples": samples}
        return Response(to_json(document), media_type="application/json")

    def refuse(self, request: Request, error: ApiError) -> Response:
        """Count an error and return its answer."""
        record_of(request.scope).error = error.code
        self.metrics.errors.labels(error.code).inc()
        return JSONResponse(error.body(), error.status, error.headers)

    def _client(self, request: Request) -> Client | None:
        return self._clients.find(request.headers.get("Authorization", ""))

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._settings.model_name,
            "object": "model",
            "created": self._start_time,
            "owned_by": "xgdn",
            "max_model_len": self._preparation.max_context,
            "default_sampling_params": self._settings.sampling_defaults.values(),
        }

    async def _compute(self, request: Request, work: Callable[[bytes], dict[str, Any]]) -> Response:
        """Answer with what `work` makes of the body, without the engine."""
        data = await self._read(request)
        content = await self._workers.run(len(data), lambda: to_json(work(data)))
        return Response(content, media_type="application/json")

    async def _read(self, request: Request) -> bytes:
        client = _client_of(record_of(request.scope))
        limit = min(self._settings.max_body_bytes, client.limits.max_body_bytes or self._settings.max_body_bytes)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise ApiError(413, "body_too_large", f"Expected a body of at most {limit} bytes.")
        return bytes(body)

    async def _generate(self, request: Request, prepare: Callable[[bytes, Client], Order]) -> Response:
        data = await self._read(request)
        record = record_of(request.scope)
        client = _client_of(record)
        order = await self._workers.run(len(data), lambda: prepare(data, client))
        with ExitStack() as held:  # until the answer has ended
            if order.turn is not None:
                held.callback(order.turn.end)
            order = order.limited(client.limits.max_tokens)
            record.operation = order.form.operation
            record.parameters = {"stream": order.body.stream, "max_tokens": order.max_tokens, **order.body.parameters()}
            requests = order.requests(self._preparation.eos_token_ids)
            generation = held.enter_context(
                self._running(
                    record,
                    requests,
                    order.body.stops,
                    reports_stop_token=bool(order.form.echoes),
                    before_end=self._keeper(order.turn),
                )
            )
            answer = order.respond(generation)
            if order.body.stream:
                events = answer.events(order.body.stream_options or StreamOptions())
                return EventStream(events, self._settings.keep_alive_seconds, on_end=held.pop_all().close)
            choices = await _while_connected(request, generation.choices())
        if choices is None:
            return Response(status_code=CLIENT_GONE)
        reports = sum(len(it.logprobs) + len(generation.prompt_logprobs(it.index)) for it in choices)
        size = sum(len(choice.text) for choice in choices) + reports * _REPORT_BYTES
        content = await self._workers.run(size, lambda: answer.document(choices))
        return Response(content, media_type="application/json")

    def _keeper(self, turn: Turn | None) -> Callable[[Sequence[int]], Awaitable[None]] | None:
        """Return what makes a request's tokens those of its session."""
        if turn is None:
            return None
        return lambda tokens: self._workers.run(0, lambda: turn.keep(tokens))

    async def _expire_sessions(self) -> None:
        while True:
            await asyncio.sleep(min(self._settings.session_idle_seconds, _EXPIRY_SECONDS))
            await self._workers.run(0, self.sessions.expire)

    @contextmanager
    def _running(
        self,
        record: RequestRecord,
        requests: Sequence[EngineRequest],
        stops: Sequence[str] = (),
        *,
        reports_stop_token: bool = False,
        before_end: Callable[[Sequence[int]], Awaitable[None]] | None = None,
    ) -> Iterator[Generation]:
        """Run requests; at the end, drop what still runs of them and take note of what they came to."""
        client = _client_of(record)
        with client.sequences(sum(request.n for request in requests)):
            generation = Generation(
                requests,
                stops,
                self._preparation.vocabulary,
                self.engine,
                self.metrics,
                reports_stop_token=reports_stop_token,
                before_end=before_end,
            )
            try:
                yield generation
            finally:
                generation.drop()
                record.close(generation)
                client.charge((record.prompt_tokens or 0) + (record.completion_tokens or 0))


def _client_of(record: RequestRecord) -> Client:
    assert record.client is not None, "check_key() comes first"
    return record.client


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Collect garbage rarely: a body of many small lists would make the collector walk all modules again and again."""
    thresholds = gc.get_threshold()
    gc.set_threshold(_COLLECT_AFTER, *thresholds[1:])
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)


async def _while_connected(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result | None:
    """Return the result of `work`; None if the client disconnects first."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
