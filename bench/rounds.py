"""Samples taken in turn: what disturbs the machine disturbs all contestants alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from bench.contestants import Place
from bench.frame import Measurement
from bench.processes import Process, scratch_directory
from bench.redis_server import redis_server
from bench.roles import LONG_S

Sample = Callable[[int], float]
"""Takes one sample, of the round with this number, which is 0 and up; -1 is for warming up."""

Prepare = Callable[[ExitStack, str, int], Sample]
"""Prepares a contestant, by name, with so many flags; what it starts is ended by the stack."""


def in_turn(
    question: str, case: str, prepare: Prepare, names: Sequence[str], flags: int, runs: int
) -> Iterator[Measurement]:
    """Prepare all contestants, then take a sample of each, again and again."""
    with ExitStack() as stack:
        takers = {name: prepare(stack, name, flags) for name in names}
        samples: dict[str, list[float]] = {name: [] for name in names}
        for number in range(-1, runs):
            for name, take in takers.items():
                samples[name].append(take(number))
    for name, found in samples.items():
        yield Measurement(question, case, name, "s", tuple(found[1:]), flags)


def place_for(stack: ExitStack, name: str) -> dict[str, str]:
    """A place for a contestant's definitions, with a Redis if it needs one."""
    url = stack.enter_context(redis_server()) if name == "redis" else ""
    return Place(stack.enter_context(scratch_directory()), url).to_json()


def publisher(
    stack: ExitStack,
    name: str,
    place: dict[str, str],
    flags: int,
    *,
    poll_interval_s: float = LONG_S,
) -> Process:
    """A process that leads and has published so many flags."""
    process = stack.enter_context(Process())
    process.call(
        "bench.roles:open_provider", contestant=name, place=place, poll_interval_s=poll_interval_s
    )
    process.call("bench.roles:publish_first", flags=flags)
    return process


def calls_per_sample(seconds: float) -> int:
    """So many calls make a sample of some milliseconds, if one takes `seconds`."""
    return max(1, min(500, int(0.005 / seconds)))
