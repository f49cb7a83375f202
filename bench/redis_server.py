"""A Redis of our own: on a free loopback port, with nothing on disk, gone after the block."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE_S = 10.0


def is_installed() -> bool:
    return shutil.which("redis-server") is not None


def version() -> str:
    """What `redis-server --version` says of itself, "" if there is none."""
    if not is_installed():
        return ""
    text = subprocess.run(
        ["redis-server", "--version"], capture_output=True, text=True, check=True
    ).stdout
    return next((word[2:] for word in text.split() if word.startswith("v=")), "")


@contextmanager
def redis_server() -> Iterator[str]:
    """The URL of a Redis that runs for the block. Raises `RuntimeError` if it cannot be started."""
    path = shutil.which("redis-server")
    if path is None:
        raise RuntimeError("redis-server is not on the path; `apt-get install redis-server` brings it")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [path, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
        cwd="/",
    )
    try:
        _wait_until_it_answers(process, port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait()


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int) -> None:
    end_s = time.monotonic() + _PATIENCE_S
    while process.poll() is None and time.monotonic() < end_s:
        try:
            with socket.create_connection(("127.0.0.1", port), 1.0) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(16).startswith(b"+PONG"):
                    return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"redis-server did not answer on port {port}")
