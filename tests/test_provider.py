"""The provider under a clock that the test moves: elections, grants, fences, step by step."""

from __future__ import annotations

import gc
import logging
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shmflags import SharedMemoryFlagCache, validate_provider, watcher
from shmflags.attachment import Attachment
from tests import manual_host
from tests.manual_host import INTERVAL_S, ManualHost
from tests.support import EMPTY, made_of, publish, served, wait_until


class Group(manual_host.Group):
    """Workers of one service key on one machine, which die and fork."""

    def kill(self, cache: SharedMemoryFlagCache) -> None:
        host = cache._host
        assert isinstance(host, ManualHost)
        self.machine.dead.add(host.pid)

    def fork(self, parent: SharedMemoryFlagCache) -> SharedMemoryFlagCache:
        """A child as `fork` leaves it: the parent's objects, and another pid."""
        child = SharedMemoryFlagCache("test", directory=self.directory, poll_interval=INTERVAL_S)
        child.__dict__.update(parent.__dict__)
        child._holding = type(parent._holding)()
        child._holding.__dict__.update(parent._holding.__dict__)
        child._host = self.next_host()
        return child


@pytest.fixture
def group(directory: Path) -> Group:
    return Group(directory)


def lose_page(cache: SharedMemoryFlagCache) -> None:
    """Remove the control page from the directory of a member."""
    assert cache._member is not None
    cache._member.directory.page_path.unlink()


# -- grants


def test_one_leads_and_the_others_follow(group: Group) -> None:
    """The first to poll is told to fetch; the others are not, and get what it published."""
    leader, follower = group.worker(), group.worker()
    publish(leader, "a")
    assert follower.should_fetch_flag_definitions() is False
    assert served(follower) == ["a"]


def test_a_read_by_itself_looks_for_the_page(group: Group) -> None:
    """One look at the page's path serves one poll, and no read after it."""
    leader, follower = group.worker(), group.worker()
    publish(leader, "a")
    assert follower.should_fetch_flag_definitions() is False
    assert served(follower) == ["a"]
    lose_page(leader)
    group.machine.pass_time(INTERVAL_S)
    publish(leader, "b")
    assert served(follower) == ["b"]


def test_a_read_after_a_fetch_looks_for_the_page(group: Group) -> None:
    """A poll that was told to fetch has no second call for which its look would do."""
    first, second = group.worker(), group.worker()
    publish(first, "a")
    assert served(second) == ["a"]
    group.machine.pass_time(INTERVAL_S)
    assert first.should_fetch_flag_definitions() is True
    lose_page(first)
    group.machine.pass_time(INTERVAL_S)
    publish(second, "b")
    assert served(first) == ["b"]


def test_a_page_that_is_lost_within_a_poll_is_made_anew_by_its_read(group: Group) -> None:
    """The poll finds it replaced when it locks it; the read that follows attaches the new one."""
    leader = group.worker()
    publish(leader, "a")
    group.machine.pass_time(INTERVAL_S)
    assert leader._member is not None
    tend = leader._publisher.tend

    def tend_and_lose(*told: Any) -> None:
        tend(*told)
        lose_page(leader)

    leader._publisher.tend = tend_and_lose  # type: ignore[method-assign]
    assert leader.should_fetch_flag_definitions() is False
    lost = leader._member.known_page
    assert served(leader) == ["a"]
    assert leader._member.known_page is not lost


def test_the_leader_fetches_once_per_interval(group: Group) -> None:
    """A poll sooner than half an interval after the host's last grant is not told to fetch."""
    leader = group.worker()
    publish(leader, "a")
    group.machine.pass_time(INTERVAL_S / 2 - 1)
    assert leader.should_fetch_flag_definitions() is False
    assert served(leader) == ["a"]
    group.machine.pass_time(1)
    assert leader.should_fetch_flag_definitions() is True


def test_a_restart_costs_no_request(group: Group) -> None:
    """A new set of workers serves the snapshot of the last one until a fetch is due."""
    old = group.worker()
    publish(old, "a")
    old.shutdown()
    new = group.worker()
    assert new.should_fetch_flag_definitions() is False
    assert served(new) == ["a"]
    group.machine.pass_time(INTERVAL_S / 2)
    assert new.should_fetch_flag_definitions() is True


def test_shutdown_hands_leadership_over_at_once(group: Group) -> None:
    """After the leader's shutdown the next poll of another worker leads; shutdown may be repeated."""
    leader, other = group.worker(), group.worker()
    publish(leader, "a")
    group.machine.pass_time(INTERVAL_S)
    assert other.should_fetch_flag_definitions() is False
    leader.shutdown()
    leader.shutdown()
    assert other.should_fetch_flag_definitions() is True


def test_shutdown_where_nothing_ever_happened_is_harmless(group: Group) -> None:
    """A process that never led, or never did anything, may shut down; it makes no file."""
    leader, other, idle = group.worker(), group.worker(), group.worker()
    idle.shutdown()
    assert os.listdir(group.directory) == []
    publish(leader, "a")
    assert other.should_fetch_flag_definitions() is False
    other.shutdown()
    group.machine.pass_time(INTERVAL_S)
    assert leader.should_fetch_flag_definitions() is True


