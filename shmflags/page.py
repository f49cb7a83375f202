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
    23-24   when the leader was elected: CLOCK_MONOTONIC ns, wall ns
    28      last grant, CLOCK_MONOTONIC ns, 0 if never
    29-32   grantee: token, pid, start time in ticks, pid namespace
    33      grants since the last accepted publish
    34      wall time of the last grant, ns
    36-37   who holds the page's lock: pid (0: nobody), since when (CLOCK_MONOTONIC ns)
    40-     counters, one word each (COUNTERS)
    128-    worker table: SLOTS slots of 16 words each:
        0       token, 0 if the slot is free
        1-3     pid, start time in ticks, pid namespace
        4       wall time of its first poll, ns
        5       its last poll, CLOCK_MONOTONIC ns
        6-7     position of the snapshot it has loaded
        8       its poll_interval, ns
        9       how far apart its polls are, smoothed, ns
        10      1 if it may be elected, else 0

The page is its own lock: `flock` on a descriptor opened for the purpose, and held for the length of a
record update. A page that is not ours to use (wrong size, magic or boot) is replaced, never mended.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shmflags import snapshot
from shmflags.errors import LockTimeoutError, PageReplacedError, ShmFlagsError, UnsafePathError
from shmflags.processes import NOBODY, Host, Identity
from shmflags.runtime_dir import RuntimeDir, may_replace, open_private
from shmflags.snapshot import NOTHING, Header, Position

_MAGIC = int.from_bytes(b"shmflag1", "big")
_WORD = 8
_TABLE = 128
_SLOT_WORDS = 16
SLOTS = 256
PAGE_BYTES = _WORD * (_TABLE + SLOTS * _SLOT_WORDS)
LOCK_PATIENCE_S = 0.05
_LOCK_RETRY_S = 0.001
_HALF = (1 << 64) - 1

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


@dataclass(frozen=True)
class Lease:
    """Who leads, and until when. Times are CLOCK_MONOTONIC ns unless they say `wall`."""

    term: int
    token: int
    holder: Identity
    length_ns: int
    deadline_ns: int
    elected_ns: int
    elected_wall_ns: int


@dataclass(frozen=True)
class Grant:
    """The last time somebody was told to fetch. `at_ns` is 0 if nobody ever was."""

    at_ns: int
    token: int
    holder: Identity
    attempts: int
    at_wall_ns: int


@dataclass(frozen=True)
class Fence:
    """What a fetcher notes before it fetches; see `election.may_publish`."""

    incarnation: int
    count: int
    term: int


@dataclass(frozen=True)
class Worker:
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


@dataclass(frozen=True)
class LockHolder:
    """Who holds the page's lock; `pid` is 0 if nobody does."""

    pid: int
    since_ns: int


