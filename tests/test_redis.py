"""`RedisFlagCache` by itself, on a real redis-server: contract, election, wire, forks, failures."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.sentinel import Sentinel

from shmflags import codec, redis_server, validate_provider
from shmflags.demo.server import DefinitionsServer, definitions, flag
from shmflags.errors import RedisUnavailableError
from shmflags.redis import RedisFlagCache
from shmflags.redis_server import state_key
from tests.cluster_worker import Worker
from tests.proxy import Proxy
from tests.redis_program import RedisProgram
from tests.support import EMPTY, WAIT_S, call_all, made_of, publish, served, wait_until, workers

KEY = "my-service"


@pytest.fixture(scope="module")
def program() -> Iterator[RedisProgram]:
    with RedisProgram() as running:
        yield running


@pytest.fixture
def server_client(program: RedisProgram) -> Iterator[redis.Redis]:
    """A client of an empty Redis."""
    with program.client() as client:
        client.config_set("maxmemory", "0")
        client.flushall()
        yield client


class Caches:
    """Makes caches, and shuts them down at the end."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._made: list[RedisFlagCache] = []

    def __call__(self, port: int | None = None, **arguments: Any) -> RedisFlagCache:
        arguments.setdefault("poll_interval", 3600.0)
        cache = RedisFlagCache(redis.Redis(port=port or self.port), KEY, **arguments)
        self._made.append(cache)
        return cache

    def close(self) -> None:
        for cache in self._made:
            cache.shutdown()


@pytest.fixture
def cache(program: RedisProgram, server_client: redis.Redis) -> Iterator[Caches]:
    caches = Caches(program.port)
    yield caches
    caches.close()


def until_told(cache: RedisFlagCache) -> None:
    wait_until(cache.should_fetch_flag_definitions, "it is told to fetch", 10)


def until_granted(cache: RedisFlagCache) -> None:
    """It is told to fetch by Redis, and not left to itself."""
    wait_until(
        lambda: cache.should_fetch_flag_definitions() and not cache._here().thread.alone,
        "it is told to fetch by Redis",
        10,
    )


def poll_until(condition: Callable[[], bool], what: str, *polling: RedisFlagCache) -> None:
    """Have caches poll until the condition holds."""

    def polled() -> bool:
        for cache in polling:
            cache.should_fetch_flag_definitions()
        return condition()

    wait_until(polled, what, 10)


def until_settled(cache: RedisFlagCache) -> None:
    poll_until(lambda: cache._here().pending is None, "what waited was published, or dropped", cache)


def publish_waiting(cache: RedisFlagCache) -> None:
    """What a poll does first, and not the rest of it."""
    process = cache._here()
    process.server._quiet_until_s = 0.0  # As if it had left Redis alone for long enough.
    cache._publish_pending(process)
    assert process.pending is None


def pass_time(client: redis.Redis, seconds: float) -> None:
    """As if so much time had passed for Redis: its times are moved back."""
    for field in ("until", "grant", "since", "barred_until", "fetched"):
        value = client.hget(state_key(KEY), field)
        if value is not None:
            client.hset(state_key(KEY), field, str(int(value) - int(seconds * 1000)))


# -- construction


def test_it_is_a_provider(cache: Caches) -> None:
    """It has PostHog's four methods, and connects to nothing when it is made."""
    validate_provider(RedisFlagCache(redis.Redis(port=1), KEY))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"redis_client": None}, TypeError),
        ({"redis_client": "redis://localhost"}, TypeError),
        ({"redis_client": "an async client"}, TypeError),
        ({"service_key": ""}, ValueError),
        ({"service_key": 3}, TypeError),
        ({"poll_interval": 0}, ValueError),
        ({"poll_interval": "30"}, TypeError),
        ({"poll_interval": float("nan")}, ValueError),
        ({"lease_ttl": 30.0}, ValueError),
        ({"max_term": -1}, ValueError),
        ({"cold_start_timeout": -1}, ValueError),
        ({"socket_timeout": 0}, ValueError),
        ({"max_bytes": "1"}, TypeError),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    """A wrong argument is refused at construction, by name."""
    given: dict[str, Any] = {"redis_client": redis.Redis(), "service_key": KEY} | arguments
    if given["redis_client"] == "an async client":
        given["redis_client"] = redis.asyncio.Redis()
    with pytest.raises(error, match=next(iter(arguments))):
        RedisFlagCache(**given)


@pytest.mark.parametrize("key", ["a}b{c", "{", "}", "a b", "ä", "x" * 300, "\0", "\ud800", "a\r\nb"])
def test_hostile_service_keys_stay_within_their_braces(key: str) -> None:
    """Whatever the service key holds, both names lie in one hash slot, and differ from other keys'."""
    name = state_key(key)
    assert name.isascii()
    assert name.startswith("shmflags:1:{")
    assert name.endswith("}")
    assert name.count("{") == name.count("}") == 1
    assert len({state_key(each) for each in (key, key + "x", "x")}) == 3


# -- the contract


def test_one_fetches_and_all_have_it(cache: Caches) -> None:
    """The first is told to fetch, the others are not, and get what it published, unknown keys too."""
    leader, follower = cache(), cache()
    data = made_of("a") | {"cohorts": {"1": {"x": 2**100}}, "new": [1.0, None, "\ud800"]}
    assert leader.should_fetch_flag_definitions() is True
    assert follower.should_fetch_flag_definitions() is False
    leader.on_flag_definitions_received(data)
    assert follower.get_flag_definitions() == data
    assert leader.get_flag_definitions() == data


