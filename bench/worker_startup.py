"""How long until all workers of a host have flags, and how often is the API asked for that?

`python -m bench worker_startup` measures the start of your own workers: with your definitions (the JSON
that the API answers with), your number of workers, your latency, and with the client made before the
fork or after it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench import contestants, data
from bench.contestants import TITLES
from bench.frame import OURS, Goal, Measurement, Options, Results, Row, Step
from bench.processes import Process
from bench.report import amount
from bench.rounds import place_for
from shmflags.demo.server import DefinitionsServer

TITLE = "The start of 32 workers, API at 200 ms"
_LATENCY_S = 0.2
_POLL_INTERVAL_S = 30.0


def steps(options: Options) -> list[Step]:
    workers = 8 if options.quick else 32
    flags = 100 if options.quick else 1000
    rounds = 1 if options.quick else 3
    definitions = data.make(flags)
    return [
        Step(f"{workers} workers, {name}", partial(starts, name, definitions, workers, rounds=rounds))
        for name in contestants.available()
    ]


def starts(
    name: str,
    definitions: dict[str, Any],
    workers: int,
    *,
    latency_s: float = _LATENCY_S,
    preload: bool = False,
    rounds: int = 3,
) -> Iterator[Measurement]:
    """Start `workers` at once, `rounds` times from nothing; each one's time to its first evaluation."""
    seconds: list[float] = []
    requests: list[float] = []
    for _ in range(rounds):
        with ExitStack() as stack:
            server = stack.enter_context(DefinitionsServer(definitions, latency_s=latency_s))
            place = place_for(stack, name)
            seconds += _one_start(stack, name, place, server.url, definitions, workers, preload=preload)
            requests.append(server.count)
    flags = len(definitions["flags"])
    yield Measurement("worker_startup", "seconds", name, "s", tuple(seconds), flags, workers)
    yield Measurement("worker_startup", "requests", name, "", tuple(requests), flags, workers)


def _one_start(
    stack: ExitStack,
    name: str,
    place: dict[str, str],
    url: str,
    definitions: dict[str, Any],
    workers: int,
    *,
    preload: bool,
) -> list[float]:
    flags, key = len(definitions["flags"]), definitions["flags"][0]["key"]
    master = stack.enter_context(Process())
    master.call("bench.fleet:prepare", contestant=name)
    told: dict[str, Any] = {"contestant": name, "place": place, "poll_interval_s": _POLL_INTERVAL_S}
    if preload:
        master.call("bench.roles:open_provider", **told)
        master.call("bench.roles:open_client", url=url, flags=flags, poll_interval_s=_POLL_INTERVAL_S)
    master.call("bench.fleet:freeze")
    master.fork(workers)
    if preload:
        return master.call_workers("bench.roles:evaluate_first", key=key)
    return master.call_workers("bench.roles:start_worker", **told, url=url, flags=flags, key=key)


def rows(results: Results) -> list[Row]:
    found = []
    for workers in results.worker_counts("worker_startup", "seconds"):
        where = {"workers": workers}
        requests = results.medians("worker_startup", "requests", **where)
        what = f"requests until {workers} workers have flags"
        found.append(Row(what, "", requests, goals=(Goal(limit=1),)))
        for percent, goals in ((50, ()), (99, (Goal(times=1, than="sdk"),))):
            values = results.percentiles("worker_startup", "seconds", percent, **where)
            found.append(Row(f"time to flags, {workers} workers, p{percent}", "s", values, goals=goals))
    return found


def main(arguments: list[str]) -> int:
    """The command line of `python -m bench worker_startup`."""
    told = _parse(arguments)
    if told.definitions is None:
        definitions = data.make(told.flags)
    else:
        definitions = json.loads(told.definitions.read_text())
        if not isinstance(definitions, dict) or not definitions.get("flags"):
            print(
                f"{told.definitions}: no definitions; there has to be a list `flags`", file=sys.stderr
            )
            return 2
        definitions = {"group_type_mapping": {}, "cohorts": {}, **definitions}
    names = told.contestants.split(",") if told.contestants else [OURS, "sdk"]
    try:
        contestants.choose(names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    when = "client loaded before the fork" if told.preload else "client made in each worker"
    print(
        f"{told.workers} workers, {len(definitions['flags']):,} flags, "
        f"{len(json.dumps(definitions)) / 1e6:.1f} MB, API at {told.latency:g} s, {when}"
    )
    print(f"{'':12}{'requests':>10}{'p50':>10}{'p90':>10}{'p99':>10}")
    for name in names:
        seconds, requests = starts(
            name, definitions, told.workers,
            latency_s=told.latency, preload=told.preload, rounds=told.rounds,
        )  # fmt: skip
        times = "".join(f"{amount(seconds.percentile(percent), 's'):>10}" for percent in (50, 90, 99))
        print(f"{TITLES[name]:12}{statistics.median(requests.samples):>10g}{times}")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench worker_startup",
        description="Measure how long your workers take to have flags, and how often they ask the API.",
    )
    parser.add_argument("--definitions", type=Path, metavar="FILE", help="JSON, as the API answers it")
    parser.add_argument("--flags", type=int, default=1000, help="without FILE: make so many (1000)")
    parser.add_argument("--workers", type=int, default=32, help="processes (32)")
    parser.add_argument("--latency", type=float, default=0.2, help="of the API, in seconds (0.2)")
    parser.add_argument("--rounds", type=int, default=3, help="starts from nothing (3)")
    parser.add_argument(
        "--contestants", metavar="NAMES", help="shmflags,sdk; or any of the benchmark's"
    )
    parser.add_argument(
        "--preload", action=argparse.BooleanOptionalAction, default=False,
        help="load the client before the fork, as with gunicorn's preload_app",
    )  # fmt: skip
    return parser.parse_args(arguments)
