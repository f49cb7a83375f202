"""One fault at one step: every step of a worker's poll in turn, instead of what a seed draws.

The first worker begins alone. It is struck at the given step of its first poll, or of the poll that
brings a change of the definitions; a reader that comes then and a second worker find what is left. All
that is before the step is the same in each run, so the steps can be counted through.
"""

from __future__ import annotations

from pathlib import Path

from .plan import INTERVAL_S, Plan
from .schedule import Schedule, own_directory
from .world import SECOND_NS, Task

_SEED = 1


class StruckSchedule(Schedule):
    """`was_struck` tells whether the worker took so many steps."""

    def __init__(
        self, fault: str, step: int, directory: Path, *, later: bool, attached: str, verbose: bool
    ) -> None:
        super().__init__(_SEED, directory, plan=_plan(fault, attached), verbose=verbose)
        self.was_struck = False
        self._step = step
        self._begin_ns = self.world.now_ns + (10 * SECOND_NS if later else 0)
        self._end_ns = self._begin_ns + int(INTERVAL_S * SECOND_NS)
        self.world.after(2.0, self._workers.start)
        self.world.after(5.0, self.server.change)

    def _between(self, task: Task) -> None:
        is_first = task.process.start_ticks == 1
        if not is_first or not self._begin_ns <= self.world.now_ns < self._end_ns or self.was_struck:
            return
        self._step -= 1
        if self._step == 0:
            self.was_struck = True
            self.world.note(f"struck: {self.plan.faults[0]}")
            self.faults.strike(task.process)
            # Somebody who cannot mend what is left over finds it first.
            self.world.after(0.3, lambda: self._workers.start(reads=True))


def _plan(fault: str, attached: str) -> Plan:
    return Plan(
        workers=1,
        attached=attached,
        etags="content",
        faults=(fault,),
        intervals=3,
        fault_chance=0.0,
        change_every_s=1e6,
        contents=1000,
        mean_fuel=0.0,  # So that each step is a suspension.
        mean_slice_ns=1e3,
        stall_chance=0.0,
        stall_s=0.0,
        slowest_s=0.5,
        together=True,
        two_namespaces=False,
        prefork=False,
        max_term_s=60 * INTERVAL_S,
        last_one=False,
        readers=False,
    )


def strike(
    fault: str, step: int, *, later: bool, attached: str, verbose: bool = False
) -> StruckSchedule:
    """Run the schedule in which the first worker is struck at `step`.

    `later` means the poll that brings a change; `attached` is "all" or "none".
    """
    with own_directory() as path:
        schedule = StruckSchedule(fault, step, path, later=later, attached=attached, verbose=verbose)
        schedule.run()
    return schedule