def test_unchanged_definitions_are_the_same_objects(cache: Caches, server_client: redis.Redis) -> None:
    """Nothing new means the objects given before; a change decodes only what changed."""
    leader, follower = cache(), cache()
    publish(leader, "a", "b")
    before = follower.get_flag_definitions()
    assert follower.get_flag_definitions() is before
    pass_time(server_client, 3600)
    publish(leader, "a", "c")
    after = follower.get_flag_definitions()
    assert after == made_of("a", "c")
    assert after["flags"][0] is before["flags"][0]


def test_an_unchanged_poll_moves_under_200_bytes(program: RedisProgram, cache: Caches) -> None:
    """A poll that finds nothing new moves less than 200 bytes, to and fro, however large the flags."""
    with Proxy(program.port) as proxy:
        leader, follower = cache(proxy.port), cache(proxy.port)
        publish(leader, *(f"flag-{number}" for number in range(1000)))
        for each in (leader, follower):
            each.should_fetch_flag_definitions()
            each.get_flag_definitions()
        for each in (leader, follower):
            before = proxy.traffic
            assert each.should_fetch_flag_definitions() is False
            assert len(each.get_flag_definitions()["flags"]) == 1000
            moved = proxy.traffic.since(before)
            assert 50 < moved.total < 200
        before = proxy.traffic
        follower.get_flag_definitions()
        assert 50 < proxy.traffic.since(before).total < 100


def test_eight_threads_load_once(program: RedisProgram, cache: Caches) -> None:
    """However many threads come first, the definitions are read from Redis once."""
    publish(cache(), "a")
    follower = cache()
    before = program.commands()["get"]
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(follower.get_flag_definitions())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(found) == 8
    assert len({id(each) for each in found}) == 1
    assert program.commands()["get"] - before == 1


def test_nothing_to_be_had_is_waited_for_once(cache: Caches) -> None:
    """Without definitions a process waits once for the first publish, and then answers empty ones."""
    leader, follower = cache(), cache(cold_start_timeout=0.5)
    assert leader.should_fetch_flag_definitions() is True
    for waits in (True, False, False):
        start = time.monotonic()
        assert follower.should_fetch_flag_definitions() is False
        assert follower.get_flag_definitions() == EMPTY
        assert (time.monotonic() - start >= 0.5) is waits
    leader.on_flag_definitions_received(made_of("a"))
    assert served(follower) == ["a"]


def test_the_first_publish_ends_the_wait(cache: Caches) -> None:
    """Who waits for the first publish gets it when it comes."""
    leader, follower = cache(), cache(cold_start_timeout=WAIT_S)
    assert leader.should_fetch_flag_definitions() is True
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(served(follower)))
    thread.start()
    leader.on_flag_definitions_received(made_of("a"))
    thread.join(WAIT_S / 2)
    assert found == [["a"]]


@pytest.mark.parametrize(
    "data", [None, [], {"flags": 3}, {"flags": []}, made_of("b") | {"x": object()}]
)
def test_a_bad_publish_loses_nothing(cache: Caches, data: Any) -> None:
    """What cannot be stored is logged, and what was served stays."""
    leader = cache()
    publish(leader, "a")
    leader.on_flag_definitions_received(data)
    assert served(cache()) == ["a"]


def test_what_is_too_large_is_not_shared(cache: Caches) -> None:
    """Definitions over `max_bytes` are neither written nor read."""
    small, large = cache(max_bytes=2048), cache(cold_start_timeout=0.0)
    publish(small, "x" * 4000)
    assert large.get_flag_definitions() == EMPTY
    large.on_flag_definitions_received(made_of("x" * 4000))
    assert served(large) == ["x" * 4000]
    assert served(small) == ["x" * 4000]  # Its own fetch.
    assert cache(max_bytes=2048).get_flag_definitions() == EMPTY


# -- election


def test_a_grant_is_due_after_half_an_interval(cache: Caches, server_client: redis.Redis) -> None:
    """Due-ness is kept in Redis: it is the cluster's last grant that counts, whoever leads."""
    leader, other = cache(), cache()
    publish(leader, "a")
    pass_time(server_client, 1700)
    assert leader.should_fetch_flag_definitions() is False
    leader.shutdown()
    assert other.should_fetch_flag_definitions() is False
    pass_time(server_client, 200)
    assert other.should_fetch_flag_definitions() is True
    assert cache().should_fetch_flag_definitions() is False


def test_a_dead_leader_is_replaced_when_its_lease_ends(
    cache: Caches, server_client: redis.Redis
) -> None:
    """Until the lease ends nobody else is told to fetch; then the next one is, in a higher term."""
    leader, other = cache(lease_ttl=7200), cache(lease_ttl=7200)
    publish(leader, "a")
    term = int(server_client.hget(state_key(KEY), "term") or 0)
    pass_time(server_client, 7100)
    assert other.should_fetch_flag_definitions() is False
    pass_time(server_client, 200)
    assert other.should_fetch_flag_definitions() is True
    assert int(server_client.hget(state_key(KEY), "term") or 0) > term


def test_a_lease_from_the_future_is_taken(cache: Caches, server_client: redis.Redis) -> None:
    """After a failover to a clock that is behind, a lease that ends too far ahead binds nobody."""
    leader, other = cache(), cache()
    publish(leader, "a")
    pass_time(server_client, -100_000)
    assert other.should_fetch_flag_definitions() is True
    assert leader.should_fetch_flag_definitions() is False


