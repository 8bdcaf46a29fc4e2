# SPDX-License-Identifier: Apache-2.0
"""Server-sent events over HTTP: comments while nothing comes, and an end that is noticed however it comes."""

import asyncio
from collections.abc import AsyncIterator, Callable

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

# The second is for nginx, which would otherwise hold events back until a buffer is full.
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_COMMENT: Message = {"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True}


class EventStream(StreamingResponse):
    """An event stream. `on_end` is called once it ends, however it does and whether or not a byte was sent."""

    def __init__(self, events: AsyncIterator[str], keep_alive_seconds: float, on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_HEADERS)
        self._keep_alive_seconds = keep_alive_seconds
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kept_alive = _KeptAlive(send, self._keep_alive_seconds)
        commenting = asyncio.create_task(kept_alive.comment()) if self._keep_alive_seconds else None
        try:
            await super().__call__(scope, receive, kept_alive)
        finally:
            self._on_end()
            if commenting is not None:
                commenting.cancel()
                await asyncio.gather(commenting, return_exceptions=True)  # a client that is gone cannot be told


class _KeptAlive:
    """Passes messages on, and sends a comment after `seconds` without any, between the first and the last."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self._is_open = False
        self._last_time = asyncio.get_running_loop().time()
        self._lock = asyncio.Lock()  # a send may wait for a slow client

    async def __call__(self, message: Message) -> None:
        async with self._lock:
            self._is_open = message["type"] == "http.response.start" or message.get("more_body", False)
            await self._send(message)
            self._last_time = asyncio.get_running_loop().time()

    async def comment(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(max(0.0, self._last_time + self._seconds - now()))
            async with self._lock:
                if now() - self._last_time >= self._seconds:
                    self._last_time = now()
                    if self._is_open:
                        await self._send(_COMMENT)
