"""After a change at the API, how long until all workers evaluate by it, and how far apart are they?"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from bench import contestants, data
from bench.frame import OURS, Measurement, Options, Results, Row, Step
from bench.processes import Process
from bench.rounds import place_for
from shmflags.demo.server import DefinitionsServer

TITLE = "A change reaches 8 workers, poll interval 1 s"
POLL_INTERVAL_S = 1.0
PATIENCE_S = 30.0
_FLAGS = 100
_WORKERS = 8
_HOW = (OURS, "sdk", "redis")
"""The others keep definitions elsewhere, and poll as the one on Redis does."""


def steps(options: Options) -> list[Step]:
    rounds = 2 if options.quick else 6
    return [Step(f"a change, {name}", partial(changes, name, rounds)) for name in polled_differently()]


def polled_differently() -> list[str]:
    """The contestants to be measured where only the way of polling matters."""
    return [name for name in contestants.available() if name in _HOW]


def changes(name: str, rounds: int) -> Iterator[Measurement]:
    """Change a flag at the API, at any time within the interval, and see it in each worker."""
    to_all, apart = [], []
    chance = random.Random(name)
    with live_workers(name, _WORKERS) as fleet:
        for number in range(rounds):
            time.sleep(chance.uniform(0, POLL_INTERVAL_S))
            changed_s, seen_s = fleet.change(f"round {number}")
            to_all.append(max(seen_s) - changed_s)
            apart.append(max(seen_s) - min(seen_s))
    yield Measurement("propagation", "to all", name, "s", tuple(to_all), _FLAGS, _WORKERS)
    yield Measurement("propagation", "apart", name, "s", tuple(apart), _FLAGS, _WORKERS)


class Fleet:
    """Workers with pollers that run, and the API that they poll."""

    def __init__(self, master: Process, server: DefinitionsServer, definitions: dict[str, Any]) -> None:
        self.master = master
        self._server = server
        self._definitions = definitions
        self._key = definitions["flags"][0]["key"]

    def change(self, name: str, *, kill: int | None = None) -> tuple[float, list[float]]:
        """Change a flag at the API; when that was, and when each worker saw it (CLOCK_MONOTONIC).

        With `kill`, that worker is killed first, and the time is that of its death.
        """
        self._definitions["flags"][0]["name"] = name
        if kill is not None:
            self.master.call("bench.fleet:kill", number=kill)
        start_s = time.monotonic()
        self._server.set_definitions(self._definitions)
        seen = self.master.call_workers(
            "bench.roles:see", key=self._key, name=name, timeout_s=PATIENCE_S
        )
        return start_s, seen

    def leader(self) -> int:
        """The number of the worker that was told to fetch last; 0 where nobody is told."""
        told: list[float] = self.master.call_workers("bench.roles:last_told_to_fetch")
        return told.index(max(told))


@contextmanager
def live_workers(name: str, count: int) -> Iterator[Fleet]:
    """`count` workers that have flags, and whose pollers run."""
    definitions = data.make(_FLAGS)
    with ExitStack() as stack:
        server = stack.enter_context(DefinitionsServer(definitions))
        place = place_for(stack, name)
        master = stack.enter_context(Process())
        master.call("bench.fleet:prepare", contestant=name)
        master.fork(count)
        master.call_workers(
            "bench.roles:start_worker",
            contestant=name,
            place=place,
            poll_interval_s=POLL_INTERVAL_S,
            within_s=POLL_INTERVAL_S,
            url=server.url,
            flags=_FLAGS,
            key=definitions["flags"][0]["key"],
        )
        yield Fleet(master, server, definitions)


def rows(results: Results) -> list[Row]:
    found = []
    for case, what in (
        ("to all", "from a change at the API to all 8 workers, poll interval 1 s"),
        ("apart", "from the first of the 8 workers to the last"),
    ):
        if values := results.medians("propagation", case):
            found.append(Row(what, "s", values))
    return found
