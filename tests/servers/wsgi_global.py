"""A WSGI application that uses the SDK through the module `posthog`, as a server's hook set it up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import posthog

from tests.servers.answers import respond

logging.basicConfig(level=logging.INFO)


def application(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]
) -> Iterable[bytes]:
    return respond(posthog.default_client, start_response)
