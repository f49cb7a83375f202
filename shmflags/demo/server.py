"""A stand-in for PostHog's flag API on loopback, that counts what it is asked.

`DefinitionsServer` answers `GET /flags/definitions` as PostHog does: JSON with an ETag made from
the content, and 304 to whoever already has that content. It can be slow, fail, hang and recover,
and keeps a record of every request, so that the demo, the tests and the benchmarks can tell who
asked how often. It needs the standard library only.

What a request is answered is decided when it arrives; the latency, or the release of a hung
request, comes after. So a fetch that was under way while the flags changed brings the old flags,
as it does in production.
"""

from __future__ import annotations

import hashlib
import json
import socket
import socketserver
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

DEFINITION_PATHS = ("/flags/definitions", "/api/feature_flag/local_evaluation")
DROPPED = 0  # the status of a request whose connection was closed without an answer


@dataclass(frozen=True)
class Request:
    """One request for definitions, recorded as it arrived."""

    time_s: float  # CLOCK_MONOTONIC, seconds
    status: int  # what it is answered; DROPPED if nothing
    etag: str | None  # the If-None-Match it carried
    peer_port: int  # the local port of the process that asked
    user_agent: str


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes
    etag: str | None = None


def flag(
    key: str,
    *,
    on: bool = True,
    percentage: float = 100,
    variants: Mapping[str, float] | None = None,
    properties: Sequence[Mapping[str, Any]] = (),
    payloads: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A flag as local evaluation receives it.

    It is true for `percentage` of the people who match all `properties`, and false for everybody
    unless it is `on`. `variants` maps names to their shares in percent, `payloads` maps "true" or
    a variant to any JSON value.
    """
    multivariate = None
    if variants is not None:
        multivariate = {
            "variants": [
                {"key": name, "name": "", "rollout_percentage": share}
                for name, share in variants.items()
            ]
        }
    return {
        "id": zlib.crc32(key.encode("utf-8", "surrogatepass")),
        "team_id": 1,
        "name": "",
        "key": key,
        "filters": {
            "groups": [
                {
                    "properties": [dict(item) for item in properties],
                    "rollout_percentage": percentage,
                    "variant": None,
                }
            ],
            "payloads": {name: json.dumps(value) for name, value in (payloads or {}).items()},
            "multivariate": multivariate,
        },
        "deleted": False,
        "active": on,
        "ensure_experience_continuity": False,
        "has_encrypted_payloads": False,
        "version": 1,
        "evaluation_runtime": "all",
        "evaluation_tags": [],
    }


def definitions(*flags: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The body of a definitions answer; `more` adds or replaces top-level keys."""
    return {"flags": list(flags), "group_type_mapping": {}, "cohorts": {}, **more}


class DefinitionsServer:
    """Serves flag definitions on a free loopback port from construction until `close`.

    A context manager. All methods may be called from any thread while it runs.
    """

    def __init__(self, data: Mapping[str, Any] | None = None, *, latency_s: float = 0.0) -> None:
        self._changed = threading.Condition()
        self._requests: list[Request] = []
        self._answered = 0
        self._remote_evaluations = 0
        self._other_requests = 0
        self._latency_s = latency_s
        self._failure: _Answer | None = None
        self._hanging = False
        self._hangs_ended = 0
        self._closed = threading.Event()
        self._connections: set[socket.socket] = set()
        self._full = _full_answer(definitions() if data is None else data)
        self._http = _HttpServer(self)
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(0.05,), name="definitions-server", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> DefinitionsServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop: the port refuses, open connections and hung requests end. May be repeated."""
        with self._changed:
            if self._closed.is_set():
                return
            self._closed.set()
            self._changed.notify_all()
        self._http.shutdown()
        # A forked child has a copy of the listening socket: with `close` alone the port would
        # go on to accept, and answer nobody.
        _end(self._http.socket)
        self._http.server_close()
        with self._changed:
            open_connections = list(self._connections)
        for connection in open_connections:
            _end(connection)
        self._thread.join()

    # What it serves

    @property
    def url(self) -> str:
        """The `host` to give to a client."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def etag(self) -> str:
        """The ETag of the current definitions."""
        with self._changed:
            assert self._full.etag is not None
            return self._full.etag

    def set_definitions(self, data: Mapping[str, Any]) -> None:
        """Serve `data` from the next request on."""
        full = _full_answer(data)
        with self._changed:
            self._full = full

    def set_latency(self, latency_s: float) -> None:
        """Wait this many seconds before each later answer about definitions, 200 and 304 alike."""
        with self._changed:
            self._latency_s = latency_s

    # How it fails

    def fail(self, status: int = 503) -> None:
        """Answer requests for definitions with this error until `recover`."""
        body = json.dumps(
            {"type": "error", "code": "unavailable", "detail": f"failing with {status} on request"}
        )
        with self._changed:
            self._failure = _Answer(status, body.encode())

    def drop(self) -> None:
        """Close the connection instead of answering a request for definitions, until `recover`."""
        with self._changed:
            self._failure = _Answer(DROPPED, b"")

    def hang(self) -> None:
        """Leave requests for definitions unanswered until `recover`, which answers them."""
        with self._changed:
            self._hanging = True

    def recover(self) -> None:
        """End `fail`, `drop` and `hang`, and release what hangs."""
        with self._changed:
            self._failure = None
            self._hanging = False
            self._hangs_ended += 1
            self._changed.notify_all()

    # What it saw

    @property
    def requests(self) -> tuple[Request, ...]:
        """Every request for definitions so far, in order of arrival."""
        with self._changed:
            return tuple(self._requests)

    @property
    def count(self) -> int:
        """Requests for definitions so far, whatever they were answered."""
        with self._changed:
            return len(self._requests)

    @property
    def full(self) -> int:
        """Requests answered with definitions (200)."""
        return self._count_of(200)

    @property
    def not_modified(self) -> int:
        """Requests answered with 304."""
        return self._count_of(304)

    @property
    def failed(self) -> int:
        """Requests answered with an error, or dropped."""
        with self._changed:
            return sum(request.status not in (200, 304) for request in self._requests)

    @property
    def answered(self) -> int:
        """Requests for definitions that are over: answered, or dropped."""
        with self._changed:
            return self._answered

    @property
    def remote_evaluations(self) -> int:
        """Requests to evaluate flags at the server (`POST /flags/`)."""
        with self._changed:
            return self._remote_evaluations

    @property
    def other_requests(self) -> int:
        """Requests for anything else, such as captured events."""
        with self._changed:
            return self._other_requests

    def wait_for(self, predicate: Callable[[DefinitionsServer], bool], timeout_s: float) -> bool:
        """Wait until `predicate(self)` holds; False when `timeout_s` has passed.

        It is looked at whenever a request arrives or ends.
        """
        with self._changed:
            return self._changed.wait_for(lambda: predicate(self), timeout_s)

    def _count_of(self, status: int) -> int:
        with self._changed:
            return sum(request.status == status for request in self._requests)

    # What the handler threads call

    def _arrived(
        self, etag: str | None, peer_port: int, user_agent: str
    ) -> tuple[_Answer, float, int | None]:
        """Record a request for definitions.

        Gives its answer, the seconds of latency, and the number of the hang it is part of, if any.
        """
        with self._changed:
            answer = self._full
            if self._failure is not None:
                answer = self._failure
            elif etag is not None and etag == answer.etag:
                answer = _Answer(304, b"", answer.etag)
            self._requests.append(Request(time.monotonic(), answer.status, etag, peer_port, user_agent))
            self._changed.notify_all()
            return answer, self._latency_s, self._hangs_ended if self._hanging else None

    def _delay(self, latency_s: float, hang: int | None) -> bool:
        """Wait as long as the answer has to; False if the server closed meanwhile."""
        with self._changed:
            if hang is not None:
                self._changed.wait_for(lambda: self._hangs_ended > hang or self._closed.is_set())
        return not self._closed.wait(latency_s)

    def _finished(self) -> None:
        with self._changed:
            self._answered += 1
            self._changed.notify_all()

    def _arrived_elsewhere(self, evaluation: bool) -> None:
        with self._changed:
            if evaluation:
                self._remote_evaluations += 1
            else:
                self._other_requests += 1
            self._changed.notify_all()

    def _connected(self, connection: socket.socket) -> None:
        with self._changed:
            self._connections.add(connection)
            if self._closed.is_set():
                # Accepted just before the port was closed: `close` may have missed it.
                _end(connection)

    def _disconnected(self, connection: socket.socket) -> None:
        with self._changed:
            self._connections.discard(connection)


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, owner: DefinitionsServer) -> None:
        self.owner = owner
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        # HTTPServer would look up our own name, and so wait for a DNS that may not be there.
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that was killed while it waited is what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    server: _HttpServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_version = "definitions"

    def setup(self) -> None:
        super().setup()
        self.server.owner._connected(self.connection)

    def finish(self) -> None:
        self.server.owner._disconnected(self.connection)
        super().finish()

    def do_GET(self) -> None:
        if urlsplit(self.path).path.rstrip("/") in DEFINITION_PATHS:
            self._definitions()
        else:
            self._elsewhere(evaluation=False, body=b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        evaluation = urlsplit(self.path).path.rstrip("/") in ("/flags", "/decide")
        self._elsewhere(evaluation, _NO_FLAGS if evaluation else b'{"status": 1}')

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the record is in `DefinitionsServer.requests`."""

    def _definitions(self) -> None:
        owner = self.server.owner
        try:
            etag, agent = self.headers.get("If-None-Match"), self.headers.get("User-Agent", "")
            answer, latency_s, hang = owner._arrived(etag, self.client_address[1], agent)
            if owner._delay(latency_s, hang) and answer.status != DROPPED:
                self._send(answer)
            else:
                self.close_connection = True
        finally:
            owner._finished()

    def _elsewhere(self, evaluation: bool, body: bytes) -> None:
        self.server.owner._arrived_elsewhere(evaluation)
        self._send(_Answer(200, body))

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        if answer.etag is not None:
            self.send_header("ETag", answer.etag)
        if answer.status != 304:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)


_NO_FLAGS = b'{"flags": {}, "errorsWhileComputingFlags": false, "requestId": "none"}'


def _full_answer(data: Mapping[str, Any]) -> _Answer:
    body = json.dumps(data).encode()
    return _Answer(200, body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def _end(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # ended already
