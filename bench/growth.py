"""How do costs grow: with the number of flags, and with the number of workers?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial

from bench import contestants, poll, publish
from bench.frame import OURS, Measurement, Options, Plot, Results, Row, Step
from bench.processes import Process
from bench.roles import LONG_S

TITLE = "Growth"
_RIVALS = ("redis", "lmdb")
_CASES = {
    "client": "the SDK's whole poll, nothing changed",
    "change": "`get` after one flag changed",
    "publish": "publish, one flag changed",
}


def steps(options: Options) -> list[Step]:
    names = [name for name in contestants.available() if name in (OURS, *_RIVALS)]
    runs = options.runs(7)
    cases = {"poll": poll.client_polls, "one changed": poll.changes, "publish": publish.publishes}
    counts = (1, 4) if options.quick else (1, 4, 16, 64)
    return [
        *(
            Step(
                f"{case}, {flags:,} flags, {name}",
                partial(_as_growth, partial(measure, name, flags, runs)),
            )
            for flags in options.sizes(10, 100, 1000, 5000, 20_000)
            for name in names
            for case, measure in cases.items()
        ),
        *(
            Step(f"poll among {workers} workers", partial(among, workers, options.runs(15)))
            for workers in counts
        ),
    ]


def _as_growth(measure: partial[Iterator[Measurement]]) -> Iterable[Measurement]:
    return [dataclasses.replace(found, question="growth") for found in measure()]


def among(workers: int, runs: int) -> Iterator[Measurement]:
    """A follower's poll while so many workers share the cache."""
    flags = 100
    with ExitStack() as stack:
        place = poll.place_for(stack, OURS)
        publisher, master = stack.enter_context(Process()), stack.enter_context(Process())
        publisher.call("bench.roles:open_provider", contestant=OURS, place=place)
        publisher.call("bench.roles:publish_first", flags=flags)
        master.call("bench.fleet:prepare", contestant=OURS)
        master.fork(workers)
        master.call_workers(
            "bench.roles:open_provider", contestant=OURS, place=place, poll_interval_s=LONG_S
        )
        master.call_workers("bench.roles:open_client", url="http://127.0.0.1:9", flags=flags)
        found = master.call(
            "bench.fleet:call", number=0, function="bench.roles:time_client_polls", runs=runs, calls=100
        )
        yield Measurement("growth", "among", OURS, "s", tuple(found), flags, workers)


def rows(results: Results) -> list[Row]:
    found = []
    for case, what in _CASES.items():
        for flags in results.sizes("growth", case):
            values = results.medians("growth", case, flags=flags)
            found.append(Row(f"{what}, {flags:,} flags", "s", values, in_readme=False))
    for workers in results.worker_counts("growth", "among"):
        values = results.medians("growth", "among", workers=workers)
        found.append(Row(f"poll among {workers} workers", "s", values, in_readme=False))
    return found


def plots(results: Results) -> list[Plot]:
    lines: dict[str, dict[str, tuple[tuple[float, float], ...]]] = {}
    for case in _CASES:
        lines[case] = {
            name: tuple(
                (flags, 1000 * results.medians("growth", case, flags=flags)[name])
                for flags in results.sizes("growth", case)
                if name in results.medians("growth", case, flags=flags)
            )
            for name in (OURS, *_RIVALS)
        }
    among_workers = tuple(
        (workers, 1e6 * results.medians("growth", "among", workers=workers)[OURS])
        for workers in results.worker_counts("growth", "among")
    )
    return [
        Plot("poll", "A whole SDK poll, nothing changed", "flags", "ms", lines["client"]),
        Plot("change", "Reading a change of one flag", "flags", "ms", lines["change"]),
        Plot("publish", "Publishing a change of one flag", "flags", "ms", lines["publish"]),
        Plot(
            "workers",
            "A whole SDK poll, 100 flags",
            "workers",
            "µs",
            {OURS: among_workers},
            log_y=False,
        ),
    ]
