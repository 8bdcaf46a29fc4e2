# SPDX-License-Identifier: Apache-2.0
"""What is known of one HTTP request, gathered while it is answered, for its line in the log and its trace."""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from xgdn.server.api_keys import Client
from xgdn.server.generation import Generation

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)  # of the request that the code runs for


@dataclass
class RequestRecord:
    """Times are those of `time.perf_counter`; None and empty: not known, or not of this request."""

    id: str
    start_time: float = field(default_factory=time.perf_counter)
    client: Client | None = None
    status: int | None = None  # of HTTP, once the answer has begun
    error: str | None = None  # the code of the error that the client was told
    operation: str | None = None  # as OpenTelemetry names it: chat, text_completion
    parameters: dict[str, Any] = field(default_factory=dict)  # of the request that say how to generate
    prompt_tokens: int | None = None
    cached_tokens: int | None = None  # of the prompt
    completion_tokens: int | None = None
    finish_reasons: list[str] = field(default_factory=list)  # of the choices
    queue_time: float | None = None  # when the request was accepted by the queue
    begin_time: float | None = None  # when its prefill had begun
    first_token_time: float | None = None

    def close(self, generation: Generation) -> None:
        """Take over what its generation came to."""
        usage = generation.usage()
        self.prompt_tokens = usage["prompt_tokens"]
        self.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        self.completion_tokens = usage["completion_tokens"]
        self.finish_reasons = generation.finish_reasons()
        self.queue_time = generation.queue_time
        self.begin_time = generation.begin_time()
        self.first_token_time = generation.first_token_time()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start_time


def record_of(scope: Scope) -> RequestRecord:
    record: RequestRecord = scope["state"]["record"]
    return record
