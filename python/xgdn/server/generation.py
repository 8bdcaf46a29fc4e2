# SPDX-License-Identifier: Apache-2.0
"""All sequences of one HTTP request, and the documents that answer it."""

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from xgdn.engine import Request, SamplingParams
from xgdn.sampling_defaults import SamplingDefaults, first_given
from xgdn.server.api_error import ApiError
from xgdn.server.engine_client import EngineClient
from xgdn.server.logprobs import TokenReport, chat_logprobs, completion_logprobs
from xgdn.server.metrics import Metrics
from xgdn.server.schemas import GenerationBody
from xgdn.server.sequence import Delta, TextSequence
from xgdn.vocabulary import Vocabulary

_UINT64 = 2**64


@dataclass(frozen=True)
class ModelDefaults:
    """What the model's files say about every answer."""

    sampling: SamplingDefaults
    eos_token_ids: Sequence[int]  # of the tokenizer; the engine knows those of the model


class Generation:
    """Queued when constructed; raises ApiError when it is refused. Choice i is answer i % n to prompt i // n."""

    def __init__(
        self,
        body: GenerationBody,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        defaults: ModelDefaults,
        vocabulary: Vocabulary,
        engine: EngineClient,
        metrics: Metrics,
    ) -> None:
        n = body.n or 1
        engine.check_room(len(prompts) * n)  # before any of them takes memory
        self.has_logprobs = body.num_logprobs is not None
        self._engine = engine
        self._deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self._num_prompt_tokens = sum(map(len, prompts))
        seed = secrets.randbits(63) if body.seed is None else body.seed
        sampling = defaults.sampling
        eos = [] if body.ignore_eos else defaults.eos_token_ids
        requests = [
            Request(
                list(prompt),
                max_new_tokens=max_tokens,
                sampling=SamplingParams(
                    temperature=first_given(body.temperature, sampling.temperature, 1.0),
                    top_k=max(first_given(body.top_k, sampling.top_k, 0), 0),
                    top_p=first_given(body.top_p, sampling.top_p, 1.0),
                    seed=seed % _UINT64,
                    logprobs=body.num_logprobs,
                ),
                stop_token_ids=[*(body.stop_token_ids or []), *eos],
                ignore_eos=bool(body.ignore_eos),
                n=n,
            )
            for prompt in prompts
        ]
        self._sequences = [
            TextSequence(i, prompts[i // n], vocabulary, body.stops, metrics, self._deltas.put_nowait)
            for i in range(len(prompts) * n)
        ]
        self._ids = engine.submit(
            [(request, self._sequences[i * n : (i + 1) * n]) for i, request in enumerate(requests)]
        )
        metrics.prompt_tokens.inc(self._num_prompt_tokens)

    @property
    def num_choices(self) -> int:
        return len(self._sequences)

    async def deltas(self) -> AsyncIterator[Delta]:
        """Pieces of all choices as they come; raises ApiError when a sequence fails."""
        num_left = self.num_choices
        while num_left > 0:
            delta = await self._deltas.get()
            if delta.finish_reason == "error":
                raise ApiError(500, "engine_error", delta.error)
            num_left -= delta.finish_reason is not None
            yield delta

    async def choices(self) -> list[Delta]:
        """Every choice in one piece, when all are finished."""
        pieces: list[list[Delta]] = [[] for _ in self._sequences]
        async for delta in self.deltas():
            pieces[delta.index].append(delta)
        return [
            Delta(
                index,
                "".join(delta.text for delta in deltas),
                [report for delta in deltas for report in delta.logprobs],
                deltas[-1].finish_reason,
            )
            for index, deltas in enumerate(pieces)
        ]

    def drop(self) -> None:
        """End what still runs; the next step frees what it held."""
        self._engine.drop(self._ids)

    def usage(self) -> dict[str, int]:
        num_generated = sum(sequence.num_tokens for sequence in self._sequences)
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": self._num_prompt_tokens + num_generated,
        }


class CompletionFormat:
    """/v1/completions."""

    name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"
    prompt_param = "prompt"
    default_max_tokens: int | None = 16  # OpenAI's

    def logprobs(self, reports: Sequence[TokenReport]) -> dict[str, Any]:
        return completion_logprobs(reports)

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def first_deltas(self) -> list[dict[str, Any]]:
        return []


class ChatFormat:
    """/v1/chat/completions."""

    name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    prompt_param = "messages"
    default_max_tokens: int | None = None  # to the end of the context

    def logprobs(self, reports: Sequence[TokenReport]) -> dict[str, Any]:
        return chat_logprobs(reports)

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def first_deltas(self) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant", "content": ""}}]


class Answer:
    """Writes a generation in one of the two formats."""

    def __init__(
        self, generation: Generation, form: CompletionFormat | ChatFormat, model: str, metrics: Metrics
    ) -> None:
        self._generation = generation
        self._form = form
        self._metrics = metrics
        self._head = {"id": f"{form.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def document(self, whole: Sequence[Delta]) -> bytes:
        """The choices as a JSON document; any thread may call it, as a long one takes a while."""
        choices = [self._choice(choice, self._form.choice(choice.text)) for choice in whole]
        document = {**self._head, "object": self._form.name, "choices": choices, "usage": self._generation.usage()}
        return to_json(document)

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        """The same as server-sent events; an error that comes later than the status is an event too."""
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        for content in self._form.first_deltas():
            for index in range(self._generation.num_choices):
                yield self._event([self._choice(Delta(index, ""), content)], usage)
        try:
            async for delta in self._generation.deltas():
                yield self._event([self._choice(delta, self._form.delta(delta.text))], usage)
        except ApiError as error:
            self._metrics.errors.labels(error.code).inc()
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        if include_usage:
            yield self._event([], {"usage": self._generation.usage()})
        yield "data: [DONE]\n\n"

    def _choice(self, delta: Delta, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = self._form.logprobs(delta.logprobs) if self._generation.has_logprobs else None
        return {"index": delta.index, **content, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> str:
        document = {**self._head, "object": self._form.chunk_name, "choices": choices, **usage}
        return f"data: {json.dumps(document)}\n\n"
