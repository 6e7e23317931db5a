"""The server's paths."""

import hashlib
import hmac
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

import deepseek_vl2
from deepseek_vl2.serve.api.chat_responses import ResponseHead, stream_response, whole_response
from deepseek_vl2.serve.api.connections import BodyLimit, EventStream, RequestLog, while_connected
from deepseek_vl2.serve.api.errors import (
    CLIENT_CLOSED_REQUEST,
    ApiError,
    error_response,
    from_http_error,
    from_validation,
    unexpected_error,
)
from deepseek_vl2.serve.api.schemas import ChatRequest, ErrorResponse
from deepseek_vl2.serve.api.service import ChatService, OpenRequest

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 408, 413, 429, CLIENT_CLOSED_REQUEST, 500, 503, 504)
}
_bearer = HTTPBearer(auto_error=False, description="only where the server was started with keys")


async def _on_invalid_request(request: Request, error: Any) -> Response:
    return error_response(from_validation(error.errors(), error.body))


async def _on_http_error(request: Request, error: Any) -> Response:
    return error_response(from_http_error(error))


async def _on_unexpected_error(request: Request, error: Exception) -> Response:
    return error_response(unexpected_error())


def create_app(service: ChatService) -> FastAPI:
    """Builds the server around its service, which is closed with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="DeepSeek-VL2",
        description="Chat completions with pictures, in the OpenAI protocol.",
        version=deepseek_vl2.__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        exception_handlers={
            RequestValidationError: _on_invalid_request,
            HTTPException: _on_http_error,
            Exception: _on_unexpected_error,
        },
    )
    app.add_middleware(BodyLimit, max_bytes=service.settings.max_body_bytes)
    app.add_middleware(RequestLog, metrics=service.metrics)
    _add_chat(app, service)
    _add_models(app, service)
    _add_operation(app, service)
    _describe_errors_rightly(app)
    return app


def _add_chat(app: FastAPI, service: ChatService) -> None:
    @app.post("/v1/chat/completions", responses=_ERRORS, response_model=None)
    async def create_chat_completion(
        request: Request, body: ChatRequest, client: Annotated[Hashable, Depends(_client_of(service))]
    ) -> Response:
        """Answers a conversation, whole or (with `stream`) piece by piece."""
        _check_model(service, body.model)
        opened = await while_connected(request, service.begin(body, client))
        head = ResponseHead(service.settings.model_name)
        if body.stream:
            includes_usage = body.stream_options is not None and body.stream_options.include_usage
            events = stream_response(head, opened, includes_usage)
            return EventStream(events, opened.deadline, lambda is_cancelled: _end_stream(service, opened, is_cancelled))
        try:
            return JSONResponse(await while_connected(request, whole_response(head, opened)))
        finally:
            service.end(opened)


def _end_stream(service: ChatService, opened: OpenRequest, is_cancelled: bool) -> None:
    service.end(opened)
    if is_cancelled:  # its status was sent before: it is not in the figures as that of other cancelled requests
        service.metrics.cancelled.inc()


def _add_models(app: FastAPI, service: ChatService) -> None:
    model = {
        "id": service.settings.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "deepseek_vl2",
    }
    needs_key = [Depends(_client_of(service))]

    @app.get("/v1/models", dependencies=needs_key, responses={401: _ERRORS[401]})
    async def list_models() -> dict[str, Any]:
        """Lists the one model that is served."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}", dependencies=needs_key, responses={s: _ERRORS[s] for s in (401, 404)})
    async def retrieve_model(model_id: str) -> dict[str, Any]:
        """Describes the model."""
        _check_model(service, model_id)
        return model


def _add_operation(app: FastAPI, service: ChatService) -> None:
    @app.get("/health", responses={503: _ERRORS[503]})
    async def health() -> dict[str, str]:
        """Says whether the server takes questions."""
        if not service.engine.is_alive:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the model does not run any more", code="not_running")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _describe_errors_rightly(app: FastAPI) -> None:
    """Takes status 422 out of the schema: a body that does not fit gets 400 here, as from OpenAI."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        schema = build()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _client_of(service: ChatService) -> Any:
    """Finds out who asks: by the key where there are several, else by the address."""
    keys = [key.encode() for key in service.settings.api_keys]

    async def client_of(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> Hashable:
        if keys:
            given = credentials.credentials.encode() if credentials is not None else b""
            # All are compared, so that the time tells nothing.
            if not any(hmac.compare_digest(given, key) for key in keys):
                message = "the API key is missing or wrong: send 'Authorization: Bearer KEY'"
                raise ApiError(
                    HTTPStatus.UNAUTHORIZED, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
                )
            if len(keys) > 1:
                return hashlib.sha256(given).hexdigest()
        return request.client.host if request.client is not None else ""

    return client_of


def _check_model(service: ChatService, name: str) -> None:
    served = service.settings.model_name
    if name != served:
        message = f"the model {name[:200]!r} does not exist here; this server has {served!r}"
        raise ApiError(HTTPStatus.NOT_FOUND, message, code="model_not_found", param="model")
