"""Processes to measure in: fresh interpreters in which functions are called by name."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_LONGEST_S = 180.0


class Process:
    """A fresh interpreter. `call("bench.poll:first_read", ...)` runs that function in it.

    Arguments and results are what JSON can express; what a function keeps in its module stays there
    for the next call. A context manager: the process is gone after the block.
    """

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # closed by `close`
        environment = dict(os.environ, PYTHONPATH=os.fspath(ROOT), PYTHONHASHSEED="0")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        self._unread = b""
        self._has_workers = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, name: str, /, **arguments: Any) -> Any:
        """Call `module:function` there and return its result."""
        self.start(name, **arguments)
        return self.result()

    def fork(self, count: int) -> None:
        """Fork workers from it, which `fleet.call` and `fleet.call_all` reach."""
        self._has_workers = True
        self.call("bench.fleet:fork", count=count)

    def call_workers(self, function: str, **arguments: Any) -> list[Any]:
        """Call a function in all its workers at the same time; their results, in order."""
        found: list[Any] = self.call("bench.fleet:call_all", function=function, **arguments)
        return found

    def start(self, name: str, /, **arguments: Any) -> None:
        """Begin a call; `result` is to be had later."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, arguments]).encode() + b"\n")
        self._process.stdin.flush()

    def result(self, timeout_s: float = _LONGEST_S) -> Any:
        """Raises `RuntimeError` if the call raised, the process ended, or it takes too long."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            ready, _, _ = select.select([descriptor], [], [], timeout_s)
            part = os.read(descriptor, 1 << 16) if ready else b""
            if not part:
                state = "ended" if ready else f"did not answer within {timeout_s:g} s"
                raise RuntimeError(f"a measuring process {state}\n{self._error_text()}")
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        kind, value = json.loads(line)
        if kind == "error":
            raise RuntimeError(f"in a measuring process:\n{value}{self._error_text()}")
        return value

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        if self._process.poll() is None and self._has_workers:
            self.call("bench.fleet:end")
        self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass  # Something was still to be sent to it.

    def _error_text(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-4000:]


@contextmanager
def processes(count: int) -> Iterator[list[Process]]:
    """`count` fresh interpreters, gone after the block."""
    running: list[Process] = []
    try:
        for _ in range(count):
            running.append(Process())  # those that were started are closed
        yield running
    finally:
        for process in running:
            process.close()


@contextmanager
def scratch_directory() -> Iterator[str]:
    """A directory in memory, where there is memory to be had: no contestant waits for a disk."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="shmflags-bench-", dir=base) as path:
        yield path
