"""The machine's side of the provider: `Host`, system calls, threads and the words of the page.

The provider's code is the real one. What it imports from the outside is replaced for the length of a
simulation (`installed`): each call is a step of the scheduler first, may meet a disk that fails,
and is then carried out for real, on real files. Descriptors are numbered per process, so that a kill
closes them and a fork copies them as the kernel does.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import filelock

from shmflags import (
    election,
    file_lock,
    holding,
    journal,
    member,
    page,
    page_file,
    processes,
    provider,
    publication,
    runtime_dir,
    snapshot,
    watcher,
)
from shmflags.errors import ShmFlagsError

from .ledger import Ledger
from .world import SECOND_NS, Lock, Shared, World

_WALL_NS = 1_700_000_000 * SECOND_NS


class SimulatedHost(Shared, processes.Host):
    """Clock, identity and liveness of whichever simulated process is running."""

    def __init__(self, world: World, *, knows_start_times: bool = True) -> None:
        self._world = world
        self._knows_start_times = knows_start_times

    def now_ns(self) -> int:
        self._world.step()
        return self._world.now_ns

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
        self._world.step(3)
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


class SimulatedMmap:
    """`mmap`, on descriptors of the simulated process."""

    ACCESS_READ = mmap.ACCESS_READ

    def __init__(self, world: World) -> None:
        self._world = world

    def mmap(self, number: int, size: int, **keywords: Any) -> mmap.mmap:
        self._world.step(4)
        return mmap.mmap(self._world.process().files[number][0], size, **keywords)


class SteppedWords(Shared):
    """The words of a page: each load and each store is a step."""

    def __init__(self, world: World, words: memoryview) -> None:
        self._step = world.step
        self._world = world
        self.raw = words

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return SteppedWords(self._world, self.raw[index])
        self._step(0.3)
        return self.raw[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._step(3)
        self.raw[index] = value


class WatchedPage(page.ControlPage):
    """The page, which tells the ledger when something is granted or found unchanged."""

    def __init__(self, world: World, ledger: Ledger, *arguments: Any) -> None:
        directory, host, words, inode = arguments
        super().__init__(directory, host, SteppedWords(world, words), inode)  # type: ignore[arg-type]
        self._ledger = ledger

    @property
    def quiet(self) -> page.ControlPage:
        """The same page, for looking at it without a step."""
        words = self._words.raw  # type: ignore[attr-defined]
        return page.ControlPage(self.directory, self._host, words, self._lock._inode)

    def write_grant(self, grant: page.Grant) -> None:
        super().write_grant(grant)
        self._ledger.note_grant(self, grant)

    def accept_unchanged(self, wall_ns: int) -> None:
        super().accept_unchanged(wall_ns)
        self._ledger.note_unchanged(self.position())


class WatchedHolding(holding.Holding):
    """The holding, whose attributes other threads see at every moment."""

    def __init__(self, world: World, ledger: Ledger) -> None:
        self._world = world
        self._ledger = ledger
        super().__init__()

    def adopt(self, decoded: Any, position: snapshot.Position) -> None:
        self._ledger.note_adopted(decoded, position)
        super().adopt(decoded, position)


def _stepped(name: str) -> property:
    def get(self: WatchedHolding) -> Any:
        self._world.step(0.5)
        return self.__dict__[name]

    def put(self: WatchedHolding, value: Any) -> None:
        self._world.step(0.5)
        self.__dict__[name] = value

    return property(get, put)


for _name in ("decoded", "position", "received"):
    setattr(WatchedHolding, _name, _stepped(_name))


class WatchedJournal(Shared, journal.Journal):
    """The log goes to the trace; an error that nobody foresaw breaks the schedule."""

    def __init__(self, world: World, ledger: Ledger) -> None:
        super().__init__("simulation")
        self._world = world
        self._ledger = ledger

    def event(self, message: str, *numbers: int) -> None:
        self._world.note(f"{message} {numbers}")

    def trouble(self, what: str, error: object, *numbers: int, level: int = 0) -> None:
        if self._world.over:
            return
        self._world.note(f"trouble: {what}: {type(error).__name__}: {error}")
        self._world.running().troubled = True
        if isinstance(error, OSError):
            self._ledger.note_os_error(what, error)
        elif isinstance(error, Exception) and not isinstance(error, ShmFlagsError):
            self._world.fail(f"an error that nobody foresaw: {what}: {error!r}")


class _TaskLocal:
    """`threading.local` for simulated threads, with the defaults of the class it stands for."""

    def __init__(self, world: World, defaults: type) -> None:
        self.__dict__["_world"] = world
        self.__dict__["_defaults"] = defaults

    def __deepcopy__(self, memo: dict[int, object]) -> _TaskLocal:
        return _TaskLocal(self._world, self._defaults)

    def __getattr__(self, name: str) -> Any:
        self._world.step(0.5)
        mine = self._world.running().local.get(self, {})
        return mine[name] if name in mine else getattr(self._defaults, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._world.step(0.5)
        self._world.running().local.setdefault(self, {})[name] = value


class _Event:
    def __init__(self, world: World) -> None:
        self._world = world
        self._flag = False
        self._waiting: list[Any] = []

    def __deepcopy__(self, memo: dict[int, object]) -> _Event:
        copied = _Event(self._world)
        copied._flag = self._flag
        return copied

    def is_set(self) -> bool:
        return self._flag

    def set(self) -> None:
        self._flag = True
        for task in self._waiting:
            task.wake_ns = 0

    def wait(self, timeout: float) -> bool:
        if not self._flag:
            self._waiting.append(self._world.running())
            self._world.sleep(timeout)
            self._waiting.remove(self._world.running())
        return self._flag


class _Thread(Shared):
    def __init__(self, world: World, *, target: Any, args: Any, name: str, daemon: bool) -> None:
        self._world = world
        self._run = functools.partial(target, *args)
        self._name = name
        self._task: Any = None

    def start(self) -> None:
        self._task = self._world.spawn(self._world.process(), self._name, self._run)
        self._task.python_thread = self

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.greenlet.dead

    def join(self, timeout: float) -> None:
        end_ns = self._world.now_ns + int(timeout * SECOND_NS)
        while self.is_alive() and self._world.now_ns < end_ns:
            self._world.sleep(0.1)


class SimulatedThreading:
    """`threading`, for threads that are greenlets."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.Lock = functools.partial(Lock, world, reentrant=False)
        self.RLock = functools.partial(Lock, world, reentrant=True)
        self.Event = functools.partial(_Event, world)
        self.Thread = functools.partial(_Thread, world)

    def get_ident(self) -> int:
        return self._world.running().number

    def current_thread(self) -> object:
        return self._world.running().python_thread


