"""Between polls: a watcher notices a new generation and a vacancy, and is quiet else."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmflags import SharedMemoryFlagCache, Watcher, publication, watcher
from shmflags.demo.server import DefinitionsServer, definitions, flag
from tests.manual_host import INTERVAL_S, Group
from tests.servers.answers import switched, values
from tests.servers.running import RECIPES, Site
from tests.support import call_all, local_publisher, wait_until, workers

TICK_S = 0.01
NEVER_S = 3600.0
"""A poll_interval that no test lives to see: what arrives, a watcher has brought."""


def cache_at(directory: Path, **arguments: Any) -> SharedMemoryFlagCache:
    return SharedMemoryFlagCache("test", directory=directory, poll_interval=NEVER_S, **arguments)


def publish_from_file(directory: Path, data: dict[str, Any], key: str = "test") -> None:
    """As `shmflags publish --force` does."""
    publisher = local_publisher(directory, key, force=True)
    publisher.publish(data)
    publisher.leave()


class Watched:
    """A watched cache: when it was called back, and how often its watcher has looked."""

    def __init__(
        self, cache: SharedMemoryFlagCache, callback: Callable[[], object] | None = None
    ) -> None:
        self.cache = cache
        self.calls_s: list[float] = []
        self.looks = 0
        self._callback = callback or self.poll
        self.watcher = cache.watch(self._called, interval=TICK_S)
        self._notice, self.watcher._notice = self.watcher._notice, self._look

    def poll(self) -> None:
        """What an attached client does: one poll, without a fetch."""
        if not self.cache.should_fetch_flag_definitions():
            self.cache.get_flag_definitions()

    def load(self) -> None:
        """Load what is published; while we do, the watcher may find out by itself."""
        self.poll()
        self.look_around()
        self.calls_s.clear()

    def _called(self) -> None:
        self.calls_s.append(time.monotonic())
        self._callback()

    def _look(self) -> Hashable | None:
        self.looks += 1
        return self._notice()

    def look_around(self, times: int = 10) -> None:
        """Wait until the watcher has looked so often."""
        goal = self.looks + times
        wait_until(lambda: self.looks >= goal, f"it has looked {times} times")


@pytest.fixture
def leader(directory: Path) -> Iterator[SharedMemoryFlagCache]:
    """A cache that leads and has published one flag."""
    cache = cache_at(directory)
    assert cache.should_fetch_flag_definitions()
    cache.on_flag_definitions_received(definitions(flag("one")))
    yield cache
    cache.shutdown()


@pytest.fixture
def follower(directory: Path, leader: SharedMemoryFlagCache) -> Iterator[Watched]:
    """A watched cache that has what the leader has published."""
    watched = Watched(cache_at(directory))
    watched.load()
    yield watched
    watched.cache.shutdown()


# -- the first look


def test_a_process_that_starts_is_left_in_peace(
    monkeypatch: pytest.MonkeyPatch, leader: SharedMemoryFlagCache, directory: Path
) -> None:
    """The first look is not taken before its time, unless the watcher is told to hasten."""
    monkeypatch.setattr(watcher, "_START_S", NEVER_S)
    waiting = Watched(cache_at(directory))
    waiting.poll()
    monkeypatch.setattr(watcher, "_START_S", 0.0)
    looking = Watched(cache_at(directory))
    looking.poll()
    looking.look_around()
    assert waiting.looks == 0
    late = Watched(waiting.cache)
    late.look_around()
    assert waiting.looks == 0, "what is added to a process that runs has nothing to wait for"
    waiting.watcher.hasten()
    waiting.look_around()
    for watched in (waiting, looking):
        watched.cache.shutdown()
        assert not watched.watcher.is_alive


def test_a_watcher_that_has_not_looked_yet_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, leader: SharedMemoryFlagCache, directory: Path
) -> None:
    """Shutting down does not wait for the first look."""
    monkeypatch.setattr(watcher, "_START_S", NEVER_S)
    waiting = Watched(cache_at(directory))
    waiting.poll()
    assert waiting.watcher.is_alive
    waiting.cache.shutdown()
    assert not waiting.watcher.is_alive
    assert waiting.looks == 0


# -- with real clients in real processes


def test_a_publish_reaches_all_watching_workers(directory: Path, server: DefinitionsServer) -> None:
    """16 workers that hardly ever poll have the flags of a publish, 100 of them, by their watchers."""
    publish_from_file(directory, definitions(*(flag(f"f{n}") for n in range(100))))
    with workers(16) as group:
        call_all(group, "make_cache", directory=str(directory), role="reader", poll_interval=NEVER_S)
        call_all(group, "make_client", server.url, poll_interval=NEVER_S)
        call_all(group, "attach")
        assert call_all(group, "evaluate", "f99") == [True] * 16
        for worker in group:
            worker.start("until", "f99", False, 60)
        publish_from_file(directory, definitions(*(flag(f"f{n}", on=False) for n in range(100))))
        assert [worker.result() for worker in group] == [True] * 16
        assert server.count == 0


def test_a_flag_flipped_at_the_server_is_flipped_in_all_workers(
    directory: Path, server: DefinitionsServer
) -> None:
    """What one poll of the leader brings, the others have by their watchers, without a request."""
    with workers(4) as group:
        call_all(group, "make_cache", directory=str(directory), poll_interval=1.0)
        call_all(group, "make_client", server.url, poll_interval=NEVER_S)
        call_all(group, "attach")
        assert call_all(group, "evaluate", "one") == [True] * 4
        leader = SharedMemoryFlagCache("test", directory=directory).status().leader
        assert leader is not None
        (first,) = [worker for worker in group if worker.pid == leader.pid]
        group.remove(first)
        for worker in group:
            worker.start("until", "one", False, 60)
        server.set_definitions(definitions(flag("one", on=False)))

        def fetched() -> bool:
            first.call("poll")
            return server.full == 2

        wait_until(fetched, "a fetch is due")
        assert [worker.result() for worker in group] == [True] * 3
        assert server.full == 2
        group.append(first)


def test_a_killed_leader_is_replaced_between_polls(directory: Path, server: DefinitionsServer) -> None:
    """Its place is taken by a watching worker that polls for it, and that costs no request."""
    cache = SharedMemoryFlagCache("test", directory=directory, role="reader")
    with workers(4) as group:
        call_all(group, "make_cache", directory=str(directory), poll_interval=NEVER_S)
        call_all(group, "make_client", server.url, poll_interval=NEVER_S)
        call_all(group, "attach")
        assert call_all(group, "evaluate", "one") == [True] * 4
        for _ in range(2):
            dead = cache.status().leader
            assert dead is not None
            (victim,) = [worker for worker in group if worker.pid == dead.pid]
            victim.kill()
            group.remove(victim)
            victim.close()
            living = [worker.pid for worker in group]

            def replaced(living: list[int] = living) -> bool:
                leader = cache.status().leader
                return leader is not None and leader.pid in living

            wait_until(replaced, "another worker leads")
        assert call_all(group, "evaluate", "one") == [True] * 2
        assert server.count == 1


def test_children_watch_for_themselves(directory: Path, server: DefinitionsServer) -> None:
    """In forked children the watcher runs from the beginning, and brings what is published."""
    publish_from_file(directory, definitions(flag("one")))
    with workers(1) as (parent,):
        parent.call("make_cache", directory=str(directory), role="reader", poll_interval=NEVER_S)
        parent.call("make_client", server.url, poll_interval=NEVER_S)
        parent.call("attach")
        assert parent.call("evaluate", "one") is True
        until, mark = ("until", ("one", False, 60)), ("leave_mark", (str(directory),))
        parent.start("fork", [("watchers_alive", ()), mark, until], 2)
        wait_until(lambda: len(list(directory.glob("mark-*"))) == 2, "both are there")
        publish_from_file(directory, definitions(flag("one", on=False)))
        assert [results for _, results in parent.result()] == [[[True], None, True]] * 2
        assert parent.call("watchers_alive") == [True]


def test_children_forked_behind_python_s_back_watch_from_their_first_call(
    directory: Path, server: DefinitionsServer
) -> None:
    """Where no hook runs at a fork, the first call of a child finds out and starts its watcher."""
    publish_from_file(directory, definitions(flag("one")))
    with workers(1) as (parent,):
        parent.call("make_cache", directory=str(directory), role="reader", poll_interval=NEVER_S)
        parent.call("make_client", server.url, poll_interval=NEVER_S)
        # The parent's threads have to be at rest: a fork without hooks, while another thread waits for
        # the interpreter, leaves the child waiting for that thread.
        parent.call("attach", interval=NEVER_S)
        assert parent.call("evaluate", "one") is True
        commands = [("watchers_alive", ()), ("poll", ()), ("watchers_alive", ())]
        children = parent.call("fork", commands, 2, raw=True)
        assert [results for _, results in children] == [[[False], ["one"], [True]]] * 2
        assert parent.call("watchers_alive") == [True]


def test_without_watch_a_client_waits_for_its_poll(directory: Path, server: DefinitionsServer) -> None:
    """`attach(client, watch=False)` starts no thread."""
    with workers(1) as (worker,):
        worker.call("make_cache", directory=str(directory))
        worker.call("make_client", server.url)
        worker.call("attach", watch=False)
        assert worker.call("watchers_alive") == []


# -- in gunicorn


def start_gunicorn(site: Site) -> Any:
    """Four workers of a master that made, loaded and attached the client; they hardly ever poll."""
    (site.home / "gunicorn.conf.py").write_text((RECIPES / "gunicorn_preload.py").read_text())
    return site.start_http(
        *(sys.executable, "-m", "gunicorn", "--bind", f"unix:{site.socket}", "--workers", "4"),
        *("--worker-tmp-dir", str(site.home), "tests.servers.wsgi:application"),
        SERVERS_LOAD="1",
        POSTHOG_POLL_INTERVAL=str(NEVER_S),
    )


def test_watchers_survive_the_fork_of_gunicorn(site: Site) -> None:
    """With preload every worker has a watcher: a publish reaches all, and a dead leader is replaced."""
    server = start_gunicorn(site)
    shared = site.home / "shared"
    before, after = values("cheaper"), values("faster")
    answers = server.ask_until(lambda answer: answer.values == before, "know the flags")
    status = SharedMemoryFlagCache("my-service", directory=shared, role="reader").status
    leader = status().leader
    assert leader is not None
    assert leader.pid == server.process.pid  # It loaded the flags, before there was a worker.
    publish_from_file(shared, switched("faster"), "my-service")
    answers = server.ask_until(lambda answer: answer.values == after, "know of the publish")
    pids = {answer.pid for answer in answers}

    def leading() -> int:
        found = status().leader
        return 0 if found is None else found.pid

    wait_until(lambda: leading() in {*pids, server.process.pid}, "one of them leads again")
    if leading() != server.process.pid:
        dead = leading()
        os.kill(dead, signal.SIGKILL)
        wait_until(lambda: leading() not in (0, dead), "another one leads")
    assert site.api.count == 1


# -- what it calls back for, and what not


def test_it_calls_back_once_for_each_publish(directory: Path, follower: Watched) -> None:
    """One call per publish, after which it is quiet, as the process has what is published."""
    assert follower.calls_s == []
    for number in range(3):
        publish_from_file(directory, definitions(flag(f"f{number}")))
        wait_until(lambda count=number: len(follower.calls_s) > count, "it is called back")  # type: ignore[misc]
        follower.look_around()
        found = follower.cache.get_flag_definitions()
        assert [each["key"] for each in found["flags"]] == [f"f{number}"]
    # The publisher has left each time, so the first call may have found a vacancy, too.
    assert 3 <= len(follower.calls_s) <= 6


def test_it_is_quiet_about_what_this_process_published(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The publisher's own watcher does not call back, however slowly the publish comes to its end."""
    watched = Watched(cache_at(directory))
    assert watched.cache.should_fetch_flag_definitions()
    publish = publication.publish

    def slow(*arguments: Any) -> Any:
        done = publish(*arguments)
        watched.look_around()  # The page names it, and this process has not noted it yet.
        return done

    monkeypatch.setattr(publication, "publish", slow)
    watched.cache.on_flag_definitions_received(definitions(flag("one")))
    watched.look_around()
    assert watched.calls_s == []
    assert watched.cache.status().generation == 1
    watched.cache.shutdown()


