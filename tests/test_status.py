"""`Status`: what is, and what is wrong, read without a lock and without a trace."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import shmflags
from shmflags import SharedMemoryFlagCache, Status, page
from shmflags.demo.server import DefinitionsServer, definitions, flag
from shmflags.page import PAGE_BYTES
from shmflags.processes import Host
from shmflags.runtime_dir import locate
from shmflags.status import read
from tests.support import call_all, wait_until, workers

KEYS = [
    "schema_version",
    "service_key",
    "directory",
    "exists",
    "at",
    "leader",
    "term",
    "generation",
    "age_s",
    "unchanged_s",
    "since_grant_s",
    "size",
    "flags",
    "cohorts",
    "workers",
    "counters",
    "problems",
    "notes",
]

LEADER_KEYS = ["pid", "command_line", "since", "term", "lease_left_s"]
WORKER_KEYS = [
    "pid",
    "role",
    "leads",
    "state",
    "generation",
    "started",
    "last_poll_s",
    "poll_interval_s",
    "poll_spacing_s",
]


def cache_at(directory: Path, **arguments: object) -> SharedMemoryFlagCache:
    return SharedMemoryFlagCache("test", directory=directory, **arguments)  # type: ignore[arg-type]


def publish(cache: SharedMemoryFlagCache, *keys: str) -> None:
    """As the SDK does: ask, fetch, hand over."""
    assert cache.should_fetch_flag_definitions()
    cache.on_flag_definitions_received(definitions(*map(flag, keys), cohorts={"1": {"type": "AND"}}))


def snapshot_of(cache: SharedMemoryFlagCache) -> Path:
    return Path(cache.status().directory) / "snapshot"


def page_of(cache: SharedMemoryFlagCache) -> Path:
    return Path(cache.status().directory) / "page"


def files_below(directory: Path) -> dict[str, bytes]:
    return {
        os.path.join(root, name): Path(root, name).read_bytes()
        for root, _, names in os.walk(directory)
        for name in names
    }


@contextmanager
def holding_the_lock(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has locked the page of "test" and does not let go."""
    program = (
        "import os, sys\n"
        "from shmflags.page_file import open_existing\n"
        "from shmflags.processes import Host\n"
        "from shmflags.runtime_dir import locate\n"
        "page = open_existing(locate(sys.argv[1], 'test', os.geteuid()), Host())\n"
        "with page.locked():\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(shmflags.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def test_before_the_first_poll_there_is_nothing_and_it_stays_so(directory: Path) -> None:
    """Asking for the status of what does not exist says so in words and creates nothing."""
    status = cache_at(directory).status()
    assert not status.exists
    assert status.problems == ()
    assert status.notes == ("There is nothing here yet: no worker has polled.",)
    assert os.listdir(directory) == []


def test_status_tells_leader_data_workers_and_counters(
    directory: Path, server: DefinitionsServer
) -> None:
    """Of two real workers it tells who leads, since when, what is served, and what each has."""
    before = time.time()
    with workers(2) as group:
        call_all(group, "make_cache", directory=str(directory), poll_interval=30.0)
        call_all(group, "make_client", server.url)
        group[0].call("poll")
        group[1].call("poll")
        status = cache_at(directory).status()
        command = (
            Path(f"/proc/{group[0].pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        )
        after = time.time()

        assert status.service_key == "test"
        assert Path(status.directory).parents[2] == directory
        assert before - 0.001 <= status.at <= after + 0.001
        leader = status.leader
        assert leader is not None
        assert (leader.pid, leader.term, status.term) == (group[0].pid, 1, 1)
        assert leader.command_line == command
        assert before - 1 <= leader.since <= after
        assert 0 < leader.lease_left_s <= 90
        assert (status.generation, status.flags, status.cohorts) == (1, 1, 0)
        assert status.size == (Path(status.directory) / "snapshot").stat().st_size
        for age in (status.age_s, status.unchanged_s, status.since_grant_s):
            assert age is not None
            assert 0 <= age <= after - before
        first, second = status.workers
        assert (first.pid, first.leads, first.role, first.state) == (
            group[0].pid,
            True,
            "auto",
            "current",
        )
        assert (second.pid, second.leads, second.generation) == (group[1].pid, False, 1)
        assert second.poll_interval_s == 30
        assert 0 <= second.last_poll_s <= after - before
        assert before - 1 <= second.started <= after
        assert (status.counters.granted, status.counters.published) == (1, 1)
        assert status.problems == ()
        assert status.notes == ()


def test_counters_count_what_their_names_say(directory: Path) -> None:
    """Grants, publishes, unchanged publishes, takeovers, dropped writes, damaged reads and repairs."""
    now = ShiftedHost()
    first, second = cache_at(directory), cache_at(directory)
    first._host = second._host = now
    publish(first, "one")
    second.should_fetch_flag_definitions()
    second.get_flag_definitions()
    now.shift_s += 20
    publish(first, "one")
    now.shift_s += 20
    assert first.should_fetch_flag_definitions()  # And is away for long enough to be deposed.
    now.shift_s += 100
    publish(second, "two")
    first.on_flag_definitions_received(definitions(flag("old")))
    snapshot = snapshot_of(first)
    snapshot.write_bytes(snapshot.read_bytes().replace(b"two", b"2wo"))
    first.get_flag_definitions()
    second.should_fetch_flag_definitions()
    assert dataclasses.asdict(first.status().counters) == {
        "granted": 4,
        "published": 2,
        "unchanged": 1,
        "takeovers": 1,
        "dropped": 1,
        "damaged": 1,
        "repaired": 1,
    }


class ShiftedHost(Host):
    """This machine, later."""

    shift_s = 0.0

    def now_ns(self) -> int:
        return super().now_ns() + int(self.shift_s * 1e9)

    def wall_ns(self) -> int:
        return super().wall_ns() + int(self.shift_s * 1e9)


def test_the_same_as_json(directory: Path) -> None:
    """As a dict it has a schema version, the names of its fields, and survives JSON unchanged."""
    cache = cache_at(directory)
    publish(cache, "one")
    told = cache.status().as_dict()
    assert list(told["leader"]) == LEADER_KEYS
    assert [list(worker) for worker in told["workers"]] == [WORKER_KEYS]
    for status in (cache.status(), cache_at(directory / "nowhere").status()):
        found = status.as_dict()
        assert list(found) == KEYS
        assert found["schema_version"] == 1
        assert json.loads(json.dumps(found)) == found
        assert found["counters"] == dataclasses.asdict(status.counters)
        assert found["workers"] == [dataclasses.asdict(worker) for worker in status.workers]


def test_a_status_cannot_be_changed(directory: Path) -> None:
    """It is frozen, and exported under its name."""
    status = cache_at(directory).status()
    assert isinstance(status, Status)
    assert shmflags.Status is Status
    with pytest.raises(dataclasses.FrozenInstanceError):
        status.term = 3  # type: ignore[misc]


def test_reading_disturbs_nobody(directory: Path) -> None:
    """It takes no lock and leaves page, snapshot and directory as they are, byte by byte."""
    cache = cache_at(directory)
    publish(cache, "one")
    before = files_below(directory)
    with holding_the_lock(directory):
        held = files_below(directory)
        status = cache.status()
        assert status.generation == 1
        assert files_below(directory) == held
    assert before.keys() == held.keys()


def test_a_lock_that_is_held_for_long_is_named_with_its_holder(directory: Path) -> None:
    """A process stopped while it holds the page's lock is named; when it is dead, nothing is said."""
    cache = cache_at(directory)
    publish(cache, "one")
    with holding_the_lock(directory) as holder:
        os.kill(holder.pid, signal.SIGSTOP)
        wait_until(lambda: bool(cache.status().problems), "the lock is held for too long")
        (problem,) = cache.status().problems
        assert problem.startswith(f"Process {holder.pid} is stopped and has held the page's lock for")
        assert f"kill -CONT {holder.pid}" in problem
        holder.kill()
        holder.wait(60)
        assert cache.status().problems == ()


def test_a_stopped_worker_is_named(directory: Path, server: DefinitionsServer) -> None:
    """A worker that stopped polling is a problem once its poll is overdue, and none when it goes on."""
    cache = cache_at(directory, poll_interval=0.5)
    with workers(2) as group:
        call_all(group, "make_cache", directory=str(directory), poll_interval=0.5)
        call_all(group, "make_client", server.url, poll_interval=0.5)
        for worker in group:  # In turn: at once they may find the lock busy.
            worker.call("evaluate", "one")
        status = cache.status()
        assert status.problems == ()
        # Not the leader: who was told to fetch may be away for as long as a fetch takes.
        (follower,) = [each for each in group if each.pid != getattr(status.leader, "pid", 0)]
        follower.stop()

        def silent() -> list[int]:
            return [row.pid for row in cache.status().workers if row.state == "silent"]

        wait_until(lambda: silent() == [follower.pid], "the stopped worker is silent")
        (problem,) = cache.status().problems
        assert problem.startswith(f"Process {follower.pid} last polled")
        assert f"kill -CONT {follower.pid}" in problem
        follower.resume()
        wait_until(lambda: not cache.status().problems, "it polls again")


def test_a_dead_leader_with_nobody_to_follow_is_a_problem(
    directory: Path, server: DefinitionsServer
) -> None:
    """With a follower alive its death is a note; with none it is a problem; once replaced, nothing."""
    cache = cache_at(directory)
    with workers(2) as group:
        call_all(group, "make_cache", directory=str(directory))
        call_all(group, "make_client", server.url)
        group[0].call("poll")
        group[1].call("poll")
        group[0].kill()
        status = cache.status()
        assert status.leader is None
        assert status.problems == ()
        dead = f"The leader, process {group[0].pid}, is dead"
        assert status.notes == (f"{dead}. A worker follows at its next poll, within 30 s.",)
        group[1].call("poll")
        status = cache.status()
        assert (status.problems, status.notes) == ((), ())
        assert status.leader is not None
        assert status.leader.pid == group[1].pid
        assert status.counters.takeovers == 1
        group[1].kill()
        (problem,) = cache.status().problems
        assert problem.startswith(f"The leader, process {group[1].pid}, is dead, and no worker polls")


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "older"])
def test_a_snapshot_that_cannot_be_used_is_a_problem(directory: Path, damage: str) -> None:
    """A snapshot that is missing, cut off, changed or an older one is a problem until it is mended."""
    cache = cache_at(directory)
    cache._host = now = ShiftedHost()
    publish(cache, "one")
    path = snapshot_of(cache)
    old = path.read_bytes()
    now.shift_s = 20
    publish(cache, "one", "two")
    new = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut": new[:-5], "changed": new[:-1] + b"?", "older": old}[damage])
        path.chmod(0o600)
    (problem,) = cache.status().problems
    assert problem.startswith("The snapshot cannot be used: ")
    cache.should_fetch_flag_definitions()
    status = cache.status()
    assert status.problems == ()
    assert status.flags == 2


def test_a_directory_that_is_open_to_others_is_a_problem(directory: Path) -> None:
    """It says which directory the workers refuse, why, and what to do about it."""
    cache = cache_at(directory)
    publish(cache, "one")
    unsafe = directory / f"shmflags-{os.geteuid()}"
    unsafe.chmod(0o755)
    (problem,) = cache.status().problems
    assert str(unsafe) in problem
    assert "open to others (mode 755)" in problem
    assert "remove it" in problem


def test_a_named_base_that_is_doubtful_is_a_note(directory: Path) -> None:
    """What workers only warn about (as of Kubernetes' emptyDir) does not make the status bad."""
    directory.chmod(0o777)
    cache = cache_at(directory)
    publish(cache, "one")
    status = cache.status()
    assert status.problems == ()
    assert "no sticky bit" in status.notes[0]


def test_a_base_that_does_not_exist_is_a_problem(directory: Path) -> None:
    """A directory that nobody created is named."""
    missing = directory / "missing"
    assert cache_at(missing).status().problems == (f"{missing} does not exist: create it.",)


def test_a_page_of_another_boot_serves_nothing(directory: Path) -> None:
    """What was left by another boot is recognised, and said to be replaced at the next poll."""
    publish(cache_at(directory), "one")

    class Rebooted(Host):
        def boot_id(self) -> int:
            return super().boot_id() ^ 1

    status = read(locate(directory, "test", os.geteuid()), Rebooted(), 1 << 20)
    assert not status.exists
    assert status.problems == ()
    assert "is from another boot" in status.notes[0]


def test_readers_of_what_was_published_from_a_file_are_fine(directory: Path) -> None:
    """With readers only, nobody leads and nothing is wrong."""
    leader = cache_at(directory)
    publish(leader, "one")
    leader.shutdown()
    reader = cache_at(directory, role="reader")
    reader.should_fetch_flag_definitions()
    reader.get_flag_definitions()
    status = reader.status()
    assert status.leader is None
    assert status.problems == ()
    assert status.notes[0].startswith("All workers are readers")
    assert [(row.role, row.generation) for row in status.workers] == [("reader", 1)]


@pytest.mark.parametrize("seed", range(20))
def test_no_page_makes_it_raise(directory: Path, seed: int) -> None:
    """Whatever stands in the words of a page, a status comes out of it, and JSON out of that."""
    cache = cache_at(directory)
    publish(cache, "one")
    path = page_of(cache)
    content = bytearray(path.read_bytes())
    assert len(content) == PAGE_BYTES
    chaos = random.Random(seed)
    # A page whose magic, boot or rising numbers are wrong is not looked at; so they are spared.
    spared = {*range(4), *page._RISING}
    for number in range(PAGE_BYTES // 8):
        if number not in spared and chaos.random() < 0.5:
            word = chaos.choice(
                [0, 1, os.getpid(), 1 << 31, 1 << 63, (1 << 64) - 1, chaos.getrandbits(64)]
            )
            content[8 * number : 8 * number + 8] = word.to_bytes(8, sys.byteorder)
    path.write_bytes(content)
    status = read(locate(directory, "test", os.geteuid()), Host(), 1 << 20)
    assert json.loads(json.dumps(status.as_dict()))["exists"] is True
    (found,) = shmflags.runtime_dir.found(directory, os.geteuid())
    assert read(found, Host(), 1 << 20).service_key in ("", "test")


def test_the_service_key_is_found_in_the_page(directory: Path) -> None:
    """Whatever the key holds, it is told although the path holds a hash only; a longer one is not."""
    for key in ("my-service", "schlüssel/../x", "\ud800", "k" * 504, "k" * 505):
        cache = SharedMemoryFlagCache(key, directory=directory)
        cache.should_fetch_flag_definitions()
    found = shmflags.runtime_dir.found(directory, os.geteuid())
    keys = {read(at, Host(), 1 << 20).service_key for at in found}
    assert keys == {"my-service", "schlüssel/../x", "\ud800", "k" * 504, ""}
    names = {read(at, Host(), 1 << 20).name for at in found}
    assert any(name.startswith("k" * 40 + "-") for name in names)
