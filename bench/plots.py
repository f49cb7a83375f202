"""Plots as SVG, for those questions that have some."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import frame
from bench.contestants import TITLES
from bench.frame import OURS, Plot, Results

_COLORS = {
    OURS: "#1d4aff",
    "sdk": "#555555",
    "redis": "#d82c20",
    "lmdb": "#2e8b57",
    "diskcache": "#b8860b",
    "file": "#8a4fbe",
}


def draw(results: Results, questions: Iterable[str], directory: Path) -> list[Path]:
    """Write the plots of all questions; the files written. Without matplotlib there are none."""
    plots = [
        plot
        for name in questions
        for plot in getattr(frame.question(name), "plots", lambda _: [])(results)
        if any(plot.lines.values())
    ]
    if not plots:
        return []
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        print("matplotlib is not installed, so there are no plots", file=sys.stderr)
        return []
    mpl.use("svg")
    # Text as text, and the same numbers give the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 11})
    return [_draw(plot, directory / f"{plot.name}.svg") for plot in plots]


def _draw(plot: Plot, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, points in plot.lines.items():
        across, up = [x for x, _ in points], [y for _, y in points]
        contestant = name.partition(" ")[0]
        axes.plot(
            across,
            up,
            marker="o",
            markersize=4,
            linewidth=2.4 if contestant == OURS else 1.4,
            color=_COLORS.get(contestant),
            linestyle="-" if contestant == name else "--",
            label=TITLES.get(contestant, contestant) + name.removeprefix(contestant),
        )
    axes.set_xscale("log")
    if plot.log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    ticks: list[Any] = sorted({x for points in plot.lines.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
