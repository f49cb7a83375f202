"""gunicorn as a child process, and talking to each of its workers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from shmflags.demo.report import Report

WORKERS = 4
_ANSWER_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 10.0


class WorkersGoneError(Exception):
    """gunicorn is not there any more; the message says how it ended."""


class Workers:
    """gunicorn with `WORKERS` sync workers in a process group of its own, running the demo's app.

    `environment` is what it runs in; its output goes to `log`. Between construction and `stop`
    processes exist: call `stop` in any case.
    """

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._clean: bool | None = None
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listening, log.open("wb") as to:
            self.address: tuple[str, int] = listening.getsockname()
            command = [
                *(sys.executable, "-m", "gunicorn"),
                *("--config", "python:shmflags.demo.gunicorn_conf"),
                *("--workers", str(WORKERS)),
                # A socket made here, not a port: a free port can be taken before gunicorn binds it.
                *("--bind", f"fd://{listening.fileno()}"),
                "shmflags.demo.app:application",
            ]
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=to,
                stderr=to,
                pass_fds=[listening.fileno()],
                # Ctrl-C is for the demo alone, which then stops gunicorn; and the group is how
                # `stop` reaches workers whose master was killed.
                start_new_session=True,
            )

    @property
    def master_pid(self) -> int:
        return self._process.pid

    def ask(self) -> list[Report]:
        """One request to as many workers as can be reached at once; some may answer twice.

        A sync worker serves one connection at a time, so that connections opened together go to
        different workers, as far as these are awake. Raises `WorkersGoneError`.
        """
        if self._process.poll() is not None:
            raise WorkersGoneError(f"gunicorn ended with status {self._process.returncode}")
        connections: list[socket.socket] = []
        try:
            for _ in range(WORKERS):
                connections.append(socket.create_connection(self.address, _ANSWER_TIMEOUT_S))
            for connection in connections:
                _send_request(connection)
            answers = [_read_report(connection) for connection in connections]
        except ConnectionRefusedError as error:
            raise WorkersGoneError("gunicorn does not listen any more") from error
        finally:
            for connection in connections:
                connection.close()
        return [answer for answer in answers if answer is not None]

    def kill(self, report: Report) -> None:
        """SIGKILL to the worker that gave this report, which is checked to be one of ours."""
        if report.parent_pid != self.master_pid:
            raise WorkersGoneError(f"process {report.pid} is not a worker of this gunicorn")
        os.kill(report.pid, signal.SIGKILL)

    def stop(self) -> bool:
        """End gunicorn and all its workers; True if it ended as it should and nothing was left.

        May be repeated, and then gives what it gave before.
        """
        if self._clean is not None:
            return self._clean
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                pass  # the group is killed below
        self._clean = self._process.poll() == 0 and not self._group_signalled(0)
        self._group_signalled(signal.SIGKILL)
        self._process.wait()
        until_s = time.monotonic() + _STOP_TIMEOUT_S
        while self._group_signalled(0) and time.monotonic() < until_s:
            time.sleep(0.02)  # orphans are not ours to wait for: init reaps them
        return self._clean

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _group_signalled(self, number: int) -> bool:
        """Whether there was a process left in gunicorn's group to send the signal to."""
        try:
            os.killpg(self.master_pid, number)
        except ProcessLookupError:
            return False
        return True


def _send_request(connection: socket.socket) -> None:
    try:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n")
    except ConnectionError:
        pass  # the worker died with the connection open: reading will say so


def _read_report(connection: socket.socket) -> Report | None:
    """The report in an HTTP answer; None if the worker died over it."""
    answer = b""
    try:
        while piece := connection.recv(65536):
            answer += piece
    except (ConnectionError, TimeoutError):
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    return Report.from_json(body) if head.startswith(b"HTTP/1.1 200") else None
