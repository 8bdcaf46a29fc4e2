# SPDX-License-Identifier: Apache-2.0
"""Where a request belongs, told by its body without a tokenizer."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_BLOCK = 256  # characters: about the 64 tokens at whose multiples a replica caches states
_RESPONSES = "/v1/responses"
_BEFORE_MESSAGES = ("model", "tools", "instructions", "chat_template_kwargs")  # what prompts of one application share


@dataclass(frozen=True)
class Route:
    keys: tuple[int, ...] = ()  # hashes of ever longer beginnings of the prompt
    replica: str | None = None  # the one that holds a stored response which the request names


def route_of(path: str, body: bytes, replica_of: Callable[[str], str | None]) -> Route:
    """Return the route of a request. One that cannot be read belongs anywhere: its replica says what is wrong with it.

    Args:
        path: of the URL.
        body: of the request.
        replica_of: the replica that stored a response, by the response's id; None where nobody knows.
    """
    if path.startswith(f"{_RESPONSES}/"):
        return Route(replica=replica_of(path.removeprefix(f"{_RESPONSES}/")))
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return Route()
    if not isinstance(document, dict):
        return Route()
    previous = document.get("previous_response_id") if path == _RESPONSES else None
    return Route(_keys(document), replica_of(previous) if isinstance(previous, str) else None)


def _keys(document: Mapping[str, Any]) -> tuple[int, ...]:
    """Hash the prompt block by block, each time with all that comes before.

    What precedes a conversation, tools and system messages, has no key of its own, else all conversations of an
    application would belong together.
    """
    head, parts = _parts(document)
    chain = hashlib.blake2b(head.encode(errors="surrogatepass"), digest_size=8)
    keys = []
    for part in parts:
        for begin in range(0, len(part), _BLOCK):
            chain.update(part[begin : begin + _BLOCK].encode(errors="surrogatepass"))
            keys.append(int.from_bytes(chain.digest(), "little"))
    return tuple(keys)


def _parts(document: Mapping[str, Any]) -> tuple[str, Iterable[str]]:
    """Return what precedes the conversation, and its messages, or the one text of a completion."""
    head = [document.get(name) for name in _BEFORE_MESSAGES]
    prompt = next((document[name] for name in ("messages", "input", "prompt") if document.get(name)), "")
    if isinstance(prompt, list) and isinstance(prompt[0], dict):
        while prompt and isinstance(prompt[0], dict) and prompt[0].get("role") in ("system", "developer"):
            head.append(prompt[0])
            prompt = prompt[1:]
        return _text(head), map(_text, prompt)
    if isinstance(prompt, list) and isinstance(prompt[0], (str, list)):  # several prompts
        prompt = prompt[0]
    text = prompt if isinstance(prompt, str) else _text(prompt).rstrip("]")  # token ids, which more may follow
    return _text(head), [text] if text else []


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
