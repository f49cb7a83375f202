"""More than one host: real workers on several directories, a real Redis, and what can happen to it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from shmflags.demo.server import DefinitionsServer, Request, definitions, flag
from shmflags.redis_server import state_key
from tests.cluster_worker import Cluster, cluster
from tests.proxy import Proxy
from tests.redis_program import RedisProgram
from tests.support import wait_until

INTERVAL_S = 0.5
LEASE_S = 2.0
ON, OFF = definitions(flag("one")), definitions(flag("one", on=False))


@dataclass(frozen=True)
class Site:
    """A cluster, what it talks to, and how its hosts reach Redis."""

    run: Cluster
    server: DefinitionsServer
    program: RedisProgram
    proxies: list[Proxy]

    def published(self) -> bytes | None:
        """The digest of what is in Redis."""
        with self.program.client() as client:
            return client.hget(state_key("test"), "digest")

    def flip(self, data: dict[str, object], value: bool) -> None:
        """Change the flag at the API; every worker gets it."""
        self.server.set_definitions(data)
        self.run.all_get("one", value)

    def shares_again(self) -> None:
        """Wait until, over two intervals, the cluster asks the API no more often than one host does."""

        def is_calm() -> bool:
            before, start_s = self.server.count, time.monotonic()
            wait_until(lambda: time.monotonic() > start_s + 2 * INTERVAL_S, "two intervals have passed")
            return self.server.count - before <= 3

        wait_until(is_calm, "the hosts share again", 20)

    @contextmanager
    def meanwhile(self, value: bool, seconds: float) -> Iterator[None]:
        """For so long, all workers evaluate all the time, promptly and to `value`, whatever happens in
        the block; and each host asks the API at most once per interval."""
        workers = self.run.workers
        for worker in workers:
            worker.start("slowest_of", "one", value, seconds)
        start_s = time.monotonic()
        yield
        slowest = max(worker.result() for worker in workers)
        assert slowest < 1.0, "an evaluation was held up"
        self.assert_bounded(start_s)

    def assert_bounded(self, start_s: float) -> None:
        """At most one request per host and interval since then: from whatever host, in any interval."""
        times = [each.time_s for each in self.server.requests if each.time_s >= start_s]
        for first in times:
            together = sum(first <= each < first + INTERVAL_S * 0.8 for each in times)
            assert together <= len(self.run.hosts), times


@contextmanager
def running(
    directory: Path,
    hosts: int = 2,
    workers: int = 2,
    *,
    up: bool = True,
    attached: bool = False,
    lease_s: float = LEASE_S,
) -> Iterator[Site]:
    """Hosts that reach Redis, if it is `up`, through a proxy each; all loaded, with the flag on."""
    with RedisProgram() as program, DefinitionsServer(ON) as server:
        if not up:
            program.kill()
        proxies = [Proxy(program.port) for _ in range(hosts)]
        ports = [proxy.port for proxy in proxies]
        try:
            with cluster(
                directory,
                server.url,
                ports,
                workers,
                INTERVAL_S,
                attached=attached,
                lease_ttl=lease_s,
            ) as run:
                site = Site(run, server, program, proxies)
                assert run.call_all("evaluate", "one") == [True] * (hosts * workers)
                yield site
        finally:
            for proxy in proxies:
                proxy.close()


def noted(run: Cluster, what: str) -> list[list[float]]:
    """For each host, when its upstream was asked ("ask"), or looked at again ("look")."""
    return [
        [
            float(line.split()[1])
            for line in (host.directory / "exchanges").read_text().splitlines()
            if line.startswith(what)
        ]
        for host in run.hosts
    ]


def statuses(requests: list[Request]) -> Counter[int]:
    return Counter(each.status for each in requests)


# -- what it is for


def test_a_cluster_makes_the_requests_of_one_process(directory: Path) -> None:
    """4 hosts of 4 workers, 1 s polls, 4 s: 5 requests, 1 of them full, one exchange per interval."""
    with (
        RedisProgram() as program,
        DefinitionsServer(ON, latency_s=0.2) as server,
        cluster(directory, server.url, [program.port] * 4, 4, 1.0) as run,
    ):
        assert run.call_all("evaluate", "one") == [True] * 16
        loaded_s, first_s = time.monotonic(), server.requests[0].time_s
        wait_until(lambda: time.monotonic() > first_s + 4.5, "4.5 s have passed")
        requests = [each for each in server.requests if each.time_s <= first_s + 4.5]
        asked = [sum(at <= first_s + 4.5 for at in host) for host in noted(run, "ask")]
        looked = [at for host in noted(run, "look") for at in host]
        assert run.call_all("evaluate", "one") == [True] * 16
    assert 2 <= len(requests) <= 5
    assert statuses(requests)[200] == 1
    assert all(2 <= count <= 5 for count in asked), asked
    assert all(at <= loaded_s for at in looked)  # Only for the very first definitions.


@pytest.mark.parametrize("kind", ["json", "async"])
def test_posthogs_own_way_as_upstream(directory: Path, kind: str) -> None:
    """With PostHog's sync and async examples above them, hosts share as well: one fetches for all."""
    with (
        RedisProgram() as program,
        DefinitionsServer(ON, latency_s=0.2) as server,
        cluster(directory, server.url, [program.port] * 2, 2, INTERVAL_S, kind=kind) as run,
    ):
        assert run.call_all("evaluate", "one") == [True] * 4
        assert server.full == 1
        server.set_definitions(OFF)
        run.all_get("one", False)
        assert server.full == 2


