"""The frame that the questions fit into: steps, measurements, rows and plots.

See the package's docstring for what a question has to offer.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

QUESTIONS = (
    "poll",
    "publish",
    "import_time",
    "worker_startup",
    "memory",
    "propagation",
    "failover",
    "watching",
    "growth",
    "cluster",
)

OURS = "shmflags"


@dataclass(frozen=True)
class Options:
    """How much to do. `quick` is for seeing that everything works, not for numbers."""

    quick: bool = False

    def runs(self, count: int) -> int:
        """`count`, or a few of them if it has to be quick."""
        return min(count, 2) if self.quick else count

    def sizes(self, *flags: int) -> tuple[int, ...]:
        """The numbers of flags to try; only the small ones if it has to be quick."""
        return tuple(size for size in flags if size <= 100) or flags[:1] if self.quick else flags


@dataclass(frozen=True)
class Measurement:
    """Samples of one thing, for one contestant.

    `case` is the question's own word for what was measured. `flags` and `workers` are 0 where
    they do not matter. Times are in seconds ("s"), memory in "bytes", the rest is counted ("").
    """

    question: str
    case: str
    contestant: str
    unit: str
    samples: tuple[float, ...]
    flags: int = 0
    workers: int = 0

    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: float) -> float:
        """The smallest sample that at least `percent` of the samples do not exceed."""
        ordered = sorted(self.samples)
        return ordered[max(0, -(-len(ordered) * percent // 100).__int__() - 1)]


@dataclass(frozen=True)
class Step:
    """Something to do that takes up to some ten seconds; the progress bar shows its label."""

    label: str
    run: Callable[[], Iterable[Measurement]]


@dataclass(frozen=True)
class Goal:
    """What a row's own value is held against: a limit, or so many times better than another."""

    limit: float | None = None
    times: float | None = None
    than: str = ""

    def is_met(self, row: Row) -> bool | None:
        """None if what it takes was not measured."""
        ours = row.values.get(OURS)
        if ours is None:
            return None
        if self.limit is not None:
            return ours <= self.limit
        theirs = row.values.get(self.than, row.beside.get(self.than))
        return None if theirs is None or self.times is None else theirs >= self.times * ours


@dataclass(frozen=True)
class Row:
    """A line of the table: one value per contestant, smaller is better.

    `beside` holds values that are no contestant's ("json.dumps alone"); `values` without ours is
    fine, and such a row has no ratios.
    """

    what: str
    unit: str
    values: Mapping[str, float]
    beside: Mapping[str, float] = field(default_factory=dict)
    goals: tuple[Goal, ...] = ()
    in_readme: bool = True


@dataclass(frozen=True)
class Plot:
    """Lines over a logarithmic axis; `lines` maps a contestant, or "contestant and more", to points."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, tuple[tuple[float, float], ...]]
    log_y: bool = True


class Results:
    """The measurements of a run, to be asked for."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self.all = tuple(measurements)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.all)

    def find(
        self, question: str, case: str, *, flags: int | None = None, workers: int | None = None
    ) -> dict[str, Measurement]:
        """By contestant: what was measured for a case, and for so many flags and workers."""
        return {
            found.contestant: found
            for found in self.all
            if (found.question, found.case) == (question, case)
            and flags in (None, found.flags)
            and workers in (None, found.workers)
        }

    def medians(self, question: str, case: str, **where: int) -> dict[str, float]:
        return {name: found.median() for name, found in self.find(question, case, **where).items()}

    def percentiles(self, question: str, case: str, percent: float, **where: int) -> dict[str, float]:
        found = self.find(question, case, **where)
        return {name: measured.percentile(percent) for name, measured in found.items()}

    def sizes(self, question: str, case: str) -> list[int]:
        """The numbers of flags for which a case was measured."""
        return sorted({m.flags for m in self.all if (m.question, m.case) == (question, case)})

    def worker_counts(self, question: str, case: str) -> list[int]:
        return sorted({m.workers for m in self.all if (m.question, m.case) == (question, case)})


def question(name: str) -> ModuleType:
    """The module of a question; raises `ModuleNotFoundError` if there is none of that name."""
    return importlib.import_module(f"bench.{name}")


def known_questions() -> tuple[str, ...]:
    """The questions whose modules are there."""
    here = Path(__file__).parent
    return tuple(name for name in QUESTIONS if (here / f"{name}.py").exists())