def test_what_is_not_taken_up_is_repeated_once_a_second(
    directory: Path, leader: SharedMemoryFlagCache
) -> None:
    """A callback that changes nothing is called again, but at most once a second."""
    watched = Watched(cache_at(directory), callback=lambda: None)
    watched.load()
    leader.shutdown()
    wait_until(lambda: len(watched.calls_s) >= 3, "it was called three times")
    first, second, third = watched.calls_s[:3]
    assert second - first >= 0.99
    assert third - second >= 0.99
    watched.cache.shutdown()


def test_a_reader_is_not_called_for_a_vacancy(directory: Path, leader: SharedMemoryFlagCache) -> None:
    """Who can never lead is not told that nobody does."""
    watched = Watched(cache_at(directory, role="reader"))
    watched.load()
    leader.shutdown()
    watched.look_around()
    assert watched.calls_s == []
    watched.cache.shutdown()


def test_a_worker_is_called_for_a_vacancy_and_takes_it(
    leader: SharedMemoryFlagCache, follower: Watched
) -> None:
    """When the leader leaves, a watching process polls and leads, with one call."""
    leader.shutdown()
    wait_until(lambda: len(follower.calls_s) == 1, "it is called back")
    follower.look_around()  # It has polled before it looks again.
    status = follower.cache.status()
    assert status.leader is not None
    assert status.term == 2
    assert status.counters.granted == 1
    assert len(follower.calls_s) == 1