def test_a_deposed_leader_publishes_nothing(cache: Caches, server_client: redis.Redis) -> None:
    """What was fetched in an earlier term is dropped, also if its fetcher has been elected again."""
    leader, other = cache(lease_ttl=7200), cache(lease_ttl=7200)
    publish(leader, "old")
    pass_time(server_client, 3600)
    assert leader.should_fetch_flag_definitions() is True
    pass_time(server_client, 7300)
    publish(other, "new")
    leader.on_flag_definitions_received(made_of("older"))
    assert served(cache()) == served(leader) == ["new"]

    assert leader.should_fetch_flag_definitions() is False
    pass_time(server_client, 7300)
    stopped = threading.Event()
    told: list[bool] = []

    def fetch_for_long() -> None:
        told.append(leader.should_fetch_flag_definitions())
        assert stopped.wait(WAIT_S)
        leader.on_flag_definitions_received(made_of("older"))

    thread = threading.Thread(target=fetch_for_long)
    thread.start()
    wait_until(lambda: told == [True], "the slow fetch is granted")
    pass_time(server_client, 7300)
    publish(other, "newer")
    pass_time(server_client, 7300)
    assert leader.should_fetch_flag_definitions() is True  # Elected again, in another thread.
    stopped.set()
    thread.join(WAIT_S)
    assert served(cache()) == ["newer"]
    leader.on_flag_definitions_received(made_of("newest"))
    assert served(cache()) == ["newest"]


def test_the_first_publish_is_taken_from_anybody(cache: Caches) -> None:
    """As long as there is nothing, what somebody fetched on its own is better; afterwards it is not."""
    leader, other, third = cache(), cache(), cache()
    assert leader.should_fetch_flag_definitions() is True
    other.on_flag_definitions_received(made_of("a"))
    third.on_flag_definitions_received(made_of("b"))
    assert served(cache()) == ["a"]
    leader.on_flag_definitions_received(made_of("c"))
    assert served(cache()) == ["c"]


def test_shutdown_hands_over_at_once(cache: Caches, server_client: redis.Redis) -> None:
    """A leader that shuts down is replaced at the next poll; one that never led changes nothing."""
    leader, other, third = cache(), cache(), cache()
    publish(leader, "a")
    third.shutdown()
    third.shutdown()
    assert other.should_fetch_flag_definitions() is False
    leader.shutdown()
    leader.shutdown()
    pass_time(server_client, 1900)
    assert other.should_fetch_flag_definitions() is True
    assert leader.should_fetch_flag_definitions() is False
    assert served(leader) == ["a"]


def test_max_term_makes_way(cache: Caches, server_client: redis.Redis) -> None:
    """Whoever has led for `max_term` makes way for an interval, even if its polls are in time."""
    leader, other = cache(max_term=3000), cache(max_term=3000)
    publish(leader, "a")
    for seconds in (2000, 2000):
        pass_time(server_client, seconds)
        told = leader.should_fetch_flag_definitions()
    assert told is False
    assert leader.should_fetch_flag_definitions() is False
    assert other.should_fetch_flag_definitions() is True


def test_a_doubtful_etag_makes_way(cache: Caches, server_client: redis.Redis) -> None:
    """A leader that once fetched something else must bring a publish, or another one fetches."""
    first, second, third = cache(lease_ttl=7200), cache(lease_ttl=7200), cache(lease_ttl=7200)
    publish(first, "a")
    pass_time(server_client, 8000)
    publish(second, "b")
    pass_time(server_client, 8000)
    assert first.should_fetch_flag_definitions() is True  # And is told 304, as the flags are "a" again.
    pass_time(server_client, 3600)
    assert first.should_fetch_flag_definitions() is False
    publish(third, "a")
    assert served(first) == served(second) == ["a"]


def test_a_leader_that_brings_nothing_makes_way_at_a_cold_start(
    cache: Caches, server_client: redis.Redis
) -> None:
    """While there is nothing to serve, one whose fetch fails lets another one try."""
    failing, other = cache(cold_start_timeout=0.0), cache(cold_start_timeout=0.0)
    assert failing.should_fetch_flag_definitions() is True
    pass_time(server_client, 3600)
    assert failing.should_fetch_flag_definitions() is False
    assert other.should_fetch_flag_definitions() is True


def test_a_lone_worker_whose_fetch_fails_tries_again(cache: Caches, server_client: redis.Redis) -> None:
    """With nobody to make way for, it is told to fetch again at every second poll at least."""
    lone = cache(cold_start_timeout=0.0)
    told = []
    for _ in range(6):
        told.append(lone.should_fetch_flag_definitions())
        pass_time(server_client, 3601)
    assert told == [True, False, True, False, True, False]


# -- for a host


def test_the_lease_stays_with_a_host_whose_leader_changes(
    cache: Caches, server_client: redis.Redis
) -> None:
    """Processes that ask for one host share its lease; each has a term of its own, fenced as ever."""
    before, after, elsewhere = cache(), cache(), cache()
    assert before.exchange_for_host(7, None, again=False).fetch is True
    before.on_flag_definitions_received(made_of("a"))
    pass_time(server_client, 3600)
    assert before.exchange_for_host(7, None, again=False).fetch is True
    assert elsewhere.exchange_for_host(8, None, again=False).fetch is False
    pass_time(server_client, 3600)
    assert after.exchange_for_host(7, None, again=False).fetch is True
    before.on_flag_definitions_received(made_of("old"))
    assert served(cache()) == ["a"]
    after.on_flag_definitions_received(made_of("new"))
    assert served(cache()) == ["new"]
    assert (before._held, after._held) == (None, None)  # The host's cache holds them.


