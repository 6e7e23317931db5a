"""Errors in the form of the OpenAI protocol: `{"error": {"message", "type", "param", "code"}}`."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

CLIENT_CLOSED_REQUEST = 499  # nginx's number; http has none
RETRY_AFTER_SECONDS = 2
# What `ChatRequest` says of a field that would change the answer; the error's context has its `name`.
UNSUPPORTED = "unsupported_parameter"
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """What a client gets instead of an answer.

    Args:
        status: of HTTP.
        message: what is wrong, and the way out.
        code: for programs.
        param: the field of the request that it is about, such as `messages.0.content`.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code = code
        self.param = param

    @property
    def content(self) -> dict[str, Any]:
        """The error's JSON."""
        kind = "server_error" if self.status_code >= 500 else _TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}


def error_response(error: ApiError) -> Response:
    """The response to an error; in ASCII, so that it can hold whatever a client has sent."""
    return Response(json.dumps(error.content), error.status_code, error.headers, "application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, code=code, param=param)


def too_many_requests(message: str) -> ApiError:
    """Status 429, with the time to wait."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, code="queue_full", headers=headers)


def from_http_error(error: HTTPException) -> ApiError:
    """An error of the framework, such as an unknown path."""
    if isinstance(error, ApiError):
        return error
    return ApiError(error.status_code, str(error.detail), headers=error.headers)


def unexpected_error() -> ApiError:
    """Status 500; what has happened is no business of the client."""
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed on this request", code="internal_error")


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """Status 400 for a body that does not fit the schema, by its first error."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return bad_request("the body is not valid JSON", code="invalid_json")
    if first["type"] == UNSUPPORTED:  # the check of the whole request finds it, and knows its place
        return bad_request(str(first["msg"]), str(first["ctx"]["name"]), UNSUPPORTED)
    param = ".".join(_place(first, body)) or None
    message = f"{param}: {first['msg']}" if param else f"the body: {first['msg']}"
    return bad_request(message, param, str(first["type"]))


def _place(error: Mapping[str, Any], body: Any) -> list[str]:
    """Where in the body an error is, without the names of the schema's alternatives."""
    parts = error["loc"][1:]
    place: list[str] = []
    for part in parts:
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            place.append(str(part))
            body = body[part]
    if error["type"] == "missing" and parts:
        place.append(str(parts[-1]))
    return place