# -- what a look sees after one that found nothing to do


@pytest.fixture
def group(directory: Path) -> Group:
    return Group(directory)


@pytest.fixture
def first(group: Group) -> SharedMemoryFlagCache:
    """A cache that leads, for a minute, and has published one flag."""
    cache = group.worker(lease_ttl=60.0)
    assert cache.should_fetch_flag_definitions()
    cache.on_flag_definitions_received(definitions(flag("one")))
    return cache


@pytest.fixture
def second(group: Group, first: SharedMemoryFlagCache) -> SharedMemoryFlagCache:
    """A cache that follows, and whose watcher would have found nothing to do."""
    return at_rest(group.worker())


def at_rest(cache: SharedMemoryFlagCache) -> SharedMemoryFlagCache:
    assert not cache.should_fetch_flag_definitions()
    assert cache.get_flag_definitions() is not None
    assert cache._notice() is None
    return cache


def test_a_look_sees_a_publish_at_once(
    group: Group, first: SharedMemoryFlagCache, second: SharedMemoryFlagCache
) -> None:
    """A new generation is seen by the very next look, at each time."""
    for number in range(3):
        group.machine.pass_time(INTERVAL_S)
        at_rest(second)
        assert first.should_fetch_flag_definitions()
        first.on_flag_definitions_received(definitions(flag(f"f{number}")))
        assert second._notice() is not None
        at_rest(second)


