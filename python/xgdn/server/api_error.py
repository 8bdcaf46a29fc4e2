# SPDX-License-Identifier: Apache-2.0
"""Errors that a client gets, in OpenAI's format."""

from collections.abc import Mapping

_MAX_LENGTH = 1000  # maximum length of a message, which may repeat what a client sent


class ApiError(Exception):
    """An answer with an error status; `code` is one of a small fixed set, for programs and for /metrics."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        if len(message) > _MAX_LENGTH:
            message = message[:_MAX_LENGTH] + "..."
        self.status = status
        self.code = code
        self.message = message
        self.param = None if param is None else param[:_MAX_LENGTH]
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        kind = "invalid_request_error" if self.status < 429 else "rate_limit_error"
        if self.status >= 500:
            kind = "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, code, message, param=param)