class ControlPage:
    """The mapped page. Made by `attach`; valid in forked children too, as the map is shared."""

    def __init__(self, directory: RuntimeDir, host: Host, mapped: mmap.mmap, inode: Inode) -> None:
        self._directory = directory
        self._host = host
        self._inode = inode
        self._words = memoryview(mapped).cast("Q")
        # Descriptors on which this process may hold the lock, for `abandon_locks`.
        self._descriptors: set[int] = set()

    # -- the page as a whole

    @property
    def directory(self) -> RuntimeDir:
        return self._directory

    @property
    def incarnation(self) -> int:
        return self._words[_INCARNATION]

    def is_at_its_path(self) -> bool:
        """False once the file was removed or replaced; then the caller attaches again."""
        try:
            return Inode.of(os.lstat(self._directory.page_path)) == self._inode
        except OSError:
            return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the page's lock for the block, which must neither wait nor log.

        Raises `LockTimeoutError` after `LOCK_PATIENCE_S`, and `PageReplacedError` if the locked
        file is not the mapped one, or no longer at the path: such a lock excludes nobody.
        """
        from filelock import unlock_descriptor

        pid = os.getpid()
        path = self._directory.page_path
        try:
            descriptor = open_private(path, os.O_RDWR, self._directory.uid)
        except (FileNotFoundError, UnsafePathError):
            raise PageReplacedError("is gone or was replaced", path=path) from None
        self._descriptors.add(descriptor)
        held = False
        try:
            _acquire(descriptor, self._host, path)
            held = True
            if Inode.of(os.fstat(descriptor)) != self._inode or not self.is_at_its_path():
                raise PageReplacedError("was replaced", path=path)
            self._words[_LOCK + 1] = self._host.now_ns()
            self._words[_LOCK] = pid
            yield
        finally:
            # A copy of this frame in a forked child must not unlock: the lock is shared.
            if pid == os.getpid():
                if held:
                    self._words[_LOCK] = 0
                self._descriptors.discard(descriptor)
                if held:
                    unlock_descriptor(descriptor)
                os.close(descriptor)

    def abandon_locks(self) -> None:
        """In a forked child: close inherited lock descriptors. Unlocking would free the parent's."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def lock_holder(self) -> LockHolder:
        return LockHolder(self._words[_LOCK], self._words[_LOCK + 1])

    # -- what is served

    def position(self) -> Position:
        return Position(self._words[_POSITION], self._words[_POSITION + 1])

    def last_position(self) -> Position:
        """The position of the newest snapshot there ever was, even if it is lost."""
        return Position(self._words[_LAST], self._words[_LAST + 1])

    def is_serving(self) -> bool:
        return self._words[_POSITION] != 0

    def digest(self) -> bytes:
        """The content digest of the snapshot; all zeros if there is none."""
        low, high = self._words[_DIGEST], self._words[_DIGEST + 1]
        return (low | high << 64).to_bytes(16, "little")

    def times(self) -> tuple[int, int]:
        """Wall times in ns: when the content last changed, and of the last accepted publish."""
        return self._words[_CHANGED], self._words[_VERIFIED]

    def fence(self) -> Fence:
        return Fence(self._words[_INCARNATION], self._words[_COUNT], self._words[_TERM])

    def accept_snapshot(self, header: Header) -> None:
        """Under the lock: the snapshot with `header` is the one that is served from now on."""
        self._put_snapshot(header)
        self._words[_COUNT] = max(self._words[_COUNT], header.count)
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
        self._words[_DIGEST] = self._words[_DIGEST + 1] = 0
        self._words[_DAMAGED] = 0

    def _put_snapshot(self, header: Header) -> None:
        number = int.from_bytes(header.digest, "little")
        self._words[_DIGEST], self._words[_DIGEST + 1] = number & _HALF, number >> 64
        self._words[_CHANGED] = header.published_wall_ns
        self._words[_DAMAGED] = 0
        self._words[_LAST], self._words[_LAST + 1] = header.position
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

    # -- counters and workers: for people to see, never to decide on alone

    def count(self, name: str) -> None:
        """Raise a counter. Without the lock an increment may be lost; they are for people."""
        self._words[_FIRST_COUNTER + COUNTERS.index(name)] += 1

    def counters(self) -> dict[str, int]:
        return {name: self._words[_FIRST_COUNTER + i] for i, name in enumerate(COUNTERS)}

    def created_wall_ns(self) -> int:
        return self._words[_CREATED]

    def register(self, token: int, identity: Identity, interval_ns: int, electable: bool) -> int:
        """Under the lock: take a slot of the worker table, and return its number, -1 if it is full.

        Slots of the provably dead are used again, once there is no free one.
        """
        slot = self._free_slot()
        if slot < 0:
            return -1
        base = _TABLE + slot * _SLOT_WORDS
        words = self._words
        words[base] = 0
        self._put_identity(base + 1, identity)
        words[base + 4] = self._host.wall_ns()
        words[base + 5] = self._host.now_ns()
        words[base + 6] = words[base + 7] = 0
        words[base + 8] = interval_ns
        words[base + 9] = 0
        words[base + 10] = 1 if electable else 0
        words[base] = token
        return slot

    def _free_slot(self) -> int:
        bases = range(_TABLE, _TABLE + SLOTS * _SLOT_WORDS, _SLOT_WORDS)
        for slot, base in enumerate(bases):
            if self._words[base] == 0:
                return slot
        for slot, base in enumerate(bases):
            if self._host.is_provably_dead(self._identity(base + 1)):
                return slot
        return -1

    def note_poll(self, slot: int, token: int) -> bool:
        """Note in our own slot that we polled; False if the slot is no longer ours."""
        base = _TABLE + slot * _SLOT_WORDS
        words = self._words
        if slot < 0 or words[base] != token:
            return False
        now = self._host.now_ns()
        last = now - words[base + 5]
        # Polls much closer than the interval are evaluations before the first load, or a watcher.
        if last > words[base + 8] // 4:
            words[base + 9] = (3 * words[base + 9] + last) // 4 if words[base + 9] else last
        words[base + 5] = now
        return True

    def note_loaded(self, slot: int, token: int, position: Position) -> None:
        """Note in our own slot which snapshot we have."""
        base = _TABLE + slot * _SLOT_WORDS
        if slot >= 0 and self._words[base] == token:
            self._words[base + 6], self._words[base + 7] = position

    def release(self, slot: int, token: int) -> None:
        """Give our own slot back."""
        base = _TABLE + slot * _SLOT_WORDS
        if slot >= 0 and self._words[base] == token:
            self._words[base] = 0

    def workers(self) -> list[Worker]:
        """The slots that are taken, the dead included. Without the lock a row may be half new."""
        words = self._words
        rows = []
        for slot in range(SLOTS):
            base = _TABLE + slot * _SLOT_WORDS
            if words[base]:
                rows.append(
                    Worker(
                        slot=slot,
                        token=words[base],
                        identity=self._identity(base + 1),
                        started_wall_ns=words[base + 4],
                        last_poll_ns=words[base + 5],
                        loaded=Position(words[base + 6], words[base + 7]),
                        interval_ns=words[base + 8],
                        spacing_ns=words[base + 9],
                        electable=words[base + 10] == 1,
                    )
                )
        return rows

    def _identity(self, base: int) -> Identity:
        words = self._words
        return Identity(words[base], words[base + 1], words[base + 2])

    def _put_identity(self, base: int, identity: Identity) -> None:
        words = self._words
        words[base] = identity.pid
        words[base + 1] = identity.start_ticks
        words[base + 2] = identity.pid_namespace


