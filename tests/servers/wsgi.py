"""A WSGI application that imports flags.py.

At import it logs, with SERVERS_LOAD=1 after it loaded the flags, which threads there are.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

from tests.servers.answers import respond

logging.basicConfig(level=logging.INFO)

import flags  # noqa: E402

if os.environ.get("SERVERS_LOAD"):
    flags.client.load_feature_flags()
logging.getLogger(__name__).info(
    "at import: %s", ", ".join(thread.name for thread in threading.enumerate())
)


def application(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]
) -> Iterable[bytes]:
    return respond(flags.client, start_response)
