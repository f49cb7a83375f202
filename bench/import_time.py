"""What does `import shmflags` add to the `import posthog` that is there anyway?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from bench.frame import OURS, Goal, Measurement, Options, Results, Row, Step
from bench.processes import ROOT

TITLE = "Importing"
_PROGRAM = """
import sys, time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def steps(options: Options) -> list[Step]:
    return [Step("import shmflags, import posthog", partial(imports, options.runs(15)))]


def imports(runs: int) -> Iterator[Measurement]:
    """Seconds that the import takes in a fresh interpreter, each in turn."""
    found: dict[str, list[float]] = {OURS: [], "posthog": []}
    for _ in range(runs + 1):
        for module, samples in found.items():
            samples.append(_import(module))
    for module, samples in found.items():
        # The first one wrote the byte code.
        yield Measurement("import_time", "import", module, "s", tuple(samples[1:]))


def _import(module: str) -> float:
    command = [sys.executable, "-c", _PROGRAM.format(module=module)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return float(answer.stdout)


def rows(results: Results) -> list[Row]:
    values = results.medians("import_time", "import")
    beside = {"import posthog": values.pop("posthog")} if "posthog" in values else {}
    goal = Goal(times=1 / 0.15, than="import posthog")
    return [Row("`import shmflags`", "s", values, beside, (goal,))] if values else []
