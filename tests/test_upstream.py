"""A host's cache and the provider above it: who asks, what the answers mean, what can go wrong."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmflags import SharedMemoryFlagCache, codec
from shmflags.demo.server import DefinitionsServer, definitions, flag
from shmflags.upstream import PATIENCE_S
from tests.cluster_worker import Worker
from tests.manual_host import INTERVAL_S, Group, Machine, ManualHost
from tests.support import WAIT_S, made_of, publish, served, wait_until, workers


class Upstream:
    """Says what the test tells it to, and notes what it was asked and given."""

    def __init__(self, fetch: object = True, content: object = None) -> None:
        self.fetch = fetch
        self.content = content
        self.before: Callable[[], None] = lambda: None
        self.asked = 0
        self.received: list[Any] = []
        self.shutdowns = 0

    def should_fetch_flag_definitions(self) -> Any:
        self.asked += 1
        self.before()
        return self.fetch

    def get_flag_definitions(self) -> Any:
        if isinstance(self.content, BaseException):
            raise self.content
        return self.content

    def on_flag_definitions_received(self, data: Any) -> Any:
        self.received.append(data)

    def shutdown(self) -> Any:
        self.shutdowns += 1


class Workers(Group):
    """Workers of one service key on one machine, with an upstream; all are shut down at the end."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._made: list[SharedMemoryFlagCache] = []

    def __call__(self, upstream: Any, **arguments: Any) -> SharedMemoryFlagCache:
        cache = self.worker(upstream=upstream, **arguments)
        self._made.append(cache)
        return cache

    def close(self) -> None:
        for cache in self._made:
            cache.shutdown()

    def poll(self, cache: SharedMemoryFlagCache) -> bool:
        """A poll one interval later."""
        self.machine.pass_time(INTERVAL_S)
        return cache.should_fetch_flag_definitions()


@pytest.fixture
def worker(directory: Path) -> Iterator[Workers]:
    workers = Workers(directory)
    yield workers
    workers.close()


# -- who asks, and when


def test_only_the_leader_asks_and_only_when_a_fetch_is_due(worker: Workers) -> None:
    """Followers never ask the upstream, and the leader asks it when the host's last grant is old."""
    upstream = Upstream(fetch=False, content=made_of("a"))
    leader, follower = worker(upstream), worker(upstream)
    for _ in range(3):
        assert leader.should_fetch_flag_definitions() is False
        assert follower.should_fetch_flag_definitions() is False
    assert upstream.asked == 1
    worker.machine.pass_time(INTERVAL_S)
    for _ in range(3):
        assert follower.should_fetch_flag_definitions() is False
        assert leader.should_fetch_flag_definitions() is False
    assert upstream.asked == 2


def test_a_reader_never_asks(worker: Workers) -> None:
    """A reader neither asks the upstream nor gives it anything, nor shuts it down."""
    upstream = Upstream()
    reader = worker(upstream, role="reader", cold_start_timeout=0.0)
    assert reader.should_fetch_flag_definitions() is False
    reader.get_flag_definitions()
    reader.on_flag_definitions_received(made_of("a"))
    reader.shutdown()
    assert (upstream.asked, upstream.received, upstream.shutdowns) == (0, [], 0)


# -- what its answers mean


def test_what_the_upstream_has_is_shared_without_a_request(worker: Workers) -> None:
    """Told not to fetch, the leader publishes the upstream's definitions on its host; all have them."""
    upstream = Upstream(fetch=False, content=made_of("a"))
    leader, follower = worker(upstream), worker(upstream)
    assert leader.should_fetch_flag_definitions() is False
    assert served(leader) == served(follower) == ["a"]
    upstream.content = made_of("a", "b")
    assert worker.poll(leader) is False
    assert served(leader) == served(follower) == ["a", "b"]
    assert upstream.received == []


def test_told_to_fetch_it_publishes_to_both(worker: Workers) -> None:
    """What was fetched is published on the host and given to the upstream."""
    upstream = Upstream(fetch=True)
    leader, follower = worker(upstream), worker(upstream)
    publish(leader, "a")
    assert upstream.received == [made_of("a")]
    assert served(follower) == ["a"]


def test_a_cold_start_within_get_asks_the_upstream_too(worker: Workers) -> None:
    """A worker that takes the lease in `get` takes what the upstream has, instead of fetching."""
    upstream = Upstream(fetch=False, content=made_of("a"))
    assert served(worker(upstream)) == ["a"]
    assert upstream.asked == 1


