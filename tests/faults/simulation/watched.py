"""Parts of the provider, derived from the real ones: each access is a step, and the ledger is told."""

from __future__ import annotations

from typing import Any

from shmflags import holding, journal, page, snapshot
from shmflags.errors import ShmFlagsError

from .ledger import Ledger
from .world import Shared, World


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
        world.process().pages.add(words[1])

    @property
    def quiet(self) -> page.ControlPage:
        """The same page, for looking at it without a step."""
        words = self._words.raw  # type: ignore[attr-defined]
        return page.ControlPage(self.directory, self.host, words, self._lock._inode)

    def write_grant(self, grant: page.Grant) -> None:
        super().write_grant(grant)
        self._ledger.note_grant(self, grant)

    def accept_snapshot(self, header: snapshot.Header) -> None:
        super().accept_snapshot(header)
        self._ledger.note_named(header.position)

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
