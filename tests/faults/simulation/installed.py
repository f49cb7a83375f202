"""Where the simulated machine is put in place of the real one, and taken away again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import filelock

from shmflags import (
    election,
    file_lock,
    member,
    page,
    page_file,
    provider,
    publication,
    runtime_dir,
    snapshot,
    watcher,
)

from .host import Disk, OpenedByProcess, SimulatedHost, SimulatedMmap, SimulatedOS
from .ledger import Ledger
from .threads import SimulatedThreading, TaskLocal
from .watched import WatchedHolding, WatchedJournal, WatchedPage
from .world import World


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
        (file_lock, "_opened", OpenedByProcess(world)),
        (provider, "Host", lambda: host),
        (provider, "Holding", functools.partial(WatchedHolding, world, ledger)),
        (provider, "Journal", lambda service_key: WatchedJournal(world, ledger)),
        (member, "_ThreadState", functools.partial(TaskLocal, world, member._ThreadState)),
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