def test_what_nobody_was_told_to_fetch_is_not_handed_on(worker: Workers) -> None:
    """Definitions that this host drops do not reach the upstream either."""
    upstream = Upstream(fetch=False, content=made_of("a"))
    leader, follower = worker(upstream), worker(upstream)
    leader.should_fetch_flag_definitions()
    follower.should_fetch_flag_definitions()
    follower.on_flag_definitions_received(made_of("old"))
    assert upstream.received == []
    assert served(follower) == ["a"]


def test_an_overtaken_answer_is_dropped(worker: Workers) -> None:
    """Definitions from the upstream are fenced: what was published while it answered stays."""
    upstream = Upstream(fetch=False, content=made_of("old"))
    leader, other = worker(upstream), worker(None)

    def overtake() -> None:
        upstream.before = lambda: None
        worker.machine.pass_time(4 * INTERVAL_S)
        publish(other, "new")

    upstream.before = overtake
    assert leader.should_fetch_flag_definitions() is False
    assert served(leader) == served(other) == ["new"]


def test_unchanged_definitions_cost_no_encoding(
    worker: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upstream that returns the object it returned before causes no encoding and no new snapshot."""
    upstream = Upstream(fetch=False, content=made_of("a"))
    leader, follower = worker(upstream), worker(upstream)
    leader.should_fetch_flag_definitions()
    before = follower.get_flag_definitions()
    encoded: list[object] = []
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda *given: encoded.append(given) or encode(*given))
    worker.machine.pass_time(INTERVAL_S)
    assert leader.should_fetch_flag_definitions() is False
    assert (upstream.asked, encoded) == (2, [])
    assert leader.get_flag_definitions() is upstream.content
    assert follower.get_flag_definitions() is before
    assert leader.status().counters.unchanged == 1
    assert leader.status().age_s == 0


def test_equal_definitions_in_new_objects_change_nothing(worker: Workers) -> None:
    """An upstream that parses its JSON anew each time gives no worker new objects to hash."""
    upstream = Upstream(fetch=False, content=made_of("a"))
    leader = worker(upstream)
    leader.should_fetch_flag_definitions()
    before = leader.get_flag_definitions()
    upstream.content = made_of("a")
    assert worker.poll(leader) is False
    assert leader.get_flag_definitions() is before
    assert leader.status().generation == 1


def test_nothing_upstream_and_something_here(worker: Workers) -> None:
    """Told not to fetch by an upstream that has nothing, a host goes on serving what it has."""
    upstream = Upstream(fetch=True)
    leader = worker(upstream)
    publish(leader, "a")
    upstream.fetch = False
    slept = worker.machine.slept
    assert worker.poll(leader) is False
    assert served(leader) == ["a"]
    assert worker.machine.slept == slept


def test_nothing_anywhere_is_fetched(worker: Workers) -> None:
    """Told not to fetch where nothing is to be had, a host with nothing to serve fetches."""
    upstream = Upstream(fetch=False, content=None)
    leader = worker(upstream)
    start_ns = worker.machine.now
    assert leader.should_fetch_flag_definitions() is True
    assert 3.9 < (worker.machine.now - start_ns) / 1e9 < 5  # Of a cold_start_timeout of 5 s.
    assert upstream.asked == 1
    slept = worker.machine.slept
    assert worker.poll(leader) is True
    assert worker.machine.slept == slept  # A process waits once.
    leader.on_flag_definitions_received(made_of("a"))
    assert served(leader) == ["a"]


def test_a_first_publish_elsewhere_is_waited_for(worker: Workers) -> None:
    """A host with nothing looks again for what another host is fetching, and asks for it only once."""
    upstream = Upstream(fetch=False, content=None)
    upstream.get_flag_definitions = lambda: (  # type: ignore[method-assign]
        looks.append(1) or (made_of("a") if len(looks) > 2 else None)
    )
    looks: list[int] = []
    leader = worker(upstream)
    assert leader.should_fetch_flag_definitions() is False
    assert served(leader) == ["a"]
    assert (upstream.asked, len(looks)) == (1, 3)


# -- what can go wrong


class _Nonsense:
    def __repr__(self) -> str:
        return "nonsense"


@pytest.mark.parametrize(
    ("fetch", "content"),
    [
        (None, made_of("a")),
        ("yes", made_of("a")),
        (_Nonsense(), made_of("a")),
        (False, [1, 2]),
        (False, {"flags": None}),
        (False, {"flags": [1], "group_type_mapping": {}, "cohorts": {}}),
        (False, made_of("a") | {"when": _Nonsense()}),
        (False, OSError("no route")),
        (False, SystemExit(3)),
        (False, KeyboardInterrupt()),
    ],
    ids=repr,
)
def test_nonsense_and_errors_mean_fetch(
    worker: Workers, caplog: pytest.LogCaptureFixture, fetch: object, content: object
) -> None:
    """Whatever an upstream answers or raises, it is logged, and the host fetches for itself."""
    leader = worker(Upstream(fetch, content))
    with caplog.at_level(logging.WARNING, "shmflags"):
        assert leader.should_fetch_flag_definitions() is True
    assert "the upstream failed, so this host asks the API" in caplog.text
    leader.on_flag_definitions_received(made_of("b"))
    assert served(leader) == ["b"]


@pytest.mark.parametrize(
    "method", ["should_fetch_flag_definitions", "on_flag_definitions_received", "shutdown"]
)
def test_an_upstream_that_raises_never_reaches_the_sdk(
    worker: Workers, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """An exception in any method of the upstream is logged, and nothing is lost."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("of the upstream")

    upstream = Upstream(fetch=True)
    setattr(upstream, method, fail)
    leader = worker(upstream)
    with caplog.at_level(logging.WARNING, "shmflags"):
        publish(leader, "a")
        assert served(leader) == ["a"]
        leader.shutdown()
    assert "of the upstream" in caplog.text


class Hanging(Upstream):
    """Does not come back until it is let go."""

    def __init__(self, fetch: object = True, content: object = None) -> None:
        super().__init__(fetch, content)
        self.entered, self.let_go = threading.Event(), threading.Event()
        self.before = self._hang

    def _hang(self) -> None:
        self.entered.set()
        assert self.let_go.wait(WAIT_S)


def test_a_hung_upstream_blocks_one_poll_for_a_bounded_time(worker: Workers) -> None:
    """A hung call is waited for once, is never doubled, and when it comes back all goes on."""
    upstream = Hanging(fetch=False, content=made_of("b"))
    leader = worker(upstream)
    start = time.monotonic()
    assert leader.should_fetch_flag_definitions() is True
    assert PATIENCE_S == 2.0  # As documented.
    assert PATIENCE_S * 0.9 < time.monotonic() - start < PATIENCE_S + 5
    leader.on_flag_definitions_received(made_of("a"))
    start = time.monotonic()
    assert worker.poll(leader) is True
    assert time.monotonic() - start < PATIENCE_S / 2
    assert (upstream.asked, upstream.received) == (1, [])
    upstream.let_go.set()
    wait_until(lambda: worker.poll(leader) is False, "the upstream is asked again")
    assert served(leader) == ["b"]


def test_no_lock_is_held_while_the_upstream_answers(worker: Workers) -> None:
    """While one thread waits for the upstream, the process and its host go on polling and serving."""
    upstream = Hanging(fetch=False, content=made_of("b"))
    upstream.let_go.set()
    leader, follower = worker(upstream), worker(upstream)
    leader.should_fetch_flag_definitions()
    upstream.let_go.clear()
    upstream.entered.clear()
    worker.machine.pass_time(INTERVAL_S)
    waiting = threading.Thread(target=leader.should_fetch_flag_definitions)
    waiting.start()
    try:
        assert upstream.entered.wait(WAIT_S)
        start = time.monotonic()
        for cache in (leader, follower):
            assert cache.should_fetch_flag_definitions() is False
            assert served(cache) == ["b"]
        assert time.monotonic() - start < PATIENCE_S / 2
        assert waiting.is_alive()
    finally:
        upstream.let_go.set()
        waiting.join(WAIT_S)


# -- shutting down


def test_it_is_shut_down_once_by_whoever_asked(worker: Workers) -> None:
    """A process that asked the upstream shuts it down, once; one that did not, does not."""
    upstream = Upstream(fetch=False, content=made_of("a"))
    leader, follower = worker(upstream), worker(upstream)
    leader.should_fetch_flag_definitions()
    follower.should_fetch_flag_definitions()
    follower.shutdown()
    assert upstream.shutdowns == 0
    leader.shutdown()
    leader.shutdown()
    assert upstream.shutdowns == 1
    assert worker.poll(leader) is False
    assert upstream.asked == 1


def test_two_threads_shut_it_down_once(worker: Workers) -> None:
    """Shutting down from many threads at once is shutting down once."""
    upstream = Upstream(fetch=False, content=made_of("a"))
    leader = worker(upstream)
    leader.should_fetch_flag_definitions()
    threads = [threading.Thread(target=leader.shutdown) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert upstream.shutdowns == 1


def test_a_hung_upstream_is_shut_down_when_it_comes_back(worker: Workers) -> None:
    """`shutdown` is bounded even behind a hung call, and is made good when that call ends."""
    upstream = Hanging()
    leader, successor = worker(upstream), worker(None)
    leader.should_fetch_flag_definitions()
    start = time.monotonic()
    leader.shutdown()
    assert time.monotonic() - start < PATIENCE_S + 5
    worker.machine.pass_time(INTERVAL_S)
    assert successor.should_fetch_flag_definitions() is True  # The host's lease was handed over first.
    assert upstream.shutdowns == 0
    upstream.let_go.set()
    wait_until(lambda: upstream.shutdowns == 1, "it is shut down")


def test_a_forked_child_does_not_shut_down_for_its_parent() -> None:
    """Children of a process that asked do not shut the upstream down, unless they ask it themselves."""
    with workers(1, Worker) as (worker,):
        worker.call("make_noting_tiers", 30.0)
        assert worker.call("should_fetch") is True
        worker.call("receive", made_of("a"))
        children = worker.call("fork", [("get", ()), ("shutdown", ()), ("noted", ())], 2)
        assert [results[-1] for _, results in children] == [["ask", "receive"]] * 2
        worker.call("shutdown")
        assert worker.call("noted") == ["ask", "receive", "shutdown"]


def test_a_forked_child_that_asks_shuts_down_for_itself() -> None:
    """A child that asks the upstream itself has a helper thread, and a shutdown, of its own."""
    with workers(1, Worker) as (worker,):
        worker.call("make_noting_tiers", 0.1)
        told = [("until_told", ()), ("receive", (made_of("a"),)), ("shutdown", ()), ("noted", ())]
        for name, arguments in told[:-1]:
            worker.call(name, *arguments)
        children = worker.call("fork", told, 1)
        assert children[0][1][-1] == ["ask", "receive", "shutdown"] * 2


# -- coroutines


class AsyncUpstream:
    """Coroutine functions throughout; notes the loop that each runs on."""

    def __init__(self) -> None:
        self.loops: list[asyncio.AbstractEventLoop] = []
        self.threads: list[threading.Thread] = []
        self.content: Any = None
        self.hang_s = 0.0
        self.cancelled = 0
        self.shutdowns = 0

    async def _note(self) -> None:
        self.loops.append(asyncio.get_running_loop())
        self.threads.append(threading.current_thread())
        try:
            await asyncio.sleep(self.hang_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def should_fetch_flag_definitions(self) -> bool:
        await self._note()
        return self.content is None

    async def get_flag_definitions(self) -> Any:
        await self._note()
        return self.content

    async def on_flag_definitions_received(self, data: Any) -> None:
        await self._note()
        self.content = data

    async def shutdown(self) -> None:
        await self._note()
        self.shutdowns += 1


def test_coroutines_run_on_one_loop_of_the_helper_thread(worker: Workers) -> None:
    """An async upstream is awaited on one loop, which is always the same, on a daemon thread."""
    upstream = AsyncUpstream()
    leader = worker(upstream)
    publish(leader, "a")
    assert worker.poll(leader) is False
    assert served(leader) == ["a"]
    leader.shutdown()
    assert upstream.shutdowns == 1
    assert len(set(upstream.loops)) == 1
    assert {thread.name for thread in upstream.threads} == {"shmflags-upstream"}
    assert all(thread.daemon for thread in upstream.threads)
    wait_until(upstream.loops[0].is_closed, "the loop is closed at the end")


def test_a_hung_coroutine_is_cancelled(worker: Workers) -> None:
    """A coroutine that takes too long is cancelled, and the next poll can ask again."""
    upstream = AsyncUpstream()
    upstream.content, upstream.hang_s = made_of("a"), 2 * WAIT_S
    leader = worker(upstream)
    assert leader.should_fetch_flag_definitions() is True
    wait_until(lambda: upstream.cancelled == 1, "it is cancelled")
    upstream.hang_s = 0.0
    assert worker.poll(leader) is False
    assert served(leader) == ["a"]


def test_a_fork_leaves_the_parents_loop_alone() -> None:
    """Children of a process with an async upstream end without harm to its event loop."""
    with workers(1, Worker) as (worker,):
        worker.call("make_noting_tiers", 0.1, is_async=True)
        assert worker.call("should_fetch") is True
        children = worker.call("fork", [("end_loops", ()), ("shutdown", ())], 2)
        assert len(children) == 2
        worker.call("receive", made_of("a"))
        assert worker.call("noted") == ["ask", "receive"]
        worker.call("shutdown")
        assert worker.call("noted") == ["ask", "receive", "shutdown"]


# -- the ETag rule, against the upstream


@pytest.mark.parametrize(
    "content", [None, made_of("other"), {"flags": 3}], ids=["none", "other", "bad"]
)
def test_an_unattached_leader_whose_etag_is_doubtful_makes_way(worker: Workers, content: Any) -> None:
    """If the upstream lacks what the client last received, a fetch without a publish ends the lead."""
    upstream = Upstream(fetch=True)
    leader, other = worker(upstream), worker(upstream)
    publish(leader, "a")
    other.should_fetch_flag_definitions()
    upstream.content = content
    worker.machine.pass_time(INTERVAL_S)
    other.should_fetch_flag_definitions()
    assert leader.should_fetch_flag_definitions() is True  # And the API says 304.
    worker.machine.pass_time(INTERVAL_S)
    assert leader.should_fetch_flag_definitions() is False
    assert other.should_fetch_flag_definitions() is True


def test_a_leader_whose_etag_stands_for_what_is_upstream_stays(worker: Workers) -> None:
    """If the upstream has what the client last received, a 304 is what is to be expected."""
    upstream = Upstream(fetch=True)
    leader, other = worker(upstream), worker(upstream)
    publish(leader, "a")
    upstream.content = made_of("a")
    for _ in range(3):
        other.should_fetch_flag_definitions()
        assert worker.poll(leader) is True
        assert other.should_fetch_flag_definitions() is False


def test_what_comes_from_upstream_owes_no_publish(worker: Workers) -> None:
    """A leader whose ETag is outdated by what it copied stays leader, as it does not use its ETag."""
    upstream = Upstream(fetch=True)
    leader, other = worker(upstream), worker(upstream)
    publish(leader, "a")
    upstream.fetch = False
    for content in (made_of("b"), made_of("b"), None, made_of("c"), made_of("c")):
        upstream.content = content
        asked = upstream.asked
        other.should_fetch_flag_definitions()
        assert worker.poll(leader) is False
        assert upstream.asked == asked + 1
    assert served(other) == ["c"]


def test_an_upstream_that_cannot_be_read_raises_no_doubt(worker: Workers) -> None:
    """While the upstream is out of order, the leader keeps its ETag, and its lead."""
    upstream = Upstream(fetch=True)
    leader, other = worker(upstream), worker(upstream)
    publish(leader, "a")
    upstream.content = OSError("gone")
    for _ in range(3):
        other.should_fetch_flag_definitions()
        assert worker.poll(leader) is True


def test_an_attached_client_asks_for_a_full_answer(directory: Path) -> None:
    """With `attach`, the ETag is cleared whenever the upstream has something else, and then kept."""
    from posthog import Posthog

    upstream = Upstream(fetch=True)
    cache = SharedMemoryFlagCache("test", directory=directory, poll_interval=3600, upstream=upstream)
    with DefinitionsServer(definitions(flag("one"))) as server:
        client = Posthog(
            "phc_test",
            host=server.url,
            secret_key="phx_test",
            poll_interval=3600,
            flag_definition_cache_provider=cache,
        )
        cache.attach(client, watch=False)
        machine = Machine(now=time.monotonic_ns())
        cache._host = ManualHost(machine, 100)
        try:
            for content, status in (
                (None, 200),
                (None, 200),  # It did not take what it was given.
                ("as received", 304),
                (definitions(flag("other")), 200),
                ("as received", 304),
            ):
                upstream.content = upstream.received[-1] if content == "as received" else content
                machine.pass_time(3600)
                client._load_feature_flags()
                assert server.requests[-1].status == status
        finally:
            client.shutdown()
    assert upstream.shutdowns == 1
