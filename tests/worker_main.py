"""What runs in a worker process of the tests: a real client with a real cache, driven by a pipe."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from posthog import Posthog

from shmflags import SharedMemoryFlagCache
from shmflags.processes import Host

# A request of the SDK is retried within itself on a dropped connection; the tests count attempts.
CLIENT = {"secret_key": "phx_test", "sync_mode": True, "timeout": 5}


class CountingHost(Host):
    """This machine, with a count of how often the cache slept."""

    slept = 0

    def sleep(self, seconds: float) -> None:
        self.slept += 1
        super().sleep(seconds)


class Records(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


class Worker:
    """The commands that a test may give; each method is one."""

    def __init__(self) -> None:
        self.cache: SharedMemoryFlagCache | None = None
        self.client: Any = None
        self.records = Records()
        logger = logging.getLogger("shmflags")
        logger.addHandler(self.records)
        logger.setLevel(logging.DEBUG)

    def make_cache(self, service_key: str = "test", **arguments: Any) -> None:
        self.cache = SharedMemoryFlagCache(service_key, **arguments)
        self.cache._host = CountingHost()

    def make_client(self, url: str, *, poll_interval: float = 30.0) -> None:
        self.client = Posthog(
            "phc_test",
            host=url,
            poll_interval=poll_interval,
            flag_definition_cache_provider=self.cache,
            **CLIENT,
        )

    def evaluate(self, key: str) -> Any:
        """The flag's value, found locally; None if there are no definitions for it."""
        flags = self.client.evaluate_flags("somebody", only_evaluate_locally=True, flag_keys=[key])
        return flags.get_flag(key)

    def evaluate_in_threads(self, key: str, count: int) -> list[Any]:
        values: list[Any] = []
        threads = [
            threading.Thread(target=lambda: values.append(self.evaluate(key))) for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return values

    def evaluate_for(self, key: str, seconds: float, per_second: float) -> int:
        """Evaluate steadily, as requests come in; the number of evaluations."""
        count = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.evaluate(key)
            count += 1
            time.sleep(1 / per_second)
        return count

    def until(self, key: str, value: Any, timeout: float) -> bool:
        """Evaluate until the flag has the value."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.evaluate(key) == value:
                return True
            time.sleep(0.01)
        return False

    def poll(self) -> list[str]:
        """One poll, as the SDK's poller makes it; the flag keys after it."""
        self.client._load_feature_flags()
        return [flag["key"] for flag in self.client.feature_flags or []]

    def etag(self) -> Any:
        return self.client._flags_etag

    def should_fetch(self) -> bool:
        assert self.cache is not None
        return self.cache.should_fetch_flag_definitions()

    def get(self) -> Any:
        assert self.cache is not None
        return self.cache.get_flag_definitions()

    def receive(self, data: Any) -> None:
        assert self.cache is not None
        self.cache.on_flag_definitions_received(data)

    def shutdown(self) -> None:
        assert self.cache is not None
        self.cache.shutdown()

    def shutdown_client(self) -> None:
        self.client.shutdown()

    def attach(self, **arguments: Any) -> None:
        assert self.cache is not None
        self.cache.attach(self.client, **arguments)

    def slept(self) -> int:
        """How often the cache has slept so far."""
        assert self.cache is not None
        host = self.cache._host
        assert isinstance(host, CountingHost)
        return host.slept

    def lead_in_another_thread(self) -> None:
        """Poll from another thread until this process leads again."""
        assert self.cache is not None
        page = self.cache._member.known_page  # type: ignore[union-attr]
        token = self.cache._member.token  # type: ignore[union-attr]
        end = time.monotonic() + 30
        while page.lease().token != token:  # type: ignore[union-attr]
            thread = threading.Thread(target=self.should_fetch)
            thread.start()
            thread.join()
            if time.monotonic() > end:
                raise AssertionError("this process does not lead again")

    def shutdown_lease_only(self) -> None:
        """Make way for another leader, and go on as a follower."""
        assert self.cache is not None
        member = self.cache._member
        assert member is not None
        page = member.known_page
        assert page is not None
        assert member.election.resign(page)

    def fork_and_kill(self, key: str, count: int) -> list[Any]:
        """One after the other: fork a child, have it load and evaluate, and kill it."""
        values = []
        for _ in range(count):
            reader, writer = os.pipe()
            pid = os.fork()
            if not pid:
                try:
                    os.write(writer, json.dumps(self.evaluate(key)).encode())
                    time.sleep(60)
                finally:
                    os._exit(1)
            os.close(writer)
            values.append(json.loads(os.read(reader, 100) or b"null"))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
        return values

    def fork_and_kill_unanswered(self, count: int) -> float:
        """As above, but no answer ever comes: kill each child once it asks, waits or gives up."""
        start = time.monotonic()
        for _ in range(count):
            reader, writer = os.pipe()
            pid = os.fork()
            if not pid:
                try:
                    if self.should_fetch() or self.get() is None:
                        os.write(writer, b"f")
                        self.client._fetch_feature_flags_from_api()
                    os.write(writer, b"e")
                    time.sleep(60)
                finally:
                    os._exit(1)
            os.close(writer)
            if os.read(reader, 1) == b"f":
                time.sleep(0.05)  # Let the request reach the server.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
        return time.monotonic() - start

    def leave_mark(self, directory: str) -> None:
        """Tell others by a file that the commands before this one are done."""
        open(os.path.join(directory, f"mark-{os.getpid()}"), "x").close()

    def watchers_alive(self) -> list[bool]:
        """For each watcher of the cache whether its thread runs in this process, as the kernel sees it."""
        assert self.cache is not None
        threads = [watcher._thread for watcher in self.cache._watchers._all]
        return [
            thread is not None and os.path.exists(f"/proc/self/task/{thread.native_id}")
            for thread in threads
        ]

    def rows(self) -> list[list[Any]]:
        """The workers that `status` shows: pid and loaded generation of each."""
        assert self.cache is not None
        return [[worker.pid, worker.generation] for worker in self.cache.status().workers]

    def logged(self) -> list[str]:
        return list(self.records.lines)

    def fork(self, commands: list[tuple[str, tuple[Any, ...]]], count: int, raw: bool = False) -> Any:
        """Fork `count` children, run `commands` in each, and return each one's list of results.

        `raw` forks behind Python's back, so that no at-fork hook runs.
        """
        children = [self._fork_one(commands, raw) for _ in range(count)]
        return [_collect(pid, descriptor) for pid, descriptor in children]

    def _fork_one(self, commands: list[tuple[str, tuple[Any, ...]]], raw: bool) -> tuple[int, int]:
        reader, writer = os.pipe()
        if raw:
            import ctypes

            pid = ctypes.PyDLL(None).fork()
        else:
            pid = os.fork()
        if pid:
            os.close(writer)
            return pid, reader
        status = 1
        try:
            os.close(reader)
            results = [getattr(self, name)(*arguments) for name, arguments in commands]
            os.write(writer, json.dumps([os.getpid(), results]).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)


def _collect(pid: int, descriptor: int, timeout_s: float = 60.0) -> list[Any]:
    """What a forked child wrote, and its end; a child that hangs is killed."""
    text = b""
    end = time.monotonic() + timeout_s
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            break
        part = os.read(descriptor, 1 << 16)
        if not part:
            break
        text += part
    os.close(descriptor)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"forked child {pid} ended with status {status}")
    result: list[Any] = json.loads(text)
    return result


def main(connection: Connection) -> None:
    run(Worker(), connection)


def run(worker: Worker, connection: Connection) -> None:
    """Run commands from the pipe until it closes; each answer is ("ok", result) or ("error", text)."""
    while True:
        try:
            name, arguments, keywords = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        command: Callable[..., Any] = getattr(worker, name)
        try:
            answer: tuple[str, Any] = ("ok", command(*arguments, **keywords))
        except Exception:
            answer = ("error", traceback.format_exc())
        connection.send(answer)
