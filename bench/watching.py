"""What does a watcher cost a process while nothing happens, and how soon is it there when something does?"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from bench import contestants, data, fleet, roles
from bench.frame import OURS, Goal, Measurement, Options, Results, Row, Step
from bench.processes import Process
from bench.roles import LONG_S
from bench.rounds import place_for
from shmflags import SharedMemoryFlagCache
from shmflags.demo.server import DefinitionsServer

TITLE = "Watching: at rest, and when something happens between polls that are an hour apart"
_SETTLE_S = 0.5
_WORKERS = 16
_FLAGS = 100
_PUBLISHER_INTERVAL_S = 0.5
_PATIENCE_S = 30.0


def steps(options: Options) -> list[Step]:
    seconds = 0.4 if options.quick else 2.0
    rounds = 2 if options.quick else 6
    return [
        Step("a watcher at rest", partial(rests, options.runs(5), seconds)),
        Step(f"a publish to {_WORKERS} watchers", partial(publishes, rounds)),
        Step(f"a leader killed among {_WORKERS} watchers", partial(kills, rounds)),
    ]


def rests(runs: int, seconds: float) -> Iterator[Measurement]:
    """The processor's time per second in a follower whose watcher looks as often as `attach` has it."""
    with ExitStack() as stack:
        place = place_for(stack, OURS)
        # The leader is another process: that it lives is part of what a watcher looks at.
        leader, follower = (stack.enter_context(Process()) for _ in range(2))
        leader.call("bench.roles:open_provider", contestant=OURS, place=place)
        leader.call("bench.roles:publish_first", flags=_FLAGS)
        shares = follower.call("bench.watching:rest", place=place, runs=runs, seconds=seconds)
    yield Measurement("watching", "at rest", OURS, "s", tuple(shares))


def publishes(rounds: int) -> Iterator[Measurement]:
    """From the publisher's call until the last of the workers has the flag."""
    samples = []
    with _watching_workers() as (publisher, master, _):
        for number in range(rounds):
            told = {"key": _a_key(), "name": f"round {number}"}
            see = {"function": "bench.roles:see", "timeout_s": _PATIENCE_S}
            master.start("bench.fleet:call_all", **see, **told)
            published_s = publisher.call("bench.watching:publish", name=told["name"])
            samples.append(max(master.result()) - published_s)
    yield Measurement("watching", "publish", OURS, "s", tuple(samples), _FLAGS, _WORKERS)


def kills(rounds: int) -> Iterator[Measurement]:
    """From the leader's SIGKILL until one of the other workers leads."""
    with _watching_workers() as (publisher, master, place):
        publisher.kill()
        arguments = {"place": place, "rounds": rounds}
        samples = master.call("bench.watching:kill_leaders", **arguments)
    yield Measurement("watching", "kill", OURS, "s", tuple(samples), _FLAGS, _WORKERS)


@contextmanager
def _watching_workers() -> Iterator[tuple[Process, Process, dict[str, str]]]:
    """A publisher that leads, the master of workers that have its flags, and their place."""
    with ExitStack() as stack:
        place = place_for(stack, OURS)
        server = stack.enter_context(DefinitionsServer())
        publisher, master = (stack.enter_context(Process()) for _ in range(2))
        opening = {"contestant": OURS, "place": place}
        publisher.call("bench.roles:open_provider", **opening, poll_interval_s=_PUBLISHER_INTERVAL_S)
        publisher.call("bench.roles:publish_first", flags=_FLAGS)
        master.call("bench.fleet:prepare", contestant=OURS)
        master.fork(_WORKERS)
        working = {"poll_interval_s": LONG_S, "url": server.url, "flags": _FLAGS, "key": _a_key()}
        master.call_workers("bench.roles:start_worker", **opening, **working)
        yield publisher, master, place


def _a_key() -> str:
    key: str = data.make(_FLAGS)["flags"][0]["key"]
    return key


def rows(results: Results) -> list[Row]:
    found = []
    for case, what, limit_s in (
        ("at rest", "processor time per second of a process with a watcher, at rest", 0.005),
        ("publish", f"from a publish to all of {_WORKERS} watching workers, {_FLAGS} flags", 0.15),
        ("kill", f"from the leader's SIGKILL until one of {_WORKERS} watching workers leads", 1.0),
    ):
        if values := results.medians("watching", case):
            found.append(Row(what, "s", values, goals=(Goal(limit=limit_s),)))
    return found


# -- called in measuring processes


def rest(place: dict[str, str], runs: int, seconds: float) -> list[float]:
    """The share of a core that this process takes while a watcher runs in it."""
    calls: list[int] = []
    cache: Any = contestants.make(OURS, place, LONG_S)
    cache.should_fetch_flag_definitions()
    cache.get_flag_definitions()
    cache.watch(lambda: calls.append(os.getpid()))
    time.sleep(_SETTLE_S)
    shares = []
    for _ in range(runs):
        used_s, began_s = time.process_time(), time.monotonic()
        time.sleep(seconds)
        shares.append((time.process_time() - used_s) / (time.monotonic() - began_s))
    if calls:
        raise RuntimeError("something happened: the watcher called back")
    return shares


def publish(name: str) -> float:
    """Publish, with another name of the first flag; when that began, CLOCK_MONOTONIC."""
    definitions = data.make(_FLAGS)
    definitions["flags"][0]["name"] = name
    return roles.publish(definitions)


def kill_leaders(place: dict[str, str], rounds: int) -> list[float]:
    """Wait until one of this master's workers leads, kill it, and so on; the seconds until the next."""
    cache = SharedMemoryFlagCache("bench", directory=place["directory"], role="reader")
    samples = []
    leader = _wait_for_leader(cache)
    for _ in range(rounds):
        time.sleep(_SETTLE_S)  # Its watcher's last look is not to be in step with the kill.
        fleet.kill(fleet.pids().index(leader))
        killed_s = time.monotonic()
        leader = _wait_for_leader(cache)
        samples.append(time.monotonic() - killed_s)
    return samples


def _wait_for_leader(cache: SharedMemoryFlagCache) -> int:
    """The pid of the worker that leads."""
    end_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end_s:
        leader = cache.status().leader
        if leader is not None and leader.pid in fleet.pids():
            return leader.pid
        time.sleep(0.004)
    raise RuntimeError("none of the workers leads")