def test_what_a_host_holds_is_given_back(program: RedisProgram, cache: Caches) -> None:
    """Definitions that the host holds already are not read again, and not held twice."""
    publish(cache(), "a")
    asking = cache()
    _, known = codec.encode(made_of("a"))
    before = program.commands().get("get", 0)
    exchange = asking.exchange_for_host(7, known, again=False)
    assert exchange.definitions is known.definitions
    assert program.commands().get("get", 0) == before
    slow = asking.exchange_for_host(7, None, again=False).definitions
    assert slow == made_of("a")
    # A host that had given up waiting for it does not wait for it again.
    assert asking.exchange_for_host(7, None, again=False).definitions is slow
    assert program.commands()["get"] == before + 1
    asking.exchange_for_host(7, known, again=False)
    assert (asking._held, asking._here().loaded) == (None, None)


def test_a_host_that_looks_again_is_no_candidate(cache: Caches, server_client: redis.Redis) -> None:
    """Whoever waits for another host's first publish only looks, and is told to fetch no more."""
    leader, other = cache(), cache()
    assert leader.exchange_for_host(7, None, again=False).fetch is True
    for again in (False, True, True):
        nothing = other.exchange_for_host(8, None, again=again)
        assert (nothing.fetch, nothing.definitions, nothing.digest) == (False, None, b"")
    leader.on_flag_definitions_received(made_of("a"))
    assert other.exchange_for_host(8, None, again=True).definitions == made_of("a")
    leader.shutdown()
    pass_time(server_client, 3600)
    assert other.exchange_for_host(8, None, again=True).fetch is False
    assert other.exchange_for_host(8, None, again=False).fetch is True


# -- clients


def assert_two_share(client: Any) -> None:
    """Of two caches that have this client, one serves what the other publishes."""
    first, second = (RedisFlagCache(client, KEY, poll_interval=3600.0) for _ in range(2))
    publish(first, "a")
    assert second.should_fetch_flag_definitions() is False
    assert served(second) == ["a"]
    first.shutdown()
    second.shutdown()


@pytest.mark.parametrize("kind", ["decoding", "url", "blocking pool", "single connection", "resp2"])
def test_any_client_will_do(program: RedisProgram, cache: Caches, kind: str) -> None:
    """How the application's client decodes, pools and speaks does not matter; it is left alone."""
    port = program.port
    clients: dict[str, Callable[[], Any]] = {
        "decoding": lambda: redis.Redis(port=port, decode_responses=True, health_check_interval=1),
        "url": lambda: redis.Redis.from_url(f"redis://127.0.0.1:{port}/3"),
        "blocking pool": lambda: redis.Redis(
            connection_pool=redis.BlockingConnectionPool(port=port, max_connections=1, timeout=1)
        ),
        "single connection": lambda: redis.Redis(port=port, single_connection_client=True),
        "resp2": lambda: redis.Redis(port=port, protocol=2, socket_timeout=0.5),
    }
    with clients[kind]() as client:
        busy = client.pubsub()
        if kind == "blocking pool":
            busy.subscribe("something")  # That was the pool's only connection.
        assert_two_share(client)
        busy.close()
        client.flushdb()


def test_a_unix_socket_and_a_password(tmp_path: Any) -> None:
    """Servers that are reached by a socket in the file system, with a password, are served too."""
    path = f"/tmp/shmflags-{os.getpid()}-{time.monotonic_ns()}.sock"
    with RedisProgram("--unixsocket", path, "--requirepass", "secret"):
        client = redis.Redis(unix_socket_path=path, password="secret")
        assert_two_share(client)
        client.close()


def test_valkeys_client_is_the_same(program: RedisProgram, cache: Caches) -> None:
    """A `valkey.Valkey` client works as a `redis.Redis` client does."""
    valkey = pytest.importorskip("valkey")
    client = valkey.Valkey(port=program.port, decode_responses=True)
    assert_two_share(client)
    client.close()


# -- forks


def test_made_before_a_fork_one_of_all_leads(program: RedisProgram, server_client: redis.Redis) -> None:
    """A cache made, and used, before a fork leaves one leader; each child connects for itself."""
    with workers(1, Worker) as (worker,):
        worker.call("make_redis_cache", program.port, 3600.0)
        children = worker.call("fork", [("should_fetch", ())], 4)
        assert sorted(results[0] for _, results in children) == [False, False, False, True]
        pass_time(server_client, 100_000)
        assert worker.call("should_fetch") is True
        worker.call("receive", made_of("a"))
        lease = server_client.hmget(state_key(KEY), "token", "term", "until")
        for raw in (False, True):
            children = worker.call(
                "fork", [("should_fetch", ()), ("get", ()), ("shutdown", ())], 4, raw=raw
            )
            assert [results[:2] for _, results in children] == [[False, made_of("a")]] * 4
        # No child renewed the lease, took it over, or handed it on.
        assert server_client.hmget(state_key(KEY), "token", "term", "until") == lease
        pass_time(server_client, 2000)
        assert worker.call("should_fetch") is True


def test_a_fork_amidst_a_fetch(program: RedisProgram, server_client: redis.Redis) -> None:
    """A child forked while its parent fetches does not rely on an ETag that it cannot know."""
    with workers(1, Worker) as (worker,):
        worker.call("make_redis_cache", program.port, 3600.0)
        assert worker.call("should_fetch") is True
        worker.call("receive", made_of("a"))
        assert worker.call("fork", [("trusts_its_etag", ())], 1)[0][1] == [True]
        pass_time(server_client, 3600)
        assert worker.call("should_fetch") is True
        assert worker.call("fork", [("trusts_its_etag", ())], 1)[0][1] == [False]
        assert worker.call("trusts_its_etag") is True
        assert worker.call("should_fetch") is False  # It was told 304.
        assert worker.call("fork", [("trusts_its_etag", ())], 1)[0][1] == [True]


