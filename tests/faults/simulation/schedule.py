"""One schedule: a seed decides the set-up, the faults and who runs when; then all must agree again.

A schedule has two parts. In the first, workers poll for some intervals while everything happens to
them that the seed's plan allows. In the second nothing new happens: the server answers, the disk
writes, who is stopped goes on, dies or stays stopped. Then, within a bounded number of polls,
somebody leads and every live worker evaluates what the server says (`converged`).
"""

from __future__ import annotations

import copy
import errno
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from random import Random

from shmflags import provider
from shmflags.provider import SharedMemoryFlagCache

from .client import Client, Server
from .host import Disk, SimulatedHost, installed
from .ledger import Ledger
from .world import SECOND_NS, Process, Task, World

INTERVAL_S = 30.0
MOST_PROCESSES = 6
MOST_FAULTS = 12
FAULTS = (
    "kill",
    "stop",
    "fork",
    "start",
    "shutdown",
    "page",
    "snapshot",
    "directory",
    "disk",
    "server",
    "change",
    "jump",
    "lease",
    "reboot",
)


@dataclass(frozen=True)
class Plan:
    """What one seed may do. Each seed leaves most of it out, so that the rest gets far."""

    workers: int
    attached: str  # "all", "none" or "some"
    etags: str  # "content", "stamp" (a revert has a new one) or "none"
    faults: tuple[str, ...]
    intervals: int
    fault_chance: float
    change_every_s: float
    contents: int  # how many different ones the server ever has: with few, most changes are reverts
    mean_fuel: float
    mean_slice_ns: float
    stall_chance: float
    stall_s: float
    slowest_s: float
    together: bool
    two_namespaces: bool
    prefork: bool
    max_term_s: float
    last_one: bool
    readers: bool

    @staticmethod
    def of(random: Random) -> Plan:
        count = random.randint(1, 6)
        return Plan(
            workers=random.randint(2, 4),
            attached=random.choice(("all", "none", "some")),
            etags=random.choice(("content", "content", "content", "stamp", "none")),
            faults=tuple(sorted(random.sample(FAULTS, count))),
            intervals=random.randint(2, 8),
            fault_chance=random.choice((0.003, 0.02, 0.1)),
            change_every_s=random.choice((5.0, 40.0, 200.0)),
            contents=random.choice((2, 2, 3, 1000)),
            mean_fuel=random.choice((5.0, 20.0, 60.0, 200.0)),
            mean_slice_ns=random.choice((1e3, 1e5, 2e7)),
            stall_chance=random.choice((0.0, 0.02, 0.2)),
            stall_s=random.choice((0.1, 20.0, 150.0)),
            slowest_s=random.choice((0.5, 30.0)),
            together=random.random() < 0.7,
            two_namespaces=random.random() < 0.15,
            prefork=random.random() < 0.3,
            max_term_s=random.choice((1.5, 3.0, 60.0)) * INTERVAL_S,
            last_one=random.random() < 0.3,
            readers=random.random() < 0.2,
        )


