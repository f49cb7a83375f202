"""`shmflags demo`: what it needs, what it starts, and that nothing of it stays behind."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from shmflags.demo.screen import Screen
from shmflags.demo.server import DefinitionsServer
from shmflags.demo.tour import StopTourError, Tour, demo_flags
from shmflags.demo.workers import WORKERS, Workers, WorkersGoneError

KEY_VARIABLES = ("POSTHOG_PROJECT_API_KEY", "POSTHOG_SECRET_KEY")
EXIT_OK, EXIT_NOT_OBSERVED, EXIT_USAGE = 0, 1, 2


@dataclass(frozen=True)
class Target:
    """The API that the workers poll, and how."""

    host: str
    keys: Mapping[str, str]  # environment variables
    interval_s: float
    latency_s: float  # of an answer; for an API that is not ours, a guess on the slow side


class UsageError(Exception):
    """The demo cannot start; the message is one line."""


class Interrupted(BaseException):
    """A signal asked the demo to end. Not an `Exception`: no handler on the way may keep it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interruptions:
    """Within its block, the first SIGINT, SIGTERM or SIGHUP raises `Interrupted`.

    Later ones, and all after `hold`, do nothing: they must not interrupt the cleaning up.
    """

    def __init__(self) -> None:
        self._held = False
        self._deferring = False
        self._deferred: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        self._held = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let what begins in this block be noted for cleaning up before a signal raises."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._deferred is not None:
            self._interrupt(self._deferred, None)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._deferring:
            self._deferred = number
        elif not self._held:
            self._held = True
            raise Interrupted(number)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to the parser of its subcommand."""
    parser.add_argument(
        "--host",
        metavar="URL",
        help="run against this PostHog instead of the embedded stand-in, with the keys in "
        + " and ".join(KEY_VARIABLES),
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; 0 if all it claims was observed, 1 if not, 2 if it cannot start."""
    try:
        _check_installed()
        with Interruptions() as interruptions:
            if arguments.host is not None:
                return _run(_real(arguments.host, os.environ), None, interruptions)
            with DefinitionsServer(demo_flags(on=False), latency_s=0.2) as server:
                return _run(_embedded(server), server, interruptions)
    except UsageError as error:
        print(f"shmflags demo: {error}", file=sys.stderr)
        return EXIT_USAGE
    except Interrupted as interruption:
        print("shmflags demo: interrupted, and cleaned up", file=sys.stderr)
        return 128 + interruption.number
    except BrokenPipeError:
        # Whoever read our output has gone; without this Python complains of it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_NOT_OBSERVED


def main(argv: Sequence[str] | None = None) -> int:
    """The demo as a command of its own."""
    parser = argparse.ArgumentParser(prog="shmflags demo", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _run(target: Target, server: DefinitionsServer | None, interruptions: Interruptions) -> int:
    screen = Screen(sys.stdout)
    what = "a stand-in for PostHog's API on this host" if server else target.host
    screen.say(f"shmflags demo: {WORKERS} gunicorn workers with the real SDK, and {what}")
    if server is None:
        screen.say("Requests cannot be counted there: what follows is what the workers report.")
    with ExitStack() as cleanup:
        with interruptions.deferred():
            directory = Path(tempfile.mkdtemp(prefix="shmflags-demo-"))
            cleanup.callback(shutil.rmtree, directory, ignore_errors=True)
            workers = Workers(_environment(target, directory), directory / "gunicorn.log")
            cleanup.callback(workers.stop)
            cleanup.callback(interruptions.hold)
        tour = Tour(screen, workers, target.interval_s, target.latency_s, server)
        try:
            tour.run()
        except WorkersGoneError as error:
            screen.result(False, f"gunicorn runs to the end: {error}")
        except StopTourError:
            pass  # its claim is in the results
        interruptions.hold()
        screen.step("gunicorn is stopped")
        screen.result(workers.stop(), "gunicorn has ended, and each of its processes")
        log = workers.log_tail()
    screen.result(not directory.exists(), "no file is left")
    screen.say()
    screen.say("Summary")
    tour.say_totals()
    if screen.summary():
        return EXIT_OK
    screen.say("\nThe last lines of gunicorn's log:")
    screen.quote(log)
    return EXIT_NOT_OBSERVED


def _check_installed() -> None:
    missing = [name for name in ("gunicorn", "posthog") if not importlib.util.find_spec(name)]
    if missing:
        raise UsageError(f"needs {' and '.join(missing)}: pip install 'shmflags[demo]'")


def _embedded(server: DefinitionsServer) -> Target:
    # Made-up keys: the user's own have no business at a stand-in.
    return Target(server.url, dict.fromkeys(KEY_VARIABLES, "demo"), interval_s=1.0, latency_s=0.2)


def _real(host: str, environment: Mapping[str, str]) -> Target:
    if not host.startswith(("http://", "https://")):
        raise UsageError(f"--host must begin with https:// or http://, not {host!r}")
    missing = [name for name in KEY_VARIABLES if not environment.get(name)]
    if missing:
        raise UsageError(f"--host needs {' and '.join(missing)} in the environment")
    keys = {name: environment[name] for name in KEY_VARIABLES}
    return Target(host, keys, interval_s=3.0, latency_s=1.0)


def _environment(target: Target, directory: Path) -> dict[str, str]:
    environment = dict(os.environ)
    environment.update(target.keys)
    environment["SHMFLAGS_DEMO_HOST"] = target.host
    environment["SHMFLAGS_DEMO_POLL_INTERVAL"] = str(target.interval_s)
    environment["SHMFLAGS_DIR"] = str(directory)
    # gunicorn puts its control socket there, or else into the home directory, and leaves it.
    environment["XDG_RUNTIME_DIR"] = str(directory)
    environment.pop("GUNICORN_CMD_ARGS", None)  # arguments meant for other servers
    # gunicorn is another process: a package that runs from a checkout is not on its path.
    package_parent = str(Path(__file__).resolve().parents[2])
    paths = [package_parent, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if target.host.startswith("http://127.0.0.1:"):
        for name in ("NO_PROXY", "no_proxy"):  # a proxy cannot reach our loopback
            environment[name] = ",".join(filter(None, [environment.get(name), "127.0.0.1"]))
    return environment
