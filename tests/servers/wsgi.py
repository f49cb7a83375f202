"""A WSGI application that imports flags.py; with SERVERS_LOAD=1 it loads the flags at import, too."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

from tests.servers.answers import respond

logging.basicConfig(level=logging.INFO)

import flags  # noqa: E402

if os.environ.get("SERVERS_LOAD"):
    flags.client.load_feature_flags()


def application(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]
) -> Iterable[bytes]:
    return respond(flags.client, start_response)
