# SPDX-License-Identifier: Apache-2.0
"""The way in: reads a request, sends it to a replica by its prefix, and sends the answer on."""

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

from ray_serve.arguments import Arguments
from ray_serve.recent import Recent
from ray_serve.relay import Message, ReplicaLost, relay
from ray_serve.replica import ForwardedRequest, Replica
from ray_serve.replica_metrics import with_replica_label
from ray_serve.route import route_of
from ray_serve.versions import check_xgdn
from xgdn.server.api_error import ApiError

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_SENT = ("type", "http_version", "method", "scheme", "query_string", "headers", "client", "server")
_LARGE_BODY = 64 * 2**10  # bytes; hashing more would hold up streams
_PROBE_SECONDS = 1.0
_MAX_STORED = 2**16
_REPLICA_HEADER = b"x-replica"
_STORED_ID = re.compile(rb'"id": ?"(resp_[0-9a-f]+)"')

ingress = FastAPI(title="xgdn", docs_url=None, redoc_url=None, openapi_url=None)


def _refusal(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


class _Relayed(Response):
    """The answer of a replica."""

    def __init__(self, gateway: Any, request: ForwardedRequest) -> None:
        super().__init__()
        self._gateway = gateway
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await relay(lambda: self._gateway.ask(self._request), send)
        except ApiError as error:
            await _refusal(error)(scope, receive, send)


@serve.ingress(ingress)  # copies the routes with the names that they use, which must be there by now
class Gateway:
    """Forwards everything but /health and /metrics."""

    def __init__(self, replicas: DeploymentHandle[Replica], arguments: Arguments, version: str) -> None:
        check_xgdn(version)
        self._replicas = replicas
        self._answers = replicas.options(method_name="answer", stream=True)
        self._arguments = arguments
        self._stored = Recent[str, str](_MAX_STORED)  # replicas by the ids of responses that they keep

    @ingress.api_route("/health", methods=["GET", "HEAD"])
    def health(self) -> Response:
        """Tell that requests come in. Ray Serve replaces replicas that fail by itself."""
        return JSONResponse({"status": "ok"})

    @ingress.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics(self) -> Response:
        """Return the metrics of all replicas."""
        seconds = self._arguments.scrape_seconds
        try:
            scraped = self._replicas.broadcast("metrics")
            found = await scraped.results_async(timeout_s=seconds, return_exceptions=True)
        except DeploymentUnavailableError:  # there is none at the moment
            found = []
        except TimeoutError:
            return _refusal(
                ApiError(503, "no_metrics", f"A replica did not tell its metrics within {seconds:g} seconds.")
            )
        texts = dict(it for it in found if not isinstance(it, BaseException))  # without those that died
        return Response(with_replica_label(texts), media_type=CONTENT_TYPE_LATEST)

    @ingress.api_route("/{path:path}", methods=_METHODS)
    async def forward(self, request: Request) -> Response:
        try:
            body = await self._read(request)
        except ApiError as error:
            return _refusal(error)
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        if len(body) > _LARGE_BODY:
            route = await asyncio.to_thread(route_of, path, body, self._stored.get)
        else:
            route = route_of(path, body, self._stored.get)
        scope = {name: request.scope[name] for name in _SENT} | {"path": path}
        return _Relayed(self, ForwardedRequest(route, scope, body))

    async def ask(self, request: ForwardedRequest) -> AsyncGenerator[Message, None]:
        """Yield the messages of one replica's answer. When the client leaves, Ray Serve cancels it there too.

        Raises:
            ReplicaLost: it died.
            ApiError: no replica took the request.
        """
        answer: Any = self._answers.remote(request)  # a generator, since it streams
        try:
            replica = await self._taken(answer, request.scope["path"])
            async for message in answer:
                if found := _STORED_ID.search(message.get("body", b""), 0, 256):
                    self._stored.put(found[1].decode(), replica)
                if message["type"] == "http.response.start":
                    headers = [it for it in message["headers"] if it[0] != b"x-request-id"]  # Ray Serve adds the same
                    message["headers"] = [*headers, (_REPLICA_HEADER, replica.encode())]
                yield message
        except RayActorError as error:
            raise ReplicaLost(str(error)) from None

    async def _taken(self, answer: Any, path: str) -> str:
        """Return the name of the replica that has taken a request, once one has."""
        seconds = _PROBE_SECONDS if path == "/ready" else self._arguments.wait_seconds
        try:
            return str(await asyncio.wait_for(anext(answer), seconds))
        except asyncio.TimeoutError:
            message = f"No replica took the request within {seconds:g} seconds."
            raise ApiError(503, "no_replica", message, headers={"Retry-After": "1"}) from None
        except DeploymentUnavailableError as error:
            raise ApiError(503, "no_replica", error.message) from None
        except BackPressureError:
            message = f"The queue is full: {self._arguments.max_queue} requests wait for a replica."
            raise ApiError(429, "queue_full", message, headers={"Retry-After": "1"}) from None

    async def _read(self, request: Request) -> bytes:
        limit = self._arguments.max_body_bytes
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise ApiError(413, "body_too_large", f"Expected a body of at most {limit} bytes.")
        return bytes(body)
