# SPDX-License-Identifier: Apache-2.0
"""The log: a line for each request, with an id that the client knows too; as text or as JSON."""

import logging
import re
import uuid
from typing import Any
from urllib.parse import quote

from pythonjsonlogger.core import RESERVED_ATTRS
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xgdn.server.request_record import RequestRecord, request_id

_log = logging.getLogger("xgdn.server.access")
_POLLED = frozenset({"/", "/health", "/ready", "/metrics"})  # too often for a log, as is all below /stats
_ID = re.compile(r"[!-~]{1,128}")  # printable ASCII, which can do no harm in a log


class RequestLog:
    """Gives each request its id and its record, tells the client, and logs the request when it is answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_id_of(scope))
        scope.setdefault("state", {})["record"] = record
        request_id.set(record.id)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = record.id
                for name, value in record.client.headers().items() if record.client else ():
                    headers[name] = value
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        finally:
            if not _is_polled(scope["path"]):
                _write(scope, record)


class RequestIdFilter(logging.Filter):
    """Adds the id of the request that a line is about."""

    def filter(self, record: logging.LogRecord) -> bool:
        if (current := request_id.get()) is not None:
            record.request_id = current
        return True


def logging_config(log_format: str) -> dict[str, Any]:
    """Return the configuration of all loggers of the server and of uvicorn, for `logging.config`.

    All is written to stderr, as `text` or as `json`, one object a line.
    """
    formatters = {
        "text": {"()": "uvicorn.logging.DefaultFormatter", "fmt": "%(levelprefix)s %(message)s"},
        "json": {
            "()": "pythonjsonlogger.json.JsonFormatter",
            "fmt": ["levelname", "name", "message"],
            "rename_fields": {"levelname": "level", "name": "logger"},
            "timestamp": "time",
            "reserved_attrs": [*RESERVED_ATTRS, "color_message"],  # the second: uvicorn's message, with colours
        },
    }
    handler = {
        "class": "logging.StreamHandler",
        "stream": "ext://sys.stderr",
        "formatter": log_format,
        "filters": ["request_id"],
    }
    logger = {"handlers": ["stderr"], "level": "INFO", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request_id": {"()": RequestIdFilter}},
        "formatters": formatters,
        "handlers": {"stderr": handler},
        "loggers": {"uvicorn": logger, "xgdn.server": logger},
    }


def _id_of(scope: Scope) -> str:
    """Return the id that the client gave; a new one where there is none, or one that is not fit for a log."""
    given = Headers(scope=scope).get("X-Request-Id", "")
    return given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


def _is_polled(path: str) -> bool:
    return path in _POLLED or path == "/stats" or path.startswith("/stats/")


def _write(scope: Scope, record: RequestRecord) -> None:
    client = scope.get("client")
    fields = {
        "method": scope["method"],
        "path": quote(scope["path"]),  # without the query; control characters would forge lines
        "status": record.status,
        "seconds": round(record.seconds, 4),
        "client": f"{client[0]}:{client[1]}" if client else None,
        "key": record.client.name if record.client else None,
        "error": record.error,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "finish_reasons": record.finish_reasons or None,
    }
    known = {name: value for name, value in fields.items() if value is not None}
    told = {"request_id": record.id, **known}
    for name in ("method", "path", "status", "client"):
        told.pop(name, None)
    details = " ".join(
        f"{name}={','.join(value) if isinstance(value, list) else value}" for name, value in told.items()
    )
    message = '%s - "%s %s" %s %s'
    _log.info(message, fields["client"], fields["method"], fields["path"], record.status, details, extra=known)
