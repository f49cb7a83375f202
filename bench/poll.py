"""What does a poll cost: with nothing changed, with one flag changed, and the first one?"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from bench import contestants
from bench.data import change_one_flag, make
from bench.frame import OURS, Goal, Options, Results, Row, Step
from bench.processes import Process
from bench.roles import LONG_S
from bench.rounds import Sample, calls_per_sample, in_turn, place_for, publisher
from shmflags.demo.server import DefinitionsServer

TITLE = "A poll"
ROUNDS_S = 0.2
"""Our poll interval where one change is published after the other: without a grant it is dropped."""

_BIG = 5000


def steps(options: Options) -> list[Step]:
    names = contestants.available()
    providers = [name for name in names if name != "sdk"]
    sizes = options.sizes(100, 1000, 5000)
    cases = [
        ("client", client_polls, names, sizes, 15),
        ("calls", follower_calls, providers, sizes, 15),
        ("leader's calls", leader_calls, [name for name in names if name == OURS], sizes, 15),
        ("change", changes, providers, sizes, 15),
        ("client, change", client_changes, names, sizes[-1:], 9),
        ("first", first_reads, providers, sizes[-1:], 15),
    ]
    return [
        Step(
            f"{case}, {flags:,} flags",
            partial(
                in_turn,
                "poll",
                case,
                prepare,
                names_,
                flags,
                options.runs(runs if flags < _BIG else runs // 2),
            ),
        )
        for case, prepare, names_, sizes_, runs in cases
        for flags in sizes_
    ]


def client_polls(stack: ExitStack, name: str, flags: int) -> Sample:
    """`_load_feature_flags` of a follower, or of an SDK alone that is answered with 304."""
    place = place_for(stack, name)
    server = stack.enter_context(DefinitionsServer(make(flags)))
    if name != "sdk":
        publisher(stack, name, place, flags)
    follower = stack.enter_context(Process())
    follower.call("bench.roles:open_provider", contestant=name, place=place)
    follower.call("bench.roles:open_client", url=server.url, flags=flags)
    calls = calls_per_sample(follower.call("bench.roles:time_client_polls", calls=1))

    def sample(_: int) -> float:
        seconds: float = follower.call("bench.roles:time_client_polls", calls=calls)
        if name != "sdk" and server.count:
            raise RuntimeError(f"{name}: a follower asked the API {server.count} times")
        return seconds

    return sample


def follower_calls(stack: ExitStack, name: str, flags: int) -> Sample:
    """The provider's two calls, of a follower."""
    place = place_for(stack, name)
    publisher(stack, name, place, flags)
    follower = stack.enter_context(Process())
    follower.call("bench.roles:open_provider", contestant=name, place=place)
    follower.call("bench.roles:follow", flags=flags)
    calls = calls_per_sample(follower.call("bench.roles:time_calls", calls=1))
    return lambda _: float(follower.call("bench.roles:time_calls", calls=calls))


def leader_calls(stack: ExitStack, name: str, flags: int) -> Sample:
    """The provider's two calls, of the leader, while no fetch is due."""
    leader = publisher(stack, name, place_for(stack, name), flags)
    calls = calls_per_sample(leader.call("bench.roles:time_calls", calls=1))
    return lambda _: float(leader.call("bench.roles:time_calls", calls=calls))


def changes(stack: ExitStack, name: str, flags: int) -> Sample:
    """A follower's `get_flag_definitions` after one flag has changed."""
    place = place_for(stack, name)
    interval_s = ROUNDS_S if name == OURS else LONG_S
    leader = publisher(stack, name, place, flags, poll_interval_s=interval_s)
    leader.call("bench.roles:prepare_variants", flags=flags)
    follower = stack.enter_context(Process())
    follower.call("bench.roles:open_provider", contestant=name, place=place)
    follower.call("bench.roles:follow", flags=flags)

    def sample(number: int) -> float:
        leader.call("bench.roles:publish_variant", number=number)
        return float(follower.call("bench.roles:timed_read"))

    return sample


def client_changes(stack: ExitStack, name: str, flags: int) -> Sample:
    """`_load_feature_flags` after one flag has changed: the provider's part, and then the SDK's own."""
    place = place_for(stack, name)
    variants = [make(flags), change_one_flag(make(flags), 1)]
    server = stack.enter_context(DefinitionsServer(variants[0]))
    if name != "sdk":
        interval_s = ROUNDS_S if name == OURS else LONG_S
        leader = publisher(stack, name, place, flags, poll_interval_s=interval_s)
        leader.call("bench.roles:prepare_variants", flags=flags)
    client = stack.enter_context(Process())
    client.call("bench.roles:open_provider", contestant=name, place=place)
    client.call("bench.roles:open_client", url=server.url, flags=flags, watch=False)

    def sample(number: int) -> float:
        if name == "sdk":
            server.set_definitions(variants[number % 2])
        else:
            leader.call("bench.roles:publish_variant", number=number)
        return float(client.call("bench.roles:timed_changed_poll"))

    return sample


def first_reads(stack: ExitStack, name: str, flags: int) -> Sample:
    """The first `get_flag_definitions` of a fresh process."""
    place = place_for(stack, name)
    publisher(stack, name, place, flags)

    def sample(_: int) -> float:
        with Process() as follower:
            follower.call("bench.roles:open_provider", contestant=name, place=place)
            return float(follower.call("bench.roles:timed_first_read", flags=flags))

    return sample


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
    for flags in results.sizes("poll", "client, change"):
        values = results.medians("poll", "client, change", flags=flags)
        found.append(Row(f"the SDK's whole poll after one flag of {flags:,} changed", "s", values))
    for flags in results.sizes("poll", "first"):
        goals = (Goal(times=1.5, than="lmdb"),) if flags == _BIG else ()
        values = results.medians("poll", "first", flags=flags)
        found.append(Row(f"a process's first read, {flags:,} flags", "s", values, goals=goals))
    return found
