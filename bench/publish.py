"""What does a publish cost the process that fetched: one flag changed?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from bench import contestants
from bench.frame import OURS, Goal, Measurement, Options, Results, Row, Step
from bench.poll import ROUNDS_S, place_for
from bench.processes import Process
from bench.roles import LONG_S

TITLE = "A publish"
_ALONE = "json.dumps"
_VARIANTS = 4


def steps(options: Options) -> list[Step]:
    runs = options.runs(15)
    providers = [name for name in contestants.available() if name != "sdk"]
    sizes = options.sizes(1000, 5000)
    return [
        *(
            Step(f"json.dumps alone, {flags:,} flags", partial(dumps_alone, flags, runs))
            for flags in sizes
        ),
        *(
            Step(f"publish, {flags:,} flags, {name}", partial(publishes, name, flags, runs))
            for flags in sizes
            for name in providers
        ),
    ]


def publishes(name: str, flags: int, runs: int) -> Iterator[Measurement]:
    """`on_flag_definitions_received` with one flag that differs from what was published last."""
    with ExitStack() as stack:
        place = place_for(stack, name)
        publisher = stack.enter_context(Process())
        interval_s = ROUNDS_S if name == OURS else LONG_S
        publisher.call(
            "bench.roles:open_provider", contestant=name, place=place, poll_interval_s=interval_s
        )
        publisher.call("bench.roles:publish_first", flags=flags)
        publisher.call("bench.roles:prepare_variants", flags=flags, count=_VARIANTS)
        found = [
            publisher.call("bench.roles:publish_variant", number=number) for number in range(runs + 1)
        ]
        yield Measurement("publish", "publish", name, "s", tuple(found[1:]), flags)


def dumps_alone(flags: int, runs: int) -> Iterator[Measurement]:
    """The yardstick: `json.dumps` of the same, and nothing else."""
    with Process() as process:
        found = process.call("bench.roles:dump_variants", flags=flags, count=_VARIANTS, runs=runs)
        yield Measurement("publish", "publish", _ALONE, "s", tuple(found), flags)


def rows(results: Results) -> list[Row]:
    found = []
    for flags in results.sizes("publish", "publish"):
        values = results.medians("publish", "publish", flags=flags)
        beside = {_ALONE: values.pop(_ALONE)} if _ALONE in values else {}
        goals = (Goal(times=2, than=_ALONE),) if flags == 5000 else ()
        what = f"publish, one flag of {flags:,} changed"
        found.append(Row(what, "s", values, beside, goals, in_readme=flags == 5000))
    return found
