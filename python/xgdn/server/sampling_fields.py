# SPDX-License-Identifier: Apache-2.0
"""The fields of a request that say how tokens are chosen."""

import re
import secrets
from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, Field

from xgdn.engine import SamplingParams
from xgdn.sampling_defaults import SamplingDefaults, first_given
from xgdn.server.api_error import bad_request

_MAX = 2**31 - 1
_UINT64 = 2**64
_LEAST_REPETITION_PENALTY = 0.01
_TOKEN_ID = re.compile("[0-9]{1,10}")

_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
_Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
_BadWord = Annotated[str, Field(min_length=1, max_length=4096)]


def _check_ids(biases: object) -> object:
    """JSON has no integers as keys."""
    if isinstance(biases, dict):
        for key in biases:
            if not _TOKEN_ID.fullmatch(key):
                raise ValueError(f"expected token ids as keys, got {key!r}")
    return biases


class SamplingFields(BaseModel):
    """OpenAI's, and with `top_k`, `min_p`, `repetition_penalty`, `min_tokens` and `bad_words` those of vLLM."""

    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=_MAX)  # -1 and 0: all tokens
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    # Divided by less than that, a logit might become infinite.
    repetition_penalty: float | None = Field(None, ge=_LEAST_REPETITION_PENALTY, le=10, allow_inf_nan=False)
    min_tokens: int | None = Field(None, ge=0, le=_MAX)
    logit_bias: Annotated[dict[str, _Bias], Field(max_length=4096), BeforeValidator(_check_ids)] | None = None
    bad_words: Annotated[list[_BadWord], Field(max_length=128, fail_fast=True)] | None = None

    def sampling_params(
        self,
        defaults: SamplingDefaults,
        encode: Callable[[Sequence[str]], list[list[int]]],
        *,
        vocab_size: int,
        max_tokens: int,
        logprobs: int | None,
    ) -> SamplingParams:
        """Return what the engine takes, with a random seed where there is none; `encode` is for the bad words.

        Raises ApiError.
        """
        biases = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        if biases and max(biases) >= vocab_size:
            message = f"'logit_bias': expected token ids below {vocab_size}, got {max(biases)}."
            raise bad_request(message, "logit_bias")
        min_tokens = self.min_tokens or 0
        if min_tokens > max_tokens:
            message = f"'min_tokens': expected at most {max_tokens}, which is max_tokens, got {min_tokens}."
            raise bad_request(message, "min_tokens")
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return SamplingParams(
            temperature=first_given(self.temperature, defaults.temperature, 1.0),
            top_k=max(first_given(self.top_k, defaults.top_k, 0), 0),
            top_p=first_given(self.top_p, defaults.top_p, 1.0),
            min_p=first_given(self.min_p, defaults.min_p, 0.0),
            seed=seed % _UINT64,
            logprobs=logprobs,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=first_given(self.repetition_penalty, defaults.repetition_penalty, 1.0),
            min_tokens=min_tokens,
            logit_bias=biases,
            bad_words=_spellings(self.bad_words or [], encode),
        )


def _spellings(words: Sequence[str], encode: Callable[[Sequence[str]], list[list[int]]]) -> list[list[int]]:
    """Return the tokens of each word, at the beginning of a text and behind a space."""
    if not words:
        return []
    found = encode([*words, *(f" {word.lstrip()}" for word in words)])
    return [list(tokens) for tokens in dict.fromkeys(tuple(tokens) for tokens in found if tokens)]
