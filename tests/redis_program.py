"""A real redis-server of a test's own, on a loopback port of its own."""

from __future__ import annotations

import signal
import socket
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import redis

from tests.support import require_program, wait_until


class RedisProgram:
    """A redis-server process; a context manager. Options are those of its command line."""

    def __init__(self, *options: str) -> None:
        self._program = require_program("redis-server")
        self._options = options
        self._directory = tempfile.TemporaryDirectory(prefix="shmflags-redis-")
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def __enter__(self) -> RedisProgram:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start it, empty, on the same port as before; returns when it answers."""
        arguments = [
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        with (Path(self._directory.name) / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, *arguments, "--dir", self._directory.name, *self._options],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        wait_until(self._answers, "redis-server answers", 20)

    def kill(self) -> None:
        """SIGKILL, and wait for its end. All data is lost."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait(20)
            self._process = None

    def close(self) -> None:
        self.kill()
        self._directory.cleanup()

    def client(self, **arguments: Any) -> redis.Redis:
        return redis.Redis(host="127.0.0.1", port=self.port, **arguments)

    def commands(self) -> Counter[str]:
        """How often each command was called, those of scripts included."""
        with self.client() as client:
            found: Any = client.info("commandstats")
        return Counter({name.removeprefix("cmdstat_"): told["calls"] for name, told in found.items()})

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "redis-server ended"
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return bool(connection.recv(1))  # Or that it wants a password: it is at work.
        except OSError:
            return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
