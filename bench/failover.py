"""The leader is killed as a flag changes: how long until the others have the change?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bench.frame import Measurement, Options, Results, Row, Step
from bench.propagation import live_workers, polled_differently

TITLE = "The leader is killed, poll interval 1 s"
_SURVIVORS = 3


def steps(options: Options) -> list[Step]:
    rounds = 1 if options.quick else 4
    return [Step(f"a kill, {name}", partial(kills, name, rounds)) for name in polled_differently()]


def kills(name: str, rounds: int) -> Iterator[Measurement]:
    """SIGKILL to whoever leads, again and again, until few are left."""
    found = []
    with live_workers(name, rounds + _SURVIVORS) as fleet:
        fleet.change("before")
        for number in range(rounds):
            killed_s, seen_s = fleet.change(f"round {number}", kill=fleet.leader())
            found.append(max(seen_s) - killed_s)
    yield Measurement("failover", "to all", name, "s", tuple(found))


def rows(results: Results) -> list[Row]:
    values = results.medians("failover", "to all")
    what = "from the leader's SIGKILL to new flags in all others, poll interval 1 s"
    return [Row(what, "s", values)] if values else []
