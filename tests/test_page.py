"""The control page: its records, its lock, its file."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmflags import codec, page_file
from shmflags import page as page_module
from shmflags.errors import LockTimeoutError, PageReplacedError, ShmFlagsError, UnsafePathError
from shmflags.file_lock import Inode
from shmflags.page import COUNTERS, PAGE_BYTES, ControlPage, Fence, Grant, Lease
from shmflags.processes import NOBODY, Host, Identity
from shmflags.runtime_dir import RuntimeDir
from shmflags.snapshot import DEFAULT_MAX_BYTES, NOTHING, Draft, Header, Position
from tests.manual_host import Machine, ManualHost
from tests.support import WAIT_S, open_descriptors

TOP = 2**64 - 1
HOLDER = Identity(10, 20, 30)


@pytest.fixture
def page(home: RuntimeDir) -> ControlPage:
    return attach(home)


def attach(home: RuntimeDir, last: ControlPage | None = None, host: Host | None = None) -> ControlPage:
    return page_file.attach(home, host or Host(), "1-2-3-4", DEFAULT_MAX_BYTES, last)


def header(incarnation: int, generation: int, count: int, digest: bytes = b"d" * 16) -> Header:
    return Header(Position(incarnation, generation), count, 1, 200, 77, 1, 0, digest)


def test_a_new_page_is_private_whole_and_empty(home: RuntimeDir, page: ControlPage) -> None:
    """A new page has its full size at once, serves nothing, has no leader, and no litter beside it."""
    info = os.stat(home.page_path)
    assert (info.st_size, info.st_mode & 0o777) == (PAGE_BYTES, 0o600)
    assert info.st_blocks * 512 >= PAGE_BYTES, "a sparse file would be a SIGBUS on a full disk"
    assert os.listdir(home.path) == ["page"]
    assert page.position() == page.last_position() == NOTHING
    assert not page.is_serving()
    assert page.digest() == bytes(16)
    assert page.lease().token == page.lease().deadline_ns == page.grant().at_ns == 0
    assert page.fence() == Fence(page.incarnation, 0, 0)
    assert page.incarnation != 0
    assert set(page.counters().values()) == {0}
    assert page.workers.rows() == []


def test_records_come_back_as_written(page: ControlPage) -> None:
    """Lease and grant survive the page with every value a word can have, next to each other."""
    lease = Lease(TOP, TOP - 1, Identity(TOP - 2, TOP - 3, TOP - 4), TOP - 5, TOP - 6, TOP - 7, TOP - 8)
    grant = Grant(TOP - 9, TOP - 10, Identity(TOP - 11, TOP - 12, TOP - 13), TOP - 14, TOP - 15)
    page.write_lease(lease)
    page.write_grant(grant)
    page.accept_snapshot(header(5, 6, 7, bytes(range(16))))
    assert page.lease() == lease
    assert page.grant() == grant._replace(attempts=0), "an accepted publish ends the attempts"
    assert page.position() == page.last_position() == Position(5, 6)
    assert page.digest() == bytes(range(16))
    assert page.fence() == Fence(page.incarnation, 7, TOP)
    assert page.times() == (77, 77)


def test_another_process_sees_the_same(home: RuntimeDir, page: ControlPage) -> None:
    """Two maps of the file are one page."""
    other = attach(home)
    page.count("granted")
    page.accept_snapshot(header(1, 2, 3))
    assert other.counters()["granted"] == 1
    assert other.position() == Position(1, 2)
    assert other.incarnation == page.incarnation


def test_an_unchanged_publish_moves_count_and_time_only(page: ControlPage) -> None:
    """The same content again raises the count and the time of verification; position and digest stay."""
    page.accept_snapshot(header(1, 2, 3))
    page.write_grant(Grant(1, 1, Identity(1, 1, 1), 4, 1))
    page.accept_unchanged(99)
    assert page.position() == Position(1, 2)
    assert page.fence().publications == 4
    assert page.times() == (77, 99)
    assert page.grant().attempts == 0


def test_a_restored_snapshot_is_no_publication(page: ControlPage) -> None:
    """Restoring what was lost leaves the count: a fetch under way may still be published."""
    page.accept_snapshot(header(1, 2, 3))
    page.report_damage(Position(1, 2))
    assert page.damage_is_reported()
    page.clear_snapshot()
    assert not page.is_serving()
    assert not page.damage_is_reported()
    assert page.position() == NOTHING
    assert page.last_position() == Position(1, 2)
    assert page.digest() == bytes(16)
    page.report_damage(Position(1, 2))
    page.restore_snapshot(header(1, 2, 9))
    assert not page.damage_is_reported()
    assert page.digest() == b"d" * 16
    assert page.position() == Position(1, 2)
    assert page.fence().publications == 3


def test_an_older_count_does_not_lower_the_page(page: ControlPage) -> None:
    """Taking up a snapshot never lowers the publication count, which fences depend on."""
    page.accept_snapshot(header(1, 2, 8))
    page.accept_snapshot(header(1, 3, 5))
    assert page.fence().publications == 8


class KilledError(Exception):
    """Stands for SIGKILL: the writer does nothing more."""


class WordsOfTheDying:
    """The words of a page, whose writer is killed instead of making its store number `fatal`."""

    def __init__(self, words: memoryview, fatal: int) -> None:
        self._words = words
        self._left = fatal

    def __getitem__(self, index: Any) -> Any:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._left -= 1
        if self._left == 0:
            raise KilledError
        self._words[index] = value


def killed_while(
    page: ControlPage, home: RuntimeDir, accepted: Header, present: Header | None
) -> Iterator[None]:
    """After each store of accepting `accepted`, on a page that serves `present`, the page as it is left."""
    fatal = 0
    while True:
        fatal += 1
        page.clear_snapshot()
        for word in (7, 13, 14):  # publication count, last position
            page._words[word] = 0
        if present is not None:
            page.accept_snapshot(present)
        words: Any = WordsOfTheDying(page._words, fatal)
        try:
            ControlPage(home, Host(), words, Inode(0, 0)).accept_snapshot(accepted)
        except KilledError:
            yield
        else:
            break
    assert fatal > 8, "it was stepped through"


OLD, NEW = b"o" * 16, b"n" * 16
SUCCESSIONS = pytest.mark.parametrize(
    ("present", "accepted"),
    [
        (header(5, 3, 8, OLD), header(5, 4, 9, NEW)),
        (header(5, 3, 8, OLD), header(6, 1, 9, NEW)),
        (header(5, 1, 8, OLD), header(6, 1, 9, NEW)),
        (None, header(6, 1, 9, NEW)),
    ],
    ids=["next generation", "next incarnation", "same generation", "first"],
)


@SUCCESSIONS
def test_a_writer_killed_half_way_has_raised_the_count(
    home: RuntimeDir, page: ControlPage, present: Header | None, accepted: Header
) -> None:
    """Whatever else of a publish is in the page, its count is: what was fetched before it is dropped."""
    for number, _ in enumerate(killed_while(page, home, accepted, present)):
        assert page.fence().publications == (9 if number else 8 if present else 0)


@SUCCESSIONS
def test_a_writer_killed_half_way_leaves_no_wrong_digest(
    home: RuntimeDir, page: ControlPage, present: Header | None, accepted: Header
) -> None:
    """The digest is that of the snapshot which the page names, or none, never that of another."""
    digests = {NOTHING: bytes(16)}
    for one in (present, accepted):
        if one is not None:
            digests[one.position] = one.digest
    for _ in killed_while(page, home, accepted, present):
        assert page.digest() in (bytes(16), digests.get(page.position()))


def steps(page: ControlPage, home: RuntimeDir, write: Callable[[ControlPage], None]) -> Iterator[None]:
    """After each store of `write` but the last, the page as a killed writer leaves it; then begins anew."""
    words = page._words
    before = words[:].tobytes()
    fatal = 0
    while True:
        fatal += 1
        dying: Any = WordsOfTheDying(words, fatal)
        try:
            write(ControlPage(home, Host(), dying, Inode(0, 0)))
        except KilledError:
            yield
        else:
            break
        words.cast("B")[:] = before
    assert fatal > 4, "it was stepped through"


def test_a_lease_half_written_has_run_out(home: RuntimeDir, page: ControlPage) -> None:
    """Whoever is killed while writing or vacating a lease leaves the last one, or one without deadline."""
    last = Lease(4, 9, Identity(1, 2, 3), 10, 20, 30, 40)
    page.write_lease(last)
    for _ in steps(page, home, lambda page: page.write_lease(Lease(5, 8, HOLDER, 11, 21, 31, 41))):
        assert page.lease() == last or page.lease().deadline_ns == 0
    page.write_lease(last)
    for _ in steps(page, home, ControlPage.vacate):
        assert page.lease() == last or page.lease().deadline_ns == 0


def test_a_grant_half_written_is_none(home: RuntimeDir, page: ControlPage) -> None:
    """Whoever is killed while being granted a fetch has asked for nothing: the time of the last one stands."""
    page.write_grant(Grant(123, 9, Identity(1, 2, 3), 2, 5))
    for _ in steps(page, home, lambda page: page.write_grant(Grant(456, 8, HOLDER, 3, 6))):
        assert page.grant().at_ns == 123


def test_vacating_keeps_the_term(home: RuntimeDir) -> None:
    """A vacated lease has no leader and no deadline, and says since when; the next term will be higher."""
    host = ManualHost(Machine(), 1)
    page = attach(home, host=host)
    page.write_lease(Lease(4, 9, Identity(1, 2, 3), 10, 20, 30, 40))
    page.vacate()
    assert page.lease() == Lease(4, 0, NOBODY, 10, 0, host.now_ns(), host.wall_ns())


def test_counters_are_apart(page: ControlPage) -> None:
    """Each counter counts by itself."""
    for number, name in enumerate(COUNTERS):
        for _ in range(number):
            page.count(name)
    assert page.counters() == {name: number for number, name in enumerate(COUNTERS)}


class Publisher(ManualHost):
    """Serves a snapshot on `page` while its owner sleeps for the time number `at`."""

    page: ControlPage
    at = 0

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        if self.machine.slept == self.at:
            self.page.accept_snapshot(header(1, 2, 3))


@pytest.mark.parametrize(
    ("published_at", "until_ms", "slept_ms"),
    [
        (0, 1000, 60),
        (0, 60, 60),
        (0, 50, 50),
        (0, 10, 10),
        (0, 5, 10),
        (0, -5, 10),
        (1, 1000, 10),
        (3, 1000, 30),
    ],
)
def test_how_long_a_doze_is(home: RuntimeDir, published_at: int, until_ms: int, slept_ms: int) -> None:
    """Who waits looks every 10 ms for something to serve, and every 60 ms for something to do."""
    host = Publisher(Machine(), 1)
    host.page, host.at = attach(home, host=host), published_at
    before = host.now_ns()
    host.page.doze(before + until_ms * 1_000_000)
    assert host.now_ns() - before == slept_ms * 1_000_000
    assert host.machine.slept == slept_ms // 10


# -- the lock


def test_the_lock_excludes_and_names_its_holder(home: RuntimeDir, page: ControlPage) -> None:
    """While one holds the lock another gives up after a bounded wait; the page says who holds it."""
    other = attach(home)
    with page.locked():
        assert other.lock_holder().pid == os.getpid()
        assert other.lock_holder().since_ns > 0
        with pytest.raises(LockTimeoutError, match="50 ms"), other.locked():
            pass
    assert other.lock_holder().pid == 0
    with other.locked():
        pass


def test_the_lock_is_free_after_an_error(page: ControlPage) -> None:
    """An error in the block frees the lock and the word that names its holder."""
    with pytest.raises(ZeroDivisionError), page.locked():
        raise ZeroDivisionError
    assert page.lock_holder().pid == 0
    with page.locked():
        pass


def test_no_descriptor_is_left_open(page: ControlPage) -> None:
    """Locking a hundred times opens and closes a hundred descriptors."""
    before = open_descriptors()
    for _ in range(100):
        with page.locked():
            pass
    assert open_descriptors() <= before


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_on_a_file_that_is_gone_excludes_nobody(
    home: RuntimeDir, page: ControlPage, replaced: bool
) -> None:
    """The lock of a page that was removed or replaced is refused."""
    home.page_path.unlink()
    if replaced:
        attach(home)
    assert not page.is_at_its_path()
    with pytest.raises(PageReplacedError), page.locked():
        pass


def test_a_page_replaced_while_waiting_for_its_lock_is_noticed(
    home: RuntimeDir, page: ControlPage
) -> None:
    """Whoever waited for the lock of a file that was replaced meanwhile starts over."""
    outcome: list[BaseException] = []
    entered, leave = threading.Event(), threading.Event()

    class WaitingHost(Host):
        def sleep(self, seconds: float) -> None:
            entered.set()
            assert leave.wait(WAIT_S)

        def now_ns(self) -> int:
            return 0

    waiting = attach(home, host=WaitingHost())

    def wait() -> None:
        try:
            with waiting.locked():
                pass
        except PageReplacedError as error:
            outcome.append(error)

    thread = threading.Thread(target=wait)
    with page.locked():
        thread.start()
        assert entered.wait(WAIT_S)
        home.page_path.unlink()
        attach(home)
    leave.set()
    thread.join(WAIT_S)
    assert len(outcome) == 1


# -- the file


def test_a_lost_page_goes_on_where_it_was(home: RuntimeDir, page: ControlPage) -> None:
    """A page made in the place of a lost one keeps last grant, term, count and counters, not the lease."""
    page.write_lease(Lease(4, 9, Identity(1, 2, 3), 10, 20, 30, 40))
    page.accept_snapshot(header(page.incarnation, 2, 8))
    page.write_grant(Grant(123, 9, Identity(1, 2, 3), 2, 5))
    page.count("granted")
    home.page_path.unlink()
    new = attach(home, page)
    assert new.incarnation != page.incarnation
    assert new.fence() == Fence(new.incarnation, 8, 4)
    assert new.grant() == page.grant() == Grant(123, 9, Identity(1, 2, 3), 2, 5)
    assert new.lease().token == 0
    assert new.last_position() == page.last_position()
    assert new.times() == page.times()
    assert not new.is_serving()
    assert new.counters()["granted"] == 1


def test_a_lost_page_that_was_garbage_is_not_gone_on_with(home: RuntimeDir, page: ControlPage) -> None:
    """Numbers that nobody counted to are not carried over to the page that is made anew."""
    page.write_lease(Lease(1 << 60, 9, Identity(1, 2, 3), 10, 20, 30, 40))
    home.page_path.unlink()
    assert attach(home, page).fence().term == 0


@pytest.mark.parametrize("boot", [7, 8])
def test_a_new_page_takes_up_the_snapshot_of_this_boot(home: RuntimeDir, boot: int) -> None:
    """A snapshot of this boot that lies there is served at once, under its own position; another is not."""
    host = ManualHost(Machine(boot=7), 1)
    encoded, _ = codec.encode({"flags": [{}], "group_type_mapping": {}, "cohorts": {}})
    draft = Draft(home, encoded, "1-2-3-4")
    written = draft.put_in_place(Position(5, 6), 9, boot, 11)
    draft.discard()
    page = attach(home, host=host)
    assert page.is_serving() == (boot == 7)
    assert page.created_wall_ns() == host.wall_ns()
    if boot == 7:
        assert page.position() == page.last_position() == Position(5, 6)
        assert page.digest() == written.digest
        assert page.fence() == Fence(page.incarnation, 9, 0)
        assert page.times() == (11, 11)


@pytest.mark.parametrize(
    ("key", "kept"),
    [
        ("my-service", True),
        ("", True),
        ("größe \U0001f600", True),
        ("\ud800", True),
        ("k" * 504, True),
        ("k" * 505, False),
        ("\u20ac" * 168, True),
        ("\u20ac" * 169, False),
    ],
    ids=itertools.count(),
)
def test_the_page_names_its_service_key(directory: Path, key: str, kept: bool) -> None:
    """The key that a page was made for can be read from it, if it has no more than 504 bytes."""
    home = RuntimeDir(directory, os.geteuid(), key, explicit=True)
    home.prepare(lambda _: None)
    page = attach(home)
    assert page.service_key() == (key if kept else "")
    assert page.workers.rows() == []


def test_a_key_that_is_garbage_is_none(page: ControlPage) -> None:
    """Bytes that are no UTF-8, and a length beyond all bounds, are no key to show."""
    page._words[65] = TOP
    assert page.service_key() == ""
    page._words[64] = TOP
    assert page.service_key() == ""


COUNTED = (6, 7, 14, 16, 33, *range(40, 40 + len(COUNTERS)))


@pytest.mark.parametrize(
    ("word", "value", "objection"),
    [
        (0, 0, "is not a control page"),
        (0, TOP, "is not a control page"),
        (1, 0, "is not a control page"),
        (1, TOP, ""),
        (2, 6, "is from another boot"),
        (3, 1, "is from another boot"),
        *((word, (1 << 48) - 1, "") for word in COUNTED),
        *((word, 1 << 48, "holds numbers that nobody counted to") for word in COUNTED),
        *((word, TOP, "") for word in (4, 5, 10, 11, 12, 13, 17, 20, 21, 22, 28, 64, 65, 128)),
    ],
)
def test_what_is_objected_to_in_a_page(home: RuntimeDir, word: int, value: int, objection: str) -> None:
    """Magic, incarnation and boot must be right, and no count be higher than can be counted to."""
    page = attach(home, host=ManualHost(Machine(boot=7), 1))
    assert page.objection() == ""
    page._words[word] = value
    assert page.objection() == objection


@pytest.mark.parametrize(
    "garbage",
    [b"", b"x", bytes(PAGE_BYTES), b"\xff" * PAGE_BYTES, bytes(PAGE_BYTES - 8), bytes(PAGE_BYTES + 8)],
    ids=len,
)
def test_a_garbage_page_is_replaced(home: RuntimeDir, garbage: bytes) -> None:
    """Whatever of ours stands in the page's place, a usable page takes it."""
    home.page_path.write_bytes(garbage)
    os.chmod(home.page_path, 0o600)
    with pytest.raises(ShmFlagsError):
        page_file.open_existing(home, Host())
    page = attach(home)
    assert page.is_at_its_path()
    assert os.listdir(home.path) == ["page"]