@dataclass(frozen=True)
class Inode:
    """Which file it is, whatever its name."""

    device: int
    number: int

    @staticmethod
    def of(info: os.stat_result) -> Inode:
        return Inode(info.st_dev, info.st_ino)


class _UnusablePage(ShmFlagsError):
    """A page of another boot, another size, or no page at all."""


def attach(
    directory: RuntimeDir, host: Host, owner: str, max_bytes: int, last: ControlPage | None = None
) -> ControlPage:
    """Map the page of `directory`, which is prepared, making it if there is none.

    `last` is the page that this process had until now: a new page goes on from its last grant and
    term, so that a lost page costs no extra request. Raises `OSError` or `UnsafePathError`.
    """
    for _ in range(10):
        try:
            return open_existing(directory, host)
        except FileNotFoundError:
            _create(directory, host, owner, max_bytes, last)
        except (UnsafePathError, _UnusablePage):
            _replace(directory, host, owner, max_bytes, last)
    raise PageReplacedError("is being replaced over and over", path=directory.page_path)


def open_existing(directory: RuntimeDir, host: Host) -> ControlPage:
    """Map the page if there is a usable one.

    Raises `FileNotFoundError`, `UnsafePathError`, or another `ShmFlagsError` for garbage.
    """
    path = directory.page_path
    descriptor = open_private(path, os.O_RDWR, directory.uid)
    try:
        info = os.fstat(descriptor)
        if info.st_size != PAGE_BYTES:
            raise _UnusablePage(f"has {info.st_size} bytes instead of {PAGE_BYTES}", path=path)
        mapped = mmap.mmap(descriptor, PAGE_BYTES)
    finally:
        os.close(descriptor)
    page = ControlPage(directory, host, mapped, Inode.of(info))
    words = page._words
    if words[0] != _MAGIC or not words[_INCARNATION]:
        raise _UnusablePage("is not a control page", path=path)
    if (words[_BOOT] | words[_BOOT + 1] << 64) != host.boot_id():
        raise _UnusablePage("is from another boot", path=path)
    return page


