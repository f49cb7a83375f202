"""The control page: a small file of 8-byte words that all workers of a service key map and share.

Words are unsigned, native-endian, aligned, and written one at a time by assignment, which the CPU
does whole; `struct.pack_into` would show zeros to readers in between. Records of several words are
written under the page's lock. Readers without the lock take single words as hints, no more.

    word    field
    0       magic
    1       incarnation: random, made with the page; makes every number below unique in time
    2-3     boot id, low and high half
    4       wall time of creation, ns
    5-6     position of the snapshot: its incarnation (0: nothing to serve), its generation
    7       publication count: raised by every accepted publish, the compare-and-swap of fencing
    8-9     content digest of the snapshot, low and high half
    10      wall time at which the content last changed, ns
    11      wall time of the last accepted publish, unchanged content included, ns
    12      generation that a reader found damaged or missing, 0 if none
    13-14   position of the last snapshot there was, kept when it is lost
    16      term: the fencing epoch, raised whenever the lease is taken
    17      leader's token, 0 if the lease is vacant
    18-20   leader: pid, start time in ticks, pid namespace
    21      lease length, ns
    22      lease deadline, CLOCK_MONOTONIC ns; zeroed first and written last
    23-24   when the leader was elected, or the lease vacated: CLOCK_MONOTONIC ns, wall ns
    28      last grant, CLOCK_MONOTONIC ns, 0 if never
    29-32   grantee: token, pid, start time in ticks, pid namespace
    33      grants since the last accepted publish, while there is nothing to serve; else 1 if the last
            one is of a fetch that was put off and has not come to its end (election.py, rule 10)
    34      wall time of the last grant, ns
    36-37   who holds the page's lock: pid (0: nobody), since when (CLOCK_MONOTONIC ns)
    40-     counters, one word each (COUNTERS)
    64      length of the service key in bytes, 0 if it has more than 504
    65-127  the service key in UTF-8; for people, as the path has a hash of it only
    128-    the worker table (worker_table.py)

The page is its own lock: `flock` on a descriptor opened for the purpose, and held for the length of a
record update.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import NamedTuple

from shmflags.file_lock import FileLock, Inode
from shmflags.processes import NOBODY, Host, Identity
from shmflags.runtime_dir import RuntimeDir
from shmflags.snapshot import IMPOSSIBLE, Header, Position
from shmflags.worker_table import TABLE_WORDS, WorkerTable

_MAGIC = int.from_bytes(b"shmflag1", "big")
_WORD = 8
_TABLE = 128
PAGE_BYTES = _WORD * (_TABLE + TABLE_WORDS)
_HALF = (1 << 64) - 1
_LOOK_S = 0.01
_DOZE_NS = 60_000_000

COUNTERS = (
    "granted",
    "published",
    "unchanged",
    "takeovers",
    "dropped",
    "damaged",
    "repaired",
)

# Words, as in the table above.
_INCARNATION, _BOOT, _CREATED = 1, 2, 4
_POSITION, _COUNT, _DIGEST, _CHANGED, _VERIFIED, _DAMAGED, _LAST = 5, 7, 8, 10, 11, 12, 13
_TERM, _LEADER, _LENGTH, _DEADLINE, _ELECTED = 16, 17, 21, 22, 23
_GRANT, _GRANTEE, _ATTEMPTS, _GRANT_WALL = 28, 29, 33, 34
_LOCK = 36
_FIRST_COUNTER = 40
_KEY = 64
_KEY_BYTES = _WORD * (_TABLE - _KEY - 1)
_COUNTER_WORDS = range(_FIRST_COUNTER, _FIRST_COUNTER + len(COUNTERS))
# What rises by one at a time. From garbage it would not rise: the next number may not fit in a word.
_RISING = (_POSITION + 1, _COUNT, _LAST + 1, _TERM, _ATTEMPTS, *_COUNTER_WORDS)
_rising = itemgetter(*_RISING)  # At each poll; a loop would take as long as all else.

Glance = tuple[int, int, int]
"""The served incarnation and generation, and the leader's token."""


class Lease(NamedTuple):
    """Who leads, and until when. Times are CLOCK_MONOTONIC ns unless they say `wall`."""

    term: int
    token: int
    holder: Identity
    length_ns: int
    deadline_ns: int
    elected_ns: int
    elected_wall_ns: int


class Grant(NamedTuple):
    """The last time somebody was told to fetch. `at_ns` is 0 if nobody ever was."""

    at_ns: int
    token: int
    holder: Identity
    attempts: int
    at_wall_ns: int


class Fence(NamedTuple):
    """What a fetcher notes before it fetches; see `election.may_publish`."""

    incarnation: int
    publications: int
    term: int


class LockHolder(NamedTuple):
    """Who holds the page's lock; `pid` is 0 if nobody does."""

    pid: int
    since_ns: int