def test_a_page_of_another_boot_is_replaced(home: RuntimeDir) -> None:
    """A page that names another boot, in either half of its id, is not used."""
    machine = Machine(boot=1 << 64 | 5)
    before = attach(home, host=ManualHost(machine, 1))
    assert attach(home, host=ManualHost(machine, 2)).incarnation == before.incarnation
    for boot in (5, 1 << 64 | 6):
        machine.boot = boot
        after = attach(home, host=ManualHost(machine, 1))
        assert after.incarnation != before.incarnation
        before = after


@pytest.mark.parametrize("kind", ["symlink", "fifo", "wide"])
def test_what_is_ours_and_unsafe_is_replaced(home: RuntimeDir, tmp_path: Path, kind: str) -> None:
    """A symlink, a FIFO or an open file in our directory is replaced, and a symlink's target left alone."""
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    if kind == "symlink":
        home.page_path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(home.page_path)
    else:
        attach(home)
        os.chmod(home.page_path, 0o666)
    attach(home)
    assert home.page_path.stat().st_mode & 0o777 == 0o600
    assert not home.page_path.is_symlink()
    assert target.read_bytes() == b"precious"


def test_a_directory_in_its_place_is_refused(home: RuntimeDir) -> None:
    """What cannot be replaced is named, with what to do."""
    os.mkdir(home.page_path)
    with pytest.raises(UnsafePathError, match="remove"):
        attach(home)


def test_many_who_make_the_page_at_once_share_one(home: RuntimeDir) -> None:
    """Of eight who find no page, one makes it, and all have the same."""
    barrier = threading.Barrier(8)
    found: list[int] = []

    def make(number: int) -> None:
        barrier.wait(WAIT_S)
        page = page_file.attach(home, Host(), f"1-2-3-{number}", DEFAULT_MAX_BYTES)
        found.append(page.incarnation)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(found) == 8
    assert len(set(found)) == 1
    assert os.listdir(home.path) == ["page"]


def test_the_layout_is_aligned_and_does_not_overlap() -> None:
    """The words of the head end before the worker table."""
    assert PAGE_BYTES % 8 == 0
    assert page_module._FIRST_COUNTER + len(COUNTERS) <= page_module._KEY
