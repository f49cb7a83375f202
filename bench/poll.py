"""What does a poll cost: with nothing changed, with one flag changed, and the first one?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from bench import contestants
from bench.contestants import Place
from bench.data import make
from bench.frame import OURS, Goal, Measurement, Options, Results, Row, Step
from bench.processes import Process, processes, scratch_directory
from bench.redis_server import redis_server
from bench.roles import LONG_S
from shmflags.demo.server import DefinitionsServer

TITLE = "A poll"
_BIG = 5000
ROUNDS_S = 0.2
"""Our poll interval where one change is published after the other: without a grant it is dropped."""


def steps(options: Options) -> list[Step]:
    names = contestants.available()
    providers = [name for name in names if name != "sdk"]
    sizes = options.sizes(100, 1000, 5000)
    cases = [
        ("SDK poll", client_polls, names, sizes, 15),
        ("two calls", calls, providers, sizes, 15),
        ("one flag changed", changes, providers, sizes, 15),
        ("first read", first_reads, providers, sizes[-1:], 9),
    ]
    return [
        Step(f"{case}, {flags:,} flags, {name}", partial(measure, name, flags, options.runs(runs)))
        for case, measure, contestants_, sizes_, runs in cases
        for flags in sizes_
        for name in contestants_
    ]


def client_polls(name: str, flags: int, runs: int) -> Iterator[Measurement]:
    """`_load_feature_flags` of a follower, or of an SDK alone that is answered with 304."""
    with ExitStack() as stack:
        place = place_for(stack, name)
        server = stack.enter_context(DefinitionsServer(make(flags)))
        publisher, follower = stack.enter_context(processes(2))
        if name != "sdk":
            publisher.call("bench.roles:open_provider", contestant=name, place=place)
            publisher.call("bench.roles:publish_first", flags=flags)
        follower.call("bench.roles:open_provider", contestant=name, place=place)
        follower.call("bench.roles:open_client", url=server.url, flags=flags)
        quick = follower.call("bench.roles:time_client_polls", runs=1, calls=1)[0]
        found = follower.call("bench.roles:time_client_polls", runs=runs, calls=_calls(quick))
        if name != "sdk" and server.count:
            raise RuntimeError(f"{name}: the API was asked {server.count} times by a follower")
        yield Measurement("poll", "client", name, "s", tuple(found), flags)


def calls(name: str, flags: int, runs: int) -> Iterator[Measurement]:
    """The provider's two calls, of a follower; and ours of the leader as well."""
    with ExitStack() as stack:
        place = place_for(stack, name)
        publisher, follower = stack.enter_context(processes(2))
        _publish(publisher, name, place, flags)
        follower.call("bench.roles:open_provider", contestant=name, place=place)
        follower.call("bench.roles:follow", flags=flags)
        quick = follower.call("bench.roles:time_calls", runs=1, calls=1)[0]
        found = follower.call("bench.roles:time_calls", runs=runs, calls=_calls(quick))
        yield Measurement("poll", "calls", name, "s", tuple(found), flags)
        if name == OURS:
            led = publisher.call("bench.roles:time_calls", runs=runs, calls=_calls(quick))
            yield Measurement("poll", "leader's calls", name, "s", tuple(led), flags)


def changes(name: str, flags: int, runs: int) -> Iterator[Measurement]:
    """A follower's `get_flag_definitions` after one flag has changed."""
    with ExitStack() as stack:
        place = place_for(stack, name)
        publisher, follower = stack.enter_context(processes(2))
        _publish(publisher, name, place, flags, ROUNDS_S if name == OURS else LONG_S)
        publisher.call("bench.roles:prepare_variants", flags=flags, count=3)
        follower.call("bench.roles:open_provider", contestant=name, place=place)
        follower.call("bench.roles:follow", flags=flags)
        found = []
        for number in range(runs):
            publisher.call("bench.roles:publish_variant", number=number)
            found.append(follower.call("bench.roles:timed_read"))
        yield Measurement("poll", "change", name, "s", tuple(found), flags)


def first_reads(name: str, flags: int, runs: int) -> Iterator[Measurement]:
    """The first `get_flag_definitions` of a fresh process."""
    with ExitStack() as stack:
        place = place_for(stack, name)
        publisher = stack.enter_context(Process())
        _publish(publisher, name, place, flags)
        found = []
        for _ in range(runs):
            with Process() as follower:
                follower.call("bench.roles:open_provider", contestant=name, place=place)
                found.append(follower.call("bench.roles:timed_first_read", flags=flags))
        yield Measurement("poll", "first", name, "s", tuple(found), flags)


def rows(results: Results) -> list[Row]:
    found = []
    for flags in results.sizes("poll", "client"):
        goals: tuple[Goal, ...] = (Goal(times=1000, than="lmdb"),) if flags >= 1000 else ()
        values = results.medians("poll", "client", flags=flags)
        what = f"the SDK's whole poll, nothing changed, {flags:,} flags, attached"
        found.append(Row(what, "s", values, goals=goals, in_readme=flags >= 1000))
    for flags in results.sizes("poll", "calls"):
        limit = Goal(limit=60e-6)
        goals = (limit, *([Goal(times=300, than="redis")] if flags == 1000 else []))
        values = results.medians("poll", "calls", flags=flags)
        what = f"the provider's two calls alone, nothing changed, {flags:,} flags"
        found.append(Row(what, "s", values, goals=goals, in_readme=flags == 1000))
        led = results.medians("poll", "leader's calls", flags=flags)
        what = f"the same in the leader, {flags:,} flags"
        found.append(Row(what, "s", led, goals=(limit,), in_readme=False))
    for flags in results.sizes("poll", "change"):
        goals = (Goal(times=50, than="lmdb"),) if flags == _BIG else ()
        values = results.medians("poll", "change", flags=flags)
        what = f"`get` after one flag of {flags:,} changed"
        found.append(Row(what, "s", values, goals=goals, in_readme=flags == _BIG))
    for flags in results.sizes("poll", "first"):
        goals = (Goal(times=1.5, than="lmdb"),) if flags == _BIG else ()
        values = results.medians("poll", "first", flags=flags)
        found.append(Row(f"a process's first read, {flags:,} flags", "s", values, goals=goals))
    return found


def _calls(seconds: float) -> int:
    """So many calls make a sample of some milliseconds, if one takes `seconds`."""
    return max(1, min(500, int(0.005 / seconds)))


def place_for(stack: ExitStack, name: str) -> dict[str, str]:
    url = stack.enter_context(redis_server()) if name == "redis" else ""
    return Place(stack.enter_context(scratch_directory()), url).to_json()


def _publish(
    publisher: Process, name: str, place: dict[str, str], flags: int, poll_interval_s: float = LONG_S
) -> None:
    publisher.call(
        "bench.roles:open_provider", contestant=name, place=place, poll_interval_s=poll_interval_s
    )
    publisher.call("bench.roles:publish_first", flags=flags)
