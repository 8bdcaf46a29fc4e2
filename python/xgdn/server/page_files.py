# SPDX-License-Identifier: Apache-2.0
"""The files of the page: `index.html` at `/`, the others below `/page`."""

from typing import Any

from fastapi import Request, Response
from fastapi.staticfiles import StaticFiles

_HEADERS = {
    # The page loads its own files and asks its own server, nothing else.
    "Content-Security-Policy": (
        "default-src 'none'; connect-src 'self'; img-src 'self'; script-src 'self'; style-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept by the browser, but asked for again by its ETag
}


class PageFiles(StaticFiles):
    def __init__(self) -> None:
        super().__init__(packages=[("xgdn.server", "page")])

    async def index(self, request: Request) -> Response:
        return await self.get_response("index.html", request.scope)

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(_HEADERS)
        return response
