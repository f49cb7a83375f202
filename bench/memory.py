"""How much memory do 5,000 flags add to each worker, with and without loading them before the fork?

It is the memory that a worker shares with nobody, less that of a worker whose client has 20 flags and
does the same: what the interpreter and the SDK touch after a fork is no matter of the definitions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from bench import contestants, data
from bench.frame import Goal, Measurement, Options, Results, Row, Step
from bench.processes import Process
from bench.rounds import place_for
from shmflags.demo.server import DefinitionsServer

TITLE = "Memory that definitions add to a worker"
_WORKERS = 4
_POLLS = 3
_ROUNDS = 10
_KEYS = 20
_CASES = {
    "preload": "client loaded before the fork, gc.freeze()",
    "preload, together": "the same, with `evaluate_flags(flag_keys=…)`, which walks through all flags",
    "each": "client made in each worker",
}


def steps(options: Options) -> list[Step]:
    flags = 500 if options.quick else 5000
    return [
        Step(f"{flags:,} flags, {name}, {case}", partial(adds, name, flags, case))
        for case in _CASES
        for name in contestants.available()
    ]


def adds(name: str, flags: int, case: str) -> Iterator[Measurement]:
    """Bytes that definitions add to a worker, after three polls and ten rounds of 20 evaluations."""
    floor = _sizes(name, data.make(_KEYS), case)
    found = _sizes(name, data.make(flags), case)
    added = tuple(float(one - sorted(floor)[len(floor) // 2]) for one in found)
    yield Measurement("memory", case, name, "bytes", added, flags, _WORKERS)


def _sizes(name: str, definitions: dict[str, Any], case: str) -> list[int]:
    flags = len(definitions["flags"])
    keys = [flag["key"] for flag in definitions["flags"]][:: flags // _KEYS][:_KEYS]
    with ExitStack() as stack:
        server = stack.enter_context(DefinitionsServer(definitions))
        place = place_for(stack, name)
        master = stack.enter_context(Process())
        master.call("bench.fleet:prepare", contestant=name)
        if case != "each":
            master.call("bench.roles:open_provider", contestant=name, place=place)
            master.call("bench.roles:open_client", url=server.url, flags=flags)
        master.call("bench.fleet:freeze")
        asked = server.count
        master.fork(_WORKERS)
        if case == "each":
            master.call_workers("bench.roles:open_provider", contestant=name, place=place)
            master.call_workers("bench.roles:open_client", url=server.url, flags=flags)
        found = master.call_workers(
            "bench.roles:work", polls=_POLLS, rounds=_ROUNDS, keys=keys, together="together" in case
        )
        if case != "each" and name != "sdk" and server.count != asked:
            raise RuntimeError(f"{name}: workers asked the API {server.count - asked} times")
        return found


def rows(results: Results) -> list[Row]:
    found = []
    for case, what in _CASES.items():
        for flags in results.sizes("memory", case):
            goals = (Goal(limit=4e6),) if case == "preload" else ()
            values = results.medians("memory", case, flags=flags)
            found.append(Row(f"{flags:,} flags, {what}", "bytes", values, goals=goals))
    return found
