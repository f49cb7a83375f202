"""What does a publish cost the process that fetched: one flag changed?"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from bench import contestants
from bench.frame import OURS, Goal, Options, Results, Row, Step
from bench.poll import ROUNDS_S
from bench.processes import Process
from bench.roles import LONG_S
from bench.rounds import Sample, in_turn, place_for, publisher

TITLE = "A publish"
_ALONE = "json.dumps"


def steps(options: Options) -> list[Step]:
    names = [_ALONE, *(name for name in contestants.available() if name != "sdk")]
    runs = options.runs(15)
    return [
        Step(
            f"publish, {flags:,} flags",
            partial(in_turn, "publish", "publish", publishes, names, flags, runs),
        )
        for flags in options.sizes(1000, 5000)
    ]


def publishes(stack: ExitStack, name: str, flags: int) -> Sample:
    """`on_flag_definitions_received` with one flag that differs from what was published last.

    The yardstick is `json.dumps` of the same, and nothing else.
    """
    if name == _ALONE:
        process = stack.enter_context(Process())
    else:
        interval_s = ROUNDS_S if name == OURS else LONG_S
        process = publisher(stack, name, place_for(stack, name), flags, poll_interval_s=interval_s)
    process.call("bench.roles:prepare_variants", flags=flags)
    function = "dump_variant" if name == _ALONE else "publish_variant"
    return lambda number: float(process.call(f"bench.roles:{function}", number=number))


def rows(results: Results) -> list[Row]:
    found = []
    for flags in results.sizes("publish", "publish"):
        values = results.medians("publish", "publish", flags=flags)
        beside = {_ALONE: values.pop(_ALONE)} if _ALONE in values else {}
        goals = (Goal(times=2, than=_ALONE),) if flags == 5000 else ()
        what = f"publish, one flag of {flags:,} changed"
        found.append(Row(what, "s", values, beside, goals, in_readme=flags == 5000))
    return found