@contextmanager
def installed(world: World, ledger: Ledger, host: SimulatedHost, disk: Disk) -> Iterator[None]:
    """For the length of the block, the provider's modules run on this machine."""
    system = SimulatedOS(world, ledger, disk)
    threads = SimulatedThreading(world)
    maps = SimulatedMmap(world)

    def lock(number: int, *, blocking: bool = True) -> bool:
        world.step(6)
        real, description = world.process().files[number]
        if not real_lock(real, blocking=False):
            return False
        description.locked = True
        return True

    def unlock(number: int) -> None:
        world.step(4)
        real, description = world.process().files[number]
        real_unlock(real)
        description.locked = False

    real_lock, real_unlock = filelock.lock_descriptor, filelock.unlock_descriptor
    replaced: list[tuple[Any, str, Any]] = [
        *((module, "os", system) for module in (file_lock, page, page_file, provider)),
        *((module, "os", system) for module in (runtime_dir, snapshot)),
        *((module, "threading", threads) for module in (election, member, provider, watcher)),
        *((module, "mmap", maps) for module in (page_file, snapshot)),
        (provider, "Host", lambda: host),
        (provider, "Holding", functools.partial(WatchedHolding, world, ledger)),
        (provider, "Journal", lambda service_key: WatchedJournal(world, ledger)),
        (member, "_ThreadState", functools.partial(_TaskLocal, world, member._ThreadState)),
        (page_file, "ControlPage", functools.partial(WatchedPage, world, ledger)),
        (filelock, "lock_descriptor", lock),
        (filelock, "unlock_descriptor", unlock),
        (runtime_dir, "file_system", lambda base: "tmpfs"),
        (publication, "publish", ledger.watching_publish(publication.publish)),
        (publication, "tend", ledger.watching_tend(publication.tend)),
    ]
    originals: list[tuple[Any, str, Any]] = []
    try:
        for module, name, stand_in in replaced:
            originals.append((module, name, getattr(module, name)))
            setattr(module, name, stand_in)
        yield
        world.end()
    finally:
        if not world.over:
            world.end()
        for module, name, original in originals:
            setattr(module, name, original)


