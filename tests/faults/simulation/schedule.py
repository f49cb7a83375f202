"""One schedule: a seed decides the set-up, the faults and who runs when; then all must agree again.

A schedule has two parts. In the first, workers poll for some intervals while everything happens to
them that the seed's plan allows. In the second nothing new happens: the server answers, the disk
writes, who is stopped goes on, dies or stays stopped. Then, within a bounded number of polls,
somebody leads and every live worker evaluates what the server says (`converged`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from .client import Server
from .faults import Faults
from .host import Disk, SimulatedHost
from .installed import installed
from .ledger import Ledger
from .plan import INTERVAL_S, Plan
from .workers import Workers
from .world import SECOND_NS, Process, Task, World


class Schedule:
    """One seed, run in `directory`; by a plan that is `drawn` from it, if none is given."""

    def __init__(
        self,
        seed: int,
        directory: Path,
        *,
        plan: Plan | None = None,
        drawn: Callable[[Random], Plan] = Plan.of,
        verbose: bool = False,
        knows_start_times: bool = True,
    ) -> None:
        self.seed = seed
        self.world = World(seed, verbose=verbose)
        self.random = self.world.random
        self.plan = plan or drawn(self.random)
        self.ledger = Ledger(self.world, int(INTERVAL_S * SECOND_NS))
        self.server = Server(self.world, self.ledger, self.plan.etags, self.plan.contents)
        self.disk = Disk()
        self.host = SimulatedHost(self.world, knows_start_times=knows_start_times)
        self._workers = Workers(self.world, self.ledger, self.server, self.plan, directory)
        self.faults = Faults(
            self.world, self.ledger, self.server, self.disk, self._workers, self.plan, directory
        )
        self.stuck_on_etags = False
        self._directory = directory
        self._quiet = False
        self._tune()

    @property
    def trace(self) -> list[str]:
        """What happened, a line each, the same whenever the seed is run."""
        return [line.replace(str(self._directory), "") for line in self.world.trace]

    def run(self) -> None:
        """Run it; `world.failure` says whether an invariant was broken."""
        self.world.note(f"seed {self.seed}: {self.plan}")
        with installed(self.world, self.ledger, self.host, self.disk):
            self._start_workers()
            self.faults.change_later()
            end_ns = self.world.now_ns + int(self.plan.intervals * INTERVAL_S * SECOND_NS)
            self.world.run(end_ns, self._between)
            if not self.world.failure:
                self._settle()

    def _tune(self) -> None:
        world, plan = self.world, self.plan
        world.mean_fuel = plan.mean_fuel
        world.mean_slice_ns = plan.mean_slice_ns
        world.stall_chance = plan.stall_chance
        world.stall_ns = int(plan.stall_s * SECOND_NS)
        self.server.slowest_s = plan.slowest_s

    def _start_workers(self) -> None:
        if self.plan.prefork:
            master = self._workers.start()
            self.world.run(self.world.now_ns + 2 * SECOND_NS, self._between)
            for _ in range(self.plan.workers - 1):
                if master.alive:
                    self._workers.fork(master)
        else:
            for _ in range(self.plan.workers):
                self._workers.start()

    def _between(self, task: Task) -> None:
        """An operation of `task` was suspended half-way: now is the time for a fault."""
        # Most suspensions are in loops that wait; those under a lock are the ones that matter.
        weight = 10.0 if task.process.holds_a_lock else 0.5
        if not self._quiet and self.random.random() < self.plan.fault_chance * weight:
            anybody = self.random.random() < 0.2
            self.faults.strike(self.random.choice(self.world.processes) if anybody else task.process)

    # -- the end

    def _settle(self) -> None:
        """No more faults; then everybody agrees within a bounded number of polls."""
        world = self.world
        self._quiet = True
        world.note("no more faults from here")
        world.forget_timers()
        world.stall_chance = 0.0
        world.mean_slice_ns = 1e3
        world.mean_fuel = max(world.mean_fuel, 100.0)
        self.disk.number = 0
        self.server.status, self.server.slowest_s = 200, 0.5
        self._settle_processes()
        bound = 10 + 3 * len(world.processes)
        for _ in range(bound):
            world.run(world.now_ns + int(INTERVAL_S * SECOND_NS), self._between)
            if world.failure or not self._disagreement():
                return
        if self._all_are_told_304():
            self.stuck_on_etags = True
            return
        world.fail(f"converged: after {bound} intervals {self._disagreement()}")

    def _settle_processes(self) -> None:
        """Who is stopped goes on or dies, or stays stopped for ever unless it holds a lock."""
        world = self.world
        for process in list(world.processes):
            fate = self.random.random()
            if process.stopped and process.holds_a_lock:
                self.faults.resume(process)
            elif process.stopped and fate < 0.4:
                world.after(fate * 5 * INTERVAL_S, lambda process=process: self.faults.resume(process))
            elif process.stopped and fate < 0.7:
                self.faults.kill(process)
        if self.plan.last_one:
            for process in list(world.processes)[1:]:
                self.faults.kill(process, ", as all but one are")
        if not any(self._could_lead(process) for process in world.processes):
            self._workers.start(leads=True)

    def _could_lead(self, process: Process) -> bool:
        return not process.stopped and bool(process.cache._settings.electable)

    def _disagreement(self) -> str:
        """What is still wrong, "" if nothing is."""
        running = [one for one in self.world.processes if not one.stopped]
        for process in running:
            if self._is_overtaken(process):
                continue
            if process.client.content != self.server.content:
                return (
                    f"{process.name} evaluates content {process.client.content}, "
                    f"the server says {self.server.content}"
                )
        tokens = {one.cache._member.token for one in running if one.cache._member is not None}
        if not {self.ledger.leader(one) for one in running} <= tokens:
            return "no live worker leads"
        return ""

    def _is_overtaken(self, process: Process) -> bool:
        return process.client.was_overtaken and process.cache._holding.attachment is None

    def _all_are_told_304(self) -> bool:
        """Whether no worker can get a full answer: unattached, and its ETag is the current one.

        What is published is then older than the server's and cannot be told from it; the next
        change, or the next worker without an ETag, ends it.
        """
        etag = self.server.etag()
        running = [one for one in self.world.processes if self._could_lead(one)]
        return etag is not None and all(
            one.cache._holding.attachment is None and one.client.etag == etag for one in running
        )


def simulate(
    seed: int,
    *,
    verbose: bool = False,
    knows_start_times: bool = True,
    told: Callable[[Schedule], None] | None = None,
    drawn: Callable[[Random], Plan] = Plan.of,
) -> Schedule:
    """Run one schedule to its end, in a directory of its own that is gone afterwards.

    `verbose` traces each suspension; `knows_start_times=False` is a host that takes a pid for a
    process; `told` is called with the schedule before it runs; `drawn` draws its plan from the seed.
    """
    with own_directory() as path:
        schedule = Schedule(
            seed, path, drawn=drawn, verbose=verbose, knows_start_times=knows_start_times
        )
        if told is not None:
            told(schedule)
        schedule.run()
    return schedule


@contextmanager
def own_directory() -> Iterator[Path]:
    """A directory in memory, if there is such a thing, for the length of the block."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="shmflags-simulation-", dir=base) as path:
        yield Path(path)
