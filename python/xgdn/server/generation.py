# SPDX-License-Identifier: Apache-2.0
"""All sequences of one HTTP request, on the engine's side."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from xgdn.engine import Logprobs, Request
from xgdn.server.api_error import ApiError
from xgdn.server.engine_client import EngineClient
from xgdn.server.metrics import Metrics
from xgdn.server.sequence import Delta, TextSequence
from xgdn.vocabulary import Vocabulary


class Generation:
    """The sequences of one HTTP request, queued by the constructor, which raises ApiError when they are refused.

    Choice i is answer i % n to prompt i // n; all requests have the same n. The text ends before a stop string.
    `before_end` is awaited before the end of an answer is told, with the tokens of its first choice and its prompt.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        stops: Sequence[str],
        vocabulary: Vocabulary,
        engine: EngineClient,
        metrics: Metrics,
        *,
        reports_stop_token: bool = False,
        before_end: Callable[[Sequence[int]], Awaitable[None]] | None = None,
    ) -> None:
        self.prompts = prompts = [request.prompt for request in requests]
        n = requests[0].n
        engine.check_room(len(prompts) * n)  # before any of them takes memory
        self.has_logprobs = requests[0].sampling.logprobs is not None
        self.vocabulary = vocabulary
        self._engine = engine
        self._before_end = before_end
        self._deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self._prompt_logprobs: list[list[Logprobs]] = [[] for _ in prompts]
        self._num_prompt_tokens = sum(map(len, prompts))
        self._sequences = [
            TextSequence(
                i,
                prompts[i // n],
                vocabulary,
                stops,
                metrics,
                self._deltas.put_nowait,
                self._prompt_logprobs[i // n],
                reports_stop_token=reports_stop_token,
            )
            for i in range(len(prompts) * n)
        ]
        self._ids = engine.submit(
            [(request, self._sequences[i * n : (i + 1) * n]) for i, request in enumerate(requests)]
        )
        self.queue_time = time.perf_counter()
        metrics.prompt_tokens.inc(self._num_prompt_tokens)

    @property
    def num_choices(self) -> int:
        return len(self._sequences)

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield pieces of all choices as they come; raises ApiError when a sequence fails."""
        num_left = self.num_choices
        while num_left > 0:
            delta = await self._deltas.get()
            if delta.finish_reason == "error":
                raise ApiError(500, delta.error_code, delta.error)
            num_left -= delta.finish_reason is not None
            if num_left == 0 and self._before_end is not None:
                await self._before_end([*self.prompts[0], *self._sequences[0].tokens])
            yield delta

    async def choices(self) -> list[Delta]:
        """Return every choice in one piece, once all are finished."""
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

    def prompt_index(self, choice: int) -> int:
        """Return which of the prompts a choice answers."""
        return choice // (self.num_choices // len(self.prompts))

    def prompt_logprobs(self, choice: int) -> Sequence[Logprobs]:
        """Return those of the tokens of its prompt but the first, once it has begun; empty if not asked for."""
        return self._prompt_logprobs[self.prompt_index(choice)]

    def hidden_states(self) -> list[list[float]]:
        """Return that of each prompt's last token, once all are finished."""
        return [sequence.hidden for sequence in self._sequences]

    def drop(self) -> None:
        """End what still runs; the next step frees what it held."""
        self._engine.drop(self._ids)

    def finish_reasons(self) -> list[str]:
        """Return those of the choices that have ended."""
        return [sequence.finish_reason for sequence in self._sequences if sequence.finish_reason is not None]

    def begin_time(self) -> float | None:
        """Return when the first sequence began, as `time.perf_counter` tells; None: all wait."""
        return min((s.begin_time for s in self._sequences if s.begin_time is not None), default=None)

    def first_token_time(self) -> float | None:
        return min((s.first_token_time for s in self._sequences if s.first_token_time is not None), default=None)

    def num_tokens_before(self, text_offsets: Sequence[float]) -> int:
        """Return the number of tokens, of all choices, that begin before a character of each choice's text."""
        return sum(
            sequence.num_tokens_before(offset) for sequence, offset in zip(self._sequences, text_offsets, strict=True)
        )

    def usage(self) -> dict[str, Any]:
        num_generated = sum(sequence.num_tokens for sequence in self._sequences)
        n = self.num_choices // len(self.prompts)  # choices share what was cached of their prompt
        num_cached = sum(
            max(sequence.num_cached for sequence in self._sequences[i * n : (i + 1) * n])
            for i in range(len(self.prompts))
        )
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": self._num_prompt_tokens + num_generated,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }
