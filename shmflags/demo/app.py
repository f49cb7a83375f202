"""The application in the demo's workers: each answer tells who gave it and what it knows.

It uses the SDK as any application may, through the module `posthog`; the client behind that was
made by `gunicorn_conf.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import posthog

from shmflags.demo.report import FLAG, ApiRequest, Report


class RequestLog(logging.Handler):
    """Notes this process's requests for definitions, as they appear in the log of urllib3.

    The SDK has no count of its own, and a provider is not told of a 304; the log of the HTTP
    library below both is the closest to what went over the wire.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seen: list[ApiRequest] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()  # http://host:80 "GET /path HTTP/1.1" 200 1234
        if '"GET /flags/definitions' in message:
            status = int(message.rsplit('" ', 1)[1].split()[0])
            self.seen.append(ApiRequest(time.monotonic(), status))

    def install(self) -> None:
        logger = logging.getLogger("urllib3.connectionpool")
        logger.setLevel(logging.DEBUG)
        logger.propagate = False  # the lines are for us, not for gunicorn's log
        logger.addHandler(self)


request_log = RequestLog()
request_log.install()


def application(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]
) -> Iterable[bytes]:
    """The WSGI entry point: any request is answered with a `Report`."""
    flags = posthog.evaluate_flags("somebody", flag_keys=[FLAG], only_evaluate_locally=True)
    value = flags.get_flag(FLAG, send_feature_flag_events=False)
    loaded = posthog.setup().feature_flags
    report = Report(
        pid=os.getpid(),
        parent_pid=os.getppid(),
        flag_count=None if loaded is None else len(loaded),
        digest=hashlib.sha256(json.dumps(loaded, sort_keys=True).encode()).hexdigest(),
        flag_value=value,
        requests=tuple(request_log.seen),
    )
    body = report.to_json()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start_response("200 OK", headers)
    return [body]
