"""The simulated machine: processes, their threads, one clock, and who runs next.

Every thread of every process is a greenlet. It runs until it has spent its fuel: each interaction with
anything shared (a word of the page, a system call, a lock, the clock) calls `World.step` and costs
some. Then it is suspended right there, mid-operation, and the scheduler decides what happens before
it goes on: another thread, a fault, or time. All decisions come from one seeded generator, so a
seed is a schedule.

What a process loses when it is killed is what the kernel would take: its threads stop where they
are and run no `finally`, and its descriptors are closed, which frees its locks.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import sys
from collections.abc import Callable
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

SECOND_NS = 1_000_000_000
_FOREVER_NS = 1 << 62


class Shared:
    """Not copied by a fork, as it belongs to the machine and not to a process."""

    def __deepcopy__(self, memo: dict[int, object]) -> Shared:
        return self


class Description(Shared):
    """An open file description: what descriptors share after a fork, the lock included."""

    def __init__(self) -> None:
        self.locked = False


class Process(Shared):
    """A simulated process. `cache` and `client` are set by its builder."""

    def __init__(self, world: World, pid: int, namespace: int, start_ticks: int) -> None:
        self.world = world
        self.pid = pid
        self.namespace = namespace
        self.start_ticks = start_ticks
        self.lineage: set[int] = set()
        self.alive = True
        self.stopped = False
        self.cache: Any = None
        self.client: Any = None
        self.files: dict[int, tuple[int, Description]] = {}
        # What the lock's module notes of its open descriptors: a global, so each process has its own.
        self.opened: dict[int, int] = {}
        # The stamp of the newest publication that its cache has handed out.
        self.handed_stamp = -1
        # The incarnations of the pages that it has mapped, ever.
        self.pages: set[int] = set()
        self._numbers = itertools.count(3)

    @property
    def name(self) -> str:
        return f"p{self.start_ticks}"

    @property
    def holds_a_lock(self) -> bool:
        return any(description.locked for _, description in self.files.values())

    def add_file(self, real: int) -> int:
        number = next(self._numbers)
        self.files[number] = (real, Description())
        return number

    def inherit_files(self, parent: Process) -> None:
        """As a fork does, but for what the parent has opened and not locked yet: that is opened anew.

        Were the parent to lock it after the fork and to be killed before it unlocks, the child would
        hold the lock until it ends. Nothing in the child can know of it.
        """
        self.opened = dict(parent.opened)
        for number, (real, description) in parent.files.items():
            if description.locked:
                self.files[number] = (os.dup(real), description)
            else:
                self.files[number] = (os.open(f"/proc/self/fd/{real}", os.O_RDONLY), Description())
        self._numbers = itertools.count(max(self.files, default=2) + 1)

    def close_file(self, number: int) -> None:
        real, _ = self.files.pop(number)
        os.close(real)


class Task(Shared):
    """A simulated thread."""

    def __init__(self, process: Process, number: int, name: str, run: Callable[[], None]) -> None:
        self.process = process
        self.number = number
        self.name = f"{process.name}.{name}"
        self.greenlet = greenlet(run, process.world.hub)
        self.wake_ns = 0
        self.waits_for: Lock | None = None
        self.python_thread: object = None
        self.local: dict[object, dict[str, Any]] = {}
        # The fetch that is being granted, asked for, delivered or published (ledger.py).
        self.granted: Any = None
        self.delivering: Any = None
        self.publishing: Any = None
        self.restoring: Any = None
        # Whether the journal was told of trouble since the last poll began.
        self.troubled = False


class World(Shared):
    """One simulated machine, until `end`."""

    def __init__(self, seed: int, *, verbose: bool = False) -> None:
        self.random = random.Random(seed)
        self.hub = getcurrent()
        self.now_ns = 1_000 * SECOND_NS
        self.booted_ns = 0
        self.boot_id = self.random.getrandbits(128) | 1
        self.processes: list[Process] = []
        self.tasks: list[Task] = []
        self.current: Task | None = None
        self.over = False
        self.failure = ""
        self.trace: list[str] = []
        self.deaths: dict[tuple[int, int, int], int] = {}
        self.mean_fuel = 50.0
        self.mean_slice_ns = 1_000.0
        self.stall_chance = 0.0
        self.stall_ns = 0
        self._verbose = verbose
        self._graveyard: list[Task] = []
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count(1)
        self._starts = itertools.count(1)
        self._fuel = 0.0

    @property
    def clock_ns(self) -> int:
        """CLOCK_MONOTONIC: begins again when the machine boots."""
        return self.now_ns - self.booted_ns

    # -- for the simulated code

    def step(self, cost: float = 1.0) -> None:
        """A point at which the running thread may be suspended, for ever if it is killed."""
        if self.over:
            raise GreenletExit
        self._fuel -= cost
        if self._fuel < 0 and self.current is not None:
            if self._verbose:
                self.note(f"suspended at {_place()}")
            self.hub.switch()
            if self.over:
                raise GreenletExit

    def sleep(self, seconds: float) -> None:
        task = self.running()
        task.wake_ns = self.now_ns + int(seconds * SECOND_NS)
        self.park()

    def park(self) -> None:
        """Suspend the running thread until the scheduler finds it ready again."""
        self.hub.switch()
        if self.over:
            raise GreenletExit

    def running(self) -> Task:
        assert self.current is not None, "only a simulated thread may do this"
        return self.current

    def process(self) -> Process:
        return self.running().process

    # -- what is told

    def note(self, what: str) -> None:
        who = self.current.name if self.current is not None else "-"
        self.trace.append(f"{self.now_ns / SECOND_NS:14.6f}  {who:<14} {what}")

    def fail(self, what: str) -> None:
        """An invariant is broken. The first one counts; the schedule ends at the next switch."""
        self.note(f"BROKEN: {what}")
        if not self.failure:
            self.failure = what

    # -- processes and threads

    def make_process(self, namespace: int, parent: Process | None = None) -> Process:
        """A process without threads. A pid is used again as soon as it is free.

        But not by a descendant of the process that had it: without hooks a provider knows a fork by
        its pid alone.
        """
        taken = {one.pid for one in self.processes if one.namespace == namespace}
        lineage = {*parent.lineage, parent.pid} if parent is not None else set()
        pid = next(pid for pid in itertools.count(2) if pid not in taken | lineage)
        process = Process(self, pid, namespace, next(self._starts))
        process.lineage = lineage
        self.processes.append(process)
        return process

    def spawn(self, process: Process, name: str, run: Callable[[], None]) -> Task:
        number = next(self._numbers)
        task = Task(process, number, name, run)
        self.tasks.append(task)
        return task

    def kill(self, process: Process) -> None:
        """SIGKILL, or the exit of a process: nothing of it runs any more."""
        process.alive = False
        self.processes.remove(process)
        self.deaths[(process.pid, process.start_ticks, process.namespace)] = self.now_ns
        self._graveyard += [task for task in self.tasks if task.process is process]
        self.tasks = [task for task in self.tasks if task.process is not process]
        for number in list(process.files):
            process.close_file(number)

    def is_running(self, pid: int, start_ticks: int | None, namespace: int) -> bool:
        return any(
            one.pid == pid and one.namespace == namespace and start_ticks in (None, one.start_ticks)
            for one in self.processes
        )

    # -- the scheduler

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Have `action` called by the scheduler when that much time has passed."""
        due_ns = self.now_ns + int(seconds * SECOND_NS)
        heapq.heappush(self._timers, (due_ns, next(self._numbers), action))

    def forget_timers(self) -> None:
        self._timers.clear()

    def run(self, until_ns: int, between: Callable[[Task], None]) -> None:
        """Run the machine up to a time; `between` is called after each suspended operation."""
        while self.now_ns < until_ns and not self.failure:
            while self._timers and self._timers[0][0] <= self.now_ns:
                heapq.heappop(self._timers)[2]()
            ready = [task for task in self.tasks if self._is_ready(task)]
            if not ready:
                self._pass_time(until_ns)
                continue
            task = ready[int(self.random.random() * len(ready))]
            self._resume(task)
            self.now_ns += int(self.random.expovariate(1.0) * self.mean_slice_ns)
            if task.greenlet.dead:
                self.tasks = [one for one in self.tasks if one is not task]
            elif self._fuel < 0 and task.process.alive:
                if self.random.random() < self.stall_chance:
                    task.wake_ns = self.now_ns + int(self.random.random() ** 3 * self.stall_ns)
                between(task)

    def _is_ready(self, task: Task) -> bool:
        if task.wake_ns > self.now_ns or task.process.stopped:
            return False
        return task.waits_for is None or task.waits_for.owner is None

    def _pass_time(self, until_ns: int) -> None:
        upcoming = [
            task.wake_ns
            for task in self.tasks
            if not task.process.stopped and task.wake_ns > self.now_ns
        ]
        if self._timers:
            upcoming.append(self._timers[0][0])
        self.now_ns = min(upcoming, default=until_ns)

    def _resume(self, task: Task) -> None:
        self._fuel = self.random.expovariate(1.0) * self.mean_fuel
        self.current = task
        try:
            task.greenlet.switch()
        finally:
            self.current = None

    def end(self) -> None:
        """Unwind what is left: from now on every step raises, so that nothing more is done."""
        self.over = True
        for task in (*self.tasks, *self._graveyard):
            if task.greenlet and not task.greenlet.dead:
                self.current = task
                task.greenlet.throw()
        self.current = None
        for process in self.processes:
            for number in list(process.files):
                process.close_file(number)
        self.tasks.clear()
        self._graveyard.clear()


class Lock:
    """`threading.Lock` and `RLock` for simulated threads. One left by a fork stays as it was."""

    def __init__(self, world: World, *, reentrant: bool) -> None:
        self.owner: Task | None = None
        self._world = world
        self._reentrant = reentrant
        self._depth = 0

    def acquire(self, *, blocking: bool = True) -> bool:
        self._world.step(2)
        task = self._world.running()
        while self.owner is not None and not (self._reentrant and self.owner is task):
            if not blocking:
                return False
            task.waits_for = self
            self._world.park()
        task.waits_for = None
        self.owner = task
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.owner = None
        self._world.step(2)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def _place() -> str:
    """Where the running thread stands, for the trace: the innermost lines that are not ours."""
    frame = sys._getframe(2)
    places: list[str] = []
    here = os.path.dirname(__file__)
    while frame is not None and len(places) < 3:
        code = frame.f_code
        is_ours = code.co_filename.startswith(here) and not code.co_filename.endswith("client.py")
        if not is_ours and "contextlib" not in code.co_filename:
            name = os.path.basename(code.co_filename)
            places.append(f"{name}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(places)
