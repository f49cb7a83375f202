"""What does a watcher cost a process while nothing happens?"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial

from bench.frame import OURS, Goal, Measurement, Options, Results, Row, Step
from bench.processes import ROOT

TITLE = "Watching, while nothing happens"
# The leader is a process of its own: that it lives is part of what a watcher looks at.
_PROGRAM = """
import os, sys, time
from bench import data
from shmflags import SharedMemoryFlagCache

directory, runs, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
done, told = os.pipe()
ready, tell = os.pipe()
if not os.fork():
    os.close(told)
    leader = SharedMemoryFlagCache("bench", directory=directory, poll_interval=3600)
    assert leader.should_fetch_flag_definitions()
    leader.on_flag_definitions_received(data.definitions(100))
    os.write(tell, b"x")
    os.read(done, 1)
    os._exit(0)
os.read(ready, 1)
cache = SharedMemoryFlagCache("bench", directory=directory, poll_interval=3600)
cache.should_fetch_flag_definitions()
cache.get_flag_definitions()
cache.watch(lambda: sys.exit("called back"))
time.sleep(0.5)
for _ in range(runs):
    used, began = time.process_time(), time.monotonic()
    time.sleep(seconds)
    print((time.process_time() - used) / (time.monotonic() - began))
"""


def steps(options: Options) -> list[Step]:
    return [Step("a watcher at rest", partial(rests, options.runs(5), 0.4 if options.quick else 2.0))]


def rests(runs: int, seconds: float) -> Iterator[Measurement]:
    """Seconds of the processor's time per second, with `attach`'s interval of 0.05 s."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        command = [sys.executable, "-c", _PROGRAM, directory, str(runs), str(seconds)]
        answer = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
        )
    shares = tuple(float(line) for line in answer.stdout.splitlines())
    yield Measurement("watching", "at rest", OURS, "s", shares)


def rows(results: Results) -> list[Row]:
    values = results.medians("watching", "at rest")
    what = "processor time per second of a process with a watcher"
    return [Row(what, "s", values, goals=(Goal(limit=0.005),))] if values else []