class Schedule:
    """One seed, run in `directory`."""

    def __init__(
        self, seed: int, directory: Path, *, verbose: bool = False, knows_start_times: bool = True
    ) -> None:
        self.seed = seed
        self.world = World(seed, verbose=verbose)
        self.random = self.world.random
        self.plan = Plan.of(self.random)
        self.ledger = Ledger(self.world, int(INTERVAL_S * SECOND_NS))
        self.server = Server(self.world, self.ledger, self.plan.etags, self.plan.contents)
        self.disk = Disk()
        self.host = SimulatedHost(self.world, knows_start_times=knows_start_times)
        self.happened: list[str] = []
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
            self._change_later()
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

    # -- processes

    def _start_workers(self) -> None:
        if self.plan.prefork:
            master = self._start()
            self.world.run(self.world.now_ns + 2 * SECOND_NS, self._between)
            for _ in range(self.plan.workers - 1):
                if master.alive:
                    self._fork(master)
        else:
            for _ in range(self.plan.workers):
                self._start()

    def _start(self, *, leads: bool = False) -> Process:
        """A new process with a cache and a client of its own; one that may lead if `leads`."""
        world, plan = self.world, self.plan
        reads = plan.readers and not leads and self.random.random() < 0.3
        namespace = 1 + (plan.two_namespaces and self.random.random() < 0.5)
        process = world.make_process(namespace)
        process.losses_seen = self.ledger.losses
        attached = plan.attached == "all" or (plan.attached == "some" and self.random.random() < 0.5)
        watched = attached and self.random.random() < 0.5
        cache = SharedMemoryFlagCache(
            "simulation",
            directory=self._directory,
            poll_interval=INTERVAL_S,
            max_term=plan.max_term_s,
            role="reader" if reads else "auto",
        )
        process.cache = cache
        process.client = Client(world, self.ledger, self.server, process, INTERVAL_S)
        world.note(f"{process.name} starts: pid {process.pid}, namespace {namespace}, {attached=}, {reads=}")

        def main() -> None:
            if attached:
                cache.attach(process.client, watch=watched, interval=2.0)
            self._evaluate(process)

        world.spawn(process, "main", main)
        if self.random.random() < 0.3:
            world.spawn(process, "second", lambda: self._evaluate(process))
        return process

    def _evaluate(self, process: Process) -> None:
        """The life of a thread that serves requests, as far as it concerns the flags."""
        self.world.sleep(self.random.random() * (0.002 if self.plan.together else INTERVAL_S))
        while process.client.content is None:
            process.client.evaluate()
            self.world.sleep(self.random.random() * INTERVAL_S / 4)

    def _fork(self, parent: Process) -> Process:
        """What a fork hands on: memory as it is at this moment, descriptors, and no threads."""
        world = self.world
        child = world.make_process(parent.namespace)
        child.inherit_files(parent)
        child.handed_stamp = parent.handed_stamp
        child.losses_seen = parent.losses_seen
        memo: dict[int, object] = {id(parent): child}
        child.cache, child.client = copy.deepcopy((parent.cache, parent.client), memo)
        self.ledger.note_fork(memo)
        cache, client = child.cache, child.client
        if cache._holding.attachment is not None:
            cache._holding.attachment._client = weakref.ref(client)
        runs_hooks = self.random.random() < 0.8
        world.note(f"{parent.name} forks {child.name}: pid {child.pid}, {runs_hooks=}")

        def main() -> None:
            if runs_hooks:
                provider._after_fork(weakref.ref(cache))
            client.after_fork(child)
            self._evaluate(child)

        world.spawn(child, "main", main)
        return child

    # -- faults

    def _between(self, task: Task) -> None:
        """An operation of `task` was suspended half-way: now is the time for a fault."""
        if not self._quiet and self.random.random() < self.plan.fault_chance and len(self.happened) < MOST_FAULTS:
            process = task.process
            if self.random.random() < 0.2:
                process = self.random.choice(self.world.processes)
            fault = self.random.choice(self.plan.faults)
            self.happened.append(fault)
            getattr(self, f"_fault_{fault}")(process)

    def _fault_kill(self, process: Process) -> None:
        self.world.note(f"{process.name} is killed{self._where(process)}")
        self.world.kill(process)
        if self.random.random() < 0.7:
            self._start()

    def _fault_stop(self, process: Process) -> None:
        self.world.note(f"{process.name} is stopped{self._where(process)}")
        process.stopped = True
        if self.random.random() < 0.8:
            self.world.after(self.random.random() ** 2 * 5 * INTERVAL_S, lambda: self._resume(process))

    def _resume(self, process: Process) -> None:
        if process.stopped and process.alive:
            self.world.note(f"{process.name} goes on")
            process.stopped = False

    def _fault_fork(self, process: Process) -> None:
        if len(self.world.processes) < MOST_PROCESSES and not process.stopped:
            self._fork(process)

    def _fault_start(self, process: Process) -> None:
        if len(self.world.processes) < MOST_PROCESSES:
            self._start()

    def _fault_shutdown(self, process: Process) -> None:
        def leave() -> None:
            process.cache.shutdown()
            self.world.note(f"{process.name} exits")
            self.world.kill(process)
            self.world.park()

        self.world.spawn(process, "exit", leave)

    def _fault_page(self, process: Process) -> None:
        self.ledger.note_loss()
        self._damage("page", random=self.random)

    def _fault_snapshot(self, process: Process) -> None:
        self._damage("snapshot", random=self.random)
        self.ledger.note_loss()

    def _damage(self, name: str, random: Random) -> None:
        """Remove a file, or put garbage or a cut copy in its place."""
        found = list(self._directory.glob(f"shmflags-*/v1/*/{name}"))
        how = random.choice(("removed", "garbage", "cut"))
        self.world.note(f"{name} is {how}" if found else f"{name} would be {how}, but there is none")
        for path in found:
            if how == "removed":
                path.unlink()
                continue
            content = path.read_bytes()
            other = path.with_name("other")
            size = random.randrange(len(content) + 1)
            other.write_bytes(random.randbytes(len(content)) if how == "garbage" else content[:size])
            other.chmod(0o600)
            other.replace(path)

    def _fault_directory(self, process: Process) -> None:
        self.world.note("the directory is removed")
        self.ledger.note_loss()
        for path in self._directory.iterdir():
            shutil.rmtree(path)

    def _fault_disk(self, process: Process) -> None:
        self.disk.number = self.random.choice((errno.ENOSPC, errno.EIO, errno.EMFILE))
        self.ledger.disk_has_failed = True
        self.world.note(f"the disk fails: {os.strerror(self.disk.number)}")
        self.world.after(self.random.random() ** 2 * 2 * INTERVAL_S, self._mend_disk)

    def _mend_disk(self) -> None:
        self.world.note("the disk works")
        self.disk.number = 0

    def _fault_server(self, process: Process) -> None:
        self.server.status = self.random.choice((500, 500, 401, 402))
        self.world.note(f"the server answers {self.server.status}")
        self.world.after(self.random.random() ** 2 * 4 * INTERVAL_S, self._mend_server)

    def _mend_server(self) -> None:
        self.world.note("the server answers 200")
        self.server.status = 200

    def _fault_change(self, process: Process) -> None:
        self.server.change()

    def _change_later(self) -> None:
        self.world.after(self.random.expovariate(1 / self.plan.change_every_s), self._change)

    def _change(self) -> None:
        self.server.change()
        self._change_later()

    def _fault_jump(self, process: Process) -> None:
        jump_s = self.random.choice((1.0, INTERVAL_S, 100.0, 4000.0))
        self.world.note(f"the machine sleeps for {jump_s} s")
        self.world.now_ns += int(jump_s * SECOND_NS)

    def _fault_lease(self, process: Process) -> None:
        """A deadline and a grant absurdly far ahead, as a clock that jumped back would leave them.

        And whoever holds the lease stops, so that he cannot renew it.
        """
        if process.cache._member is None or (page := process.cache._member.known_page) is None:
            return
        lease = page.quiet.lease()
        if lease.deadline_ns and not any(one.holds_a_lock for one in self.world.processes):
            self.world.note("deadline and grant are far ahead")
            self.ledger.note_loss()
            holder = lease.holder
            for one in self.world.processes:
                if (one.pid, one.start_ticks) == (holder.pid, holder.start_ticks):
                    self._fault_stop(one)
            page.quiet._words[22] = lease.deadline_ns + 10_000 * SECOND_NS
            page.quiet._words[28] += 10_000 * SECOND_NS

    def _fault_reboot(self, process: Process) -> None:
        """Everybody dies, the clock begins again, the files stay (they may lie on a disk)."""
        self.world.note("the machine boots again")
        for one in list(self.world.processes):
            self.world.kill(one)
        self.world.boot_id = self.random.getrandbits(128) | 1
        self.ledger.note_loss()
        for _ in range(self.plan.workers):
            self._start()

    def _where(self, process: Process) -> str:
        return ", holding a lock" if process.holds_a_lock else ""

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
                self._resume(process)
            elif process.stopped and fate < 0.4:
                world.after(fate * 5 * INTERVAL_S, lambda process=process: self._resume(process))
            elif process.stopped and fate < 0.7:
                world.note(f"{process.name} is killed{self._where(process)}")
                world.kill(process)
        if self.plan.last_one:
            for process in list(world.processes)[1:]:
                world.note(f"{process.name} is killed{self._where(process)}, as all but one are")
                world.kill(process)
        if not any(self._could_lead(process) for process in world.processes):
            self._start(leads=True)

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


def simulate(seed: int, *, verbose: bool = False, knows_start_times: bool = True) -> Schedule:
    """Run one schedule to its end, in a directory of its own that is gone afterwards."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="shmflags-sim-", dir=base) as path:
        schedule = Schedule(
            seed, Path(path), verbose=verbose, knows_start_times=knows_start_times
        )
        schedule.run()
    return schedule
