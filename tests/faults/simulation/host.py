"""The machine's side of the provider: `Host` and the system calls.

The provider's code is the real one. What it imports from the outside is replaced for the length of a
simulation (installed.py): each call is a step of the scheduler first, may meet a disk that fails,
and is then carried out for real, on real files. Descriptors are numbered per process, so that a kill
closes them and a fork copies them as the kernel does.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import Any

from greenlet import GreenletExit

from shmflags import processes, snapshot

from .ledger import Ledger
from .world import SECOND_NS, Shared, World

_WALL_NS = 1_700_000_000 * SECOND_NS


class SimulatedHost(Shared, processes.Host):
    """Clock, identity and liveness of whichever simulated process is running."""

    def __init__(self, world: World, *, knows_start_times: bool = True) -> None:
        self._world = world
        self._knows_start_times = knows_start_times

    def now_ns(self) -> int:
        self._world.step()
        return self._world.clock_ns

    def wall_ns(self) -> int:
        return _WALL_NS + self._world.now_ns

    def sleep(self, seconds: float) -> None:
        # A sleep may last longer than it was meant to.
        self._world.sleep(seconds * (1 + 20 * self._world.random.random()))

    def account(self) -> tuple[int, int]:
        self._world.step(0.2)
        return self._world.process().pid, os.geteuid()

    def identity(self) -> processes.Identity:
        process = self._world.process()
        return processes.Identity(process.pid, process.start_ticks, process.namespace)

    def boot_id(self) -> int:
        return self._world.boot_id

    def random_word(self) -> int:
        return self._world.random.getrandbits(64) | 1

    def is_provably_dead(self, other: processes.Identity) -> bool:
        self._world.step(2)
        if other.pid <= 0 or other.pid_namespace != self._world.process().namespace:
            return False
        ticks = other.start_ticks if self._knows_start_times else None
        return not self._world.is_running(other.pid, ticks, other.pid_namespace)

    def has_ended(self, other: processes.Identity) -> bool:
        return self.is_provably_dead(other)


class Disk:
    """What is wrong with the disk, if anything: the error of every write, or of every open."""

    def __init__(self) -> None:
        self.number = 0

    def check(self, *, writes: bool) -> None:
        if self.number and (writes or self.number == errno.EMFILE):
            raise OSError(self.number, os.strerror(self.number))


class SimulatedOS:
    """`os`, as the provider sees it."""

    def __init__(self, world: World, ledger: Ledger, disk: Disk) -> None:
        self._world = world
        self._ledger = ledger
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        if name == "register_at_fork":
            raise AttributeError(name)  # Hooks would outlive the simulation; forks are ours.
        value = getattr(os, name)
        setattr(self, name, value)
        return value

    def getpid(self) -> int:
        return self._world.process().pid if self._world.current is not None else os.getpid()

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        self._world.step(6)
        self._disk.check(writes=bool(flags & os.O_CREAT))
        return self._world.process().add_file(os.open(path, flags, mode))

    def close(self, number: int) -> None:
        # No step: a fork between forgetting an inherited descriptor and closing it would hand it on.
        if self._world.over:
            raise GreenletExit
        self._world.process().close_file(number)

    def fstat(self, number: int) -> os.stat_result:
        self._world.step(2)
        return os.fstat(self._world.process().files[number][0])

    def fchmod(self, number: int, mode: int) -> None:
        self._world.step(2)
        os.fchmod(self._world.process().files[number][0], mode)

    def lstat(self, path: Any) -> os.stat_result:
        self._world.step(3)
        return os.lstat(path)

    def stat(self, path: Any) -> os.stat_result:
        self._world.step(2)
        return os.stat(path)

    def mkdir(self, path: Any, mode: int = 0o777) -> None:
        self._world.step(4)
        if not os.path.exists(path):
            self._disk.check(writes=True)
        os.mkdir(path, mode)

    def write(self, number: int, data: Any) -> int:
        self._world.step(6)
        self._disk.check(writes=True)
        return os.write(self._world.process().files[number][0], self._some_of(data))

    def pwrite(self, number: int, data: Any, offset: int) -> int:
        self._world.step(6)
        self._disk.check(writes=True)
        return os.pwrite(self._world.process().files[number][0], self._some_of(data), offset)

    def _some_of(self, data: Any) -> Any:
        short = len(data) > 1 and self._world.random.random() < 0.1
        return data[: len(data) // 2] if short else data

    def link(self, source: Any, target: Any) -> None:
        self._world.step(6)
        self._disk.check(writes=True)
        os.link(source, target)

    def unlink(self, path: Any) -> None:
        self._world.step(4)
        os.unlink(path)

    def replace(self, source: Any, target: Any) -> None:
        self._world.step(8)
        self._disk.check(writes=True)
        if os.path.basename(target) != "snapshot":
            os.replace(source, target)
            return
        with open(source, "rb") as file:
            header = snapshot._checked_header(
                memoryview(file.read(snapshot.HEADER_BYTES)), os.path.getsize(source)
            )
        os.replace(source, target)
        self._ledger.note_snapshot(header)

    def listdir(self, path: Any) -> list[str]:
        self._world.step(3)
        return sorted(os.listdir(path))


class OpenedByProcess:
    """A dict that is another one in each process."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __setitem__(self, descriptor: int, pid: int) -> None:
        self._world.process().opened[descriptor] = pid

    def __delitem__(self, descriptor: int) -> None:
        del self._world.process().opened[descriptor]

    def items(self) -> list[tuple[int, int]]:
        return list(self._world.process().opened.items())

    def pop(self, descriptor: int, default: None) -> int | None:
        return self._world.process().opened.pop(descriptor, default)


class SimulatedMmap:
    """`mmap`, on descriptors of the simulated process."""

    ACCESS_READ = mmap.ACCESS_READ

    def __init__(self, world: World) -> None:
        self._world = world

    def mmap(self, number: int, size: int, **keywords: Any) -> mmap.mmap:
        self._world.step(4)
        return mmap.mmap(self._world.process().files[number][0], size, **keywords)