def test_a_change_reaches_every_worker(directory: Path) -> None:
    """A flag that changes at the API is fetched in full once, and evaluated everywhere."""
    with running(directory, hosts=3) as site:
        for number, (data, value) in enumerate([(OFF, False), (ON, True), (OFF, False)]):
            site.flip(data, value)
            assert site.server.full == 2 + number


def test_a_new_host_needs_no_request(directory: Path) -> None:
    """A host that comes later takes what is in Redis."""
    with RedisProgram() as program, DefinitionsServer(ON) as server:
        ports = [program.port]
        with cluster(directory / "a", server.url, ports, 1, 30.0) as first:
            assert first.call_all("evaluate", "one") == [True]
            with cluster(directory / "b", server.url, ports, 2, 30.0) as second:
                assert second.call_all("evaluate", "one") == [True, True]
        assert server.count == 1


def test_a_client_loaded_before_the_fork(directory: Path) -> None:
    """Children of a process that loaded have its flags, leave its lease alone, and ask nobody."""
    with (
        RedisProgram() as program,
        program.client() as admin,
        DefinitionsServer(ON) as server,
        cluster(directory, server.url, [program.port], 1, 30.0) as run,
    ):
        (worker,) = run.workers
        assert worker.call("evaluate", "one") is True
        before = admin.hgetall(state_key("test"))
        story = [("evaluate", ("one",)), ("poll", ()), ("shutdown_client", ())]
        for _, results in worker.call("fork", story, 4):
            assert results[:2] == [True, ["one"]]
        assert admin.hgetall(state_key("test")) == before
        assert server.count == 1
        assert worker.call("leads_cluster")


# -- the ETag rule across two hosts


def poll_until(condition: Callable[[], bool], what: str, *runs: Cluster) -> None:
    """Have the workers poll, by command, until the condition holds."""

    def polled() -> bool:
        for run in runs:
            run.call_all("poll")
        return condition()

    wait_until(polled, what, 20)


@pytest.mark.parametrize("copied", [False, True], ids=["missed", "copied"])
@pytest.mark.parametrize("attached", [False, True], ids=["unattached", "attached"])
@pytest.mark.parametrize("kind", ["redis", "json"])
def test_a_stale_etag_freezes_no_other_host(
    directory: Path, kind: str, attached: bool, copied: bool
) -> None:
    """Host A fetched D0, B fetched D1 and died, the API is back at D0, and A leads: all get D0.

    A's client would be told 304, and D1 would stay upstream, for ever, for all other hosts. It is
    the same whether A saw D1 meanwhile or not, and whether its clients are attached or not.
    """
    redis = {"lease_ttl": 600.0, "max_term": 3600.0}
    lease = redis if kind == "redis" else {"lock_s": 600.0}
    with RedisProgram() as program, program.client() as admin, DefinitionsServer(ON) as server:

        def end_lease() -> None:
            if kind == "redis":
                admin.hset(state_key("test"), "until", 0)
            else:
                admin.delete("flags:test:lock")

        def host(name: str) -> AbstractContextManager[Cluster]:
            return cluster(
                directory / name,
                server.url,
                [program.port],
                2,
                0.2,
                kind=kind,
                attached=attached,
                by_hand=True,
                **lease,
            )

        with host("a") as a:
            poll_until(lambda: server.full == 1, "A has fetched D0", a)
            first = a.hosts[0].leader()
            with host("b") as b:
                server.set_definitions(OFF)
                end_lease()
                poll_until(lambda: server.full == 2, "B leads and has fetched D1", b)
                if copied:
                    poll_until(lambda: not any(a.call_all("evaluate", "one")), "A has D1", a)
            server.set_definitions(ON)
            end_lease()
            asked = server.count
            poll_until(lambda: server.count > asked, "A leads and asks the API", a)

            def all_have_it(run: Cluster) -> bool:
                if kind == "json" and not first.call("leads_host"):
                    end_lease()  # Its lock is its own, and it no longer asks for it.
                    poll_until(lambda: True, "", a)
                return all(run.call_all("evaluate", "one"))

            poll_until(lambda: all_have_it(a), "A has D0", a)
            with host("c") as c:
                poll_until(lambda: all_have_it(c), "C has D0", a, c)


# -- what can happen