def test_a_reader_never_leads_nor_publishes(group: Group) -> None:
    """A reader is never told to fetch, and what it receives goes nowhere."""
    reader, worker = group.worker(role="reader"), group.worker()
    assert reader.should_fetch_flag_definitions() is False
    reader.on_flag_definitions_received(made_of("planted"))
    assert reader.get_flag_definitions() == EMPTY
    publish(worker, "a")
    assert served(reader) == ["a"]
    group.kill(worker)
    group.machine.pass_time(10 * INTERVAL_S)
    assert reader.should_fetch_flag_definitions() is False


def test_with_nothing_to_serve_a_dead_grantee_is_followed_by_ever_rarer_grants(group: Group) -> None:
    """Before the first answer ever came, grants of dead grantees follow after 1, 2, 4, … seconds."""
    pauses = []
    last = group.machine.now
    for _ in range(5):
        worker = group.worker(cold_start_timeout=0)
        while not worker.should_fetch_flag_definitions():
            group.machine.pass_time(0.25)
        pauses.append((group.machine.now - last) / 1e9)
        last = group.machine.now
        group.kill(worker)
    assert pauses == [0, 1, 2, 4, 8]


def test_a_live_grantee_is_waited_for(group: Group) -> None:
    """Before the first answer, nobody else is told to fetch for half an interval while one fetches."""
    fetcher, other = group.worker(), group.worker(cold_start_timeout=1)
    assert fetcher.should_fetch_flag_definitions() is True
    group.machine.pass_time(INTERVAL_S / 2 - 2)
    assert other.should_fetch_flag_definitions() is False
    assert other.get_flag_definitions() == EMPTY


# -- fencing


def slow_and_quick(group: Group) -> tuple[SharedMemoryFlagCache, SharedMemoryFlagCache]:
    """A leader that was told to fetch and has lost its lease since, and another worker."""
    slow, quick = group.worker(lease_ttl=31), group.worker(lease_ttl=31)
    publish(slow, "a")
    group.machine.pass_time(INTERVAL_S)
    assert slow.should_fetch_flag_definitions() is True
    group.machine.pass_time(40)
    return slow, quick


def test_what_another_publish_overtook_is_dropped(group: Group) -> None:
    """A fetch is published only if nothing was published since it was granted."""
    slow, quick = slow_and_quick(group)
    publish(quick, "newer")
    slow.on_flag_definitions_received(made_of("older"))
    assert served(slow) == ["newer"]


def test_even_unchanged_content_overtakes(group: Group) -> None:
    """A publish of the same content counts as one: an older fetch of other content is dropped."""
    slow, quick = slow_and_quick(group)
    publish(quick, "a")
    slow.on_flag_definitions_received(made_of("older"))
    assert served(quick) == ["a"]


def test_a_deposed_leader_may_not_publish_even_if_nobody_did(group: Group) -> None:
    """With something to serve, a fetch of an earlier term is dropped."""
    slow, quick = slow_and_quick(group)
    assert quick.should_fetch_flag_definitions() is True
    slow.on_flag_definitions_received(made_of("older"))
    assert served(quick) == ["a"]
    quick.on_flag_definitions_received(made_of("newer"))
    assert served(slow) == ["newer"]


def test_with_nothing_to_serve_the_term_does_not_matter(group: Group) -> None:
    """The first answer is taken from whoever brings it, as long as nothing was published."""
    slow, quick = group.worker(lease_ttl=31), group.worker(lease_ttl=31)
    assert slow.should_fetch_flag_definitions() is True
    group.machine.pass_time(40)
    assert quick.should_fetch_flag_definitions() is True
    slow.on_flag_definitions_received(made_of("first"))
    assert served(quick) == ["first"]


def test_data_that_nobody_was_told_to_fetch_is_dropped(group: Group) -> None:
    """With something to serve, a publish without a grant changes nothing."""
    leader, other = group.worker(), group.worker()
    publish(leader, "a")
    other.on_flag_definitions_received(made_of("b"))
    assert served(leader) == ["a"]


# -- the ETag rule


class Client:
    """What `attach` needs of a client, and an API with ETags behind it."""

    def __init__(self, cache: SharedMemoryFlagCache, api: dict[str, str]) -> None:
        self._flag_definition_cache_provider = cache
        self.cache = cache
        self.api = api
        self.feature_flags: list[Any] | None = None
        self.poll_interval = INTERVAL_S
        self._flags_etag: str | None = None
        self.asked_with: list[str | None] = []
        self._flag_definition_publication_lock = threading.RLock()

    def _load_feature_flags(self) -> None:
        if self.cache.should_fetch_flag_definitions():
            self._fetch()
            return
        data = self.cache.get_flag_definitions()
        if data:
            self.feature_flags = data["flags"]
        elif not self.feature_flags:
            self._fetch()

    def _fetch(self) -> None:
        content = self.api["content"]
        self.asked_with.append(self._flags_etag)
        if self._flags_etag == content:
            return
        data = made_of(content)
        self.feature_flags = data["flags"]
        self._flags_etag = content
        self.cache.on_flag_definitions_received(data)

    @property
    def keys(self) -> list[str]:
        return [flag["key"] for flag in self.feature_flags or []]


