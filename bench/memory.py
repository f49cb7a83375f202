"""How much memory does each worker add: with the client loaded before the fork, and in each worker?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from bench import contestants, data
from bench.frame import Goal, Measurement, Options, Results, Row, Step
from bench.poll import place_for
from bench.processes import Process
from shmflags.demo.server import DefinitionsServer

TITLE = "Memory of a worker"
_WORKERS = 4
_POLLS = 3
_ROUNDS = 10
_KEYS = 20


def steps(options: Options) -> list[Step]:
    flags = 100 if options.quick else 5000
    return [
        Step(
            f"{flags:,} flags, {name}, {'preload' if preload else 'no preload'}",
            partial(grows, name, flags, preload),
        )
        for preload in (True, False)
        for name in contestants.available()
    ]


def grows(name: str, flags: int, preload: bool) -> Iterator[Measurement]:
    """Bytes that a worker shares with nobody, after three polls and ten rounds of 20 evaluations."""
    definitions = data.make(flags)
    keys = [flag["key"] for flag in definitions["flags"] if flag["active"]][:: flags // 25][:_KEYS]
    with ExitStack() as stack:
        server = stack.enter_context(DefinitionsServer(definitions))
        place = place_for(stack, name)
        master = stack.enter_context(Process())
        master.call("bench.fleet:prepare", contestant=name)
        if preload:
            master.call("bench.roles:open_provider", contestant=name, place=place)
            master.call("bench.roles:open_client", url=server.url, flags=flags)
        master.call("bench.fleet:freeze")
        master.fork(_WORKERS)
        if not preload:
            master.call_workers("bench.roles:open_provider", contestant=name, place=place)
            master.call_workers("bench.roles:open_client", url=server.url, flags=flags)
        found = master.call_workers("bench.roles:work", polls=_POLLS, rounds=_ROUNDS, keys=keys)
        case = "preload" if preload else "each"
        yield Measurement("memory", case, name, "bytes", tuple(found), flags, _WORKERS)


def rows(results: Results) -> list[Row]:
    found = []
    for flags in results.sizes("memory", "preload"):
        values = results.medians("memory", "preload", flags=flags)
        what = f"a worker's own memory, {flags:,} flags, client loaded before the fork"
        found.append(Row(what, "bytes", values, goals=(Goal(limit=4e6),)))
    for flags in results.sizes("memory", "each"):
        values = results.medians("memory", "each", flags=flags)
        found.append(Row("the same, client made in each worker", "bytes", values))
    return found


