"""How do costs grow: with the number of flags, and with the number of workers?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from bench import contestants, poll, publish
from bench.frame import OURS, Measurement, Options, Plot, Results, Row, Step
from bench.processes import Process
from bench.rounds import in_turn, place_for, publisher

TITLE = "Growth"
_NAMES = (OURS, "lmdb")
_IN_README = (10, 1000, 20_000)
_CASES = {
    "client": "the SDK's whole poll, nothing changed",
    "change": "`get` after one flag changed",
    "publish": "publish, one flag changed",
}


def steps(options: Options) -> list[Step]:
    names = [name for name in contestants.available() if name in _NAMES]
    cases = {"client": poll.client_polls, "change": poll.changes, "publish": publish.publishes}
    counts = (1, 4) if options.quick else (1, 4, 16, 64)
    return [
        *(
            Step(
                f"{case}, {flags:,} flags",
                partial(
                    in_turn,
                    "growth",
                    case,
                    prepare,
                    names,
                    flags,
                    options.runs(7 if flags < 5000 else 3),
                ),
            )
            for flags in options.sizes(10, 100, 1000, 5000, 20_000)
            for case, prepare in cases.items()
        ),
        *(
            Step(f"poll among {workers} workers", partial(among, workers, options.runs(15)))
            for workers in counts
        ),
    ]


def among(workers: int, runs: int) -> Iterator[Measurement]:
    """A follower's poll while so many workers share the cache."""
    flags = 100
    with ExitStack() as stack:
        place = place_for(stack, OURS)
        publisher(stack, OURS, place, flags)
        master = stack.enter_context(Process())
        master.call("bench.fleet:prepare", contestant=OURS)
        master.fork(workers)
        master.call_workers("bench.roles:open_provider", contestant=OURS, place=place)
        master.call_workers("bench.roles:open_client", url="http://127.0.0.1:9", flags=flags)
        poll_one = partial(
            master.call,
            "bench.fleet:call",
            number=0,
            function="bench.roles:time_client_polls",
            calls=100,
        )
        found = [poll_one() for _ in range(runs + 1)]
        yield Measurement("growth", "among", OURS, "s", tuple(found[1:]), flags, workers)


def rows(results: Results) -> list[Row]:
    found = []
    for case, what in _CASES.items():
        for flags in results.sizes("growth", case):
            values = results.medians("growth", case, flags=flags)
            what_of = f"{what}, {flags:,} flags"
            found.append(Row(what_of, "s", values, in_readme=flags in _IN_README))
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
            for name in _NAMES
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
