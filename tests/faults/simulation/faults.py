"""What happens to a schedule: one method for each kind of fault that a plan may name."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .client import Server
from .host import Disk
from .ledger import Ledger
from .plan import INTERVAL_S, Plan
from .workers import Workers
from .world import SECOND_NS, Process, World

MOST = 12
"""So many faults in one schedule."""


class Faults:
    """Strikes processes, files, the disk, the server and the clock. `happened` names what it did."""

    def __init__(
        self,
        world: World,
        ledger: Ledger,
        server: Server,
        disk: Disk,
        workers: Workers,
        plan: Plan,
        directory: Path,
    ) -> None:
        self.happened: list[str] = []
        self._world = world
        self._random = world.random
        self._ledger = ledger
        self._server = server
        self._disk = disk
        self._workers = workers
        self._plan = plan
        self._directory = directory

    def strike(self, process: Process) -> None:
        """One fault of the plan, to `process` if it strikes a process."""
        if len(self.happened) < MOST:
            fault = self._random.choice(self._plan.faults)
            self.happened.append(fault)
            strike: Callable[[Process], None] = getattr(self, f"_strike_{fault}")
            strike(process)

    def change_later(self) -> None:
        """Have the server's definitions change, again and again."""
        self._world.after(self._random.expovariate(1 / self._plan.change_every_s), self._change_again)

    def _change_again(self) -> None:
        self._server.change()
        self.change_later()

    # -- processes

    def kill(self, process: Process, why: str = "") -> None:
        """Kill it, wherever it stands."""
        holding = ", holding a lock" if process.holds_a_lock else ""
        self._world.note(f"{process.name} is killed{holding}{why}")
        self._world.kill(process)

    def resume(self, process: Process) -> None:
        """Have a stopped process go on."""
        if process.stopped and process.alive:
            self._world.note(f"{process.name} goes on")
            process.stopped = False

    def _strike_kill(self, process: Process) -> None:
        self.kill(process)
        if self._random.random() < 0.7:
            self._workers.start()

    def _strike_stop(self, process: Process) -> None:
        self._world.note(
            f"{process.name} is stopped{', holding a lock' if process.holds_a_lock else ''}"
        )
        process.stopped = True
        if self._random.random() < 0.8:
            self._world.after(self._random.random() ** 2 * 5 * INTERVAL_S, lambda: self.resume(process))

    def _strike_fork(self, process: Process) -> None:
        if not self._workers.is_full and not process.stopped:
            self._workers.fork(process)

    def _strike_start(self, process: Process) -> None:
        if not self._workers.is_full:
            self._workers.start()

    def _strike_shutdown(self, process: Process) -> None:
        def leave() -> None:
            process.cache.shutdown()
            self._world.note(f"{process.name} exits")
            self._world.kill(process)
            self._world.park()

        self._world.spawn(process, "exit", leave)

    # -- files and the disk

    def _strike_page(self, process: Process) -> None:
        self._ledger.note_loss()
        self._damage("page")

    def _strike_snapshot(self, process: Process) -> None:
        self._ledger.files_are_disturbed = True
        self._damage("snapshot")

    def _damage(self, name: str) -> None:
        """Remove a file, or put garbage or a cut copy in its place."""
        found = list(self._directory.glob(f"shmflags-*/v1/*/{name}"))
        random = self._random
        how = random.choice(("removed", "garbage", "cut"))
        self._world.note(f"{name} is {how}" if found else f"{name} would be {how}, but there is none")
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

    def _strike_directory(self, process: Process) -> None:
        self._world.note("the directory is removed")
        self._ledger.note_loss()
        for path in self._directory.iterdir():
            shutil.rmtree(path)

    def _strike_disk(self, process: Process) -> None:
        self._disk.number = self._random.choice((errno.ENOSPC, errno.EIO, errno.EMFILE))
        self._ledger.files_are_disturbed = True
        self._world.note(f"the disk fails: {os.strerror(self._disk.number)}")
        self._world.after(self._random.random() ** 2 * 2 * INTERVAL_S, self._mend_disk)

    def _mend_disk(self) -> None:
        self._world.note("the disk works")
        self._disk.number = 0

    # -- the server, the clock, the machine

    def _strike_server(self, process: Process) -> None:
        self._server.status = self._random.choice((500, 500, 401, 402))
        self._world.note(f"the server answers {self._server.status}")
        self._world.after(self._random.random() ** 2 * 4 * INTERVAL_S, self._mend_server)

    def _mend_server(self) -> None:
        self._world.note("the server answers 200")
        self._server.status = 200

    def _strike_change(self, process: Process) -> None:
        self._server.change()

    def _strike_jump(self, process: Process) -> None:
        jump_s = self._random.choice((1.0, INTERVAL_S, 100.0, 4000.0))
        self._world.note(f"the machine sleeps for {jump_s} s")
        self._world.now_ns += int(jump_s * SECOND_NS)

    def _strike_lease(self, process: Process) -> None:
        """A deadline and a grant absurdly far ahead, as a clock that jumped back would leave them.

        And whoever holds the lease stops, so that he cannot renew it.
        """
        if process.cache._member is None or (page := process.cache._member.known_page) is None:
            return
        lease = page.quiet.lease()
        if lease.deadline_ns and not any(one.holds_a_lock for one in self._world.processes):
            self._world.note("deadline and grant are far ahead")
            self._ledger.note_loss()
            holder = lease.holder
            for one in self._world.processes:
                if (one.pid, one.start_ticks) == (holder.pid, holder.start_ticks):
                    self._strike_stop(one)
            page.quiet._words[22] = lease.deadline_ns + 10_000 * SECOND_NS
            page.quiet._words[28] += 10_000 * SECOND_NS

    def _strike_reboot(self, process: Process) -> None:
        """Everybody dies, the clock begins again, the files stay (they may lie on a disk)."""
        self._world.note("the machine boots again")
        for one in list(self._world.processes):
            self._world.kill(one)
        self._world.boot_id = self._random.getrandbits(128) | 1
        self._world.booted_ns = self._world.now_ns - SECOND_NS
        self._ledger.note_loss()
        for _ in range(self._plan.workers):
            self._workers.start()
