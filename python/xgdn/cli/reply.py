# SPDX-License-Identifier: Apache-2.0
"""What `xgdn generate` has of one branch of a prompt."""

import time

from xgdn.detokenize import Detokenizer
from xgdn.engine import FinishReason, Logprobs, Request, RequestEvent
from xgdn.vocabulary import Vocabulary


class Reply:
    """The reply generated so far for one branch of a prompt: ids, and text where there is a tokenizer."""

    def __init__(self, index: int, branch: int, request: Request, vocabulary: Vocabulary | None) -> None:
        self.name = f"{index}.{branch}" if request.n > 1 else str(index)
        self.index = index
        self.branch = branch
        self.prompt = request.prompt
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs] | None = None if request.sampling.logprobs is None else []
        self.text = ""
        self._detokenizer = None if vocabulary is None else Detokenizer(vocabulary, self.prompt)
        self._begin = time.perf_counter()
        self._token_times: list[float] = []

    def apply(self, event: RequestEvent) -> str:
        """Book an event and return what it adds to the output."""
        piece = ""
        for token in event.tokens:
            self._token_times.append(time.perf_counter())
            self.tokens.append(token)
            if self._detokenizer is None:
                piece += f" {token}" if self.text or piece else str(token)
            else:
                piece += self._detokenizer.push(token)
        if self.logprobs is not None:
            self.logprobs += event.logprobs
        if event.finish_reason != FinishReason.RUNNING and self._detokenizer is not None:
            piece += self._detokenizer.finish()
        self.text += piece
        return piece

    def document(self, event: RequestEvent) -> dict[str, object]:
        """The reply as a JSON object, with the event that ended it."""
        times = self._token_times
        return {
            "index": self.index,
            "branch": self.branch,
            "prompt_ids": self.prompt,
            "ids": self.tokens,
            "logprobs": None if self.logprobs is None else [_logprobs_document(it) for it in self.logprobs],
            "text": None if self._detokenizer is None else self.text,
            "finish_reason": event.finish_reason.name.lower(),
            "error": event.error or None,
            "seconds_to_first_token": times[0] - self._begin if times else None,
            "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
        }


def _logprobs_document(logprobs: Logprobs) -> dict[str, object]:
    top = [{"id": token.token, "logprob": token.logprob} for token in logprobs.top]
    return {"logprob": logprobs.chosen, "top": top}
