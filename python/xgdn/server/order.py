# SPDX-License-Identifier: Apache-2.0
"""A checked request, ready for the engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from xgdn.engine import Request, SamplingParams
from xgdn.server.answer import Answer
from xgdn.server.api_error import bad_request
from xgdn.server.formats import Format
from xgdn.server.generation import Generation
from xgdn.server.grammar_compiler import CompiledGrammar
from xgdn.server.responses import ResponseAnswer
from xgdn.server.schemas import GenerationBody
from xgdn.server.sessions import Turn


@dataclass(frozen=True)
class Order:
    """What the engine is to do, and how its reply becomes an answer."""

    body: GenerationBody
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    sampling: SamplingParams
    form: Format
    grammar: CompiledGrammar | None
    is_default: bool  # max_tokens: the request has none
    respond: Callable[[Generation], Answer | ResponseAnswer]
    turn: Turn | None = None  # of the session that goes on with it

    def requests(self, eos_token_ids: Sequence[int]) -> list[Request]:
        """Return what the engine takes, for each prompt."""
        body = self.body
        eos = [] if body.ignore_eos else eos_token_ids
        return [
            Request(
                list(prompt),
                max_new_tokens=self.max_tokens,
                sampling=self.sampling,
                stop_token_ids=[*(body.stop_token_ids or []), *eos],
                ignore_eos=bool(body.ignore_eos),
                n=body.n or 1,
                prompt_logprobs=body.num_prompt_logprobs,
                grammar=self.grammar,
                is_rewindable=self.turn is not None,
            )
            for prompt in self.prompts
        ]

    def limited(self, max_tokens: int | None) -> "Order":
        """Return it with the limit of a key; raises ApiError where the request asks for more."""
        if max_tokens is None or self.max_tokens <= max_tokens:
            return self
        if not self.is_default:
            message = f"'max_tokens': expected at most {max_tokens} with this key, got {self.max_tokens}."
            raise bad_request(message, "max_tokens")
        return replace(self, max_tokens=max_tokens)