def test_a_fork_amidst_polls(program: RedisProgram, server_client: redis.Redis) -> None:
    """Children forked while threads of the parent talk to Redis all get through."""
    with workers(1, Worker) as (worker,):
        worker.call("make_redis_cache", program.port, 3600.0)
        worker.call("should_fetch")
        worker.call("receive", made_of("a"))
        worker.call("poll_in_threads", 4)
        for _ in range(5):
            children = worker.call("fork", [("should_fetch", ()), ("get", ())], 4)
            assert [results for _, results in children] == [[False, made_of("a")]] * 4


def test_real_clients_alone_on_redis(program: RedisProgram, server_client: redis.Redis) -> None:
    """8 real clients on RedisFlagCache alone load with one full request, and see a change."""
    one = definitions(flag("one"))
    with workers(8, Worker) as group, DefinitionsServer(one, latency_s=0.2) as server:
        call_all(group, "make_redis_cache", program.port, 0.5)
        call_all(group, "make_client", server.url, poll_interval=0.5)
        assert call_all(group, "evaluate", "one") == [True] * 8
        assert server.full == 1
        server.set_definitions(definitions(flag("one", on=False)))
        assert all(call_all(group, "until", "one", False, WAIT_S / 2))
        assert server.full == 2


# -- failures


def test_without_redis_a_worker_is_on_its_own(cache: Caches) -> None:
    """If Redis refuses, each worker fetches for itself once in half an interval, and nothing raises."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = probe.getsockname()[1]
    alone = cache(nobody, poll_interval=1.0)
    assert alone.should_fetch_flag_definitions() is True
    assert alone.should_fetch_flag_definitions() is False
    assert alone.get_flag_definitions() == EMPTY
    alone.on_flag_definitions_received(made_of("a"))
    assert served(alone) == ["a"]
    until_told(alone)
    alone.shutdown()


def test_a_silent_redis_is_waited_for_no_longer_than_told(program: RedisProgram, cache: Caches) -> None:
    """A Redis that does not answer costs one bounded wait, then it is left alone for a while."""
    with Proxy(program.port) as proxy:
        silent = cache(proxy.port, socket_timeout=0.3)
        publish(silent, "a")
        proxy.cut()
        start = time.monotonic()
        assert silent.should_fetch_flag_definitions() in (True, False)
        assert 0.25 < time.monotonic() - start < 5
        start = time.monotonic()
        for _ in range(20):
            silent.should_fetch_flag_definitions()
            assert served(silent) == ["a"]
        assert time.monotonic() - start < 0.25


def test_a_publish_that_failed_is_made_good(program: RedisProgram, cache: Caches) -> None:
    """What could not be published is published at a later poll, if nobody else led meanwhile."""
    with Proxy(program.port) as proxy:
        leader, follower = cache(proxy.port, poll_interval=0.2, lease_ttl=60.0), cache(lease_ttl=7200)
        publish(leader, "a")
        until_told(leader)
        proxy.point_at(1)
        proxy.drop()
        leader.on_flag_definitions_received(made_of("b"))
        assert served(follower) == ["a"]
        proxy.point_at(program.port)
        poll_until(lambda: served(follower) == ["b"], "it is published", leader)


def test_a_restart_is_survived(cache: Caches) -> None:
    """Redis killed and started empty: all go on serving, one is told to fetch, and all have that."""
    with RedisProgram() as own:
        first, second = (cache(own.port, poll_interval=0.4, lease_ttl=60.0) for _ in range(2))
        publish(first, "a")
        assert served(second) == ["a"]
        own.kill()
        first.should_fetch_flag_definitions()
        assert served(first) == served(second) == ["a"]
        own.start()
        with own.client() as admin:
            poll_until(lambda: admin.hget(state_key(KEY), "grant") is not None, "one is told", first)
        assert served(first) == served(second) == ["a"]
        first.on_flag_definitions_received(made_of("b"))
        poll_until(lambda: served(second) == ["b"], "the other one has it", second)


def test_a_failover_that_loses_the_lock(cache: Caches) -> None:
    """A replica that never heard of the lease elects anew; the old leader's fetch is dropped there."""
    with RedisProgram() as old, RedisProgram() as new, Proxy(old.port) as proxy:
        first, second = (
            cache(proxy.port, poll_interval=0.4, lease_ttl=60.0, socket_timeout=0.5) for _ in range(2)
        )
        publish(first, "a")
        until_told(first)  # It fetches while the failover happens.
        proxy.point_at(new.port)
        proxy.drop()
        with new.client() as admin:
            poll_until(lambda: admin.hget(state_key(KEY), "grant") is not None, "it elects", second)
        second.on_flag_definitions_received(made_of("b"))
        first.on_flag_definitions_received(made_of("old"))
        poll_until(lambda: served(first) == ["b"], "it has what the new leader published", first)
        assert served(second) == ["b"]


def test_a_demoted_server_is_left(cache: Caches) -> None:
    """A server that became a replica, and keeps its connections open, is not clung to."""
    with RedisProgram() as old, RedisProgram() as new, Proxy(old.port) as proxy:
        leader = cache(proxy.port, poll_interval=0.4, lease_ttl=60.0)
        publish(leader, "a")
        proxy.point_at(new.port)
        with old.client() as admin:
            admin.replicaof("127.0.0.1", new.port)
        with new.client() as admin:
            poll_until(
                lambda: admin.hget(state_key(KEY), "token") is not None, "it elects there", leader
            )