def test_redis_down_at_start(directory: Path) -> None:
    """Without Redis each host fetches for itself; when it comes, the hosts share, without help."""
    with running(directory, up=False) as site:
        assert site.server.full == 2
        with site.meanwhile(True, 4 * INTERVAL_S):
            pass
        site.program.start()
        wait_until(lambda: site.published() is not None, "one host publishes to Redis", 20)
        site.shares_again()
        site.flip(OFF, False)


def test_redis_killed_and_restarted_empty(directory: Path) -> None:
    """Redis dies and comes back empty: hosts fetch for themselves meanwhile, and share again after."""
    with running(directory) as site:
        with site.program.client() as client:
            client.set("mark", "here")
        with site.meanwhile(True, 6 * INTERVAL_S):
            site.program.kill()
        site.flip(OFF, False)
        site.program.start()
        with site.program.client() as client:
            assert client.get("mark") is None, "it came back empty"
        wait_until(lambda: site.published() is not None, "one host publishes to Redis", 20)
        site.shares_again()
        site.flip(ON, True)


def test_redis_restarted_at_once(directory: Path) -> None:
    """A Redis that is restarted between two polls is filled again, though nothing changed at all."""
    with running(directory) as site:
        with site.meanwhile(True, 6 * INTERVAL_S):
            site.program.kill()
            site.program.start()
        wait_until(lambda: site.published() is not None, "one host publishes to Redis", 20)


def test_a_lone_attached_host_fills_an_empty_redis(directory: Path) -> None:
    """A single worker whose client would be told 304 for ever fills a restarted Redis all the same."""
    with running(directory, hosts=1, workers=1, attached=True) as site:
        site.program.kill()
        site.program.start()
        wait_until(lambda: site.published() is not None, "it publishes to Redis", 20)


def test_redis_slow(directory: Path) -> None:
    """A Redis whose answers take seconds holds up no evaluation, and no host for long."""
    with running(directory) as site:
        with site.meanwhile(True, 8 * INTERVAL_S):
            for proxy in site.proxies:
                proxy.delay(3.0)
        site.flip(OFF, False)
        for proxy in site.proxies:
            proxy.heal()
        site.shares_again()
        site.flip(ON, True)


def test_redis_a_little_slow(directory: Path) -> None:
    """A Redis at some distance is used all the same: one host fetches for all."""
    with running(directory) as site:
        for proxy in site.proxies:
            proxy.delay(0.05)
        site.shares_again()
        full = site.server.full
        site.flip(OFF, False)
        assert site.server.full == full + 1


def test_redis_full(directory: Path) -> None:
    """A Redis that takes no writes: hosts fetch for themselves, and share again when it does."""
    with running(directory) as site, site.program.client() as admin:
        admin.config_set("maxmemory-policy", "noeviction")
        with site.meanwhile(True, 6 * INTERVAL_S):
            admin.config_set("maxmemory", "1")
        site.flip(OFF, False)
        admin.config_set("maxmemory", "0")
        site.shares_again()
        site.flip(ON, True)


def test_redis_refuses_authentication(directory: Path) -> None:
    """A Redis that demands another password: hosts fetch for themselves, until it does not."""
    with running(directory) as site, site.program.client() as admin:
        with site.meanwhile(True, 6 * INTERVAL_S):
            admin.config_set("requirepass", "changed")
            for proxy in site.proxies:
                proxy.drop()
        site.flip(OFF, False)
        admin.execute_command("AUTH", "changed")
        admin.config_set("requirepass", "")
        site.shares_again()
        site.flip(ON, True)


def test_one_host_cut_off(directory: Path) -> None:
    """A host that cannot reach Redis fetches for itself; the others share; it joins them again."""
    with running(directory) as site:
        with site.meanwhile(True, 8 * INTERVAL_S):
            site.proxies[0].cut()
        site.flip(OFF, False)
        site.proxies[0].heal()
        site.shares_again()
        site.flip(ON, True)


def test_a_host_leader_is_killed_with_the_clusters_lease(directory: Path) -> None:
    """Its successor on the host has the cluster's lease at once, and nobody asks more often."""
    with running(directory, lease_s=600.0) as site:
        site.shares_again()
        (host,) = [each for each in site.run.hosts if each.leader().call("leads_cluster")]
        start_s = time.monotonic()
        host.kill(host.leader())
        successor = host.workers[0]
        wait_until(lambda: successor.call("leads_cluster"), "the successor leads the cluster", 20)
        site.flip(OFF, False)
        site.assert_bounded(start_s)


def test_the_leading_host_dies(directory: Path) -> None:
    """When the host that leads dies whole, another one leads when the lease has ended."""
    with running(directory) as site:
        site.shares_again()
        (host,) = [each for each in site.run.hosts if each.leader().call("leads_cluster")]
        start_s = time.monotonic()
        for worker in list(host.workers):
            host.kill(worker)
        site.flip(OFF, False)
        site.assert_bounded(start_s)
