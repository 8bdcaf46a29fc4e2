# SPDX-License-Identifier: Apache-2.0
"""The HTTP application: routes, limits, answers to errors."""

import asyncio
import gc
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp
from tokenizers import Tokenizer

from xgdn.engine import Engine, SamplingParams
from xgdn.engine import Request as EngineRequest
from xgdn.server.answer import Answer
from xgdn.server.api_error import ApiError, bad_request
from xgdn.server.api_keys import Client, Clients
from xgdn.server.chat_template import ChatTemplate
from xgdn.server.embedding import Pooling
from xgdn.server.engine_client import EngineClient
from xgdn.server.event_stream import EventStream
from xgdn.server.formats import ChatFormat, CompletionFormat, Format
from xgdn.server.generation import Generation
from xgdn.server.grammar_compiler import CompiledGrammar, GrammarCompiler
from xgdn.server.json_schema import check_keywords
from xgdn.server.metrics import Metrics
from xgdn.server.openapi import describe
from xgdn.server.page_files import PageFiles
from xgdn.server.prompt_encoder import PromptEncoder, TooManyTokens
from xgdn.server.prompt_field import each
from xgdn.server.prompt_reports import EchoedPrompt
from xgdn.server.reply_parser import THOUGHT, ReplySyntax
from xgdn.server.request_log import RequestLog
from xgdn.server.request_record import RequestRecord, record_of
from xgdn.server.response_store import ResponseStore, StoredResponse
from xgdn.server.responses import ResponseAnswer, ResponsesFormat
from xgdn.server.responses_schemas import ResponseBody, as_asked, messages_of_output
from xgdn.server.schemas import ChatBody, CompletionBody, EmbeddingBody, GenerationBody, StreamOptions, check, parse
from xgdn.server.settings import Settings
from xgdn.server.structured_output import structured_output
from xgdn.server.tokenization import Tokenization
from xgdn.server.tool_call_formats import FORMATS
from xgdn.server.tool_grammar import needs_grammar, tool_grammar
from xgdn.server.workers import Workers
from xgdn.tokenizer_files import eos_token_ids, read_tokenizer_config
from xgdn.vocabulary import Vocabulary

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_MAX_TOKENS = 2**31 - 1  # of a sequence, if neither the model nor the pools have a maximum
_CLIENT_GONE = 499  # nobody is left to read it
_EXPOSED_HEADERS = [
    "X-Request-Id",
    "Retry-After",
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
]
_COLLECT_AFTER = 50_000  # new objects between two collections
_NUMBER_BYTES = 24  # approximate size of a number in an answer
_REPORT_BYTES = 1024  # approximate size of a token's log-probabilities in an answer
_MAX_SHOWN = 64  # requests under way in /stats

_Result = TypeVar("_Result")