def test_sentinel_failover(cache: Caches) -> None:
    """Behind Sentinel, with a client from `master_for`, a failover is followed without help."""
    with (
        RedisProgram() as master,
        RedisProgram("--replicaof", "127.0.0.1", str(master.port)) as replica,
        SentinelProgram(master.port) as sentinel,
    ):
        manager = Sentinel([("127.0.0.1", sentinel.port)], socket_timeout=0.5)
        wait_until(lambda: len(manager.discover_slaves("flags")) == 1, "Sentinel sees the replica", 30)
        first, second = (
            RedisFlagCache(
                manager.master_for("flags", retry=None), KEY, poll_interval=0.4, lease_ttl=2.0
            )
            for _ in range(2)
        )
        publish(first, "a")
        assert served(second) == ["a"]
        with replica.client() as client:
            wait_until(lambda: client.hget(state_key(KEY), "digest") is not None, "it is replicated")
        master.kill()
        wait_until(
            lambda: second.should_fetch_flag_definitions() and second._here().term > 0,
            "the replica was promoted and elects",
            40,
        )
        second.on_flag_definitions_received(made_of("b"))
        with replica.client() as client:
            assert client.hget(state_key(KEY), "generation") == b"2"
        first.shutdown()
        second.shutdown()


class SentinelProgram(RedisProgram):
    """A Sentinel, alone, that watches the server on `port` as "flags"."""

    def __init__(self, port: int) -> None:
        self._watched = port
        super().__init__()

    def start(self) -> None:
        import subprocess
        from pathlib import Path

        configuration = Path(self._directory.name) / "sentinel.conf"
        configuration.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self._directory.name}\n"
            f"sentinel monitor flags 127.0.0.1 {self._watched} 1\n"
            "sentinel down-after-milliseconds flags 500\nsentinel failover-timeout flags 3000\n"
        )
        self._process = subprocess.Popen(
            [self._program, str(configuration), "--sentinel"], stdout=subprocess.DEVNULL
        )
        wait_until(self._answers, "Sentinel answers", 20)


@pytest.mark.parametrize("damage", ["gone", "cut", "garbage", "poisoned", "foreign"])
def test_damaged_definitions_are_replaced(
    cache: Caches, server_client: redis.Redis, damage: str
) -> None:
    """Definitions that are gone or damaged are not served; the next fetch has to bring them anew."""
    leader = cache(cold_start_timeout=0.0)
    publish(leader, "a")
    name = f"{state_key(KEY)}:definitions"
    whole: Any = server_client.get(name)
    bad = {
        "cut": whole[:-1],
        "garbage": os.urandom(len(whole)),
        "poisoned": whole[:-1] + bytes([whole[-1] ^ 1]),
        "foreign": b'{"flags": []}',
    }
    if damage == "gone":
        server_client.delete(name)
    else:
        server_client.set(name, bad[damage])
    newcomer = cache(cold_start_timeout=0.0)
    assert newcomer.should_fetch_flag_definitions() is False
    assert newcomer.get_flag_definitions() == EMPTY
    assert served(leader) == ["a"]
    pass_time(server_client, 3600)
    publish(leader, "a")
    assert served(newcomer) == ["a"]


def test_evicted_definitions_are_written_again(cache: Caches, server_client: redis.Redis) -> None:
    """If Redis evicted the definitions unnoticed, the next publish writes them, even if unchanged."""
    leader, newcomer = cache(), cache(cold_start_timeout=0.0)
    publish(leader, "a")
    server_client.delete(f"{state_key(KEY)}:definitions")
    pass_time(server_client, 3600)
    publish(leader, "a")
    assert served(newcomer) == ["a"]


def test_a_value_is_checked_before_it_is_decoded() -> None:
    """Every single changed byte of a value is noticed."""
    encoded, _ = codec.encode(made_of("a", "b") | {"cohorts": {"1": [1, 2, 3]}})
    whole = redis_server.pack(encoded)
    assert redis_server.unpack(whole, None).definitions == made_of("a", "b") | {
        "cohorts": {"1": [1, 2, 3]}
    }
    for place in range(len(whole)):
        changed = whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]
        with pytest.raises(redis_server.DamagedSnapshotError):
            redis_server.unpack(changed, None)


def test_a_full_redis(cache: Caches, server_client: redis.Redis) -> None:
    """A Redis without memory left: workers are on their own, and share again when there is some."""
    leader, follower = (
        cache(poll_interval=0.4, lease_ttl=60.0),
        cache(poll_interval=0.4, lease_ttl=60.0),
    )
    publish(leader, "a")
    assert served(follower) == ["a"]
    server_client.config_set("maxmemory", "1")
    until_told(leader)
    leader.on_flag_definitions_received(made_of("b"))
    leader._here().server._quiet_until_s = 0.0  # As if it had left Redis alone for long enough.
    assert served(leader) == ["b"], "it does not go back to what is older, which can be read"
    assert served(follower) == ["a"]
    server_client.config_set("maxmemory", "0")
    poll_until(lambda: served(follower) == ["b"], "what was fetched meanwhile is shared", leader)


