# SPDX-License-Identifier: Apache-2.0
"""One sequence: from the engine's events to the pieces of text that a client reads."""

import math
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xgdn.detokenize import Detokenizer
from xgdn.engine import FinishReason, Logprobs, RequestEvent
from xgdn.server.logprobs import LogprobQueue, TokenReport
from xgdn.server.metrics import Metrics
from xgdn.server.stop_strings import StopStrings
from xgdn.vocabulary import Vocabulary


@dataclass(frozen=True)
class Delta:
    """The next piece of one choice of an answer."""

    index: int
    text: str
    logprobs: Sequence[TokenReport] = ()  # of tokens that begin in the text so far, if requested
    finish_reason: str | None = None  # stop, length or error
    error: str = ""
    error_code: str = "engine_error"


class TextSequence:
    """A sequence in the event loop's thread.

    `give` is called with every piece of text, and once with the end; `prompt_logprobs` gets what events have of them.
    """

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        vocabulary: Vocabulary,
        stops: Sequence[str],
        metrics: Metrics,
        give: Callable[[Delta], None],
        prompt_logprobs: list[Logprobs],
        *,
        reports_stop_token: bool = False,
    ) -> None:
        self.num_prompt_tokens = len(prompt)
        self.tokens = array("i")  # generated and counted
        self.num_cached = 0  # prompt tokens that were not computed again
        self.begin_time: float | None = None  # of time.perf_counter; None: it waits in the queue
        self.is_finished = False
        self.finish_reason: str | None = None  # stop, length, cancelled or error
        self.first_token_time: float | None = None  # of time.perf_counter
        self.hidden: list[float] = []  # of the prompt's last token, if the request asks for it
        self._prompt_logprobs = prompt_logprobs  # of the choices that share the prompt
        self._reports_stop_token = reports_stop_token
        self._index = index
        self._vocabulary = vocabulary
        self._detokenizer = Detokenizer(vocabulary, prompt)
        self._stop_strings = StopStrings(stops, vocabulary.special_names)
        self._logprobs = LogprobQueue(vocabulary)
        self._num_decoded = 0  # characters
        self._offsets = array("q")  # the character at which each counted token begins
        self._num_given = 0
        self._metrics = metrics
        self._give = give
        self._last_time = time.perf_counter()

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def has_begun(self) -> bool:
        return self.begin_time is not None

    def apply(self, event: RequestEvent, now: float) -> None:
        """Process the event of a step; nothing once the sequence is finished."""
        if self.is_finished:
            return
        self.num_cached = event.num_cached
        self.hidden = event.hidden or self.hidden
        self._prompt_logprobs += event.prompt_logprobs
        if event.finish_reason == FinishReason.ERROR:
            self.fail(event.error, "numerics_error" if event.is_spoilt else "engine_error")
            return
        text = ""
        for i, token in enumerate(event.tokens):
            if self._stop_strings.is_found:
                break
            self._count_token(token, now)
            is_stop = event.finish_reason == FinishReason.STOP and i + 1 == len(event.tokens)
            if event.logprobs and (not is_stop or self._reports_stop_token):
                self._logprobs.push(token, event.logprobs[i], self._num_decoded)
            # A token that ends the sequence has no text, but it may complete a stop string that contains its name.
            if not is_stop or self._watched_name(token) is not None:
                text += self._text_of(token)
        if event.finish_reason != FinishReason.RUNNING and not self._stop_strings.is_found:
            text += self._settle(self._detokenizer.finish())
            if not self._stop_strings.is_found:
                text += self._stop_strings.finish()
        if self._stop_strings.is_found:
            self._finish("stop", text)
        elif event.finish_reason != FinishReason.RUNNING:
            self._finish(event.finish_reason.name.lower(), text)
        elif text:
            self._give_text(text)

    def fail(self, message: str, code: str = "engine_error") -> None:
        """End with an error."""
        self._finish("error", "", message, code)

    def drop(self) -> None:
        """End for a client that has disconnected."""
        self._finish("cancelled", "")

    def num_tokens_before(self, text_offset: float) -> int:
        """Return the number of tokens that begin before a character of the text."""
        return bisect_left(self._offsets, text_offset)

    def _watched_name(self, token: int) -> str | None:
        name = self._vocabulary.special_tokens.get(token)
        return name if name is not None and self._stop_strings.watches(name) else None

    def _text_of(self, token: int) -> str:
        name = self._watched_name(token)
        if name is None:
            return self._settle(self._detokenizer.push(token))
        text = self._settle(self._detokenizer.finish())  # nothing after the token completes a character before it
        return text if self._stop_strings.is_found else text + self._stop_strings.push_special(name)

    def _settle(self, piece: str) -> str:
        self._num_decoded += len(piece)
        return self._stop_strings.push(piece)

    def _count_token(self, token: int, now: float) -> None:
        histogram = self._metrics.inter_token_time if self.num_tokens else self._metrics.time_to_first_token
        histogram.observe(now - self._last_time)
        self._last_time = now
        self.first_token_time = self.first_token_time or now
        self.tokens.append(token)
        self._offsets.append(self._num_decoded)
        self._metrics.generated_tokens.inc()

    def _finish(self, reason: str, text: str, error: str = "", error_code: str = "engine_error") -> None:
        self.is_finished = True
        self.finish_reason = reason
        self._metrics.finished.labels(reason).inc()
        self._give_text(text, reason, error, error_code)

    def _give_text(
        self, text: str, reason: str | None = None, error: str = "", error_code: str = "engine_error"
    ) -> None:
        self._num_given += len(text)
        # Without a stop string nothing is cut, so a token without text at the very end is reported too.
        is_uncut_end = reason is not None and not self._stop_strings.is_found
        reports = self._logprobs.pop_before(math.inf if is_uncut_end else self._num_given)
        self._give(Delta(self._index, text, reports, reason, error, error_code))
