"""The worker table of the control page: who is there, what each has loaded, when it last polled.

Every worker owns a slot, taken under the page's lock at its first poll and written by it alone, one
word at a time. The table is for people to see, and tells a leader whether somebody else could
lead; a full table costs no more than that. `SLOTS` slots of 16 words each:

    word    field
    0       token, 0 if the slot is free
    1-3     pid, start time in ticks, pid namespace
    4       wall time of its first poll, ns
    5       its last poll, CLOCK_MONOTONIC ns
    6-7     position of the snapshot it has loaded
    8       its poll_interval, ns
    9       how far apart its polls are, smoothed, ns
    10      1 if it may be elected, else 0
"""

from __future__ import annotations

from typing import NamedTuple

from shmflags.processes import Host, Identity
from shmflags.snapshot import NOTHING, Position

_SLOT_WORDS = 16
SLOTS = 256
TABLE_WORDS = SLOTS * _SLOT_WORDS
_MINUTE_NS = 60 * 1_000_000_000
_WEEK_NS = 7 * 24 * 60 * _MINUTE_NS


class Worker(NamedTuple):
    """One slot of the worker table."""

    slot: int
    token: int
    identity: Identity
    started_wall_ns: int
    last_poll_ns: int
    loaded: Position
    interval_ns: int
    spacing_ns: int
    electable: bool


def gone_after_ns(interval_ns: int) -> int:
    """For how long a worker has to be silent to count as gone where its death cannot be proven."""
    return max(20 * interval_ns, 10 * _MINUTE_NS)


class WorkerTable:
    """The table, over the words of the page that hold it."""

    def __init__(self, words: memoryview, host: Host) -> None:
        self._words = words
        self._host = host

    def has_room(self) -> bool:
        """Without the lock: whether there is a slot to be had just now."""
        return self._free_slot() >= 0

    def register(
        self,
        token: int,
        identity: Identity,
        interval_ns: int,
        electable: bool,
        loaded: Position = NOTHING,
    ) -> int:
        """Under the lock: take a slot of the worker table, and return its number, -1 if it is full.

        Slots of those that are gone are used again, once there is no free one.
        """
        slot = self._free_slot()
        if slot < 0:
            return -1
        base = slot * _SLOT_WORDS
        words = self._words
        words[base] = 0
        words[base + 1] = identity.pid
        words[base + 2] = identity.start_ticks
        words[base + 3] = identity.pid_namespace
        words[base + 4] = self._host.wall_ns()
        words[base + 5] = self._host.now_ns()
        words[base + 6], words[base + 7] = loaded
        words[base + 8] = interval_ns
        words[base + 9] = 0
        words[base + 10] = 1 if electable else 0
        words[base] = token
        return slot

    def _free_slot(self) -> int:
        bases = range(0, TABLE_WORDS, _SLOT_WORDS)
        for slot, base in enumerate(bases):
            if self._words[base] == 0:
                return slot
        for slot, base in enumerate(bases):
            if self._is_gone(base):
                return slot
        return -1

    def _is_gone(self, base: int) -> bool:
        """Dead by proof, or silent for so long that its slot may go; if it lives, it takes another."""
        # Garbage may have its last poll in the future, and polls that are ages apart.
        silent_ns = abs(self._host.now_ns() - self._words[base + 5])
        if silent_ns > gone_after_ns(min(self._words[base + 8], _WEEK_NS)):
            return True
        return self._host.is_provably_dead(self._identity(base + 1))

    def note_poll(self, slot: int, token: int, loaded: Position) -> bool:
        """Note in our own slot that we polled, holding `loaded`; False if the slot is no longer ours."""
        base = slot * _SLOT_WORDS
        words = self._words
        if slot < 0 or words[base] != token:
            return False
        now = self._host.now_ns()
        last = now - words[base + 5]
        # Polls much closer than the interval are evaluations before the first load, or a watcher.
        if last > words[base + 8] // 4:
            words[base + 9] = (3 * words[base + 9] + last) // 4 if words[base + 9] else last
        words[base + 5] = now
        words[base + 6], words[base + 7] = loaded
        return True

    def note_loaded(self, slot: int, token: int, position: Position) -> None:
        """Note in our own slot which snapshot we have."""
        base = slot * _SLOT_WORDS
        if slot >= 0 and self._words[base] == token:
            self._words[base + 6], self._words[base + 7] = position

    def release(self, slot: int, token: int) -> None:
        """Give our own slot back."""
        base = slot * _SLOT_WORDS
        if slot >= 0 and self._words[base] == token:
            self._words[base] = 0

    def rows(self) -> list[Worker]:
        """The slots that are taken, the dead included."""
        words = self._words
        rows = []
        for slot in range(SLOTS):
            base = slot * _SLOT_WORDS
            token = words[base]
            if not token:
                continue
            row = Worker(
                slot=slot,
                token=token,
                identity=self._identity(base + 1),
                started_wall_ns=words[base + 4],
                last_poll_ns=words[base + 5],
                loaded=Position(words[base + 6], words[base + 7]),
                interval_ns=words[base + 8],
                spacing_ns=words[base + 9],
                electable=words[base + 10] == 1,
            )
            if words[base] == token:  # Else it changed hands while it was read, and is half new.
                rows.append(row)
        return rows

    def _identity(self, base: int) -> Identity:
        words = self._words
        return Identity(words[base], words[base + 1], words[base + 2])
