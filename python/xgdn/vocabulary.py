# SPDX-License-Identifier: Apache-2.0
"""The text of single tokens."""

import json
import re
from typing import Any

from tokenizers import Tokenizer


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()


class Vocabulary:
    """The text and the bytes of each token of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens: dict[int, str] = {i: token.content for i, token in added.items() if token.special}
        names = sorted(self.special_tokens.values(), key=len, reverse=True)  # one may be a prefix of another
        self.special_names = re.compile("|".join(map(re.escape, names))) if names else None
        steps = _steps(tokenizer)
        self._is_byte_level = [step["type"] for step in steps] == ["ByteLevel"]
        self._has_byte_fallback = any(step["type"] == "ByteFallback" for step in steps)

    def raw_bytes(self, token: int) -> bytes | None:
        """Return the bytes of a token that may be part of a character; None for one of whole characters or none."""
        word = self.tokenizer.id_to_token(token)
        if word is None or token in self.special_tokens:
            return None
        if self._is_byte_level:
            if all(character in _BYTES for character in word):
                return bytes(_BYTES[character] for character in word)
            return word.encode()
        if self._has_byte_fallback and (match := re.fullmatch(r"<0x([0-9A-F]{2})>", word)):
            return bytes.fromhex(match[1])
        return None

    def bytes(self, token: int) -> bytes | None:
        """Return the token's bytes in UTF-8; None for a token without text."""
        data = self.raw_bytes(token)
        if data is None and not self.is_invisible(token):
            return self.text_after(token, token).encode()  # a decoder may drop the space at the start of a text
        return data

    def name(self, token: int) -> str:
        """Return the token's text; `bytes:\\xe6\\x97` for bytes that are not whole characters."""
        data = self.bytes(token)
        if data is None:
            return self.tokenizer.id_to_token(token) or f"<{token}>"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def is_invisible(self, token: int) -> bool:
        """Return whether a token has no text: special tokens, and ids that the tokenizer does not know."""
        return token in self.special_tokens or self.tokenizer.id_to_token(token) is None

    def text_after(self, previous: int | None, token: int) -> str:
        """Return the text that a token of whole characters adds after `previous`; None at the start of the text."""
        if previous is None:
            return str(self.tokenizer.decode([token]))
        return str(self.tokenizer.decode([previous, token])[len(self.tokenizer.decode([previous])) :])


def _steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the steps of the tokenizer's decoder, in order."""
    if tokenizer.decoder is None:
        return []
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps
