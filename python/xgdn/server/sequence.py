# SPDX-License-Identifier: Apache-2.0
"""One sequence: from the engine's events to the pieces of text that a client reads."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from xgdn.detokenize import Detokenizer
from xgdn.engine import FinishReason, Request, RequestEvent
from xgdn.server.metrics import Metrics
from xgdn.server.stop_strings import StopStrings

_CONTEXT_TOKENS = 64  # of the prompt, for the decoder; a whole long one would hold up the event loop


@dataclass(frozen=True)
class Delta:
    """What is new of one choice of an answer."""

    index: int
    text: str
    finish_reason: str | None = None  # stop, length or error
    error: str = ""


class TextSequence:
    """Lives in the event loop's thread. `give` is called with every piece of text and with the end, once."""

    def __init__(
        self,
        index: int,
        request: Request,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        metrics: Metrics,
        give: Callable[[Delta], None],
    ) -> None:
        self.request = request
        self.num_tokens = 0
        self.has_begun = False
        self.is_finished = False
        self._index = index
        self._detokenizer = Detokenizer(tokenizer, request.prompt[-_CONTEXT_TOKENS:])
        self._stop_strings = StopStrings(stops)
        self._metrics = metrics
        self._give = give
        self._last_time = time.perf_counter()

    def apply(self, event: RequestEvent, now: float) -> None:
        """Book what a step did for it; nothing once it is finished."""
        self.has_begun = True
        if self.is_finished:
            return
        if event.finish_reason == FinishReason.ERROR:
            self.fail(event.error)
            return
        text = ""
        if event.token is not None:
            self._count_token(now)
            if event.finish_reason != FinishReason.STOP:  # a stop token is no text
                text = self._stop_strings.push(self._detokenizer.push(event.token))
        if event.finish_reason != FinishReason.RUNNING and not self._stop_strings.is_found:
            text += self._stop_strings.push(self._detokenizer.finish())
            if not self._stop_strings.is_found:
                text += self._stop_strings.finish()
        if self._stop_strings.is_found:
            self._finish("stop", text)
        elif event.finish_reason != FinishReason.RUNNING:
            self._finish(event.finish_reason.name.lower(), text)
        elif text:
            self._give(Delta(self._index, text))

    def fail(self, message: str) -> None:
        """End with an error."""
        self._finish("error", "", message)

    def drop(self) -> None:
        """End for a client that is gone."""
        self._finish("cancelled", "")

    def _count_token(self, now: float) -> None:
        histogram = self._metrics.inter_token_time if self.num_tokens else self._metrics.time_to_first_token
        histogram.observe(now - self._last_time)
        self._last_time = now
        self.num_tokens += 1
        self._metrics.generated_tokens.inc()

    def _finish(self, reason: str, text: str, error: str = "") -> None:
        self.is_finished = True
        self._metrics.finished.labels(reason).inc()
        self._give(Delta(self._index, text, reason, error))
