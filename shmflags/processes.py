"""Who a process is, what time it is, and whether another process is provably dead.

Everything that the rest of the package asks of the host goes through `Host`, so that a test can
stand another host in its place: clocks, sleep, process identity, liveness.

A process is (pid, start time in kernel ticks, pid namespace). The pid alone is recycled; a start
time in wall-clock seconds moves when NTP steps the clock and would "prove" a live leader dead; a
pid in another namespace names another process. Death is asserted only on proof: same namespace,
and no such pid, a zombie, or another start time. Whatever cannot be read proves nothing.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from typing import NamedTuple

from shmflags.vigil import Vigil


class Identity(NamedTuple):
    """One process. `start_ticks` and `pid_namespace` are 0 where the platform hides them."""

    pid: int
    start_ticks: int
    pid_namespace: int


NOBODY = Identity(0, 0, 0)


class Host:
    """The machine as this process sees it."""

    # (pid, its namespace): the latter is looked up once per process, as it cannot change.
    _namespace_of: tuple[int, int | None] = (0, None)
    # The process that `has_ended` was last asked about, if it ran then.
    _watched: tuple[Identity, Vigil] | None = None

    def now_ns(self) -> int:
        """CLOCK_MONOTONIC in nanoseconds: one clock for all processes of one boot."""
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        """Wall-clock time in nanoseconds since the epoch; for people to read, never to decide."""
        return time.time_ns()

    def sleep(self, seconds: float) -> None:
        # Looked up at each call, so that a monkey-patched (gevent) sleep yields.
        time.sleep(seconds)

    def account(self) -> tuple[int, int]:
        """(pid, effective uid): a change of either means another member of the host."""
        return os.getpid(), os.geteuid()

    def identity(self) -> Identity:
        """The calling process."""
        pid = os.getpid()
        stat = _read_stat(pid)
        return Identity(pid, stat.start_ticks if stat else 0, self._pid_namespace() or 0)

    def boot_id(self) -> int:
        """A 128-bit number that differs after each boot; 0 where the platform has none."""
        return _boot_id()

    def random_word(self) -> int:
        """A random non-zero 64-bit word."""
        return int.from_bytes(os.urandom(8), "little") | 1

    def is_provably_dead(self, other: Identity) -> bool:
        """True only when `other` certainly runs no more."""
        namespace = self._pid_namespace()
        if other.pid <= 0 or namespace is None or other.pid_namespace != namespace:
            return False
        try:
            os.kill(other.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True  # Garbage may name a pid that no process can have.
        except PermissionError:
            pass  # It exists; whether it is the same process, the start time tells.
        stat = _read_stat(other.pid)
        if stat is None:
            return False
        recycled = bool(other.start_ticks) and stat.start_ticks != other.start_ticks
        return stat.is_zombie or recycled

    def has_ended(self, other: Identity) -> bool:
        """What `is_provably_dead` says; cheap when asked about the same process again and again."""
        watched = self._watched
        if watched is not None and watched[0] == other and watched[1].sees_life():
            return False
        if self.is_provably_dead(other):
            return True
        self._watch(other)
        return False

    def _watch(self, other: Identity) -> None:
        self._watched = None
        if not other.start_ticks or other.pid_namespace != self._pid_namespace():
            return
        try:
            vigil = Vigil(other.pid)
        except (OSError, AttributeError, OverflowError):
            return
        # Only now does the descriptor hold the pid: before, it could have come to another process.
        stat = _read_stat(other.pid)
        if stat is not None and stat.start_ticks == other.start_ticks and not stat.is_zombie:
            self._watched = other, vigil

    def _pid_namespace(self) -> int | None:
        pid = os.getpid()
        if self._namespace_of[0] != pid or self._namespace_of[1] is None:
            self._namespace_of = (pid, _pid_namespace())
        return self._namespace_of[1]


class _Stat(NamedTuple):
    start_ticks: int
    is_zombie: bool


def _read_stat(pid: int) -> _Stat | None:
    """State and start time of a process, or None where they cannot be known."""
    if not sys.platform.startswith("linux"):
        return _read_stat_portably(pid)
    try:
        # A /proc of another pid namespace (a container given its host's) would show another
        # process under this pid, with another start time: false proof of death.
        if os.readlink("/proc/self") != str(os.getpid()):
            return None
        # One read() gives one consistent line; buffered file objects cost twice the time.
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            line = os.read(descriptor, 4096)
        finally:
            os.close(descriptor)
        # The command name, in parentheses, may itself hold spaces and parentheses.
        fields = line[line.rindex(b")") + 2 :].split()
        return _Stat(start_ticks=int(fields[19]), is_zombie=fields[0] in (b"Z", b"X"))
    except (OSError, ValueError, IndexError):
        return None


def _read_stat_portably(pid: int) -> _Stat | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return _Stat(
            start_ticks=int(process.create_time() * 100),
            is_zombie=process.status() == psutil.STATUS_ZOMBIE,
        )
    except psutil.Error:
        return None


def process_state(pid: int) -> str:
    """The state as psutil names it ("sleeping", "stopped", …), "" if there is no such process."""
    import psutil

    try:
        return str(psutil.Process(pid).status())
    except (psutil.Error, OSError, ValueError):
        return ""


def command_line(pid: int) -> str:
    """The command line of a process of ours, for people to read; "" if it cannot be had."""
    import psutil

    try:
        return " ".join(psutil.Process(pid).cmdline())
    except (psutil.Error, OSError, ValueError):
        return ""


def _pid_namespace() -> int | None:
    """The inode of our pid namespace, 0 where there are none, None where it is hidden."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def _boot_id() -> int:
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            text = file.read(64).strip()
    except OSError:
        return 0
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little") if text else 0
