"""Worker processes, waiting, the smallest definitions, and what a test needs from the machine."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from shmflags import settings
from shmflags.contract import Definitions, FlagDefinitionCacheProvider
from shmflags.local_publish import LocalPublisher
from shmflags.processes import Host, Identity
from shmflags.snapshot import DEFAULT_MAX_BYTES
from tests import worker_main

WAIT_S = 60.0
"""Bound of any wait; reached only when something is wrong."""

EMPTY: Definitions = {"flags": [], "group_type_mapping": {}, "cohorts": {}}
"""What a cache hands out that has nothing."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.worker_main"])


class Worker:
    """A worker process with a client of its own (worker_main.py), commanded through a pipe."""

    def __init__(self, main: Callable[[Connection], None] = worker_main.main) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._process = _context.Process(target=main, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def start(self, command: str, *arguments: Any, **keywords: Any) -> Worker:
        """Give a command and do not wait."""
        self._connection.send((command, arguments, keywords))
        return self

    def result(self, timeout_s: float = WAIT_S) -> Any:
        """The result of the command given last."""
        if not self._connection.poll(timeout_s):
            raise TimeoutError(f"worker {self.pid} did not answer within {timeout_s} s")
        kind, value = self._connection.recv()
        if kind == "error":
            raise AssertionError(f"in worker {self.pid}:\n{value}")
        return value

    def call(self, command: str, *arguments: Any, **keywords: Any) -> Any:
        """Give a command and return its result."""
        return self.start(command, *arguments, **keywords).result()

    def has_answered(self) -> bool:
        return self._connection.poll(0)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join(WAIT_S)
        assert not self._process.is_alive()

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        self.signal(signal.SIGSTOP)
        wait_until(lambda: state_of(self.pid) == "T", "the process stops")

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        self._connection.close()


def state_of(pid: int) -> str:
    """What the kernel has a process do, in its letter: "R" runs, "S" sleeps, "T" is stopped, …"""
    return _stat_of(pid)[0]


def identity_of(pid: int, host: Host) -> Identity:
    """Who a process on this host is, by what the kernel says and not by what the package finds."""
    return host.identity()._replace(pid=pid, start_ticks=int(_stat_of(pid)[19]))


def _stat_of(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat that follow the name, which may have anything in it."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].decode().split()


@contextmanager
def workers(count: int, kind: Callable[[], Worker] = Worker) -> Iterator[list[Worker]]:
    """`count` worker processes of that kind, gone after the block."""
    running: list[Worker] = []
    try:
        for _ in range(count):
            running.append(kind())
        yield running
    finally:
        for worker in running:
            worker.close()


def call_all(group: list[Worker], command: str, *arguments: Any, **keywords: Any) -> list[Any]:
    """Give all the same command at the same time; their results in order."""
    for worker in group:
        worker.start(command, *arguments, **keywords)
    return [worker.result() for worker in group]


def poll_in_turn(group: list[Worker]) -> None:
    """One poll each: on a busy machine, workers that poll at once may find the lock busy and give up."""
    for worker in group:
        worker.call("poll")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    """Wait for something that no event tells of; fails when `timeout_s` is over."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {timeout_s} s in vain until {what}")
        time.sleep(0.005)


def made_of(*keys: str) -> Definitions:
    """Definitions with a flag per key, and nothing else in them."""
    return {"flags": [{"key": key} for key in keys], "group_type_mapping": {}, "cohorts": {}}


def publish(cache: FlagDefinitionCacheProvider, *keys: str) -> None:
    """Be told to fetch, and receive what is made of `keys`."""
    assert cache.should_fetch_flag_definitions() is True
    cache.on_flag_definitions_received(made_of(*keys))


def served(cache: FlagDefinitionCacheProvider) -> list[str]:
    """The keys of the flags that the cache hands out."""
    return [flag["key"] for flag in cache.get_flag_definitions()["flags"]]


def open_descriptors() -> set[str]:
    """Those of this process, after what nobody refers to any more, such as a map, has closed its own."""
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


def local_publisher(directory: Path, key: str = "test", *, force: bool = False) -> LocalPublisher:
    """A publisher with the settings of `shmflags publish`."""
    told = settings.check(key, directory, DEFAULT_MAX_BYTES, poll_interval=10.0, cold_start_timeout=0.0)
    return LocalPublisher(told, force=force)


def require_program(name: str) -> str:
    """The path of a program that a test drives; skips without it, fails where none may be missing."""
    # What was installed beside this Python comes first: an environment need not be activated.
    places = [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]
    path = shutil.which(name, path=os.pathsep.join(places))
    if path is None:
        if os.environ.get("SHMFLAGS_REQUIRE_SERVERS"):
            pytest.fail(f"{name} is not installed, and no server-backed test may be skipped here")
        pytest.skip(f"{name} is not installed")
    return path


def require_root() -> None:
    """Skips where the tests do not run as root; fails where none may be skipped."""
    if os.geteuid() != 0:
        if os.environ.get("SHMFLAGS_REQUIRE_SERVERS"):
            pytest.fail("the tests do not run as root, and none may be skipped here")
        pytest.skip("only root can start processes of another user, or in other namespaces")


__all__ = [
    "EMPTY",
    "Connection",
    "Worker",
    "call_all",
    "identity_of",
    "local_publisher",
    "made_of",
    "poll_in_turn",
    "publish",
    "require_program",
    "require_root",
    "served",
    "state_of",
    "wait_until",
    "workers",
]
