"""An ASGI application that starts as the recipe does."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

logging.basicConfig(level=logging.INFO)

import asgi  # noqa: E402

from tests.servers.answers import Answer  # noqa: E402


async def application(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    body = Answer.of(asgi.flags.client).to_json()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
