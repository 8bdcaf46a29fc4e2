# SPDX-License-Identifier: Apache-2.0
"""What an answer says of its prompt: the text in front of the reply, and the log-probabilities of its tokens."""

from collections.abc import Sequence
from typing import Any

from xgdn.detokenize import Detokenizer
from xgdn.engine import Logprobs
from xgdn.server.logprobs import NamedLogprob, TokenReport, named
from xgdn.vocabulary import Vocabulary


class EchoedPrompt:
    """A prompt in front of the text of its answers. Special tokens have their names as text."""

    def __init__(self, ids: Sequence[int], text: str | None, vocabulary: Vocabulary) -> None:
        self._ids = ids
        self._vocabulary = vocabulary
        self._offsets: list[int] = []  # the character at which each token begins
        self._reports: list[TokenReport] = []  # once they are known
        decoded = self._decode()
        self.text = decoded if text is None else text

    def reports(self, logprobs: Sequence[Logprobs]) -> list[TokenReport]:
        """Return one for every token of the prompt; the first has no log-probability, `logprobs` has the others.

        They are made once, for all the choices that answer the prompt.
        """
        if self._reports:
            return self._reports
        first = NamedLogprob(self._vocabulary.name(self._ids[0]), None, None)
        self._reports = [
            TokenReport(first, [], 0),
            *(
                TokenReport(
                    named(self._vocabulary, token, report.chosen),
                    [named(self._vocabulary, it.token, it.logprob) for it in report.top],
                    offset,
                )
                for token, report, offset in zip(self._ids[1:], logprobs, self._offsets[1:], strict=True)
            ),
        ]
        return self._reports

    def _decode(self) -> str:
        pieces: list[str] = []
        size = 0
        detokenizer = Detokenizer(self._vocabulary, [])
        for token in self._ids:
            self._offsets.append(size)
            name = self._vocabulary.special_tokens.get(token)
            piece = detokenizer.push(token) if name is None else detokenizer.finish() + name
            pieces.append(piece)
            size += len(piece)
        return "".join([*pieces, detokenizer.finish()])


def prompt_logprobs(ids: Sequence[int], logprobs: Sequence[Logprobs], vocabulary: Vocabulary) -> list[Any]:
    """Return vLLM's form of them: null for the first token, and for each other one its likeliest rivals and itself."""
    return [None, *(_by_id(token, report, vocabulary) for token, report in zip(ids[1:], logprobs, strict=True))]


def _by_id(token: int, report: Logprobs, vocabulary: Vocabulary) -> dict[str, Any]:
    """`rank` is null where the token is not among the likeliest."""
    entries: dict[int, tuple[float, int | None]] = {}
    for rank, it in enumerate(report.top, start=1):
        entries[it.token] = (it.logprob, rank)
    entries.setdefault(token, (report.chosen, None))
    return {
        str(it): {"logprob": named(vocabulary, it, value).logprob, "rank": rank, "decoded_token": vocabulary.name(it)}
        for it, (value, rank) in entries.items()
    }
