"""A stage for damage: workers that hold definitions, the files below them, and what must hold after."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shmflags import snapshot
from shmflags.page import PAGE_BYTES
from shmflags.processes import Host, Identity
from shmflags.worker_table import TABLE_WORDS
from tests.faults.harness import (
    Api,
    Poller,
    control_page,
    page_words,
    runtime_dir,
    stamp_on_disk,
    temporary_files,
)
from tests.manual_host import Machine, ManualHost

ROUNDS = 30  # polls, half an interval apart, within which all must be well again


class RealLiveness(ManualHost):
    """Simulated clocks, but whether a process is dead is asked of the real machine."""

    def identity(self) -> Identity:
        return Host.identity(self)

    def is_provably_dead(self, other: Identity) -> bool:
        return Host.is_provably_dead(self, other)


class Scene:
    """Two workers that hold the definitions, and what is done to their files.

    Clocks are simulated, so that a lease runs out without waiting; the files are real.
    """

    def __init__(
        self,
        base: Path,
        host: type[ManualHost] = ManualHost,
        *,
        workers: int = 2,
        **arguments: Any,
    ) -> None:
        self.base = base
        self.arguments = arguments
        self.host = host
        self.api = Api()
        self.machine = Machine(boot=Host().boot_id())
        self.pids = 100
        self.group: list[Poller] = []
        self.start(workers)
        if workers:
            self.settle()

    def start(self, count: int) -> list[Poller]:
        started = []
        for _ in range(count):
            self.pids += 1
            host = self.host(self.machine, self.pids)
            started.append(Poller(self.base, self.api, host=host, **self.arguments))
        self.group += started
        return started

    def end_all(self) -> None:
        """All workers die, without a farewell."""
        self.machine.dead.update(range(101, self.pids + 1))
        if self.host is RealLiveness:
            # They were all this process, which lives: their slots would never be free.
            page_words(self.base)[-TABLE_WORDS:] = memoryview(bytes(8 * TABLE_WORDS)).cast("Q")
        self.group.clear()

    def path(self, name: str) -> Path:
        return runtime_dir(self.base).path / name

    def settle(self) -> None:
        """Poll until every worker holds what the API says, and one of them leads."""
        for _ in range(ROUNDS):
            self.machine.pass_time(0.5)
            stamps = [poller.poll() for poller in self.group]
            leaders = sum(poller.leads for poller in self.group)
            if stamps == [self.api.stamp] * len(self.group) and leaders == 1:
                return
        raise AssertionError(
            f"after {ROUNDS} polls the workers hold {stamps}, not {self.api.stamp}; {leaders} lead"
        )

    def survive(self, damage: Callable[[], None], *, running: bool, newcomers: int = 1) -> None:
        """Do the damage; nobody sees anything wrong, and a publish mends all.

        It is done to two workers that are `running`, joined by `newcomers`; or between two
        generations of workers.
        """
        known = self.api.stamp
        if not running:
            self.end_all()
        damage()
        for poller in self.group:
            assert poller.poll() == known, "a worker that held definitions lost them"
        joining = self.start(newcomers if running else 2)
        for poller in joining:
            assert poller.poll() in (None, known)
        self.api.change()
        self.settle()
        self.assert_sound()
        for poller in joining if running else []:
            poller.cache.shutdown()
            self.group.remove(poller)

    def assert_sound(self) -> None:
        """Both files are ours and whole, and nothing else lies about."""
        directory = runtime_dir(self.base)
        for path in (directory.page_path, directory.snapshot_path):
            info = os.lstat(path)
            assert info.st_mode == stat.S_IFREG | 0o600
            assert info.st_uid == os.geteuid()
        assert directory.page_path.stat().st_size == PAGE_BYTES
        header = snapshot.verify(directory, snapshot.DEFAULT_MAX_BYTES)
        assert header.position == control_page(self.base).position()
        assert temporary_files(self.base) == []

    def poke(self, word: int, value: int) -> Callable[[], None]:
        """The damage of another value in one word of the page: in place, under those who map it."""

        def damage() -> None:
            page_words(self.base)[word] = value

        return damage

    def put(self, name: str, content: bytes) -> None:
        """Another file with this content takes the place of `name`."""
        other = self.path(name + ".other")
        other.write_bytes(content)
        other.chmod(0o600)
        other.replace(self.path(name))

    def edit(self, name: str, change: Callable[[bytearray], None]) -> Callable[[], None]:
        def damage() -> None:
            content = bytearray(self.path(name).read_bytes())
            change(content)
            self.put(name, bytes(content))

        return damage


def small(scene: Scene) -> None:
    """The next definitions take some 2 KB."""
    scene.api.padding = 400
    scene.api.change()


def large(scene: Scene, size: int) -> None:
    """The next definitions take some `size` bytes."""
    scene.api.padding = size // scene.api.flags
    scene.api.change()


def poll_all(scene: Scene, rounds: int = 4) -> list[int | None]:
    """What the workers hold after some polls in which nobody fell behind what is served."""
    for _ in range(rounds):
        scene.machine.pass_time(0.5)
        after = [poller.poll() for poller in scene.group]
        assert min(stamp or 0 for stamp in after) >= (stamp_on_disk(scene.base) or 0)
    return after


def fetch_in_vain(scene: Scene) -> None:
    """Poll until one worker has fetched what cannot be shared; the others hold what is served."""
    known, new = scene.api.stamp - 1, scene.api.stamp
    for _ in range(10):
        scene.machine.pass_time(0.5)
        held = [poller.poll() for poller in scene.group]
        if new in held:
            assert sorted(stamp or 0 for stamp in held) == [known] * (len(held) - 1) + [new]
            return
    raise AssertionError(f"nobody fetched; the workers hold {held}")