@pytest.fixture
def alone(cache: Caches, server_client: redis.Redis) -> Iterator[list[RedisFlagCache]]:
    """Three workers that share "a", the first of which led, when Redis has become full."""
    group = [cache(poll_interval=0.4, lease_ttl=60.0) for _ in range(3)]
    publish(group[0], "a")
    assert [served(each) for each in group] == [["a"]] * 3
    pass_time(server_client, 3600)
    server_client.config_set("maxmemory", "1")
    for each in group:
        until_told(each)
    yield group
    server_client.config_set("maxmemory", "0")


@pytest.mark.parametrize("first", [0, 1], ids=["who led", "another one"])
def test_what_was_fetched_without_redis_is_shared(
    cache: Caches, server_client: redis.Redis, alone: list[RedisFlagCache], first: int
) -> None:
    """Whoever comes back first: nobody's client would get it once more, as all have its ETag."""
    key = "b" * 100_000
    for each in alone:
        each.on_flag_definitions_received(made_of(key))
    server_client.config_set("maxmemory", "0")
    before: Any = server_client.info("stats")
    until_settled(alone[first])
    assert served(cache(cold_start_timeout=0.0)) == [key]
    for each in alone:
        until_settled(each)
        assert served(each) == [key]
    assert server_client.hget(state_key(KEY), "generation") == b"2"
    after: Any = server_client.info("stats")
    moved = after["total_net_input_bytes"] - before["total_net_input_bytes"]
    assert moved < 2 * len(key), "the others see that it is there, and do not send it again"


def test_what_a_host_fetched_without_redis_is_shared(cache: Caches, server_client: redis.Redis) -> None:
    """The same if it is asked on behalf of a host."""
    leader, other = cache(poll_interval=0.4, lease_ttl=60.0), cache(poll_interval=0.4, lease_ttl=60.0)
    publish(leader, "a")
    pass_time(server_client, 3600)
    server_client.config_set("maxmemory", "1")
    with pytest.raises(RedisUnavailableError):
        other.exchange_for_host(7, None, again=False)
    other.on_flag_definitions_received(made_of("b"))
    server_client.config_set("maxmemory", "0")
    other._here().server._quiet_until_s = 0.0
    other.exchange_for_host(7, None, again=False)
    assert served(cache(cold_start_timeout=0.0)) == ["b"]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)], ids=["in order", "the later one first"])
def test_of_fetches_without_redis_the_later_one_counts(
    cache: Caches, server_client: redis.Redis, alone: list[RedisFlagCache], order: tuple[int, int]
) -> None:
    """They are ordered by when they were begun, and not by who comes back first.

    (Unless Redis has told somebody to fetch by then, as it does at the first poll.)
    """
    alone[1]._here().thread.begun_s -= 1.0  # As if it had been told a second earlier.
    alone[1].on_flag_definitions_received(made_of("b"))
    alone[2].on_flag_definitions_received(made_of("c"))
    server_client.config_set("maxmemory", "0")
    for number in order:
        publish_waiting(alone[number])
    assert served(cache(cold_start_timeout=0.0)) == ["c"]


def test_a_fetch_without_redis_that_brought_what_is_there_counts_too(
    cache: Caches, server_client: redis.Redis, alone: list[RedisFlagCache]
) -> None:
    """It confirms what is there, so that what was fetched before it is dropped."""
    alone[1]._here().thread.begun_s -= 1.0
    alone[1].on_flag_definitions_received(made_of("b"))
    alone[2].on_flag_definitions_received(made_of("a"))
    server_client.config_set("maxmemory", "0")
    publish_waiting(alone[2])
    publish_waiting(alone[1])
    assert served(cache(cold_start_timeout=0.0)) == ["a"]


def test_a_fetch_without_redis_is_not_late_by_another_clock(
    cache: Caches, server_client: redis.Redis, alone: list[RedisFlagCache]
) -> None:
    """What another Redis noted, the clock of which was ahead, outdates nothing."""
    alone[1].on_flag_definitions_received(made_of("b"))
    server_client.config_set("maxmemory", "0")
    pass_time(server_client, -9000)
    publish_waiting(alone[1])
    assert served(cache(cold_start_timeout=0.0)) == ["b"]


def test_a_fetch_without_redis_brings_back_what_was_lost(
    cache: Caches, server_client: redis.Redis, alone: list[RedisFlagCache]
) -> None:
    """Definitions that are gone, while their digest is not, are written again."""
    alone[1].on_flag_definitions_received(made_of("a"))
    server_client.config_set("maxmemory", "0")
    server_client.delete(f"{state_key(KEY)}:definitions")
    publish_waiting(alone[1])
    assert served(cache(cold_start_timeout=0.0)) == ["a"]


@pytest.mark.parametrize("later", ["c", "a", ""], ids=["changed", "unchanged", "not modified"])
def test_a_fetch_without_redis_does_not_overtake_a_later_one(
    cache: Caches, server_client: redis.Redis, alone: list[RedisFlagCache], later: str
) -> None:
    """Once another one has come to its end, what was fetched alone before is dropped, whatever that brought."""
    alone[1].on_flag_definitions_received(made_of("b"))
    server_client.config_set("maxmemory", "0")
    until_granted(alone[0])
    if later:
        alone[0].on_flag_definitions_received(made_of(later))
    else:
        assert alone[0].should_fetch_flag_definitions() is False
    expected = [later or "a"]
    assert alone[1]._here().pending is not None
    alone[1]._here().server._quiet_until_s = 0.0
    assert served(alone[1]) == expected, "it takes what is newer, even before it could publish"
    until_settled(alone[1])
    poll_until(lambda: served(alone[1]) == expected, "it takes what is newer", alone[1])
    assert served(cache(cold_start_timeout=0.0)) == expected


