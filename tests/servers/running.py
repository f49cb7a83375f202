"""Starting a server, asking its workers, and that nothing of it stays behind."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from shmflags.demo.server import DefinitionsServer
from tests.servers.answers import Answer, kept_answers, switched, values
from tests.support import WAIT_S, wait_until

INTERVAL_S = 2.5
"""The workers' poll_interval. While nothing can be served, a fetch that takes half as long, on a machine
that is busy, is followed by another."""

WORKERS = 4
RECIPES = Path(__file__).parent / "recipes"
_CHECKOUT = Path(__file__).parents[2]
_AT_ONCE = 6
_ASK_EVERY_S = 0.05  # What is waited for takes seconds, and other tests want the processors.
_STOP_S = 20.0


class Site:
    """Where one test's server runs: a directory, short enough for a socket in it, and the API.

    A context manager; what was started is killed at its end.
    """

    def __init__(self) -> None:
        self._cleanup = ExitStack()
        self.home = Path(tempfile.mkdtemp(prefix="shmflags-"))
        self._cleanup.callback(shutil.rmtree, self.home)
        self.home.chmod(0o755)
        shared = self.home / "shared"  # the cache's base directory
        shared.mkdir()
        shared.chmod(0o1777)
        self.api = self._cleanup.enter_context(DefinitionsServer(switched("cheaper"), latency_s=0.1))

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *error: object) -> None:
        self._cleanup.close()

    def start(self, *command: str, **environment: str) -> Running:
        """Start processes that keep their answers in files."""
        server = Running(command, self, environment)
        self._cleanup.callback(server.kill)
        return server

    def start_http(self, *command: str, **environment: str) -> HttpServer:
        """Start a server that listens on `self.socket`."""
        server = HttpServer(command, self, environment)
        self._cleanup.callback(server.kill)
        return server

    @property
    def socket(self) -> Path:
        return self.home / "socket"

    @property
    def answers(self) -> Path:
        """Where processes that listen to nobody keep their answers."""
        return self.home / "answers"


class Running:
    """A server's processes, in a session of their own."""

    def __init__(self, command: Sequence[str], site: Site, environment: Mapping[str, str]) -> None:
        self.site = site
        self.api = site.api
        self.log_path = site.home / "log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=site.home,
                env={**_environment(site), **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def logged(self, part: str) -> list[str]:
        """The lines of the log with `part` in them."""
        return [line for line in self.log.splitlines() if part in line]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """As `support.wait_until`, and at once with the log if the server ended."""

        def look() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log}")
            return condition()

        try:
            wait_until(look, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\nThe server's log:\n{self.log}") from None

    def wait(self) -> None:
        """Wait until the server ends by itself."""
        self.process.wait(WAIT_S)

    def stop(self) -> None:
        """SIGTERM to the master; all its processes are gone afterwards, one way or the other."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                pass  # `kill` is next.
        self.kill()

    def kill(self) -> None:
        """SIGKILL to all its processes; none of them runs any more afterwards."""

        def gone() -> bool:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return True
            self.process.poll()
            return not _runs(self.process.pid)

        wait_until(gone, "the server's processes are gone")
        self.process.wait()


def _runs(group: int) -> bool:
    """Whether a process of that group runs. A dead orphan is there until init reaps it, perhaps seconds."""
    for pid in psutil.pids():
        try:
            if os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass  # It ended while we looked.
    return False


class HttpServer(Running):
    """A server that listens on the site's socket."""

    def ask(self) -> list[Answer]:
        """Several requests at once, and a pause; answers of those that were answered with 200."""
        answers: list[Answer] = []
        threads = [
            threading.Thread(target=_ask, args=(self.site.socket, answers)) for _ in range(_AT_ONCE)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(_ASK_EVERY_S)
        return answers

    def ask_until(
        self, condition: Callable[[Answer], bool], what: str, *, workers: int = WORKERS
    ) -> list[Answer]:
        """Ask until so many workers have given an answer that meets `condition`; all answers."""
        answers: list[Answer] = []
        meeting: set[int] = set()

        def asked() -> bool:
            new = self.ask()
            answers.extend(new)
            meeting.update(answer.pid for answer in new if condition(answer))
            return len(meeting) >= workers

        self.wait_until(asked, f"{workers} workers {what}")
        return answers

    def ask_until_requests(self, count: int) -> list[Answer]:
        """Ask until the API has answered so many requests for definitions; all answers."""
        answers: list[Answer] = []

        def answered() -> bool:
            answers.extend(self.ask())
            return self.api.answered >= count

        self.wait_until(answered, f"the API has answered {count} requests")
        return answers


def _ask(path: Path, answers: list[Answer]) -> None:
    connection = http.client.HTTPConnection("localhost", timeout=WAIT_S / 2)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(connection.timeout)
    try:
        connection.sock.connect(os.fspath(path))
        connection.request("GET", "/")
        response = connection.getresponse()
        body = response.read()
        if response.status == 200:
            answers.append(Answer.from_json(body))
    except (OSError, http.client.HTTPException):
        pass  # Not there yet, or a worker that was restarted.
    finally:
        connection.close()


def _environment(site: Site) -> dict[str, str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        # Arguments that somebody set for other servers.
        if not name.startswith(("GUNICORN_", "UWSGI_", "UVICORN_", "CELERY_", "WEB_", "SHMFLAGS_"))
    }
    return environment | {
        "POSTHOG_PROJECT_API_KEY": "phc_test",
        "POSTHOG_SECRET_KEY": "phx_test",
        "POSTHOG_HOST": site.api.url,
        "POSTHOG_POLL_INTERVAL": str(INTERVAL_S),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "SHMFLAGS_DIR": str(site.home / "shared"),
        "PYTHONPATH": os.pathsep.join([str(_CHECKOUT), str(RECIPES)]),
        "PYTHONUNBUFFERED": "1",
        "XDG_RUNTIME_DIR": str(site.home),  # gunicorn's control socket
    }


def check_workers(server: HttpServer) -> None:
    """Each worker answers rightly from the first time on, and learns of a change; one asks the API."""
    api = server.api
    before, after = values("cheaper"), values("faster")
    answers = server.ask_until(lambda answer: answer.values == before, "know the flags")
    wrong = [answer for answer in answers if answer.values != before]
    assert not wrong, f"{wrong}\n{server.log}"
    assert api.full == 1, f"{api.requests}\n{server.log}"
    api.set_definitions(switched("faster"))
    answers = server.ask_until(lambda answer: answer.values == after, "know of the change")
    wrong = [answer for answer in answers if answer.values not in (before, after)]
    assert not wrong, f"{wrong}\n{server.log}"
    assert api.full == 2, f"{api.requests}\n{server.log}"
    server.ask_until_requests(3)
    check_requests(api)


def check_busy_workers(server: Running) -> None:
    """As `check_workers`, for processes that keep answering into files."""
    api = server.api
    before, after = values("cheaper"), values("faster")

    def histories() -> list[list[Mapping[str, bool | str | None]]]:
        return [[answer.values for answer in answers] for answers in kept_answers(server.site.answers)]

    def all_know(right: Mapping[str, bool]) -> bool:
        latest = [history[-1:] for history in histories()]
        return len(latest) >= WORKERS and all(values == [right] for values in latest)

    server.wait_until(lambda: all_know(before), "all know the flags")
    assert api.full == 1, f"{api.requests}\n{server.log}"
    api.set_definitions(switched("faster"))
    server.wait_until(lambda: all_know(after), "all know of the change")
    assert histories() == [[before, after]] * WORKERS, server.log
    assert api.full == 2, f"{api.requests}\n{server.log}"
    server.wait_until(lambda: api.answered >= 3, "the API has answered 3 requests")
    check_requests(api)


def stop_answering(server: Running) -> None:
    """Let processes that keep answering come to an end."""
    (server.site.answers / "stop").touch()


def check_requests(api: DefinitionsServer, *, apart_s: float = INTERVAL_S) -> None:
    """So far the API was asked as often as by one client that asks every `apart_s` seconds.

    Four clients on their own would ask four times as often. Two requests are allowed for: the first,
    and one that was under way longer than the next.
    """
    requests = api.requests
    elapsed_s = time.monotonic() - requests[0].time_s
    assert len(requests) <= elapsed_s / apart_s + 2, f"{elapsed_s} s: {requests}"
    assert api.remote_evaluations == 0