def test_a_look_sees_a_leader_that_left_at_once(
    first: SharedMemoryFlagCache, second: SharedMemoryFlagCache
) -> None:
    """Nobody leads: that is seen by the very next look."""
    first.shutdown()
    assert second._notice() == ("vacant", 1)


def test_a_look_sees_that_the_lease_runs_out_at_once(
    group: Group, second: SharedMemoryFlagCache
) -> None:
    """A leader that lives and polls no more leads until its lease is over, to the moment."""
    group.machine.pass_time(59.9)
    assert second._notice() is None
    group.machine.pass_time(0.0999)
    assert second._notice() is None
    group.machine.pass_time(0.0001)
    assert second._notice() == ("vacant", 1)


def test_a_dead_leader_is_seen_a_few_times_a_second(
    group: Group, first: SharedMemoryFlagCache, second: SharedMemoryFlagCache
) -> None:
    """Not by the very next look, as each would cost more: but in less than half a second."""
    leader = first.status().leader
    assert leader is not None
    group.machine.dead.add(leader.pid)
    assert second._notice() is None
    group.machine.pass_time(0.5)
    assert second._notice() == ("vacant", 1)


def test_an_exception_in_the_callback_is_logged_and_does_not_end_it(
    directory: Path, leader: SharedMemoryFlagCache, caplog: pytest.LogCaptureFixture
) -> None:
    """After a callback has failed, the next publish is called back for as if nothing had been."""
    failures = [RuntimeError("one"), KeyError("two")]

    def fails() -> None:
        watched.poll()
        if failures:
            raise failures.pop()

    watched = Watched(cache_at(directory))
    watched.load()
    watched._callback = fails
    for number in range(3):
        publish_from_file(directory, definitions(flag(f"f{number}")))
        wait_until(
            lambda key=f"f{number}": has(watched.cache, key),  # type: ignore[misc]
            "it is called back",
        )
    assert failures == []
    assert watched.watcher.is_alive
    troubles = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert ["a watcher's callback failed" in record.getMessage() for record in troubles] == [True] * 2
    watched.cache.shutdown()