class ControlPage:
    """The mapped page. Made by `page_file.attach`; valid in forked children too, as the map is shared."""

    def __init__(self, directory: RuntimeDir, host: Host, words: memoryview, inode: Inode) -> None:
        self.directory = directory
        self.workers = WorkerTable(words[_TABLE:], host)
        self.host = host
        self._boot = host.boot_id()
        self._words = words
        self._lock = FileLock(directory.page_path, inode, directory.uid, host)

    # -- the page as a whole

    @property
    def incarnation(self) -> int:
        return self._words[_INCARNATION]

    def objection(self) -> str:
        """Why this page cannot be used, "" if it can."""
        words = self._words
        if words[0] != _MAGIC or not words[_INCARNATION]:
            return "is not a control page"
        if (words[_BOOT] | words[_BOOT + 1] << 64) != self._boot:
            return "is from another boot"
        if max(_rising(words)) >= IMPOSSIBLE:
            return "holds numbers that nobody counted to"
        return ""

    def is_at_its_path(self) -> bool:
        """False once the file was removed or replaced; then the caller attaches again."""
        return self._lock.guards_its_path()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the page's lock for the block, which must neither wait nor log.

        Raises `LockTimeoutError` or `PageReplacedError`, see `file_lock.py`.
        """
        with self._lock.held():
            self._words[_LOCK + 1] = self.host.now_ns()
            self._words[_LOCK] = os.getpid()
            try:
                yield
            finally:
                self._words[_LOCK] = 0

    def lock_holder(self) -> LockHolder:
        return LockHolder(self._words[_LOCK], self._words[_LOCK + 1])

    def glance(self) -> Glance:
        """The words that a watcher compares with those it saw last."""
        words = self._words
        return words[_POSITION], words[_POSITION + 1], words[_LEADER]

    # -- what is served

    def position(self) -> Position:
        return Position(self._words[_POSITION], self._words[_POSITION + 1])

    def last_position(self) -> Position:
        """The position of the newest snapshot there ever was, even if it is lost."""
        return Position(self._words[_LAST], self._words[_LAST + 1])

    def is_serving(self) -> bool:
        return self._words[_POSITION] != 0

    def doze(self, until_ns: int) -> None:
        """Sleep until something is served, or it is time to look whether somebody has to take over."""
        until_ns = min(until_ns, self.host.now_ns() + _DOZE_NS)
        self.host.sleep(_LOOK_S)
        while not self.is_serving() and self.host.now_ns() < until_ns:
            self.host.sleep(_LOOK_S)

    def digest(self) -> bytes:
        """The content digest of the snapshot; all zeros if there is none.

        Also if a writer was killed while naming another one: the words may be that one's already.
        """
        if self.position() != self.last_position():
            return bytes(16)
        low, high = self._words[_DIGEST], self._words[_DIGEST + 1]
        return (low | high << 64).to_bytes(16, "little")

    def times(self) -> tuple[int, int]:
        """Wall times in ns: when the content last changed, and of the last accepted publish."""
        return self._words[_CHANGED], self._words[_VERIFIED]

    def fence(self) -> Fence:
        return Fence(self._words[_INCARNATION], self._words[_COUNT], self._words[_TERM])

    def accept_snapshot(self, header: Header) -> None:
        """Under the lock: the snapshot with `header` is the one that is served from now on."""
        # First: a writer killed after naming the snapshot and before this would leave a page on which
        # a fetch that this publish has overtaken is still accepted.
        self._words[_COUNT] = max(self._words[_COUNT], header.publications)
        self._put_snapshot(header)
        self._words[_VERIFIED] = header.published_wall_ns
        self._words[_ATTEMPTS] = 0

    def accept_unchanged(self, wall_ns: int) -> None:
        """Under the lock: a fetch brought the content that is served already."""
        self._words[_VERIFIED] = wall_ns
        self._words[_ATTEMPTS] = 0
        self._words[_COUNT] += 1

    def restore_snapshot(self, header: Header) -> None:
        """Under the lock: the same content is in place again. No publication: nothing was fetched."""
        self._put_snapshot(header)

    def clear_snapshot(self) -> None:
        """Under the lock: nothing can be served any more."""
        self._words[_POSITION] = 0
        self._words[_POSITION + 1] = 0
        self._words[_DAMAGED] = 0

    def _put_snapshot(self, header: Header) -> None:
        self._words[_CHANGED] = header.published_wall_ns
        self._words[_DAMAGED] = 0
        # The generation first: the other way round, a writer killed in between would leave the old
        # generation under the new incarnation, and the snapshot just published would count as older.
        self._words[_LAST + 1] = header.position.generation
        self._words[_LAST] = header.position.incarnation
        # Not before: until the position is the last one, too, `digest` gives none.
        number = int.from_bytes(header.digest, "little")
        self._words[_DIGEST], self._words[_DIGEST + 1] = number & _HALF, number >> 64
        self._words[_POSITION + 1] = header.position.generation
        self._words[_POSITION] = header.position.incarnation

    def report_damage(self, position: Position) -> None:
        """A reader could not read the snapshot at `position`; the leader looks at its next poll."""
        self._words[_DAMAGED] = position.generation
        self.count("damaged")

    def damage_is_reported(self) -> bool:
        return self._words[_DAMAGED] != 0

    # -- the lease

    def lease(self) -> Lease:
        words = self._words
        return Lease(
            term=words[_TERM],
            token=words[_LEADER],
            holder=self._identity(_LEADER + 1),
            length_ns=words[_LENGTH],
            deadline_ns=words[_DEADLINE],
            elected_ns=words[_ELECTED],
            elected_wall_ns=words[_ELECTED + 1],
        )

    def write_lease(self, lease: Lease) -> None:
        """Under the lock. A writer killed half-way leaves a lease that has run out."""
        words = self._words
        words[_DEADLINE] = 0
        words[_TERM] = lease.term
        words[_LEADER] = lease.token
        self._put_identity(_LEADER + 1, lease.holder)
        words[_LENGTH] = lease.length_ns
        words[_ELECTED], words[_ELECTED + 1] = lease.elected_ns, lease.elected_wall_ns
        words[_DEADLINE] = lease.deadline_ns

    def vacate(self) -> None:
        """Under the lock: nobody leads. The term stays, so that the next one is higher."""
        self._words[_DEADLINE] = 0
        self._words[_LEADER] = 0
        self._put_identity(_LEADER + 1, NOBODY)
        self._words[_ELECTED], self._words[_ELECTED + 1] = self.host.now_ns(), self.host.wall_ns()

    # -- the grant

    def grant(self) -> Grant:
        words = self._words
        return Grant(
            at_ns=words[_GRANT],
            token=words[_GRANTEE],
            holder=self._identity(_GRANTEE + 1),
            attempts=words[_ATTEMPTS],
            at_wall_ns=words[_GRANT_WALL],
        )

    def write_grant(self, grant: Grant) -> None:
        """Under the lock. A writer killed half-way has asked for nothing and blocks nobody."""
        words = self._words
        words[_GRANTEE] = grant.token
        self._put_identity(_GRANTEE + 1, grant.holder)
        words[_ATTEMPTS] = grant.attempts
        words[_GRANT_WALL] = grant.at_wall_ns
        words[_GRANT] = grant.at_ns

    # -- counters: for people to see, never to decide on

    def count(self, name: str) -> None:
        """Raise a counter. Without the lock an increment may be lost; they are for people."""
        self._words[_FIRST_COUNTER + COUNTERS.index(name)] += 1

    def counters(self) -> dict[str, int]:
        return {name: self._words[_FIRST_COUNTER + i] for i, name in enumerate(COUNTERS)}

    def service_key(self) -> str:
        """The service key that the page was made for, "" if it did not fit in."""
        data = self._words[_KEY + 1 : _TABLE].tobytes()[: self._words[_KEY]]
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return ""

    def created_wall_ns(self) -> int:
        return self._words[_CREATED]

    def _identity(self, base: int) -> Identity:
        words = self._words
        return Identity(words[base], words[base + 1], words[base + 2])

    def _put_identity(self, base: int, identity: Identity) -> None:
        words = self._words
        words[base] = identity.pid
        words[base + 1] = identity.start_ticks
        words[base + 2] = identity.pid_namespace


def new_page(
    directory: RuntimeDir, host: Host, adopted: Header | None, last: ControlPage | None
) -> bytearray:
    """The bytes of a new page, serving the snapshot with header `adopted`, if any.

    It goes on from `last`, the page that was lost: last grant, term and counters.
    """
    content = bytearray(PAGE_BYTES)
    words = memoryview(content).cast("Q")
    boot = host.boot_id()
    words[0] = _MAGIC
    words[_INCARNATION] = host.random_word()
    words[_BOOT], words[_BOOT + 1] = boot & _HALF, boot >> 64
    words[_CREATED] = host.wall_ns()
    key = directory.service_key.encode("utf-8", "surrogatepass")
    if len(key) <= _KEY_BYTES:
        words[_KEY] = len(key)
        content[_WORD * (_KEY + 1) : _WORD * (_KEY + 1) + len(key)] = key
    if last is not None and not last.objection():
        kept = (_COUNT, _CHANGED, _VERIFIED, _LAST, _LAST + 1, _TERM)
        for word in (*kept, *range(_GRANT, _GRANT_WALL + 1), *_COUNTER_WORDS):
            words[word] = last._words[word]
    if adopted is not None:
        ControlPage(directory, host, words, Inode(0, 0)).accept_snapshot(adopted)
    return content
