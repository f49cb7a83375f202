"""What does a watcher cost a process while nothing happens?"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from bench import contestants, poll
from bench.frame import OURS, Goal, Measurement, Options, Results, Row, Step
from bench.processes import Process
from bench.roles import LONG_S

TITLE = "Watching, while nothing happens"
_SETTLE_S = 0.5


def steps(options: Options) -> list[Step]:
    seconds = 0.4 if options.quick else 2.0
    return [Step("a watcher at rest", partial(rests, options.runs(5), seconds))]


def rests(runs: int, seconds: float) -> Iterator[Measurement]:
    """The processor's time per second in a follower whose watcher looks as often as `attach` has it."""
    with ExitStack() as stack:
        place = poll.place_for(stack, OURS)
        # The leader is another process: that it lives is part of what a watcher looks at.
        leader, follower = (stack.enter_context(Process()) for _ in range(2))
        leader.call("bench.roles:open_provider", contestant=OURS, place=place)
        leader.call("bench.roles:publish_first", flags=100)
        shares = follower.call("bench.watching:rest", place=place, runs=runs, seconds=seconds)
    yield Measurement("watching", "at rest", OURS, "s", tuple(shares))


def rest(place: dict[str, str], runs: int, seconds: float) -> list[float]:
    """In a measuring process: the share of a core that it takes while a watcher runs in it."""
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


def rows(results: Results) -> list[Row]:
    values = results.medians("watching", "at rest")
    what = "processor time per second of a process with a watcher, at rest"
    return [Row(what, "s", values, goals=(Goal(limit=0.005),))] if values else []
