# SPDX-License-Identifier: Apache-2.0
"""The HTTP application: its routes, and its answers to errors."""

from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp
from tokenizers import Tokenizer

from xgdn.engine import Engine
from xgdn.server.api_error import ApiError
from xgdn.server.handlers import CLIENT_GONE, Handlers
from xgdn.server.page_files import PageFiles
from xgdn.server.request_log import RequestLog
from xgdn.server.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_EXPOSED_HEADERS = [
    "X-Request-Id",
    "Retry-After",
    *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
]


class _Application(FastAPI):
    """FastAPI with a log around all of it, so that answers to failures are in it and have an id as well."""

    tracer: "Tracer | None" = None

    def build_middleware_stack(self) -> ASGIApp:
        stack = super().build_middleware_stack()
        if self.tracer is not None:
            from xgdn.server.tracing import Traced  # needs an extra package

            stack = Traced(stack, self.tracer)
        return RequestLog(stack)


def create_app(engine: Engine, tokenizer: Tokenizer, settings: Settings) -> FastAPI:
    """Return the application. It steps the engine while it runs.

    `state.problem` is the reason why chat is not served, `state.engine` takes part in a graceful shutdown.

    Raises:
        ValueError: the files of the model directory's tokenizer cannot be read.
    """
    handlers = Handlers(engine, tokenizer, settings)
    # FastAPI's documentation pages load scripts from elsewhere, and it does not see the schemas of the bodies.
    app = _Application(title="xgdn", lifespan=handlers.lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.tracer = settings.tracer
    app.state.problem = handlers.problem
    app.state.engine = handlers.engine
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    to_read = ["GET", "HEAD"]  # probes use HEAD
    api = APIRouter(prefix="/v1", dependencies=[Depends(handlers.check_key)])
    api.add_api_route("/completions", handlers.completions, methods=["POST"], response_model=None)
    api.add_api_route("/chat/completions", handlers.chat_completions, methods=["POST"], response_model=None)
    api.add_api_route("/embeddings", handlers.embeddings, methods=["POST"], response_model=None)
    api.add_api_route("/responses", handlers.responses, methods=["POST"], response_model=None)
    # One route for both, so that the answer to a further method names all that there are.
    api.add_api_route(
        "/responses/{response_id}", handlers.stored_response, methods=[*to_read, "DELETE"], response_model=None
    )
    api.add_api_route("/sessions", handlers.all_sessions, methods=[*to_read, "POST"], response_model=None)
    api.add_api_route("/sessions/{session_id}", handlers.session, methods=[*to_read, "DELETE"], response_model=None)
    for action, change in (
        ("fork", handlers.fork_session),
        ("truncate", handlers.truncate_session),
        ("save", handlers.save_session),
    ):
        api.add_api_route(f"/sessions/{{session_id}}/{action}", change, methods=["POST"], response_model=None)
    api.add_api_route("/session_files", handlers.session_files, methods=to_read, response_model=None)
    api.add_api_route("/session_files/{file}", handlers.delete_session_file, methods=["DELETE"], response_model=None)
    api.add_api_route("/models", handlers.models, methods=to_read)
    api.add_api_route("/models/{name:path}", handlers.model, methods=to_read)
    app.include_router(api)
    tools = APIRouter(dependencies=[Depends(handlers.check_key)])
    tools.add_api_route("/tokenize", handlers.tokenize, methods=["POST"], response_model=None)
    tools.add_api_route("/detokenize", handlers.detokenize, methods=["POST"], response_model=None)
    tools.add_api_route("/tokenizer_info", handlers.tokenizer_info, methods=to_read)
    app.include_router(tools)
    app.add_api_route("/health", handlers.health, methods=to_read, response_model=None)
    app.add_api_route("/ready", handlers.ready, methods=to_read, response_model=None)
    app.add_api_route("/openapi.json", handlers.openapi, methods=to_read)
    app.add_api_route("/metrics", handlers.render_metrics, methods=to_read, response_model=None)
    for path, figures in (("/stats", handlers.stats), ("/stats/history", handlers.stats_history)):
        app.add_api_route(
            path, figures, methods=to_read, response_model=None, dependencies=[Depends(handlers.check_key)]
        )
    page = PageFiles()
    app.add_api_route("/", page.index, methods=to_read, response_model=None)
    app.mount("/page", page)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return handlers.refuse(request, error)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path}: {error.detail}."
        return handlers.refuse(request, ApiError(error.status_code, code, message, headers=error.headers))

    @app.exception_handler(ClientDisconnect)
    async def client_gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def failure(request: Request, _: Exception) -> Response:
        return handlers.refuse(request, ApiError(500, "internal_error", "The server failed; its log says how."))

    return app
