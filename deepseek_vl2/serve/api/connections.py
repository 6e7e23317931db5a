"""Connections: work that ends when the client goes away, limits on bodies, and a line in the log for each request."""

import asyncio
import logging
import time
from collections.abc import AsyncIterable, Callable, Coroutine
from http import HTTPStatus
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_vl2.serve.api.errors import CLIENT_CLOSED_REQUEST, ApiError, error_response
from deepseek_vl2.serve.api.metrics import Metrics

logger = logging.getLogger(__name__)

T = TypeVar("T")
BODY_TIMEOUT = 60.0
# After the deadline, for the event that says so.
SEND_GRACE = 5.0


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Does some work, and ends it as soon as the client goes away. The body must have been read.

    Raises:
        ApiError: status 499, the client went away; nobody reads it.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(CLIENT_CLOSED_REQUEST, "the client closed the connection", code="client_closed_request")
    finally:
        await _end(working, listening)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancels what is not done, and waits until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


class _StalledClientError(Exception):
    """A client takes nothing any more, and its time is over."""


class EventStream(StreamingResponse):
    """Server-sent events; `on_end` is called when they are over, also by the client's going away or reading no more.

    Args:
        events: the events.
        deadline: by when they must be sent (and `SEND_GRACE`), in the time of the event loop.
        on_end: is told whether the client went away before the end.
    """

    def __init__(self, events: AsyncIterable[bytes], deadline: float, on_end: Callable[[bool], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._deadline = deadline
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        is_complete = False

        async def noting_send(message: Message) -> None:
            nonlocal is_complete
            try:
                async with asyncio.timeout_at(self._deadline + SEND_GRACE):
                    await send(message)  # waits while the client does not read what was sent before
            except TimeoutError:
                raise _StalledClientError from None
            is_complete = is_complete or (message["type"] == "http.response.body" and not message.get("more_body"))

        try:
            await super().__call__(scope, receive, noting_send)
        except _StalledClientError:
            logger.info("a client stopped reading its answer; the connection is closed")
        finally:
            self._on_end(not is_complete)


class BodyLimit:
    """Refuses bodies that are too large or come too slowly.

    Args:
        app: what is behind.
        max_bytes: largest body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self._max_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        num_bytes, is_over = 0, False
        deadline = time.monotonic() + BODY_TIMEOUT

        async def limited() -> Message:
            nonlocal num_bytes, is_over
            if is_over:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.001))
            except TimeoutError:
                raise ApiError(HTTPStatus.REQUEST_TIMEOUT, "the request came too slowly", code="timeout") from None
            num_bytes += len(message.get("body", b""))
            is_over = not message.get("more_body", False)
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        message = f"the request is larger than the {self._max_bytes} bytes that this server takes"
        return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, code="request_too_large")


class RequestLog:
    """Logs and counts requests: path, status and time, and nothing that users wrote.

    Args:
        app: what is behind.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), int(HTTPStatus.INTERNAL_SERVER_ERROR)

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        finally:
            # The path as it is declared: the one that was asked for may hold anything.
            path = getattr(scope.get("route"), "path", "unknown")
            seconds = time.monotonic() - start
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(seconds)
            if status == CLIENT_CLOSED_REQUEST:
                self._metrics.cancelled.inc()
            logger.info("%s %s %d in %.3f s", scope["method"], path, status, seconds)
