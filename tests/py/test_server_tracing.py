# SPDX-License-Identifier: Apache-2.0
"""Traces of `xgdn serve`, as OpenTelemetry's SDK gets them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from typer.testing import CliRunner

from live_server import (
    CHECKPOINT,
    GOOD,
    IGNORE_EOS,
    KEY,
    SteppedEngine,
    http_get,
    http_post,
    live_stepped,
    post,
    wait_until,
)
from xgdn.cli import app as cli_app
from xgdn.server import tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Traces:
    def __init__(
        self, provider: TracerProvider, exporter: InMemorySpanExporter, engine: SteppedEngine, url: str
    ) -> None:
        self.engine = engine
        self.url = url
        self._provider = provider
        self._exporter = exporter

    def spans(self, count: int) -> list[ReadableSpan]:
        """All since the last call, once there are as many."""
        found: list[ReadableSpan] = []

        def has_all() -> bool:
            self._provider.force_flush()
            found.extend(self._exporter.get_finished_spans())
            self._exporter.clear()
            return len(found) >= count

        wait_until(has_all)
        assert len(found) == count
        return found


@pytest.fixture(scope="module")
def traces() -> Iterator[Traces]:
    exporter = InMemorySpanExporter()
    provider = tracing.provider(exporter)
    with live_stepped(tracer=provider.get_tracer("xgdn")) as (engine, url):
        engine.open()
        yield Traces(provider, exporter, engine, url)
    provider.shutdown()


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_request_is_a_span_with_the_conventions_attributes(traces: Traces, is_stream: bool) -> None:
    parameters = {"max_tokens": 4, "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "stop": ["never"]}
    headers = {"Authorization": f"Bearer {KEY}", "traceparent": f"00-{TRACE}-{PARENT}-01"}
    body = GOOD | IGNORE_EOS | parameters | {"prompt": [1, 2, 3], "stream": is_stream}
    answer = http_post(f"{traces.url}/v1/completions", json=body, headers=headers, timeout=60)
    (span,) = traces.spans(1)
    assert (span.name, span.kind) == ("text_completion tiny", SpanKind.SERVER)
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "xgdn",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.stream": is_stream,
        "gen_ai.request.stop_sequences": ("never",),
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 3,
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 8,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "url.scheme": "http",
        "xgdn.request_id": answer.headers["X-Request-Id"],
    }
    assert [event.name for event in span.events] == ["queued", "started", "first_token"]
    times = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
    slack = 5_000_000  # the events' clock is another one, which is read at the end
    assert all(b is not None and a is not None and b - a >= -slack for a, b in pairwise(times))
    assert span.resource.attributes["service.name"] == "xgdn"
    assert span.status.status_code == StatusCode.UNSET


def test_failures_are_in_the_trace(traces: Traces) -> None:
    assert post(traces.url, b"{").status_code == 400
    assert post(traces.url, GOOD, key="wrong").status_code == 401
    traces.engine.close()
    traces.engine.failures = 1
    traces.engine.open()
    assert post(traces.url, GOOD).status_code == 500
    assert http_get(f"{traces.url}/v1/models").status_code == 401
    assert http_get(f"{traces.url}/health").status_code == 200
    spans = traces.spans(3)

    def seen(span: ReadableSpan) -> tuple[Any, ...]:
        attributes = span.attributes or {}
        code = attributes["http.response.status_code"]
        return span.name, attributes["error.type"], code, span.status.status_code

    assert [seen(span) for span in spans] == [
        ("POST /v1/completions", "invalid_json", 400, StatusCode.UNSET),
        ("POST /v1/completions", "invalid_api_key", 401, StatusCode.UNSET),
        ("text_completion tiny", "engine_error", 500, StatusCode.ERROR),
    ]
    assert spans[0].parent is None


@pytest.mark.parametrize("source", ["option", "variable"])
def test_a_missing_package_is_said(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    options = ["--otlp-endpoint", "http://127.0.0.1:4318"] if source == "option" else []
    if source == "variable":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    result = CliRunner().invoke(cli_app, ["serve", str(CHECKPOINT), *options])
    assert result.exit_code == 1
    assert "traces need opentelemetry.exporter" in result.stderr
    assert "pip install 'xgdn[otel]'" in result.stderr
    assert result.stderr.count("\n") == 1
