"""Results as a table for the terminal, as the README's Markdown, and as JSON."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import frame, redis_server
from bench.contestants import TITLES
from bench.frame import OURS, Goal, Measurement, Results, Row

_PACKAGES = ("shmflags", "posthog", "msgpack", "filelock", "psutil", "redis", "lmdb", "diskcache")


def surroundings() -> dict[str, Any]:
    """Machine, versions and date: without them no number means anything."""
    versions = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    if server := redis_server.version():
        versions["redis-server"] = server
    return {
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory_gb()} GB, {platform.system()}",
        "versions": versions,
    }


def to_json(results: Results, around: Mapping[str, Any], *, quick: bool) -> str:
    """One measurement a line, so that two runs can be compared by eye."""
    lines = ",\n".join("    " + json.dumps(_measurement(found)) for found in results)
    head = {"quick": quick, **around}
    start = json.dumps(head, indent=2).rstrip().removesuffix("}").rstrip()
    return f'{start},\n  "measurements": [\n{lines}\n  ]\n}}\n'


def from_json(text: str) -> tuple[Results, dict[str, Any]]:
    """What `to_json` was given."""
    fields = json.loads(text)
    measurements = fields.pop("measurements")
    return Results(
        Measurement(**{**found, "samples": tuple(found["samples"])}) for found in measurements
    ), fields


def table(results: Results, questions: Iterable[str], around: Mapping[str, Any]) -> str:
    """The table for a terminal: each value with its ratio to ours, and whether goals are met."""
    lines = [_heading(around), ""]
    found = {name: frame.question(name).rows(results) for name in questions}
    widest = max((len(row.what) for rows in found.values() for row in rows), default=0)
    widths = [widest + 2, *[17] * len(TITLES)]
    for name, rows in found.items():
        if not rows:
            continue
        lines += [frame.question(name).TITLE, _columns(["", *TITLES.values()], widths)]
        for row in rows:
            cells = [_cell(row, contestant) for contestant in TITLES]
            lines.append(_columns([row.what.replace("`", ""), *cells], widths))
            lines += [f"    {text}" for text in _beside(row)]
            lines += [f"    {_verdict(goal, row)}" for goal in row.goals]
        lines.append("")
    return "\n".join(lines)


def markdown(results: Results, questions: Iterable[str], around: Mapping[str, Any]) -> str:
    """The README's table: what, ours, and the others with how many times ours they take."""
    titles = list(TITLES.values())
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for name in questions:
        for row in frame.question(name).rows(results):
            if row.in_readme and row.values:
                cells = [_cell(row, contestant) or "-" for contestant in TITLES]
                cells[0] = f"**{cells[0]}**"
                what = "; ".join([row.what, *_beside(row)])
                lines.append(f"| {what} | " + " | ".join(cells) + " |")
    lines += ["", f"{_heading(around)}.", ""]
    for name in questions:
        for plot in getattr(frame.question(name), "plots", lambda _: [])(results):
            if any(plot.lines.values()):
                lines.append(
                    f"![{plot.title}: {plot.y_label} by {plot.x_label}](bench/results/{plot.name}.svg)"
                )
    return "\n".join(lines) + "\n"


def amount(value: float, unit: str) -> str:
    """A value with a unit that suits it, two or three digits."""
    if unit == "s":
        for factor, name in ((1e6, "µs"), (1e3, "ms"), (1, "s")):
            if value * factor < 1000 or name == "s":
                return f"{_digits(value * factor)} {name}"
    if unit == "bytes":
        return f"{_digits(value / 1e6)} MB"
    return f"{value:g}"


def missed(results: Results, questions: Iterable[str]) -> list[str]:
    """The goals that were measured and not met, in words."""
    return [
        f"{row.what}: {_verdict(goal, row)}"
        for name in questions
        for row in frame.question(name).rows(results)
        for goal in row.goals
        if goal.is_met(row) is False
    ]


def _measurement(found: Measurement) -> dict[str, Any]:
    samples = [float(f"{sample:.4g}") for sample in found.samples]
    return {**asdict(found), "samples": samples}


def _digits(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def _ratio(times: float) -> str:
    return f"{times:.1f}x" if times < 10 else f"{times:,.0f}x"


def _cell(row: Row, contestant: str) -> str:
    value = row.values.get(contestant)
    if value is None:
        return ""
    text = amount(value, row.unit)
    ours = row.values.get(OURS)
    return text if contestant == OURS or not ours else f"{text} ({_ratio(value / ours)})"


def _beside(row: Row) -> list[str]:
    ours = row.values.get(OURS)
    return [
        f"{name}: {amount(value, row.unit)}" + (f" ({_ratio(value / ours)})" if ours else "")
        for name, value in row.beside.items()
    ]


def _verdict(goal: Goal, row: Row) -> str:
    met = goal.is_met(row)
    word = "not measured" if met is None else "met" if met else "MISSED"
    if goal.limit is not None:
        return f"goal: at most {amount(goal.limit, row.unit)}: {word}"
    theirs = row.values.get(goal.than, row.beside.get(goal.than))
    found = "" if theirs is None or not row.values.get(OURS) else f", {theirs / row.values[OURS]:,.2f}"
    return f"goal: {TITLES.get(goal.than, goal.than)} takes at least {goal.times:,.1f} times ours{found}: {word}"


def _heading(around: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in around["versions"].items())
    return f"Measured on {around['date']} on {around['machine']}, with {versions}"


def _columns(cells: list[str], widths: list[int]) -> str:
    return "".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
