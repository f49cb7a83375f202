"""What one seed may do, drawn at its start.

Each seed leaves most of it out, so that the rest gets far: a schedule in which everything fails at
once never reaches the states that matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

INTERVAL_S = 30.0
"""The poll interval of all workers, in seconds of the simulated clock."""

FAULTS = (
    "kill",
    "stop",
    "fork",
    "start",
    "shutdown",
    "page",
    "snapshot",
    "directory",
    "disk",
    "server",
    "change",
    "jump",
    "lease",
    "reboot",
)


@dataclass(frozen=True)
class Plan:
    """Times in seconds of the simulated clock, chances per suspended operation."""

    workers: int
    attached: str  # "all", "none" or "some"
    etags: str  # "content", "stamp" (a revert has a new one) or "none"
    faults: tuple[str, ...]
    intervals: int
    fault_chance: float
    change_every_s: float
    contents: int  # how many the server ever has: with few, most changes are reverts
    mean_fuel: float  # how much a thread does until it is suspended
    mean_slice_ns: float  # how long that takes
    stall_chance: float  # that a suspended thread is not run again for up to `stall_s`
    stall_s: float
    slowest_s: float  # the server's slowest answer
    together: bool  # all workers start, and so poll, at once
    two_namespaces: bool  # of pids
    prefork: bool  # the workers are forked from one that has begun to load
    max_term_s: float
    last_one: bool  # in the end all but one are killed
    readers: bool  # some workers only read

    @staticmethod
    def of(random: Random) -> Plan:
        count = random.randint(1, 6)
        return Plan(
            workers=random.randint(2, 4),
            attached=random.choice(("all", "none", "some")),
            etags=random.choice(("content", "content", "content", "stamp", "none")),
            faults=tuple(sorted(random.sample(FAULTS, count))),
            intervals=random.randint(2, 8),
            fault_chance=random.choice((0.003, 0.02, 0.1)),
            change_every_s=random.choice((5.0, 40.0, 200.0)),
            contents=random.choice((2, 2, 3, 1000)),
            mean_fuel=random.choice((5.0, 20.0, 60.0, 200.0)),
            mean_slice_ns=random.choice((1e3, 1e5, 2e7)),
            stall_chance=random.choice((0.0, 0.02, 0.2)),
            stall_s=random.choice((0.1, 20.0, 150.0)),
            slowest_s=random.choice((0.5, 30.0)),
            together=random.random() < 0.7,
            two_namespaces=random.random() < 0.15,
            prefork=random.random() < 0.3,
            max_term_s=random.choice((1.5, 3.0, 60.0)) * INTERVAL_S,
            last_one=random.random() < 0.3,
            readers=random.random() < 0.2,
        )