def _create(
    directory: RuntimeDir, host: Host, owner: str, max_bytes: int, last: ControlPage | None
) -> None:
    # Linked into place whole: nobody ever maps an empty or half-written page.
    with _written(directory, host, owner, max_bytes, last) as temporary:
        try:
            os.link(temporary, directory.page_path)
        except FileExistsError:
            pass  # Another worker was first; its page is as good.


def _replace(
    directory: RuntimeDir, host: Host, owner: str, max_bytes: int, last: ControlPage | None
) -> None:
    # What stands there may be no file that can be locked, so the directory is locked instead.
    from filelock import unlock_descriptor

    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(directory.path, flags)
    try:
        _acquire(descriptor, host, directory.path)
        try:
            try:
                open_existing(directory, host)
                return  # Another worker has replaced it meanwhile.
            except FileNotFoundError:
                return
            except (UnsafePathError, _UnusablePage):
                may_replace(directory.page_path, directory.uid)
            with _written(directory, host, owner, max_bytes, last) as temporary:
                os.replace(temporary, directory.page_path)
        finally:
            unlock_descriptor(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _written(
    directory: RuntimeDir, host: Host, owner: str, max_bytes: int, last: ControlPage | None
) -> Iterator[str]:
    """A temporary file with the content of a new page, gone after the block unless it was moved."""
    temporary = os.fspath(directory.temporary_path("page", owner))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600)
    try:
        try:
            os.fchmod(descriptor, 0o600)
            content = memoryview(_new_content(directory, host, max_bytes, last))
            while content:
                # write(), not ftruncate(): a full disk must fail here, not at the first store.
                content = content[os.write(descriptor, content) :]
        finally:
            os.close(descriptor)
        yield temporary
    finally:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass


def _new_content(
    directory: RuntimeDir, host: Host, max_bytes: int, last: ControlPage | None
) -> bytes:
    content = bytearray(PAGE_BYTES)
    words = memoryview(content).cast("Q")
    boot = host.boot_id()
    words[0] = _MAGIC
    words[_INCARNATION] = host.random_word()
    words[_BOOT], words[_BOOT + 1] = boot & _HALF, boot >> 64
    words[_CREATED] = host.wall_ns()
    if last is not None:
        old = last._words
        words[_TERM] = old[_TERM]
        words[_COUNT] = old[_COUNT]
        words[_LAST], words[_LAST + 1] = old[_LAST], old[_LAST + 1]
        words[_CHANGED], words[_VERIFIED] = old[_CHANGED], old[_VERIFIED]
        for word in range(_GRANT, _GRANT_WALL + 1):
            words[word] = old[word]
        for word in range(_FIRST_COUNTER, _FIRST_COUNTER + len(COUNTERS)):
            words[word] = old[word]
    header = _adoptable(directory, boot, max_bytes)
    if header is not None:
        page = ControlPage.__new__(ControlPage)
        page._words = words
        page.accept_snapshot(header)
    del words
    return bytes(content)


def _adoptable(directory: RuntimeDir, boot: int, max_bytes: int) -> Header | None:
    """The header of the snapshot that lies there, if it is sound and of this boot."""
    try:
        header = snapshot.read_header(directory, max_bytes)
    except (OSError, ShmFlagsError):
        return None
    return header if header.boot_id == boot else None


def _acquire(descriptor: int, host: Host, path: os.PathLike[str]) -> None:
    """Lock `descriptor` within `LOCK_PATIENCE_S`, or raise `LockTimeoutError`."""
    from filelock import lock_descriptor

    deadline_ns = host.now_ns() + int(LOCK_PATIENCE_S * 1e9)
    while not lock_descriptor(descriptor, blocking=False):
        if host.now_ns() >= deadline_ns:
            raise LockTimeoutError(
                f"its lock was busy for {LOCK_PATIENCE_S * 1000:.0f} ms",
                path=path,
                remedy="if this repeats, `shmflags status` names the process that holds it",
            )
        host.sleep(_LOCK_RETRY_S)


__all__ = [
    "COUNTERS",
    "NOTHING",
    "PAGE_BYTES",
    "SLOTS",
    "ControlPage",
    "Fence",
    "Grant",
    "Lease",
    "LockHolder",
    "Position",
    "Worker",
    "attach",
    "open_existing",
]
