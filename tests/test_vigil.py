"""Looking at the same process again and again is cheap, and never less true than a closer look."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from shmflags import vigil
from shmflags.processes import Host, Identity
from shmflags.vigil import Vigil
from tests.support import WAIT_S, identity_of, open_descriptors, wait_until


class CountingHost(Host):
    """Counts the closer looks."""

    def __init__(self) -> None:
        self.closer_looks = 0

    def is_provably_dead(self, other: Identity) -> bool:
        self.closer_looks += 1
        return super().is_provably_dead(other)


@pytest.fixture
def host() -> CountingHost:
    return CountingHost()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_living_process_is_looked_at_closely_once(
    host: CountingHost, child: subprocess.Popen[bytes]
) -> None:
    """After the first time the answer for a process that runs on needs no closer look."""
    who = identity_of(child.pid, host)
    assert [host.has_ended(who) for _ in range(5)] == [False] * 5
    assert host.closer_looks == 1


def test_its_end_is_seen_before_and_after_it_is_reaped(
    host: CountingHost, child: subprocess.Popen[bytes]
) -> None:
    """A killed process has ended as a zombie, and has ended when it is gone."""
    who = identity_of(child.pid, host)
    assert host.has_ended(who) is False
    child.kill()
    wait_until(lambda: host.has_ended(who), "the killed child is a zombie")
    child.wait(WAIT_S)
    assert host.has_ended(who) is True


def test_a_recycled_pid_is_not_watched(host: CountingHost, child: subprocess.Popen[bytes]) -> None:
    """Another start time is another process, which has ended, whoever has its pid now."""
    who = identity_of(child.pid, host)
    assert host.has_ended(who) is False
    assert host.has_ended(who._replace(start_ticks=who.start_ticks - 1)) is True
    assert host.has_ended(who) is False


def test_who_cannot_be_known_is_not_watched(host: CountingHost, child: subprocess.Popen[bytes]) -> None:
    """A process of another namespace, or of unknown start, has not provably ended, dead or alive."""
    who = identity_of(child.pid, host)
    for doubtful in (who._replace(start_ticks=0), who._replace(pid_namespace=1)):
        before = host.closer_looks
        assert [host.has_ended(doubtful) for _ in range(3)] == [False] * 3
        assert host.closer_looks == before + 3


def test_a_descriptor_that_was_closed_and_used_again(
    host: CountingHost, child: subprocess.Popen[bytes]
) -> None:
    """A daemon closes all descriptors: the number comes to mean another file, which is left alone."""
    who = identity_of(child.pid, host)
    assert host.has_ended(who) is False
    watched = host._watched
    assert watched is not None
    descriptor = watched[1]._descriptor
    reader, writer = os.pipe()
    try:
        os.dup2(reader, descriptor)
        assert host.has_ended(who) is False
        assert host.closer_looks == 2
        del watched
        child.kill()
        child.wait(WAIT_S)
        assert host.has_ended(who) is True
        assert os.fstat(descriptor).st_ino == os.fstat(reader).st_ino
    finally:
        os.close(descriptor)
        os.close(reader)
        os.close(writer)


def test_a_vigil_leaves_no_descriptor_behind(child: subprocess.Popen[bytes]) -> None:
    """The descriptor is closed with the host that held it."""
    before = open_descriptors()
    host = CountingHost()
    assert host.has_ended(identity_of(child.pid, host)) is False
    assert len(open_descriptors() - before) == 1
    del host
    assert set(os.listdir("/proc/self/fd")) <= before  # At once: no collector is needed for it.


def test_many_threads_may_look_at_once(host: CountingHost, child: subprocess.Popen[bytes]) -> None:
    """Poller, watcher and requests look at the same time, and none of them fails."""
    who = identity_of(child.pid, host)
    answers: list[bool] = []
    start = threading.Barrier(8)

    def look() -> None:
        start.wait(WAIT_S)
        answers.extend(host.has_ended(who) for _ in range(500))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert answers == [False] * 4000


@pytest.mark.parametrize("missing", ["pidfd_open", "poll"])
def test_without_pidfd_each_look_is_a_close_one(
    host: CountingHost, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """On an older kernel, or where gevent has replaced poll(), the answers are the same."""
    if missing == "poll":
        monkeypatch.setattr(vigil, "_poll", None)
    else:
        monkeypatch.delattr(os, "pidfd_open")
    with pytest.raises((OSError, AttributeError)):
        Vigil(child.pid)
    who = identity_of(child.pid, host)
    assert [host.has_ended(who) for _ in range(3)] == [False] * 3
    assert host.closer_looks == 3
    child.kill()
    child.wait(WAIT_S)
    assert host.has_ended(who) is True