class Server:
    """The handlers of one engine's application."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: Settings) -> None:
        self._encoder = PromptEncoder(tokenizer)
        self._workers = Workers()
        self._vocabulary = Vocabulary(tokenizer)
        self._settings = settings
        self._vocab_size = engine.vocab_size
        self._max_context = engine.max_context or _MAX_TOKENS
        self._sampling_defaults = settings.sampling_defaults
        # Of the tokenizer; the engine knows those of the model.
        self._eos_token_ids = eos_token_ids(settings.model_dir, tokenizer)
        stops = [*engine.eos_token_ids, *self._eos_token_ids]
        self._grammars = GrammarCompiler(self._vocabulary, engine.vocab_size, stops)
        self._pooling = Pooling(settings.model_dir)
        self._chat_template = ChatTemplate(settings.model_dir, settings.tool_call_format)
        self._tokenization = Tokenization(
            tokenizer,
            self._encoder,
            self._chat_template,
            read_tokenizer_config(settings.model_dir),
            self._max_context,
            self._check_model,
        )
        self.problem = self._chat_template.problem
        self.metrics = Metrics()
        self.engine = EngineClient(engine, self.metrics, settings.max_queue)
        self._clients = Clients(settings.api_keys)
        self._openapi = describe(settings, engine.vocab_size)
        self._responses = ResponseStore(settings.max_stored_responses)
        self._start_time = int(time.time())

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        with _rare_collections():
            yield
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
        return await self._generate(request, self._prepare_completion)

    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, self._prepare_chat)

    async def responses(self, request: Request) -> Response:
        client = _client_of(record_of(request.scope)).name
        return await self._generate(request, lambda data: self._prepare_response(data, client))

    def response(self, request: Request, response_id: str) -> Mapping[str, Any]:
        for name in request.query_params:
            raise bad_request(f"'{name}' is not supported.", name, "unsupported_parameter")
        client = _client_of(record_of(request.scope)).name
        return self._responses.find(client, response_id).document

    def delete_response(self, request: Request, response_id: str) -> dict[str, Any]:
        self._responses.delete(_client_of(record_of(request.scope)).name, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    async def embeddings(self, request: Request) -> Response:
        data = await self._read(request)
        body, requests = await self._workers.run(len(data), lambda: self._prepare_embedding(data))
        record = record_of(request.scope)
        record.operation = "embeddings"
        record.parameters = {"model": body.model}
        with self._running(record, requests) as generation:
            if await _while_connected(request, generation.choices()) is None:
                return Response(status_code=_CLIENT_GONE)
        states, num_tokens = generation.hidden_states(), generation.usage()["prompt_tokens"]
        size = sum(map(len, states)) * _NUMBER_BYTES
        content = await self._workers.run(size, lambda: self._pooling.document(states, num_tokens, body))
        return Response(content, media_type="application/json")

    async def tokenize(self, request: Request) -> Response:
        return await self._compute(request, self._tokenization.tokenize)

    async def detokenize(self, request: Request) -> Response:
        return await self._compute(request, self._tokenization.detokenize)

    def tokenizer_info(self) -> dict[str, Any]:
        return self._tokenization.info()

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model_card()]}

    def model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
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
            "has_chat_template": self._chat_template.is_usable,
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
            "max_model_len": self._max_context,
            "default_sampling_params": self._sampling_defaults.values(),
        }

    def _check_model(self, name: str) -> None:
        if name != self._settings.model_name:
            message = f"The model '{name}' does not exist; this server has '{self._settings.model_name}'."
            raise ApiError(404, "model_not_found", message, param="model")

    async def _compute(self, request: Request, work: Callable[[bytes], dict[str, Any]]) -> Response:
        """Answer with what `work` makes of the body, without the engine."""
        data = await self._read(request)
        try:
            content = await self._workers.run(len(data), lambda: to_json(work(data)))
        except TooManyTokens as error:
            raise self._too_long(f"at least {error.count}", "prompt") from None
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

    def _prepare_completion(self, data: bytes) -> "_Order":
        body = parse(CompletionBody, data)
        self._check_model(body.model)
        ids = self._encode_each(body.prompt, CompletionFormat.prompt_param)
        texts = [it if isinstance(it, str) else None for it in each(body.prompt)]
        echoes = [EchoedPrompt(*it, self._vocabulary) for it in zip(ids, texts, strict=True)] if body.echo else []
        grammar = self._grammar(body, ReplySyntax())
        return self._order(body, ids, body.max_tokens, CompletionFormat(echoes), grammar)

    def _prepare_chat(self, data: bytes) -> "_Order":
        body = parse(ChatBody, data)
        self._check_model(body.model)
        return self._order_chat(body, ChatFormat)

    def _order_chat(self, body: ChatBody, form_of: Callable[[ReplySyntax], ChatFormat]) -> "_Order":
        text = self._chat_template.render(body.messages, body.chat_template_kwargs, body.callable_tools)
        syntax = self._reply_syntax(body, text)
        form = form_of(syntax)
        ids = self._encode([text], form.prompt_param, add_special_tokens=False)
        max_tokens = body.max_completion_tokens or body.max_tokens
        return self._order(body, ids, max_tokens, form, self._chat_grammar(body, syntax))

    def _prepare_response(self, data: bytes, client: str | None) -> "_Order":
        body = parse(ResponseBody, data)
        self._check_model(body.model)
        messages: list[Mapping[str, Any]] = []
        if body.previous_response_id is not None:
            previous = self._responses.get(client, body.previous_response_id)
            if previous is None:
                name = "previous_response_id"
                message = f"'{name}': there is no response '{body.previous_response_id}', or no longer."
                raise bad_request(message, name, "previous_response_not_found")
            messages += previous.messages
        messages += body.messages()
        try:
            order = self._order_chat(check(ChatBody, body.chat(messages)), ResponsesFormat)
        except ApiError as error:
            raise as_asked(error) from None

        size = len(data) + sum(len(message["content"] or "") for message in messages)

        def keep(document: Mapping[str, Any]) -> None:
            whole = [*messages, *messages_of_output(document["output"])]
            self._responses.put(client, StoredResponse(document, whole, size))

        syntax, defaults = order.form.syntax, self._sampling_defaults
        return replace(order, respond=lambda it: ResponseAnswer(it, body, syntax, defaults, self.metrics, keep))

    def _reply_syntax(self, body: ChatBody, prompt: str) -> ReplySyntax:
        tool_calls = None
        if tools := body.callable_tools:
            parameters = {tool.function.name: tool.parameters for tool in tools}
            tool_calls = FORMATS[self._chat_template.call_format()](parameters)
        has_thought = self._settings.has_reasoning and self._chat_template.has_thought
        return ReplySyntax(
            has_thought=has_thought,
            begins_in_thought=has_thought and prompt.rstrip().endswith(THOUGHT),
            tool_calls=tool_calls,
            max_calls=1 if body.parallel_tool_calls is False else None,
        )

    def _grammar(self, body: GenerationBody, syntax: ReplySyntax) -> CompiledGrammar | None:
        grammar = structured_output(body, self._grammars, syntax)
        if grammar is not None and body.ignore_eos:
            raise bad_request("'ignore_eos': expected no grammar of the replies with it.", "ignore_eos")
        return grammar

    def _chat_grammar(self, body: ChatBody, syntax: ReplySyntax) -> CompiledGrammar | None:
        grammar = self._grammar(body, syntax)
        tools, choice = body.callable_tools, body.tool_choice or "auto"
        if grammar is not None and tools:
            message = "'tools': expected 'tool_choice' to be none where a grammar restricts the replies."
            raise bad_request(message, "tools")
        is_parallel = body.parallel_tool_calls is not False
        if not needs_grammar(tools, choice, is_parallel=is_parallel):
            return grammar
        if body.ignore_eos:
            raise bad_request("'ignore_eos': expected tools that the reply is free to call with it.", "ignore_eos")
        for i, tool in enumerate(tools):
            check_keywords(tool.function.parameters, f"tools[{i}].function.parameters")
        text = tool_grammar(
            self._chat_template.call_format(),
            tools,
            choice,
            is_parallel=is_parallel,
            has_thought=syntax.has_thought,
            begins_in_thought=syntax.begins_in_thought,
        )
        return self._grammars.grammar(text, "tools")

    def _prepare_embedding(self, data: bytes) -> tuple[EmbeddingBody, list[EngineRequest]]:
        body = parse(EmbeddingBody, data)
        self._check_model(body.model)
        self._pooling.check()
        prompts = self._encode_each(body.input, "input")
        for ids in prompts:
            self._check_prompt(ids, 0, "input")
        return body, [EngineRequest(list(ids), max_new_tokens=0, wants_hidden=True) for ids in prompts]

    def _encode_each(self, value: Any, param: str) -> Sequence[Sequence[int]]:
        """Return the token ids of each text; those that are token ids already stay."""
        prompts = each(value)
        if len(prompts) > self.engine.capacity:
            raise bad_request(f"'{param}': expected at most {self.engine.capacity} texts, got {len(prompts)}.", param)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        return [it for it in prompts if not isinstance(it, str)] or self._encode(texts, param, add_special_tokens=True)

    def _encode(self, texts: Sequence[str], param: str, *, add_special_tokens: bool) -> list[list[int]]:
        try:
            return self._encoder.encode(texts, self._max_context, add_special_tokens=add_special_tokens)
        except TooManyTokens as error:
            raise self._too_long(f"at least {error.count} of the prompt", param) from None

    def _too_long(self, what: str, param: str) -> ApiError:
        message = f"This model's maximum context length is {self._max_context} tokens, got {what}."
        return bad_request(message, param, "context_length_exceeded")

    def _check_prompt(self, ids: Sequence[int], max_tokens: int, param: str) -> None:
        if not ids:
            raise bad_request(f"'{param}': expected at least one token, got none.", param, "empty_prompt")
        if max(ids) >= self._vocab_size:
            raise bad_request(f"'{param}': expected token ids below {self._vocab_size}, got {max(ids)}.", param)
        if len(ids) + max_tokens > self._max_context:
            total = len(ids) + max_tokens
            raise self._too_long(f"{total}: {len(ids)} of the prompt and up to {max_tokens} to generate", param)

    def _order(
        self,
        body: GenerationBody,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | None,
        form: Format,
        grammar: CompiledGrammar | None,
    ) -> "_Order":
        is_default = max_tokens is None
        if max_tokens is None:  # the format's default, as far as the context has room
            rest = max(1, self._max_context - max(map(len, prompts), default=0))
            max_tokens = min(form.default_max_tokens or self._sampling_defaults.max_new_tokens or rest, rest)
        for ids in prompts:
            self._check_prompt(ids, max_tokens, form.prompt_param)
        sampling = body.sampling_params(
            self._sampling_defaults,
            lambda words: self._encode(words, "bad_words", add_special_tokens=False),
            vocab_size=self._vocab_size,
            max_tokens=max_tokens,
            logprobs=body.num_logprobs,
        )
        reports_prompt = body.prompt_logprobs is not None

        def respond(generation: Generation) -> Answer:
            return Answer(generation, form, body.model, self.metrics, reports_prompt=reports_prompt)

        return _Order(body, prompts, max_tokens, sampling, form, grammar, is_default, respond)

    async def _generate(self, request: Request, prepare: Callable[[bytes], "_Order"]) -> Response:
        data = await self._read(request)
        order = await self._workers.run(len(data), lambda: prepare(data))
        record = record_of(request.scope)
        client = _client_of(record)
        order = _limit_tokens(order, client.limits.max_tokens)
        record.operation = order.form.operation
        record.parameters = {"stream": order.body.stream, "max_tokens": order.max_tokens, **order.body.parameters()}
        with ExitStack() as held:  # until the answer has ended
            requests = order.requests(self._eos_token_ids)
            generation = held.enter_context(
                self._running(record, requests, order.body.stops, reports_stop_token=bool(order.form.echoes))
            )
            answer = order.respond(generation)
            if order.body.stream:
                events = answer.events(order.body.stream_options or StreamOptions())
                return EventStream(events, self._settings.keep_alive_seconds, on_end=held.pop_all().close)
            choices = await _while_connected(request, generation.choices())
        if choices is None:
            return Response(status_code=_CLIENT_GONE)
        size = sum(len(choice.text) + len(choice.logprobs) * _REPORT_BYTES for choice in choices)
        content = await self._workers.run(size, lambda: answer.document(choices))
        return Response(content, media_type="application/json")

    @contextmanager
    def _running(
        self,
        record: RequestRecord,
        requests: Sequence[EngineRequest],
        stops: Sequence[str] = (),
        *,
        reports_stop_token: bool = False,
    ) -> Iterator[Generation]:
        """Run requests; at the end, drop what still runs of them and take note of what they came to."""
        client = _client_of(record)
        with client.sequences(sum(request.n for request in requests)):
            generation = Generation(
                requests, stops, self._vocabulary, self.engine, self.metrics, reports_stop_token=reports_stop_token
            )
            try:
                yield generation
            finally:
                generation.drop()
                record.close(generation)
                client.charge((record.prompt_tokens or 0) + (record.completion_tokens or 0))


@dataclass(frozen=True)
class _Order:
    """A checked request, ready for the engine."""

    body: GenerationBody
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    sampling: SamplingParams
    form: Format
    grammar: CompiledGrammar | None
    is_default: bool  # max_tokens: the request has none
    respond: Callable[[Generation], Answer | ResponseAnswer]

    def requests(self, eos_token_ids: Sequence[int]) -> list[EngineRequest]:
        """Return what the engine takes, for each prompt."""
        body = self.body
        eos = [] if body.ignore_eos else eos_token_ids
        return [
            EngineRequest(
                list(prompt),
                max_new_tokens=self.max_tokens,
                sampling=self.sampling,
                stop_token_ids=[*(body.stop_token_ids or []), *eos],
                ignore_eos=bool(body.ignore_eos),
                n=body.n or 1,
                prompt_logprobs=body.num_prompt_logprobs,
                grammar=self.grammar,
            )
            for prompt in self.prompts
        ]


def _limit_tokens(order: _Order, limit: int | None) -> _Order:
    """Apply the limit of a key; raises ApiError where the request asks for more."""
    if limit is None or order.max_tokens <= limit:
        return order
    if not order.is_default:
        message = f"'max_tokens': expected at most {limit} with this key, got {order.max_tokens}."
        raise bad_request(message, "max_tokens")
    return replace(order, max_tokens=limit)


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


class _Application(FastAPI):
    """FastAPI with a log around all of it, so that answers to failures are in it and have an id as well."""

    tracer: "Tracer | None" = None

    def build_middleware_stack(self) -> ASGIApp:
        stack = super().build_middleware_stack()
        if self.tracer is not None:
            from xgdn.server.tracing import Traced  # needs an extra package

            stack = Traced(stack, self.tracer)
        return RequestLog(stack)


def create_app(engine: Engine, tokenizer: Tokenizer, settings: Settings) -> FastAPI:
    """Return the application. It steps the engine while it runs.

    `state.problem` is the reason why chat is not served, `state.engine` takes part in a graceful shutdown.

    Raises:
        ValueError: the files of the model directory's tokenizer cannot be read.
    """
    server = Server(engine, tokenizer, settings)
    # FastAPI's documentation pages load scripts from elsewhere, and it does not see the schemas of the bodies.
    app = _Application(title="xgdn", lifespan=server.lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.tracer = settings.tracer
    app.state.problem = server.problem
    app.state.engine = server.engine
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    to_read = ["GET", "HEAD"]  # probes use HEAD
    api = APIRouter(prefix="/v1", dependencies=[Depends(server.check_key)])
    api.add_api_route("/completions", server.completions, methods=["POST"], response_model=None)
    api.add_api_route("/chat/completions", server.chat_completions, methods=["POST"], response_model=None)
    api.add_api_route("/embeddings", server.embeddings, methods=["POST"], response_model=None)
    api.add_api_route("/responses", server.responses, methods=["POST"], response_model=None)
    api.add_api_route("/responses/{response_id}", server.response, methods=to_read, response_model=None)
    api.add_api_route("/responses/{response_id}", server.delete_response, methods=["DELETE"])
    api.add_api_route("/models", server.models, methods=to_read)
    api.add_api_route("/models/{name:path}", server.model, methods=to_read)
    app.include_router(api)
    tools = APIRouter(dependencies=[Depends(server.check_key)])
    tools.add_api_route("/tokenize", server.tokenize, methods=["POST"], response_model=None)
    tools.add_api_route("/detokenize", server.detokenize, methods=["POST"], response_model=None)
    tools.add_api_route("/tokenizer_info", server.tokenizer_info, methods=to_read)
    app.include_router(tools)
    app.add_api_route("/health", server.health, methods=to_read, response_model=None)
    app.add_api_route("/ready", server.ready, methods=to_read, response_model=None)
    app.add_api_route("/openapi.json", server.openapi, methods=to_read)
    app.add_api_route("/metrics", server.render_metrics, methods=to_read, response_model=None)
    for path, figures in (("/stats", server.stats), ("/stats/history", server.stats_history)):
        app.add_api_route(path, figures, methods=to_read, response_model=None, dependencies=[Depends(server.check_key)])
    page = PageFiles()
    app.add_api_route("/", page.index, methods=to_read, response_model=None)
    app.mount("/page", page)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return server.refuse(request, error)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path}: {error.detail}."
        return server.refuse(request, ApiError(error.status_code, code, message, headers=error.headers))

    @app.exception_handler(ClientDisconnect)
    async def client_gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(Exception)
    async def failure(request: Request, _: Exception) -> Response:
        return server.refuse(request, ApiError(500, "internal_error", "The server failed; its log says how."))

    return app