def has(cache: SharedMemoryFlagCache, key: str) -> bool:
    """Whether the process holds this flag already; does not load."""
    held = cache._holding.definitions()
    return held is not None and key in [each["key"] for each in held["flags"]]


# -- how it begins and ends


def test_shutdown_ends_it(directory: Path, follower: Watched) -> None:
    """After `shutdown` its thread is gone, and nothing is called back any more."""
    before = set(threading.enumerate())
    follower.cache.shutdown()
    assert not follower.watcher.is_alive
    assert set(threading.enumerate()) < before
    publish_from_file(directory, definitions(flag("two")))
    assert follower.calls_s == []
    follower.cache.shutdown()


def test_it_can_be_stopped_by_itself(
    directory: Path, leader: SharedMemoryFlagCache, caplog: pytest.LogCaptureFixture
) -> None:
    """`stop` may be called from within the callback, and twice, and does not come back in a child."""
    watched = Watched(cache_at(directory), callback=lambda: watched.watcher.stop())
    watched.poll()
    publish_from_file(directory, definitions(flag("two")))
    wait_until(lambda: not watched.watcher.is_alive, "it has ended")
    assert len(watched.calls_s) == 1
    assert caplog.text == ""
    watched.watcher.stop()
    pid = os.fork()
    if not pid:
        watched.poll()
        os._exit(1 if watched.watcher.is_alive else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    watched.cache.shutdown()


def test_two_watchers_are_told_apart(directory: Path, leader: SharedMemoryFlagCache) -> None:
    """Each watcher of a cache calls its own callback."""
    cache = cache_at(directory)
    calls: list[str] = []
    first = cache.watch(lambda: calls.append("first"), interval=TICK_S)
    cache.watch(lambda: calls.append("second"), interval=TICK_S)
    assert isinstance(first, Watcher)
    cache.should_fetch_flag_definitions()
    cache.get_flag_definitions()
    publish_from_file(directory, definitions(flag("two")))
    wait_until(lambda: {"first", "second"} <= set(calls), "both are called back")
    cache.shutdown()


@pytest.mark.parametrize(
    ("callback", "interval", "kind"),
    [
        (None, 0.05, TypeError),
        ("poll", 0.05, TypeError),
        (print, 0, ValueError),
        (print, -1, ValueError),
        (print, float("nan"), ValueError),
        (print, "1", TypeError),
        (print, True, TypeError),
    ],
)
def test_wrong_arguments_are_refused(
    directory: Path, callback: Any, interval: Any, kind: type[Exception]
) -> None:
    """What cannot be called, and an interval that is none, are refused with what is allowed."""
    cache = cache_at(directory)
    before = set(threading.enumerate())
    with pytest.raises(kind, match=r"callback must be callable|interval must be a finite number"):
        cache.watch(callback, interval)
    assert set(threading.enumerate()) <= before
