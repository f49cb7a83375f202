"""A seeded simulation of one host: the real provider on a machine that is made up.

    world.py      processes and threads as greenlets, one clock, and the scheduler
    plan.py       what a seed may do
    workers.py    building processes, and forking them
    faults.py     what happens to them, to files, disk, server and clock
    host.py       clock, liveness and system calls of a process
    threads.py    its threads and locks
    watched.py    the page, the holding and the log, which take a step at each access
    client.py     the server with its ETags, and the SDK's client
    ledger.py     what really happened, and the invariants
    schedule.py   one seed, and that all agree in the end
    every_step.py one fault at every step of a poll, in turn
    installed.py  where all this takes the place of the real thing

`simulate(seed)` runs one schedule. The same seed gives the same schedule, step by step.
"""

from .every_step import StruckSchedule, strike
from .plan import FAULTS, Plan
from .schedule import Schedule, simulate

__all__ = ["FAULTS", "Plan", "Schedule", "StruckSchedule", "simulate", "strike"]
