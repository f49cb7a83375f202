"""`Status` as a table for a terminal."""

from __future__ import annotations

import os
import re
import textwrap
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import TextIO

from shmflags.diagnosis import BEHIND, CURRENT, SILENT, count, duration
from shmflags.status import Status, WorkerStatus

_BOLD, _DIM, _RED, _GREEN, _YELLOW, _PLAIN = "1", "2", "31", "32", "33", "0"
_STATE_COLOURS = {CURRENT: _GREEN, BEHIND: _RED, SILENT: _RED}
_COLOUR = re.compile(r"\033\[\d+m")
_UNITS = ("bytes", "kB", "MB", "GB")


def has_colours(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that shows colours, to somebody who wants them."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def fitting(lines: list[str], columns: int, rows: int) -> list[str]:
    """What of it a terminal can show without scrolling, and how much more there is."""
    heights = [max(1, -(-len(_COLOUR.sub("", line)) // columns)) for line in lines]
    left = rows - 1  # The cursor comes to stand below.
    if sum(heights) <= left:
        return lines
    shown = 0
    while heights[shown] < left:
        left -= heights[shown]
        shown += 1
    return [*lines[:shown], f"… and {count(len(lines) - shown, 'more line')}: name a key"[:columns]]


class Table:
    """Renders in lines, on a terminal of at most `width` characters, with or without colours."""

    def __init__(
        self, *, colours: bool, width: int | None = None, most_workers: int | None = None
    ) -> None:
        self._colours = colours
        self._width = None if width is None else max(width, 40)
        self._most_workers = most_workers

    def lines(self, status: Status) -> list[str]:
        """One service key, without sentences."""
        lines = [self._title(status)]
        if status.exists:
            lines.extend(f"  {name:<9}{text}" for name, text in self._facts(status))
            if status.workers:
                lines.extend(["", *self._workers(status.workers)])
        return lines

    def problems(self, status: Status) -> list[str]:
        return self._sentences("problem", status.problems, _RED)

    def notes(self, status: Status) -> list[str]:
        return self._sentences("note", status.notes, _DIM)

    def _title(self, status: Status) -> str:
        if status.problems:
            verdict = self._paint(count(len(status.problems), "problem"), _RED)
        elif status.exists:
            verdict = self._paint("ok", _GREEN)
        else:
            verdict = self._paint("nothing here", _YELLOW)
        name = _printable(status.name)
        return (
            f"{self._paint(name, _BOLD)}  {verdict}  {self._paint(_printable(status.directory), _DIM)}"
        )

    def _facts(self, status: Status) -> Iterable[tuple[str, str]]:
        leader = status.leader
        if leader is None:
            yield "leader", self._paint("nobody", _YELLOW)
        else:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(leader.since))
            left = _duration(leader.lease_left_s)
            yield (
                "leader",
                f"process {leader.pid}, term {leader.term}, since {since}, lease left {left}",
            )
            if leader.command_line:
                yield "", self._paint(self._cut(_printable(leader.command_line), 11), _DIM)
        if status.generation is None:
            yield "serving", self._paint("nothing", _YELLOW)
        else:
            flags, cohorts = count(status.flags or 0, "flag"), count(status.cohorts or 0, "cohort")
            yield (
                "serving",
                f"generation {status.generation}: {flags}, {cohorts}, {size(status.size or 0)}",
            )
        fetched, changed = _ago(status.age_s), _ago(status.unchanged_s)
        yield "age", f"fetched {fetched}, changed {changed}, last grant {_ago(status.since_grant_s)}"
        counted = asdict(status.counters)
        yield "so far", ", ".join(f"{number} {name}" for name, number in counted.items())

    def _workers(self, workers: tuple[WorkerStatus, ...]) -> Iterable[str]:
        # Who leads and who is in trouble comes first: the rest may not fit.
        ordered = sorted(workers, key=lambda worker: (not worker.leads, worker.state == CURRENT))
        yield self._paint(
            "     worker  role          up   last poll     every     has  state",
            _DIM,
        )
        for worker in ordered[: self._most_workers]:
            yield self._worker(worker)
        hidden = len(ordered[self._most_workers :]) if self._most_workers is not None else 0
        if hidden:
            yield self._paint(f"  and {count(hidden, 'more worker')}", _DIM)

    def _worker(self, worker: WorkerStatus) -> str:
        role = "leader" if worker.leads else {"auto": "worker"}.get(worker.role, worker.role)
        spacing_s = worker.poll_spacing_s or worker.poll_interval_s
        has = "-" if worker.generation is None else str(worker.generation)
        row = (
            f"  {worker.pid:>9}  {role:<7} {_duration(time.time() - worker.started):>8}  "
            f"{_ago(worker.last_poll_s):>10}  {_duration(spacing_s):>8}  {has:>6}  "
        )
        state = self._paint(worker.state, _STATE_COLOURS.get(worker.state, _RED))
        return (self._paint(row, _BOLD) if worker.leads else row) + state

    def _sentences(self, kind: str, sentences: tuple[str, ...], colour: str) -> list[str]:
        lines = []
        for sentence in sentences:
            text = _printable(sentence)
            first, *rest = textwrap.wrap(text, self._width - 12) if self._width else [text]
            lines += [f"  {self._paint(kind, colour)}: {first}", *(f"    {line}" for line in rest)]
        return lines

    def _paint(self, text: str, colour: str) -> str:
        return f"\033[{colour}m{text}\033[{_PLAIN}m" if self._colours else text

    def _cut(self, text: str, indent: int) -> str:
        if self._width is None:
            return text
        room = self._width - indent
        return text if len(text) <= room else text[: room - 1] + "…"


def size(number: int) -> str:
    """A number of bytes for people."""
    value, unit = float(number), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f} {_UNITS[unit]}" if unit else f"{number} bytes"


def _duration(value_s: float) -> str:
    return duration(int(max(0.0, value_s) * 1e9))


def _ago(value_s: float | None) -> str:
    return "never" if value_s is None else f"{_duration(value_s)} ago"


def _printable(text: str) -> str:
    """Without control characters: a command line or a key must not command the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
