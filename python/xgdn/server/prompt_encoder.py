# SPDX-License-Identifier: Apache-2.0
"""Tokenizing of prompts, at a cost bounded by the context length."""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer

_CHARACTERS_PER_TOKEN = 8  # more than real texts have, so that a prefix of this length tells which texts are too long
_NFC_SHRINKAGE = 3  # how many bytes of UTF-8 NFC may turn into one: U+0390 and its letters


class TooManyTokens(Exception):
    """A text has at least `count` tokens, which is more than the context length."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


class PromptEncoder:
    """Encodes without holding Python's lock, so that other threads continue. Any thread may call it.

    A text that cannot fit is refused before it is tokenized as a whole: by the bytes that a token can hold, where the
    tokenizer loses none, and by the tokens of a prefix.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._max_bytes_per_token = _max_bytes_per_token(tokenizer)

    def encode(self, texts: Sequence[str], max_tokens: int, *, add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of each text.

        Raises:
            TooManyTokens: a text has more than `max_tokens`.
        """
        for text in texts:
            if (least := self._least_tokens(text, max_tokens)) > max_tokens:
                raise TooManyTokens(least)
        # Unlike `encode`, the batch call releases Python's lock, and the fast one computes no offsets.
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        for encoding in encodings:
            if len(encoding) > max_tokens:
                raise TooManyTokens(len(encoding))
        return [encoding.ids for encoding in encodings]

    def _least_tokens(self, text: str, max_tokens: int) -> int:
        """Return a lower bound of the number of tokens; 0 where the text may fit by its length alone."""
        num_characters = _CHARACTERS_PER_TOKEN * max_tokens
        if len(text) <= num_characters:
            return 0
        if self._max_bytes_per_token is not None:
            least = len(text.encode()) // self._max_bytes_per_token
            if least > max_tokens:
                return least
        (prefix,) = self._tokenizer.encode_batch([text[:num_characters]], add_special_tokens=False)
        # Words are split from left to right, so what follows can change only the last ones.
        words = prefix.word_ids
        last = words[-1] if words else None
        return 0 if last is None else sum(word is not None and word < last - 1 for word in words)


def _max_bytes_per_token(tokenizer: Tokenizer) -> int | None:
    """Return the maximum number of bytes that one token stands for; None where there is no known maximum."""
    state = json.loads(tokenizer.to_str())
    components = {name: state[name] or {"type": None} for name in ("normalizer", "pre_tokenizer", "decoder")}
    is_byte_level = components["decoder"]["type"] == "ByteLevel" and state["model"]["type"] == "BPE"
    added = state["added_tokens"]
    strips = any(token["lstrip"] or token["rstrip"] for token in added)
    removes = '"Removed"' in json.dumps(components["pre_tokenizer"])
    if not is_byte_level or components["normalizer"]["type"] not in (None, "NFC") or strips or removes:
        return None
    # A character of a byte-level word is one byte; that of an added token is not.
    longest = max(map(len, state["model"]["vocab"]), default=1)
    longest_added = max((len(token["content"].encode()) for token in added), default=1)
    return max(longest, longest_added) * (1 if components["normalizer"]["type"] is None else _NFC_SHRINKAGE)