@pytest.mark.parametrize("attach", [False, True], ids=["plain", "attached"])
@pytest.mark.parametrize("phase", [0.1, 0.45, 0.55, 0.95])
def test_flags_that_go_back_are_everywhere_within_three_intervals(
    group: Group, attach: bool, phase: float
) -> None:
    """D0, D1, leader killed, D0: all have D0 within three intervals, whenever each of them polls."""
    api = {"content": "D0"}
    clients = [Client(group.worker(), api) for _ in range(4)]
    if attach:
        for client in clients:
            client.cache.attach(client, watch=False)
    former, leader, *others = clients
    former._load_feature_flags()
    member = former.cache._member
    assert member is not None and member.known_page is not None
    member.election.resign(member.known_page)
    for client in (leader, *others, former):
        client._load_feature_flags()
    api["content"] = "D1"
    group.machine.pass_time(INTERVAL_S)
    for client in (leader, *others, former):
        client._load_feature_flags()
    assert [client.keys for client in clients] == [["D1"]] * 4
    group.kill(leader.cache)
    api["content"] = "D0"
    # The former leader, whose ETag is that of D0, is the first to poll.
    group.machine.pass_time(phase * INTERVAL_S)
    for _ in range(3):
        for client in (former, *others):
            client._load_feature_flags()
            group.machine.pass_time(0.01)
        group.machine.pass_time(INTERVAL_S - 0.03)
    assert [client.keys for client in (former, *others)] == [["D0"]] * 3


def test_an_attached_leader_asks_with_the_etag_of_what_it_serves(group: Group) -> None:
    """Whoever leads for the first time asks whether what is served is current, and learns if it is not."""
    api = {"content": "D0"}
    leader, successor, last = (Client(group.worker(), api) for _ in range(3))
    for client in (leader, successor, last):
        client.cache.attach(client, watch=False)
        client._load_feature_flags()
    for client in (successor, last):
        group.kill(leader.cache)
        leader = client
        group.machine.pass_time(INTERVAL_S)
        client._load_feature_flags()
        assert client.asked_with == ["D0"]
    api["content"] = "D1"
    group.machine.pass_time(INTERVAL_S)
    leader._load_feature_flags()
    assert (leader.asked_with, leader.keys) == (["D0", "D0"], ["D1"])


def test_an_etag_is_not_lent_for_what_the_client_does_not_have(group: Group) -> None:
    """A leader whose client evaluates from something else, or is installing it, asks for a full answer."""
    api = {"content": "D0"}
    leader, other, busy = (Client(group.worker(), api) for _ in range(3))
    for client in (leader, other, busy):
        client.cache.attach(client, watch=False)
        client._load_feature_flags()
    other.feature_flags = made_of("D0")["flags"]
    group.kill(leader.cache)
    group.machine.pass_time(INTERVAL_S)
    other._load_feature_flags()
    assert other.asked_with == [None]
    group.kill(other.cache)
    group.machine.pass_time(INTERVAL_S)
    assert busy.cache.get_flag_definitions() is None
    with_lock = threading.Event()
    release = threading.Event()

    def install() -> None:
        with busy._flag_definition_publication_lock:
            with_lock.set()
            release.wait(60)

    thread = threading.Thread(target=install)
    thread.start()
    assert with_lock.wait(60)
    busy._load_feature_flags()
    release.set()
    thread.join()
    assert busy.asked_with == [None]


def in_another_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor() as pool:
        return pool.submit(function).result(60)


def test_a_fetch_that_ends_while_an_etag_is_lent(group: Group) -> None:
    """Whatever three threads of a client do at once, no 304 is taken for what is not published."""
    api = {"content": "D0"}
    first = joining(group, api, watch=False)
    first._load_feature_flags()
    group.kill(first.cache)
    group.machine.pass_time(2 * INTERVAL_S)
    api["content"] = "D1"
    client = Client(group.worker(), api)
    cache = client.cache
    cache.attach(client, watch=False)
    assert cache.should_fetch_flag_definitions(), "one thread fetches, slowly"
    answer = made_of("D1")
    assert not in_another_thread(cache.should_fetch_flag_definitions)
    cached = in_another_thread(cache.get_flag_definitions)
    group.machine.pass_time(0.6 * INTERVAL_S)
    api["content"] = "D0"
    client.feature_flags, client._flags_etag = answer["flags"], "D1"
    client.feature_flags = cached["flags"]  # The other, which loads more slowly, installs older flags.
    in_another_thread(client._load_feature_flags)
    cache.on_flag_definitions_received(answer)
    group.machine.pass_time(0.2 * INTERVAL_S)
    client._load_feature_flags()
    for _ in range(4):
        group.machine.pass_time(INTERVAL_S)
        client._load_feature_flags()
    assert client.keys == ["D0"]


