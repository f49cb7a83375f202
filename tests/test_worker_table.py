"""The worker table: who is there, what each has, and when it last polled."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmflags import SharedMemoryFlagCache
from shmflags.demo.server import DefinitionsServer, definitions, flag
from shmflags.page_file import open_existing
from shmflags.processes import Host, Identity
from shmflags.runtime_dir import locate
from shmflags.snapshot import NOTHING, Position
from shmflags.worker_table import SLOTS, TABLE_WORDS, WorkerTable
from tests.manual_host import SECOND_NS, Machine, ManualHost
from tests.support import call_all, poll_in_turn, wait_until, workers

INTERVAL_NS = 30 * SECOND_NS


class Table:
    """A table on a simulated machine, and workers that register in it by their pid."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.words = memoryview(bytearray(8 * TABLE_WORDS)).cast("Q")
        self.table = WorkerTable(self.words, ManualHost(self.machine, 1))

    def register(self, pid: int, loaded: Position = NOTHING) -> int:
        identity = Identity(pid, pid * 10, 1)
        return self.table.register(pid, identity, INTERVAL_NS, True, loaded)

    def pids(self) -> list[int]:
        return [row.identity.pid for row in self.table.rows()]


@pytest.fixture
def simulated() -> Table:
    return Table()


def test_a_row_holds_what_was_noted(simulated: Table) -> None:
    """A row tells pid, start, last poll, what is loaded, interval and role, as they were written."""
    slot = simulated.register(7, Position(3, 1))
    started = ManualHost(simulated.machine, 7).wall_ns()
    simulated.machine.pass_time(30)
    assert simulated.table.note_poll(slot, 7, Position(3, 2))
    (row,) = simulated.table.rows()
    assert (row.slot, row.token, row.identity) == (slot, 7, Identity(7, 70, 1))
    assert row.started_wall_ns == started
    assert row.last_poll_ns == simulated.machine.now
    assert row.loaded == Position(3, 2)
    assert (row.interval_ns, row.spacing_ns, row.electable) == (INTERVAL_NS, INTERVAL_NS, True)
    simulated.table.note_loaded(slot, 7, Position(3, 3))
    assert simulated.table.rows()[0].loaded == Position(3, 3)


def test_a_worker_writes_its_own_slot_only(simulated: Table) -> None:
    """With another token than the slot's, nothing is noted and nothing is given back."""
    slot = simulated.register(7)
    before = simulated.words.tobytes()
    assert not simulated.table.note_poll(slot, 8, Position(3, 2))
    assert not simulated.table.note_poll(-1, 7, Position(3, 2))
    simulated.table.note_loaded(slot, 8, Position(3, 2))
    simulated.table.release(slot, 8)
    assert simulated.words.tobytes() == before
    simulated.table.release(slot, 7)
    assert simulated.table.rows() == []


def test_with_more_workers_than_slots_the_rest_is_not_shown(simulated: Table) -> None:
    """A full table refuses the next worker, and takes it as soon as one of the others has gone."""
    for pid in range(1, SLOTS + 1):
        assert simulated.register(pid) >= 0
    assert not simulated.table.has_room()
    assert simulated.register(1000) == -1
    assert simulated.pids() == list(range(1, SLOTS + 1))
    simulated.machine.dead.add(100)
    assert simulated.table.has_room()
    assert simulated.register(1000) == 99
    assert 100 not in simulated.pids()
    assert 1000 in simulated.pids()


def test_free_slots_are_used_before_those_of_the_dead(simulated: Table) -> None:
    """A worker that died stays to be seen while there is another slot."""
    first = simulated.register(1)
    simulated.machine.dead.add(1)
    assert simulated.register(2) != first


def test_slots_of_the_long_silent_are_used_again(simulated: Table) -> None:
    """A worker whose death nobody can prove gives way after long silence, and returns if it lives."""
    for pid in range(1, SLOTS + 1):
        simulated.register(pid)
    simulated.machine.pass_time(599)
    for slot in range(1, SLOTS):
        simulated.table.note_poll(slot, slot + 1, NOTHING)
    assert not simulated.table.has_room()
    simulated.machine.pass_time(2)
    assert simulated.register(1000) == 0
    assert not simulated.table.note_poll(0, 1, NOTHING)


def test_the_spacing_of_polls_is_smoothed_and_free_of_bursts(simulated: Table) -> None:
    """Polls that follow at once, as evaluations before the first load do, do not count."""
    slot = simulated.register(7)
    for _ in range(20):
        simulated.machine.pass_time(0.1)
        simulated.table.note_poll(slot, 7, NOTHING)
    assert simulated.table.rows()[0].spacing_ns == 0
    for _ in range(20):
        simulated.machine.pass_time(60)
        simulated.table.note_poll(slot, 7, NOTHING)
    assert simulated.table.rows()[0].spacing_ns == pytest.approx(60 * SECOND_NS, rel=0.01)


