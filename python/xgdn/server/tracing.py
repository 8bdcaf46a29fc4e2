# SPDX-License-Identifier: Apache-2.0
"""Traces by OpenTelemetry: a span for each request of /v1, by the semantic conventions for generative models.

Needs the packages of the extra `otel`.
"""

import os
import time
from typing import Any

from opentelemetry import propagate
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from xgdn.server.request_record import RequestRecord, record_of

# The last part of the attribute by the name of the request's parameter.
_REQUEST_ATTRIBUTES = {
    "model": "model",
    "choices": "choice.count",
    "max_tokens": "max_tokens",
    "stream": "stream",
    "stop": "stop_sequences",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
}
_SERVICE = "xgdn"


class Traced:
    """Makes a span of each request that generates; its parent is that of the client's `traceparent`."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        parent = propagate.extract(Headers(scope=scope))
        name = f"{scope['method']} {scope['path']}"
        with self._tracer.start_as_current_span(name, context=parent, kind=SpanKind.SERVER) as span:
            record = record_of(scope)
            try:
                await self._app(scope, receive, send)
            finally:
                if record.operation is not None:
                    span.update_name(f"{record.operation} {record.parameters['model']}")
                known = {key: value for key, value in _attributes(scope, record).items() if value is not None}
                span.set_attributes(known)
                times = {"queued": record.queue_time, "started": record.begin_time}
                for event, moment in (times | {"first_token": record.first_token_time}).items():
                    if moment is not None:
                        span.add_event(event, timestamp=_nanoseconds(moment))
                if record.status is None or record.status >= 500 or "error" in record.finish_reasons:
                    span.set_status(Status(StatusCode.ERROR))


def start_tracing(endpoint: str | None) -> TracerProvider:
    """Return what sends spans to a collector by OTLP over HTTP; its `shutdown` sends the rest.

    Args:
        endpoint: Address without `/v1/traces`; None: that of OpenTelemetry's environment variables.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    target = {} if endpoint is None else {"endpoint": f"{endpoint.rstrip('/')}/v1/traces"}
    return provider(OTLPSpanExporter(**target))


def provider(exporter: SpanExporter) -> TracerProvider:
    name = os.environ.get("OTEL_SERVICE_NAME") or _SERVICE
    made = TracerProvider(resource=Resource.create({"service.name": name}))
    made.add_span_processor(BatchSpanProcessor(exporter))
    return made


def _attributes(scope: Scope, record: RequestRecord) -> dict[str, Any]:
    request = {
        f"gen_ai.request.{attribute}": record.parameters.get(name) for name, attribute in _REQUEST_ATTRIBUTES.items()
    }
    is_generation = record.operation is not None
    return {
        "gen_ai.operation.name": record.operation,
        "gen_ai.provider.name": _SERVICE if is_generation else None,
        **request,
        "gen_ai.response.model": record.parameters.get("model"),
        "gen_ai.response.finish_reasons": record.finish_reasons or None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "error.type": record.error or ("engine_error" if "error" in record.finish_reasons else None),
        "http.request.method": scope["method"],
        "http.response.status_code": record.status,
        "url.path": scope["path"],
        "url.scheme": scope["scheme"],
        "xgdn.request_id": record.id,
    }


def _nanoseconds(moment: float) -> int:
    """Return a time of `time.perf_counter` since 1970."""
    return time.time_ns() - round((time.perf_counter() - moment) * 1e9)
