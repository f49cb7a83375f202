"""A host whose clock stands still until a test moves it, and several providers on it in one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shmflags import SharedMemoryFlagCache
from shmflags.processes import Host, Identity

SECOND_NS = 1_000_000_000
INTERVAL_S = 30.0


@dataclass
class Machine:
    """What all simulated processes share: the clock, the boot, and who is dead."""

    now: int = 1_000 * SECOND_NS
    boot: int = 7
    dead: set[int] = field(default_factory=set)
    slept: int = 0

    def pass_time(self, seconds: float) -> None:
        self.now += int(seconds * SECOND_NS)


class ManualHost(Host):
    """The machine as the simulated process `pid` sees it."""

    def __init__(self, machine: Machine, pid: int) -> None:
        self.machine = machine
        self.pid = pid

    def now_ns(self) -> int:
        return self.machine.now

    def wall_ns(self) -> int:
        return self.machine.now + 1_700_000_000 * SECOND_NS

    def sleep(self, seconds: float) -> None:
        self.machine.slept += 1
        self.machine.pass_time(seconds)

    def account(self) -> tuple[int, int]:
        return self.pid, super().account()[1]

    def identity(self) -> Identity:
        return Identity(self.pid, self.pid * 10, 1)

    def boot_id(self) -> int:
        return self.machine.boot

    def is_provably_dead(self, other: Identity) -> bool:
        return other.pid in self.machine.dead


class Group:
    """Caches of one service key on one machine, each in a simulated process of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.machine = Machine()
        self._pid = 100

    def worker(self, **arguments: Any) -> SharedMemoryFlagCache:
        """Start another process; its cache polls every `INTERVAL_S`, if nothing else is said."""
        arguments.setdefault("poll_interval", INTERVAL_S)
        cache = SharedMemoryFlagCache("test", directory=self.directory, **arguments)
        cache._host = self.next_host()
        return cache

    def next_host(self) -> ManualHost:
        self._pid += 1
        return ManualHost(self.machine, self._pid)
