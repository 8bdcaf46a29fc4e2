# SPDX-License-Identifier: Apache-2.0
"""What an HTTP request is answered with: a JSON document or a stream of events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from pydantic_core import to_json

from xgdn.server.api_error import ApiError
from xgdn.server.formats import Format
from xgdn.server.generation import Generation
from xgdn.server.logprobs import TokenReport
from xgdn.server.metrics import Metrics
from xgdn.server.prompt_reports import prompt_logprobs
from xgdn.server.reply import Reply
from xgdn.server.schemas import StreamOptions
from xgdn.server.sequence import Delta


class Answer:
    """The document, or the server-sent events, that answer a request in one of the wire formats.

    `reports_prompt`: the document has the log-probabilities of the prompt's tokens, in vLLM's form.
    """

    def __init__(
        self, generation: Generation, form: Format, model: str, metrics: Metrics, *, reports_prompt: bool = False
    ) -> None:
        self._reports_prompt = reports_prompt
        self._generation = generation
        self._form = form
        self._metrics = metrics
        self._head = {"id": f"{form.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._begun: set[int] = set()  # choices whose prompt has been echoed
        self._prompt_reports: dict[int, list[Any]] = {}  # by prompt
        self._replies = [Reply(form.syntax) for _ in range(generation.num_choices)]

    def document(self, whole: Sequence[Delta]) -> bytes:
        """Return the choices as a JSON document. Any thread may call it, since a long document takes a while."""
        choices = []
        for choice in whole:
            reply = self._replies[choice.index]
            delta = self._echoed(choice)
            content = self._form.choice([piece for piece, _ in reply.push(delta) if piece is not None])
            content |= self._prompt_logprobs(choice.index) if self._form.is_for_prompts else {}
            choices.append(self._choice(choice.index, content, delta.logprobs, reply.finish_reason))
        more = {} if self._form.is_for_prompts else self._prompt_logprobs(0)
        return to_json({**self._head, "object": self._form.name, "choices": choices, "usage": self._usage(), **more})

    async def events(self, options: StreamOptions) -> AsyncIterator[str]:
        """Yield the same as server-sent events; an error after the status has been sent is an event too."""
        has_usage = options.include_usage or options.continuous_usage_stats
        for content in self._form.first_deltas():
            for index in range(self._generation.num_choices):
                yield self._event([self._choice(index, content)], self._usage_so_far(options))
        try:
            async for piece in self._generation.deltas():
                if self._form.echoes and piece.index not in self._begun:  # a prompt may be long
                    delta = await asyncio.to_thread(self._echoed, piece)
                else:
                    delta = self._echoed(piece)
                for choice in self._chunks(delta):
                    yield self._event([choice], self._usage_so_far(options))
        except ApiError as error:
            self._metrics.errors.labels(error.code).inc()
            yield f"data: {json.dumps(error.body())}\n\n"
        else:
            if has_usage:
                yield self._event([], {"usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _prompt_logprobs(self, choice: int) -> dict[str, Any]:
        generation = self._generation
        if not self._reports_prompt:
            return {}
        index = generation.prompt_index(choice)
        if index not in self._prompt_reports:  # choices share their prompt's
            logprobs = generation.prompt_logprobs(choice)
            self._prompt_reports[index] = prompt_logprobs(generation.prompts[index], logprobs, generation.vocabulary)
        return {"prompt_logprobs": self._prompt_reports[index]}

    def _echoed(self, delta: Delta) -> Delta:
        """Put what is to be echoed in front of a choice's first piece; its text is part of that of the choice."""
        if not self._form.echoes:
            return delta
        generation = self._generation
        prompt = self._form.echoes[generation.prompt_index(delta.index)]
        reports = [replace(it, text_offset=len(prompt.text) + it.text_offset) for it in delta.logprobs]
        if delta.index in self._begun:
            return replace(delta, logprobs=reports)
        self._begun.add(delta.index)
        if generation.has_logprobs:
            reports = [*prompt.reports(generation.prompt_logprobs(delta.index)), *reports]
        return replace(delta, text=prompt.text + delta.text, logprobs=reports)

    def _usage_so_far(self, options: StreamOptions) -> dict[str, Any]:
        if options.continuous_usage_stats:
            return {"usage": self._usage()}
        return {"usage": None} if options.include_usage else {}

    def _chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Yield a choice per piece; the last has the reason of the end."""
        reply = self._replies[delta.index]
        parts = reply.push(delta)
        for i, (piece, reports) in enumerate(parts):
            reason = reply.finish_reason if i + 1 == len(parts) else None
            yield self._choice(delta.index, self._form.delta(piece), reports, reason)

    def _choice(
        self, index: int, content: dict[str, Any], reports: Sequence[TokenReport] = (), reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = self._form.logprobs(reports) if self._generation.has_logprobs else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage()
        if self._form.syntax.has_thought:
            ends = [reply.end_of_thought for reply in self._replies]
            usage["completion_tokens_details"] = {"reasoning_tokens": self._generation.num_tokens_before(ends)}
        return usage

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> str:
        document = {**self._head, "object": self._form.chunk_name, "choices": choices, **usage}
        return f"data: {json.dumps(document)}\n\n"