def test_a_row_that_changes_hands_while_it_is_read_is_left_out(simulated: Table) -> None:
    """A reader without the lock never takes half of one worker for half of another."""
    simulated.register(7)

    class Changing(WorkerTable):
        def _identity(self, base: int) -> Identity:
            found = super()._identity(base)
            self._words[base - 1] = 8  # The token stands before the identity.
            return found

    assert Changing(simulated.words, Host()).rows() == []


def test_a_recycled_pid_is_another_worker(directory: Path) -> None:
    """The slot of a dead worker is known for dead although another process has its pid."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        try:
            host = Host()
            table = WorkerTable(memoryview(bytearray(8 * TABLE_WORDS)).cast("Q"), host)
            namespace = host.identity().pid_namespace
            for token in range(1, SLOTS + 1):
                table.register(token, host.identity(), INTERVAL_NS, True)
            assert not table.has_room()
            recycled = Identity(other.pid, 1, namespace)
            table.release(5, 6)
            assert table.register(1000, recycled, INTERVAL_NS, True) == 5
            assert table.register(1001, host.identity(), INTERVAL_NS, True) == 5
        finally:
            other.communicate(b"\n", timeout=60)


@pytest.fixture
def many(directory: Path) -> Iterator[list[SharedMemoryFlagCache]]:
    """More caches of one key than the table has slots."""
    caches = [SharedMemoryFlagCache("many", directory=directory) for _ in range(SLOTS + 10)]
    yield caches
    for cache in caches:
        cache.shutdown()
    caches.clear()
    gc.collect()  # Each has mapped the page, and holds a descriptor for it.


def test_more_real_workers_than_slots_all_work(many: list[SharedMemoryFlagCache]) -> None:
    """Workers without a slot fetch, publish and load; only status does not see them."""
    assert [cache.should_fetch_flag_definitions() for cache in many] == [True] + [False] * (SLOTS + 9)
    many[0].on_flag_definitions_received(definitions(flag("one")))
    for cache in many:
        found = cache.get_flag_definitions()
        assert [each["key"] for each in found["flags"]] == ["one"]
    status = many[-1].status()
    assert len(status.workers) == SLOTS
    assert any("table of workers is full" in note for note in status.notes)
    # One that was shown leaves, and at its next poll one that was not is.
    many[5].shutdown()
    many[-1].should_fetch_flag_definitions()
    assert len(many[-1].status().workers) == SLOTS


def test_forked_children_have_slots_of_their_own(directory: Path, server: DefinitionsServer) -> None:
    """A child shows in the table as itself, with what it inherited from its parent."""
    with workers(1) as (parent,):
        parent.call("make_cache", directory=str(directory))
        parent.call("make_client", server.url)
        parent.call("poll")
        children = parent.call("fork", [("poll", ()), ("rows", ())], 2)
        cache = SharedMemoryFlagCache("test", directory=directory)
        for pid, (keys, rows) in children:
            assert keys == ["one"]
            assert [pid, cache.status().generation] in rows
        assert server.full == 1
        # The children ended without a word; they are not shown for alive.
        assert [row.pid for row in cache.status().workers] == [parent.pid]


def test_a_killed_worker_is_no_longer_shown(directory: Path, server: DefinitionsServer) -> None:
    """Status shows who lives; of two workers, one is killed and only the other is left."""
    cache = SharedMemoryFlagCache("test", directory=directory)
    with workers(2) as group:
        call_all(group, "make_cache", directory=str(directory))
        call_all(group, "make_client", server.url)
        poll_in_turn(group)
        assert {row.pid for row in cache.status().workers} == {worker.pid for worker in group}
        group[0].kill()
        wait_until(
            lambda: [row.pid for row in cache.status().workers] == [group[1].pid],
            "only the survivor is shown",
        )


def test_a_worker_that_kept_its_objects_is_current_on_a_new_page(directory: Path) -> None:
    """After the page was lost, workers show what they have, although they had nothing to load again."""
    leader, follower = (SharedMemoryFlagCache("test", directory=directory) for _ in range(2))
    assert leader.should_fetch_flag_definitions()
    leader.on_flag_definitions_received(definitions(flag("one")))
    for cache in (leader, follower):
        cache.should_fetch_flag_definitions()
        cache.get_flag_definitions()
    os.unlink(Path(leader.status().directory) / "page")
    for cache in (leader, follower):
        cache.should_fetch_flag_definitions()
        cache.get_flag_definitions()
    assert [row.generation for row in leader.status().workers] == [1, 1]


def test_a_worker_without_a_slot_needs_no_lock(
    directory: Path, many: list[SharedMemoryFlagCache], caplog: pytest.LogCaptureFixture
) -> None:
    """Where the table is full, polls of the rest do not wait for the page's lock to find that out."""
    assert [cache.should_fetch_flag_definitions() for cache in many].count(True) == 1
    caplog.clear()
    page = open_existing(locate(directory, "many", os.geteuid()), Host())
    with page.locked():
        assert not many[-1].should_fetch_flag_definitions()
    assert caplog.text == ""
