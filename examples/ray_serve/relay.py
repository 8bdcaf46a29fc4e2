# SPDX-License-Identifier: Apache-2.0
"""Sends a replica's answer on to the client, and what the client gets when the replica dies."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from typing import Any

from xgdn.server.api_error import ApiError

Message = MutableMapping[str, Any]  # of ASGI

_MAX_ATTEMPTS = 3
_FIRST_DELTA = {"role": "assistant", "content": ""}  # of a chat, before there is a token
_FIRST_EVENTS = (b"event: response.created\n", b"event: response.in_progress\n")


class ReplicaLost(Exception):
    """A replica died, or cannot be reached, before its answer was complete."""


async def relay(ask: Callable[[], AsyncGenerator[Message, None]], send: Callable[[Message], Awaitable[None]]) -> None:
    """Send an answer on; ask again when a replica is lost before any part of its answer was sent.

    A stream that had begun ends with an error in its own format.

    Raises:
        ApiError: nothing was sent, and every replica that was asked is lost.
    """
    for _ in range(_MAX_ATTEMPTS):
        answer = _Answer(send)
        try:
            async with aclosing(ask()) as messages:
                async for message in messages:
                    await answer.pass_on(message)
            return
        except ReplicaLost:
            if answer.has_begun:
                await answer.break_off(_lost("The replica that wrote this answer died."))
                return
    raise _lost(f"{_MAX_ATTEMPTS} replicas that took this request died, one after the other.")


def _lost(message: str) -> ApiError:
    return ApiError(503, "replica_lost", message, headers={"Retry-After": "1"})


class _Answer:
    """An answer, held back until a part of it must be sent: a document until it is whole, a stream until its first
    token, or the first comment that keeps it alive.
    """

    def __init__(self, send: Callable[[Message], Awaitable[None]]) -> None:
        self.has_begun = False
        self._send = send
        self._held: list[Message] = []
        self._is_stream = False
        self._created: bytes | None = None  # first event of /v1/responses
        self._num_events = 0

    async def pass_on(self, message: Message) -> None:
        self._held.append(message)
        if message["type"] == "http.response.start":
            self._is_stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
            return
        body = message.get("body", b"")
        if self._is_stream and body.startswith(b"event: "):
            self._created = self._created or body
            self._num_events += 1
        is_last = not message.get("more_body", False)
        self.has_begun = self.has_begun or is_last or (self._is_stream and _has_answer(body))
        if self.has_begun:
            held, self._held = self._held, []
            for it in held:
                await self._send(it)

    async def break_off(self, error: ApiError) -> None:
        """Send the end of a stream whose rest is lost, as `xgdn serve` ends one that fails."""
        if self._created is None:
            end = f"data: {json.dumps(error.body())}\n\ndata: [DONE]\n\n"
        else:
            response = json.loads(self._created.partition(b"data: ")[2])["response"]
            response |= {"status": "failed", "error": {"code": "server_error", "message": error.message}}
            document = {"type": "response.failed", "sequence_number": self._num_events, "response": response}
            end = f"event: response.failed\ndata: {json.dumps(document)}\n\n"
        await self._send({"type": "http.response.body", "body": end.encode(), "more_body": False})


def _has_answer(event: bytes) -> bool:
    """Return whether a client must see an event now: all but those that come before there is a token."""
    if event.startswith(_FIRST_EVENTS):
        return False
    if not event.startswith(b"data: {"):
        return True
    choices = json.loads(event.removeprefix(b"data: ")).get("choices")
    return not choices or any(choice.get("delta") != _FIRST_DELTA for choice in choices)
