"""Workers whose cache has an upstream, and hosts and clusters made of them."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import redis

from shmflags import SharedMemoryFlagCache
from shmflags.redis import RedisFlagCache
from tests import support, worker_main
from tests.json_on_redis import AsyncJsonOnRedis, JsonOnRedis
from tests.support import WAIT_S


class Counted:
    """An upstream that notes in a file, shared by all processes, when it was asked."""

    def __init__(self, upstream: Any, path: str) -> None:
        self._upstream = upstream
        self._path = path
        if hasattr(upstream, "exchange_for_host"):
            self.exchange_for_host = self._exchange

    def should_fetch_flag_definitions(self) -> Any:
        self._note("ask")
        return self._upstream.should_fetch_flag_definitions()

    def _exchange(self, host: int, known: Any, *, again: bool) -> Any:
        self._note("look" if again else "ask")
        return self._upstream.exchange_for_host(host, known, again=again)

    def get_flag_definitions(self) -> Any:
        return self._upstream.get_flag_definitions()

    def on_flag_definitions_received(self, data: Any) -> Any:
        return self._upstream.on_flag_definitions_received(data)

    def shutdown(self) -> Any:
        return self._upstream.shutdown()

    def _note(self, what: str) -> None:
        with open(self._path, "a") as file:
            file.write(f"{what} {time.monotonic()}\n")


class Noting:
    """An upstream that says fetch, and notes what it is called for."""

    def __init__(self) -> None:
        self.noted: list[str] = []

    def should_fetch_flag_definitions(self) -> Any:
        self.noted.append("ask")
        return True

    def get_flag_definitions(self) -> Any:
        return None

    def on_flag_definitions_received(self, data: Any) -> Any:
        self.noted.append("receive")

    def shutdown(self) -> Any:
        self.noted.append("shutdown")


class AsyncNoting(Noting):
    """The same, on an event loop, with a reader on it: what a forked child could break."""

    async def should_fetch_flag_definitions(self) -> Any:
        await asyncio.sleep(0)
        return super().should_fetch_flag_definitions()

    async def on_flag_definitions_received(self, data: Any) -> Any:
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.01)
        return super().on_flag_definitions_received(data)

    async def shutdown(self) -> Any:
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.01)
        return super().shutdown()


class ClusterWorker(worker_main.Worker):
    """The commands of a worker, and those that need an upstream."""

    def __init__(self) -> None:
        super().__init__()
        self.upstream: Any = None

    def make_tiers(
        self,
        directory: str,
        redis_port: int,
        poll_interval: float,
        *,
        kind: str = "redis",
        counted_in: str = "",
        **arguments: Any,
    ) -> None:
        """A host's cache with an upstream on Redis."""
        client: Any
        if kind == "async":
            client = redis.asyncio.Redis(port=redis_port, decode_responses=True)
            self.upstream = AsyncJsonOnRedis(client, "test")
        else:
            client = redis.Redis(port=redis_port, decode_responses=True)
            if kind == "json":
                self.upstream = JsonOnRedis(client, "test", **arguments)
            else:
                self.upstream = RedisFlagCache(client, "test", poll_interval=poll_interval, **arguments)
        upstream = Counted(self.upstream, counted_in) if counted_in else self.upstream
        self.cache = SharedMemoryFlagCache(
            "test",
            directory=directory,
            poll_interval=poll_interval,
            max_term=3600.0,  # Making way in time would mend much of what is to be found here.
            upstream=upstream,
        )

    def make_noting_tiers(self, poll_interval: float, *, is_async: bool = False) -> None:
        self.upstream = AsyncNoting() if is_async else Noting()
        self.directory = tempfile.TemporaryDirectory(prefix="shmflags-test-")
        self.cache = SharedMemoryFlagCache(
            "test",
            directory=self.directory.name,
            poll_interval=poll_interval,
            upstream=self.upstream,
        )

    def until_told(self) -> None:
        assert self.cache is not None
        support.wait_until(self.cache.should_fetch_flag_definitions, "it is told to fetch", 20)

    def noted(self) -> list[str]:
        return list(self.upstream.noted)

    def end_loops(self) -> int:
        """As the end of a process does: end all event loops that it finds, its parent's too."""
        loops = [each for each in gc.get_objects() if isinstance(each, asyncio.AbstractEventLoop)]
        for loop in loops:
            loop.close()
        return len(loops)

    def make_redis_cache(self, redis_port: int, poll_interval: float, **arguments: Any) -> None:
        """RedisFlagCache alone, without a host's cache."""
        client = redis.Redis(port=redis_port)
        arguments = {"poll_interval": poll_interval, **arguments}
        self.cache = RedisFlagCache(client, "my-service", **arguments)  # type: ignore[assignment]

    def trusts_its_etag(self) -> bool:
        """Whether, told to fetch, RedisFlagCache would be content with a 304."""
        cache: Any = self.cache
        cache._here()
        return bool(cache._received == cache._held.digest)

    def poll_in_threads(self, count: int) -> None:
        """Threads that do nothing but poll, until the process ends."""

        def poll() -> None:
            assert self.cache is not None
            while True:
                self.cache.should_fetch_flag_definitions()
                self.cache.get_flag_definitions()

        for _ in range(count):
            threading.Thread(target=poll, daemon=True).start()

    def leads_cluster(self) -> bool:
        return bool(self.upstream._here().term)

    def leads_host(self) -> bool:
        assert self.cache is not None
        member = self.cache._me()
        page = member.known_page
        return page is not None and page.lease().token == member.token

    def slowest_of(self, key: str, value: Any, seconds: float) -> float:
        """Evaluate for so long, as requests come in; the longest that one took, in seconds."""
        slowest = 0.0
        end = time.monotonic() + seconds
        while (start := time.monotonic()) < end:
            found = self.evaluate(key)
            if found != value:
                raise AssertionError(f"{key} is {found!r}, not {value!r}")
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.02)
        return slowest