def test_a_fork_while_an_etag_is_lent(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that is forked at that moment does not take its client's old ETag for the new one."""
    api = {"content": "D0"}
    former, leader = (Client(group.worker(), api) for _ in range(2))
    for client in (former, leader):
        client.cache.attach(client, watch=False)
    former._load_feature_flags()
    assert former.cache._member is not None
    former.cache.shutdown()
    former.cache._member.closed = False
    leader._load_feature_flags()
    api["content"] = "D1"
    group.machine.pass_time(INTERVAL_S)
    leader._load_feature_flags()
    former._load_feature_flags()
    assert (former.keys, former._flags_etag) == (["D1"], "D0")
    group.kill(leader.cache)
    group.machine.pass_time(INTERVAL_S)
    children: list[Client] = []
    lend = Attachment.lend_etag

    def forked(attachment: Attachment, *arguments: Any) -> bool:
        if not children:
            child = Client(group.fork(former.cache), api)
            child.feature_flags, child._flags_etag = former.feature_flags, former._flags_etag
            child.cache._member_lock = threading.Lock()
            child.cache._holding.attachment = Attachment(child, child.cache)
            children.append(child)
        return lend(attachment, *arguments)

    monkeypatch.setattr(Attachment, "lend_etag", forked)
    former._load_feature_flags()
    (child,) = children
    child.cache._me()
    group.kill(former.cache)
    api["content"] = "D0"
    for _ in range(2):
        group.machine.pass_time(INTERVAL_S)
        child._load_feature_flags()
    assert child.keys == ["D0"]


def test_whoever_was_lent_an_etag_has_received_what_it_stands_for(group: Group) -> None:
    """Flags that come, go, and come again: nobody takes the ETag that he was lent for his own of before."""
    api = {"content": "D0"}
    former, other = (Client(group.worker(), api) for _ in range(2))
    for client in (former, other):
        client.cache.attach(client, watch=False)
        client._load_feature_flags()

    def lead(client: Client, content: str) -> None:
        """Have the other make way, and this one be granted a fetch."""
        api["content"] = content
        rival = other if client is former else former
        group.machine.pass_time(INTERVAL_S)
        assert rival.cache._member is not None and rival.cache._member.known_page is not None
        rival.cache._member.election.resign(rival.cache._member.known_page)
        client._load_feature_flags()
        rival._load_feature_flags()
        assert former.keys == other.keys == [content]

    lead(other, "D1")
    lead(former, "D1")
    assert former.asked_with == [None, "D1"]
    lead(other, "D0")
    lead(former, "D1")


def test_an_etag_is_lent_for_what_is_published_only(group: Group) -> None:
    """A leader that is behind what is published does not ask with the ETag of what it has."""
    api = {"content": "D0"}
    leader, behind = (Client(group.worker(), api) for _ in range(2))
    for client in (leader, behind):
        client.cache.attach(client, watch=False)
        client._load_feature_flags()
    api["content"] = "D1"
    group.machine.pass_time(INTERVAL_S)
    leader._load_feature_flags()
    group.kill(leader.cache)
    api["content"] = "D0"
    group.machine.pass_time(INTERVAL_S)
    behind._load_feature_flags()
    assert behind.asked_with == [None]
    newcomer = Client(group.worker(), api)
    newcomer._load_feature_flags()
    assert newcomer.keys == ["D0"]


@pytest.fixture
def rare_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watcher that looks once an hour counts as one that looks often: the test does its work."""
    monkeypatch.setattr(watcher, "_AGAIN_S", 7200.0)


def starting(group: Group, **arguments: Any) -> Client:
    """A worker that joins after the leader was killed, when a fetch has fallen due."""
    api = {"content": "D0"}
    leader = Client(group.worker(), api)
    leader.cache.attach(leader, watch=False)
    leader._load_feature_flags()
    group.kill(leader.cache)
    api["content"] = "D1"
    return joining(group, api, **arguments)


def joining(group: Group, api: dict[str, str], **arguments: Any) -> Client:
    client = Client(group.worker(), api)
    client.cache.attach(client, **arguments)
    return client


@pytest.mark.parametrize("intervals", [0.5, 1.49])
def test_a_worker_that_starts_takes_what_is_served_and_fetches_then(
    group: Group, rare_looks: None, intervals: float
) -> None:
    """A fetch that is due waits until the client has flags; its watcher sees to it at the next look."""
    late = starting(group, interval=3600.0)
    group.machine.pass_time(intervals * INTERVAL_S)
    late._load_feature_flags()
    assert (late.keys, late.asked_with) == (["D0"], [])
    assert late.cache._notice() is not None
    late.cache._reload()
    assert (late.keys, late.asked_with) == (["D1"], ["D0"])
    assert late.cache._notice() is None
    late.cache.shutdown()


def test_a_fetch_that_was_put_off_is_made_within_a_second(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watcher that has only been started does not wait with its first look."""
    monkeypatch.setattr(watcher, "_START_S", 3600.0)
    late = starting(group, interval=0.01)
    group.machine.pass_time(INTERVAL_S)
    late._load_feature_flags()
    wait_until(lambda: late.keys == ["D1"], "the watcher has it fetch")
    late.cache.shutdown()


def test_a_fetch_is_put_off_until_the_client_has_flags(group: Group, rare_looks: None) -> None:
    """While the client has not installed what it was handed, there is nothing for its watcher to see."""
    late = starting(group, interval=3600.0)
    group.machine.pass_time(INTERVAL_S)
    assert late.cache.should_fetch_flag_definitions() is False
    assert served(late.cache) == ["D0"]
    assert late.cache._notice() is None
    late.cache.shutdown()


@pytest.mark.parametrize(
    ("intervals", "arguments"),
    [(1.5, {}), (1.0, {"watch": False}), (1.0, {"interval": 1.1})],
    ids=["too long ago", "nobody looks", "somebody looks too rarely"],
)
def test_a_fetch_is_not_put_off(group: Group, intervals: float, arguments: dict[str, Any]) -> None:
    """Not where it would wait for more than a second, nor one and a half intervals after the last grant."""
    late = starting(group, **arguments)
    group.machine.pass_time(intervals * INTERVAL_S)
    late._load_feature_flags()
    assert (late.keys, late.asked_with) == (["D1"], [None])
    late.cache.shutdown()


def test_a_fetch_is_not_put_off_for_want_of_a_thread(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no more threads are to be had, nobody would make up for it."""
    late = starting(group)
    group.machine.pass_time(INTERVAL_S)

    def no_more(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    late._load_feature_flags()
    assert (late.keys, late.asked_with) == (["D1"], [None])


def test_a_snapshot_that_is_written_again_has_its_etag(group: Group) -> None:
    """What its publisher restores, the next leader asks for as it would have before."""
    leader = Client(group.worker(), {"content": "D0"})
    leader.cache.attach(leader, watch=False)
    leader._load_feature_flags()
    assert leader.cache._member is not None
    leader.cache._member.directory.snapshot_path.unlink()
    leader._load_feature_flags()
    successor = joining(group, leader.api, watch=False)
    successor._load_feature_flags()
    group.kill(leader.cache)
    group.machine.pass_time(INTERVAL_S)
    successor._load_feature_flags()
    assert successor.asked_with == ["D0"]


def test_who_looks_for_a_client_that_is_gone_looks_for_no_other(group: Group, rare_looks: None) -> None:
    """A client that is attached without a watcher, after one with, has its fetch at once."""
    late = starting(group, interval=3600.0)
    cache = late.cache
    cache.should_fetch_flag_definitions()
    api = late.api
    del late
    gc.collect()
    second = Client(cache, api)
    cache.attach(second, watch=False)
    group.machine.pass_time(INTERVAL_S)
    second._load_feature_flags()
    assert second.keys == ["D1"]
    cache.shutdown()


def test_workers_that_live_for_a_moment_put_off_no_fetch_for_ever(
    group: Group, rare_looks: None
) -> None:
    """If a fetch that was put off is lost with its worker, the next worker's is made at once."""
    late = starting(group, interval=3600.0)
    group.machine.pass_time(INTERVAL_S)
    late._load_feature_flags()
    assert late.cache.should_fetch_flag_definitions() is True, "its watcher's thread is told to fetch"
    group.kill(late.cache)
    group.machine.pass_time(INTERVAL_S)
    later = joining(group, late.api, interval=3600.0)
    later._load_feature_flags()
    assert (later.keys, later.asked_with) == (["D1"], [None])
    late.cache._watchers.stop()
    later.cache.shutdown()


def test_a_fetch_that_was_put_off_and_made_lets_others_put_off_theirs(
    group: Group, rare_looks: None
) -> None:
    """Once its answer has come, be it a 304, the next worker that starts is served first, too."""
    late = starting(group, interval=3600.0)
    late.api["content"] = "D0"
    group.machine.pass_time(INTERVAL_S)
    late._load_feature_flags()
    late.cache._reload()
    assert late.asked_with == ["D0"]
    group.kill(late.cache)
    group.machine.pass_time(INTERVAL_S)
    later = joining(group, late.api, interval=3600.0)
    later._load_feature_flags()
    assert (later.keys, later.asked_with) == (["D0"], [])
    late.cache._watchers.stop()
    later.cache.shutdown()


@pytest.mark.parametrize("how", ["the page cannot be had", "shutdown"])
def test_a_fetch_that_was_put_off_is_given_up(group: Group, rare_looks: None, how: str) -> None:
    """A worker that cannot use the cache, or has left, is not sent to the API by its watcher."""
    late = starting(group, interval=3600.0)
    group.machine.pass_time(INTERVAL_S)
    late._load_feature_flags()
    assert late.cache._notice() is not None
    if how == "shutdown":
        late.cache.shutdown()
    else:
        shutil.rmtree(next(group.directory.iterdir()))
        group.directory.joinpath(f"shmflags-{os.geteuid()}").write_text("no directory")
        assert late.cache.should_fetch_flag_definitions() is True
    assert late.cache._notice() is None
    late.cache.shutdown()


def test_a_leader_that_cannot_fetch_makes_way(group: Group) -> None:
    """With nothing to serve, a leader whose grant brought nothing leaves the next one to another."""
    keyless, other = group.worker(cold_start_timeout=0), group.worker(cold_start_timeout=0)
    assert keyless.should_fetch_flag_definitions() is True
    assert other.should_fetch_flag_definitions() is False
    group.machine.pass_time(INTERVAL_S)
    assert keyless.should_fetch_flag_definitions() is False
    assert other.should_fetch_flag_definitions() is True


def test_a_lone_leader_with_a_doubtful_etag_takes_what_is_published(group: Group) -> None:
    """Alone, a worker told 304 for flags it no longer has polls the cache in between."""
    api = {"content": "D0"}
    lone, other = Client(group.worker(), api), Client(group.worker(), api)
    lone._load_feature_flags()
    group.kill(lone.cache)
    api["content"] = "D1"
    group.machine.pass_time(INTERVAL_S)
    other._load_feature_flags()
    assert other.keys == ["D1"]
    group.machine.dead.clear()
    group.kill(other.cache)
    api["content"] = "D0"
    for _ in range(3):
        group.machine.pass_time(INTERVAL_S)
        lone._load_feature_flags()
    assert lone.keys == ["D1"], "a 304 tells nothing; what the host serves is what counts"
    api["content"] = "D2"
    for _ in range(2):
        group.machine.pass_time(INTERVAL_S)
        lone._load_feature_flags()
    assert lone.keys == ["D2"]


# -- rotation, lost leases, odd clocks


def test_the_leader_makes_way_after_max_term(group: Group) -> None:
    """Past max_term the leader yields once, if another worker lives, and follows."""
    leader, other = group.worker(max_term=100), group.worker(max_term=100)
    publish(leader, "a")
    assert other.should_fetch_flag_definitions() is False
    group.machine.pass_time(INTERVAL_S)
    publish(leader, "a")
    other.should_fetch_flag_definitions()
    group.machine.pass_time(75)
    other.should_fetch_flag_definitions()
    assert leader.should_fetch_flag_definitions() is False
    assert other.should_fetch_flag_definitions() is True


def test_alone_the_leader_leads_on_after_max_term(group: Group) -> None:
    """With nobody to take over, max_term changes nothing."""
    leader = group.worker(max_term=100)
    publish(leader, "a")
    for _ in range(10):
        group.machine.pass_time(INTERVAL_S)
        assert leader.should_fetch_flag_definitions() is True


def test_get_does_not_renew_the_lease(group: Group) -> None:
    """Only should_fetch renews: a process that is read from but does not poll loses the lease."""
    silent, other = group.worker(lease_ttl=31), group.worker(lease_ttl=31)
    publish(silent, "a")
    for _ in range(4):
        group.machine.pass_time(10)
        served(silent)
    assert other.should_fetch_flag_definitions() is True


@pytest.mark.parametrize("jump_s", [-900.0, 1e6])
def test_a_clock_that_jumps_leaves_one_leader(group: Group, jump_s: float) -> None:
    """After a jump of the clock, either way, exactly one of the workers leads."""
    first, second = group.worker(), group.worker()
    publish(first, "a")
    group.machine.pass_time(jump_s)
    told = [cache.should_fetch_flag_definitions() for cache in (second, first, second)]
    assert told.count(True) == 1
    assert served(first) == served(second) == ["a"]


def test_a_page_of_another_boot_is_not_served(group: Group) -> None:
    """After a reboot neither lease nor snapshot count: the first worker fetches."""
    before = group.worker()
    publish(before, "old")
    group.machine.boot += 1
    after = group.worker()
    publish(after, "new")
    assert served(after) == ["new"]


def test_a_child_follows_its_parent(group: Group) -> None:
    """A forked child is another contender: it follows, serves the same objects, frees nothing."""
    parent = group.worker()
    publish(parent, "a")
    child = group.fork(parent)
    assert child.should_fetch_flag_definitions() is False
    assert child.get_flag_definitions() is parent.get_flag_definitions()
    child.shutdown()
    group.machine.pass_time(INTERVAL_S)
    assert parent.should_fetch_flag_definitions() is True


# -- files that vanish


def test_a_lost_snapshot_is_restored_without_a_request(group: Group) -> None:
    """The leader writes a snapshot that was removed again, at its next poll, without being granted."""
    leader, late = group.worker(), group.worker()
    publish(leader, "a")
    (snapshot,) = group.directory.glob("**/snapshot")
    snapshot.unlink()
    assert leader.should_fetch_flag_definitions() is False
    assert served(late) == ["a"]


def test_a_lost_directory_is_made_again_without_a_request(group: Group) -> None:
    """When all files vanish the leader restores them, and followers are attached again by their polls."""
    import shutil

    leader, follower = group.worker(), group.worker()
    publish(leader, "a")
    assert follower.should_fetch_flag_definitions() is False
    served(follower)
    for path in group.directory.iterdir():
        shutil.rmtree(path)
    assert leader.should_fetch_flag_definitions() is False
    assert follower.should_fetch_flag_definitions() is False
    assert served(follower) == ["a"]
    assert served(group.worker()) == ["a"]
    group.machine.pass_time(INTERVAL_S)
    assert [c.should_fetch_flag_definitions() for c in (leader, follower)] == [True, False]


def test_a_publish_that_cannot_be_written_waits(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be written is written at a later poll; the SDK would never give it again."""
    leader, other = group.worker(), group.worker()
    publish(leader, "a")
    group.machine.pass_time(INTERVAL_S)
    assert leader.should_fetch_flag_definitions() is True
    (directory,) = (path.parent for path in group.directory.glob("**/page"))
    real = os.pwrite

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    leader.on_flag_definitions_received(made_of("b"))
    assert sorted(path.name for path in directory.iterdir()) == ["page", "snapshot"]
    assert served(other) == ["a"]
    assert served(leader) == ["b"], "the client has it; it must not be taken back to older flags"
    monkeypatch.setattr(os, "pwrite", real)
    group.machine.pass_time(1)
    leader.should_fetch_flag_definitions()
    assert served(other) == ["b"]


# -- what cannot be stored


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        {},
        {"flags": []},
        {"flags": None, "group_type_mapping": {}, "cohorts": {}},
        {"flags": [1], "group_type_mapping": {}, "cohorts": {}},
        {"flags": [{"key": {1, 2}}], "group_type_mapping": {}, "cohorts": {}},
        {"flags": [{"key": b"x"}], "group_type_mapping": {}, "cohorts": {}},
        {"flags": [{"key": b""}], "group_type_mapping": {}, "cohorts": {}},
        {"flags": [{"key": (1, 2)}], "group_type_mapping": {}, "cohorts": {}},
        {"flags": [{1: 2}], "group_type_mapping": {}, "cohorts": {}},
        {"flags": [{"big": 1 << 200, "key": object()}], "group_type_mapping": {}, "cohorts": {}},
        {"flags": [], "group_type_mapping": {}, "cohorts": {7: {}}},
        {"flags": [], "group_type_mapping": {}, "cohorts": {}, "extra": memoryview(b"x")},
    ],
    ids=lambda bad: re.sub(r" at 0x\w+", "", repr(bad)),
)
def test_a_bad_publish_is_logged_and_loses_nothing(
    group: Group, caplog: pytest.LogCaptureFixture, bad: Any
) -> None:
    """Data that cannot be stored is logged, and the last good snapshot goes on being served."""
    leader, other = group.worker(), group.worker()
    publish(leader, "good")
    group.machine.pass_time(INTERVAL_S)
    assert leader.should_fetch_flag_definitions() is True
    with caplog.at_level(logging.WARNING, "shmflags"):
        leader.on_flag_definitions_received(bad)
    assert "cannot be shared" in caplog.text
    assert served(other) == ["good"]


def test_definitions_above_the_maximum_are_refused(
    group: Group, caplog: pytest.LogCaptureFixture
) -> None:
    """A snapshot larger than max_bytes is not written, and the log says how large it is."""
    leader, other = group.worker(max_bytes=2000), group.worker(max_bytes=2000)
    publish(leader, "good")
    group.machine.pass_time(INTERVAL_S)
    assert leader.should_fetch_flag_definitions() is True
    with caplog.at_level(logging.WARNING, "shmflags"):
        leader.on_flag_definitions_received(made_of(*(f"flag-{i}" for i in range(500))))
    assert "max_bytes is 2000" in caplog.text
    assert served(other) == ["good"]


# -- never raises


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken on purpose")


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda c: c.should_fetch_flag_definitions(), True),
        (lambda c: c.get_flag_definitions(), None),
        (lambda c: c.on_flag_definitions_received(made_of("a")), None),
    ],
    ids=["should_fetch", "get", "on_received"],
)
@pytest.mark.parametrize("handler_breaks", [False, True])
def test_an_unforeseen_error_never_reaches_the_sdk(
    group: Group,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[SharedMemoryFlagCache], object],
    answer: object,
    handler_breaks: bool,
) -> None:
    """Whatever breaks inside, a method answers as if there were no cache, even if logging breaks too."""
    cache = group.worker()
    monkeypatch.setattr(cache._host, "account", fail)
    if handler_breaks:
        monkeypatch.setattr(logging.getLogger("shmflags"), "log", fail)
    assert call(cache) is answer
    cache.shutdown()


def test_an_unusable_directory_is_as_no_cache(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    """Without a directory to use, a worker fetches for itself, a reader has nothing, and the log says why."""
    group.directory /= "missing"
    worker, reader = group.worker(), group.worker(role="reader")
    assert worker.should_fetch_flag_definitions() is True
    assert worker.get_flag_definitions() is None
    worker.on_flag_definitions_received(made_of("a"))
    assert reader.should_fetch_flag_definitions() is False
    assert reader.get_flag_definitions() is None
    assert "missing" in caplog.text


# -- construction


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"service_key": ""}, ValueError, "service_key"),
        ({"service_key": None}, TypeError, "service_key"),
        ({"service_key": b"key"}, TypeError, "service_key"),
        ({"directory": 7}, TypeError, "directory"),
        ({"directory": ""}, ValueError, "directory"),
        ({"directory": "a\0b"}, ValueError, "directory"),
        ({"poll_interval": "30"}, TypeError, "poll_interval"),
        ({"poll_interval": True}, TypeError, "poll_interval"),
        ({"poll_interval": 0}, ValueError, "poll_interval"),
        ({"poll_interval": math.nan}, ValueError, "poll_interval"),
        ({"poll_interval": math.inf}, ValueError, "poll_interval"),
        ({"poll_interval": 10**400}, ValueError, "poll_interval"),
        ({"cold_start_timeout": -1}, ValueError, "cold_start_timeout"),
        ({"cold_start_timeout": math.nan}, ValueError, "cold_start_timeout"),
        ({"lease_ttl": 30.0}, ValueError, "lease_ttl"),
        ({"lease_ttl": "x"}, TypeError, "lease_ttl"),
        ({"max_term": -5}, ValueError, "max_term"),
        ({"role": "leader"}, ValueError, "role"),
        ({"role": None}, ValueError, "role"),
        ({"upstream": object()}, TypeError, "upstream"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes"),
        ({"max_bytes": 0}, ValueError, "max_bytes"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+|\\", "", repr(value)),
)
def test_a_wrong_argument_is_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    """A wrong argument raises at construction, naming the argument, the value and what is allowed."""
    given = {"service_key": "test", **arguments}
    with pytest.raises(error) as caught:
        SharedMemoryFlagCache(**given)
    message = str(caught.value)
    assert says in message
    assert "must be" in message or "must name" in message or "lacks" in message
    value = next(iter(arguments.values()))
    if says != "upstream":
        assert repr(value)[:20] in message


def test_construction_touches_no_file(group: Group) -> None:
    """A server may build the cache as root and run its workers as somebody else."""
    group.worker()
    assert os.listdir(group.directory) == []


@pytest.mark.parametrize(
    "key",
    ["../../etc", "/", ".", "..", "a/../../b", "\0", "\n", "x" * 5000, "\ud800", "-rf", "é" * 300],
    ids=range(11),
)
def test_no_service_key_leaves_the_directory(group: Group, key: str) -> None:
    """However hostile the key, all files lie in one directory below the base, and it works."""
    cache = SharedMemoryFlagCache(key, directory=group.directory)
    publish(cache, "a")
    assert served(cache) == ["a"]
    (user,) = group.directory.iterdir()
    (version,) = user.iterdir()
    (own,) = version.iterdir()
    assert sorted(path.name for path in own.iterdir()) == ["page", "snapshot"]
    assert own.resolve().is_relative_to(group.directory.resolve())


def test_two_keys_do_not_meet(group: Group) -> None:
    """Keys that differ only in what a file name cannot hold have files of their own."""
    caches = [SharedMemoryFlagCache(key, directory=group.directory) for key in ("a/b", "a?b", "a-b")]
    for number, cache in enumerate(caches):
        publish(cache, str(number))
    assert [served(cache) for cache in caches] == [["0"], ["1"], ["2"]]


def test_a_provider_has_four_methods(group: Group) -> None:
    """validate_provider accepts the cache, and names every method that something else lacks."""
    validate_provider(group.worker())

    class Half:
        shutdown = None

        def get_flag_definitions(self) -> None:
            return None

    with pytest.raises(TypeError) as caught:
        validate_provider(Half())
    message = str(caught.value)
    assert (
        "lacks should_fetch_flag_definitions(), on_flag_definitions_received(), shutdown();" in message
    )


def test_windows_is_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows the constructor says what is missing there."""
    from shmflags import UnsupportedPlatformError

    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UnsupportedPlatformError, match="Windows"):
        SharedMemoryFlagCache("test")


# -- attach


def test_attach_takes_the_client_of_this_cache_only(group: Group) -> None:
    """What is no client, a client of another cache, and a second live client are refused."""
    cache, other = group.worker(), group.worker()
    api = {"content": "D0"}
    client, second, foreign = Client(cache, api), Client(cache, api), Client(other, api)
    with pytest.raises(TypeError, match="feature_flags"):
        cache.attach(object())
    with pytest.raises(ValueError, match="flag_definition_cache_provider"):
        cache.attach(foreign)
    cache.attach(client, watch=False)
    cache.attach(client, watch=False)
    with pytest.raises(ValueError, match="one cache per client"):
        cache.attach(second)
    del client
    cache.attach(second, watch=False)


def test_a_differing_poll_interval_is_told(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    """attach warns when the client polls at another interval than the cache was told."""
    cache = group.worker(poll_interval=5)
    client = Client(cache, {"content": "D0"})
    cache.attach(client, watch=False)
    assert "every 30 s" in caplog.text and "told 5 s" in caplog.text
