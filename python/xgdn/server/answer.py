# SPDX-License-Identifier: Apache-2.0
"""What an HTTP request is answered with: a JSON document or a stream of events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic_core import to_json

from xgdn.server.api_error import ApiError
from xgdn.server.formats import Format
from xgdn.server.generation import Generation
from xgdn.server.metrics import Metrics
from xgdn.server.schemas import StreamOptions
from xgdn.server.sequence import Delta


class Answer:
    """The document, or the server-sent events, that answer a request in one of the wire formats."""

    def __init__(self, generation: Generation, form: Format, model: str, metrics: Metrics) -> None:
        self._generation = generation
        self._form = form
        self._metrics = metrics
        self._head = {"id": f"{form.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def document(self, whole: Sequence[Delta]) -> bytes:
        """Return the choices as a JSON document. Any thread may call it, since a long document takes a while."""
        choices = [self._choice(choice, self._form.choice(choice.text)) for choice in whole]
        document = {**self._head, "object": self._form.name, "choices": choices, "usage": self._generation.usage()}
        return to_json(document)

    async def events(self, options: StreamOptions) -> AsyncIterator[str]:
        """Yield the same as server-sent events; an error after the status has been sent is an event too."""
        has_usage = options.include_usage or options.continuous_usage_stats
        for content in self._form.first_deltas():
            for index in range(self._generation.num_choices):
                yield self._event([self._choice(Delta(index, ""), content)], self._usage_so_far(options))
        try:
            async for delta in self._generation.deltas():
                yield self._event([self._choice(delta, self._form.delta(delta.text))], self._usage_so_far(options))
        except ApiError as error:
            self._metrics.errors.labels(error.code).inc()
            yield f"data: {json.dumps(error.body())}\n\n"
        else:
            if has_usage:
                yield self._event([], {"usage": self._generation.usage()})
        yield "data: [DONE]\n\n"

    def _usage_so_far(self, options: StreamOptions) -> dict[str, Any]:
        if options.continuous_usage_stats:
            return {"usage": self._generation.usage()}
        return {"usage": None} if options.include_usage else {}

    def _choice(self, delta: Delta, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = self._form.logprobs(delta.logprobs) if self._generation.has_logprobs else None
        return {"index": delta.index, **content, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> str:
        document = {**self._head, "object": self._form.chunk_name, "choices": choices, **usage}
        return f"data: {json.dumps(document)}\n\n"