def test_a_grant_that_came_to_nothing_does_not_count(
    cache: Caches, server_client: redis.Redis, alone: list[RedisFlagCache]
) -> None:
    """A poll may be carried out when nobody waits for its answer any more, or who was told may die."""
    for each in alone[1:]:
        each.on_flag_definitions_received(made_of("b"))
    server_client.config_set("maxmemory", "0")
    told: Any = server_client.time()
    server_client.hset(state_key(KEY), "grant", str(told[0] * 1000 + told[1] // 1000))
    until_settled(alone[1])
    assert served(cache(cold_start_timeout=0.0)) == ["b"]


def test_a_clock_that_was_moved_back_drops_nothing_for_long(
    cache: Caches, server_client: redis.Redis
) -> None:
    """After a failover to a clock that is behind, what was noted by the other one is forgotten."""
    leader = cache()
    publish(leader, "a")
    pass_time(server_client, -9000)
    assert leader.should_fetch_flag_definitions() is True
    assert leader.should_fetch_flag_definitions() is False
    told: Any = server_client.hmget(state_key(KEY), "grant", "fetched")
    assert int(told[1]) <= int(told[0])
    leader.on_flag_definitions_received(made_of("b"))
    assert served(cache(cold_start_timeout=0.0)) == ["b"]


def test_who_was_told_before_does_not_overtake_who_fetched_alone(
    cache: Caches, server_client: redis.Redis, alone: list[RedisFlagCache]
) -> None:
    """A leader's fetch that takes long brings what is older than what was fetched meanwhile."""
    server_client.config_set("maxmemory", "0")
    until_granted(alone[0])
    pass_time(server_client, 1)
    alone[1]._here().thread.begun_s = redis_server.now_s()
    alone[1]._here().server._quiet_until_s = 0.0
    alone[1].on_flag_definitions_received(made_of("b"))
    alone[0].on_flag_definitions_received(made_of("older"))
    assert served(cache(cold_start_timeout=0.0)) == ["b"]


def test_what_was_fetched_alone_is_kept_whatever_redis_had(
    cache: Caches, server_client: redis.Redis
) -> None:
    """It may have had something newer than what this worker held; its own fetch is newer still."""
    leader, other = cache(), cache(poll_interval=0.4, lease_ttl=60.0)
    publish(leader, "a")
    assert served(other) == ["a"]
    pass_time(server_client, 3600)
    publish(leader, "b")
    pass_time(server_client, 1)
    server_client.config_set("maxmemory", "1")
    for key in "cd":
        until_told(other)
        other.on_flag_definitions_received(made_of(key))
        other._here().server._quiet_until_s = 0.0
        assert served(other) == [key]
    server_client.config_set("maxmemory", "0")


def test_what_is_received_while_something_is_loaded_stays(
    cache: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread loads what is in Redis, and another one receives what is newer: that is held then."""
    leader, other = cache(), cache()
    publish(leader, "a")
    load = other._load

    def slow(*arguments: Any) -> Any:
        found = load(*arguments)
        other.on_flag_definitions_received(made_of("b"))
        return found

    monkeypatch.setattr(other, "_load", slow)
    assert served(other) == ["b"]


def test_a_child_does_not_publish_in_its_parents_term(
    program: RedisProgram, server_client: redis.Redis
) -> None:
    """What its parent was told to fetch, and may publish later, is its parent's."""
    with workers(1, Worker) as (worker,):
        worker.call("make_redis_cache", program.port, 3600.0)
        assert worker.call("should_fetch") is True
        worker.call("receive", made_of("a"))
        pass_time(server_client, 3600)
        assert worker.call("should_fetch") is True
        server_client.config_set("maxmemory", "1")
        worker.call("receive", made_of("b"))
        server_client.config_set("maxmemory", "0")
        worker.call("fork", [("should_fetch", ())], 1)
        assert server_client.hget(state_key(KEY), "generation") == b"1"


def test_a_child_forked_without_redis_has_what_was_fetched(
    program: RedisProgram, server_client: redis.Redis
) -> None:
    """It does not go back to what is older, and publishes it if its parent does not live to do so."""
    with workers(1, Worker) as (worker,):
        worker.call("make_redis_cache", program.port, 0.4)
        assert worker.call("should_fetch") is True
        worker.call("receive", made_of("a"))
        pass_time(server_client, 3600)
        server_client.config_set("maxmemory", "1")
        wait_until(lambda: worker.call("should_fetch"), "it is told to fetch", 10)
        worker.call("receive", made_of("b"))
        assert worker.call("fork", [("get", ())], 1)[0][1] == [made_of("b")]
        server_client.config_set("maxmemory", "0")
        worker.call("fork", [("should_fetch", ())], 1)
        assert server_client.hget(state_key(KEY), "generation") == b"2"


def test_refused_authentication(cache: Caches) -> None:
    """A Redis that wants another password: workers are on their own until it takes theirs."""
    with RedisProgram() as own, own.client() as admin:
        leader = cache(own.port, poll_interval=0.4, lease_ttl=60.0)
        publish(leader, "a")
        admin.config_set("requirepass", "other")
        leader._here().server.close()
        until_told(leader)
        assert leader._here().server._error.startswith("AuthenticationError")
        leader.on_flag_definitions_received(made_of("b"))
        assert served(leader) == ["b"]
        admin.execute_command("AUTH", "other")
        admin.config_set("requirepass", "")
        follower = cache(own.port, poll_interval=0.4, lease_ttl=60.0)
        poll_until(lambda: served(follower) == ["b"], "what was fetched is shared", leader)
