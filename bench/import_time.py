"""What does `import shmflags` take, beside the `import posthog` that is there anyway?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.frame import OURS, Goal, Measurement, Options, Results, Row, Step
from bench.processes import ROOT, scratch_directory

TITLE = "Importing"
_PROGRAM = """
import time
{before}
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""
_ON_TOP = "on top"


def steps(options: Options) -> list[Step]:
    return [Step("import shmflags, import posthog", partial(imports, options.runs(15)))]


def imports(runs: int) -> Iterator[Measurement]:
    """Seconds that the import takes in a fresh interpreter, each in turn."""
    cases = {
        ("import", OURS): _PROGRAM.format(before="", module="shmflags"),
        ("import", "posthog"): _PROGRAM.format(before="", module="posthog"),
        (_ON_TOP, OURS): _PROGRAM.format(before="import posthog", module="shmflags"),
    }
    found: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
    with scratch_directory() as cache:
        for _ in range(runs + 1):
            for case, program in cases.items():
                found[case].append(_run(program, Path(cache)))
    for (case, module), samples in found.items():
        # The first one wrote the byte code, as an installation does.
        yield Measurement("import_time", case, module, "s", tuple(samples[1:]))


def _run(program: str, cache: Path) -> float:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return float(answer.stdout)


def rows(results: Results) -> list[Row]:
    values = results.medians("import_time", "import")
    if not values:
        return []
    beside = {"import posthog": values.pop("posthog")} if "posthog" in values else {}
    goal = Goal(times=1 / 0.15, than="import posthog")
    on_top = results.medians("import_time", _ON_TOP)
    return [
        Row("`import shmflags`", "s", values, beside, (goal,)),
        Row("the same, after `import posthog`", "s", on_top),
    ]
