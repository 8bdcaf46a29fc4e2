# SPDX-License-Identifier: Apache-2.0
"""All sequences of one HTTP request, and the documents that answer it."""

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from xgdn.engine import Request, SamplingParams
from xgdn.server.api_error import ApiError
from xgdn.server.engine_thread import EngineThread
from xgdn.server.metrics import Metrics
from xgdn.server.schemas import GenerationBody
from xgdn.server.sequence import Delta, TextSequence

_UINT64 = 2**64


class Generation:
    """Queued when constructed; raises ApiError when it is refused. Choice i is answer i % n to prompt i // n."""

    def __init__(
        self,
        body: GenerationBody,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        tokenizer: Tokenizer,
        engine: EngineThread,
        metrics: Metrics,
    ) -> None:
        engine.check_room(len(prompts) * (body.n or 1))  # before any of them takes memory
        self._deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self._num_prompt_tokens = sum(map(len, prompts))
        seed = secrets.randbits(63) if body.seed is None else body.seed
        requests = [
            Request(
                list(prompt),
                max_new_tokens=max_tokens,
                sampling=SamplingParams(
                    temperature=1.0 if body.temperature is None else body.temperature,
                    top_k=body.top_k or 0,
                    top_p=1.0 if body.top_p is None else body.top_p,
                    seed=(seed + i) % _UINT64,
                ),
                stop_token_ids=body.stop_token_ids,
                ignore_eos=body.ignore_eos,
            )
            for prompt in prompts
            for i in range(body.n or 1)
        ]
        self._sequences = [
            TextSequence(index, request, tokenizer, body.stops, metrics, self._deltas.put_nowait)
            for index, request in enumerate(requests)
        ]
        engine.submit(self._sequences)
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

    async def texts(self) -> list[tuple[str, str]]:
        """Text and finish reason of every choice, when all are finished."""
        texts = [""] * self.num_choices
        reasons = [""] * self.num_choices
        async for delta in self.deltas():
            texts[delta.index] += delta.text
            reasons[delta.index] = delta.finish_reason or ""
        return list(zip(texts, reasons, strict=True))

    def drop(self) -> None:
        """End what still runs; the engine's thread frees what it held."""
        for sequence in self._sequences:
            if not sequence.is_finished:
                sequence.drop()

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

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def first_deltas(self, num_choices: int) -> list[dict[str, Any]]:
        return []


class ChatFormat:
    """/v1/chat/completions."""

    name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def first_deltas(self, num_choices: int) -> list[dict[str, Any]]:
        first = {"delta": {"role": "assistant", "content": ""}}
        return [_choice(index, first, None) for index in range(num_choices)]


def _choice(index: int, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}


class Answer:
    """Writes a generation in one of the two formats."""

    def __init__(self, generation: Generation, form: CompletionFormat | ChatFormat, model: str) -> None:
        self._generation = generation
        self._form = form
        self._head = {"id": f"{form.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def document(self) -> dict[str, Any]:
        texts = await self._generation.texts()
        choices = [_choice(i, self._form.choice(text), reason) for i, (text, reason) in enumerate(texts)]
        return {**self._head, "object": self._form.name, "choices": choices, "usage": self._generation.usage()}

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        """The same as server-sent events; an error that comes later than the status is an event too."""
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        for choice in self._form.first_deltas(self._generation.num_choices):
            yield self._event([choice], usage)
        try:
            async for delta in self._generation.deltas():
                choice = _choice(delta.index, self._form.delta(delta.text), delta.finish_reason)
                yield self._event([choice], usage)
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n"
            return
        if include_usage:
            yield self._event([], {"usage": self._generation.usage()})
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> str:
        document = {**self._head, "object": self._form.chunk_name, "choices": choices, **usage}
        return f"data: {json.dumps(document)}\n\n"