def main(connection: Connection) -> None:
    worker_main.run(ClusterWorker(), connection)


class Worker(support.Worker):
    """A worker process that runs a `ClusterWorker`."""

    def __init__(self) -> None:
        super().__init__(main)


# Imported once, by the process that all workers are forked from.
support._context.set_forkserver_preload(["tests.worker_main", "tests.cluster_worker"])


class Host:
    """Workers that share a directory, and the Redis (or a proxy of it) that they reach."""

    def __init__(self, directory: Path, redis_port: int, workers: list[Worker]) -> None:
        self.directory = directory
        self.redis_port = redis_port
        self.workers = workers

    def leader(self) -> Worker:
        """The one that leads this host; asked when they have settled."""
        found = [worker for worker in self.workers if worker.call("leads_host")]
        assert len(found) == 1, f"{len(found)} leaders"
        return found[0]

    def kill(self, worker: Worker) -> None:
        worker.kill()
        self.workers.remove(worker)


class Cluster:
    """Hosts that share a Redis; a context manager makes them all at the same time."""

    def __init__(self, hosts: list[Host]) -> None:
        self.hosts = hosts

    @property
    def workers(self) -> list[Worker]:
        return [worker for host in self.hosts for worker in host.workers]

    def call_all(self, command: str, *arguments: Any, **keywords: Any) -> list[Any]:
        return support.call_all(list(self.workers), command, *arguments, **keywords)

    def all_get(self, key: str, value: Any, timeout_s: float = WAIT_S / 2) -> None:
        """Wait until every worker evaluates `key` to `value`."""
        assert all(self.call_all("until", key, value, timeout_s)), f"not all got {key} = {value!r}"


@contextmanager
def cluster(
    base: Path,
    url: str,
    redis_ports: list[int],
    workers: int,
    poll_interval: float,
    *,
    attached: bool = False,
    by_hand: bool = False,
    **arguments: Any,
) -> Iterator[Cluster]:
    """A cluster with one host per port and real clients, which nobody has used yet.

    The clients poll by themselves, unless it is to be done `by_hand`, by the command `poll`.
    """
    with ExitStack() as stack:
        hosts = []
        for number, port in enumerate(redis_ports):
            directory = base / f"host-{number}"
            directory.mkdir(mode=0o700, parents=True)
            group: list[Worker] = []
            hosts.append(Host(directory, port, group))
            for _ in range(workers):
                worker = Worker()
                stack.callback(worker.close)
                group.append(worker)
                counted_in = str(directory / "exchanges")
                worker.start(
                    "make_tiers",
                    str(directory),
                    port,
                    poll_interval,
                    counted_in=counted_in,
                    **arguments,
                )
        made = Cluster(hosts)
        for worker in made.workers:
            worker.result()
        made.call_all("make_client", url, poll_interval=3600.0 if by_hand else poll_interval)
        if attached:
            made.call_all("attach", watch=not by_hand)
        yield made


__all__ = ["Cluster", "ClusterWorker", "Host", "Worker", "cluster"]
