"""A worker that is stopped (SIGSTOP, a frozen container, a debugger): the others go on."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from shmflags.page import ControlPage
from tests.faults.harness import Api, Ear, Poller, control_page, temporary_files
from tests.support import wait_until

INTERVAL_S = 0.02
LEASE_S = 0.3
NEVER_S = 24 * 3600.0


def poller(base: Path, api: Api, lease_s: float = LEASE_S) -> Poller:
    return Poller(base, api, poll_interval=INTERVAL_S, lease_ttl=lease_s, cold_start_timeout=0.0)


def until(pollers: list[Poller], stamp: int) -> None:
    """Poll until all have the stamp; nobody has less than before at any time."""
    held = [one.stamp or 0 for one in pollers]

    def all_have_it() -> bool:
        for number, one in enumerate(pollers):
            now = one.poll() or 0
            assert now >= held[number]
            held[number] = now
        return held == [stamp] * len(pollers)

    wait_until(all_have_it, f"all hold {stamp}")


@contextmanager
def stopped(act: Callable[[], object]) -> Iterator[int]:
    """A child that runs `act`, which stops it; it is gone after the block."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(0)
    try:
        _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the child ended with wait status {status}"
        yield pid
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def resume(pid: int) -> None:
    """Let the child go on, to its end."""
    os.kill(pid, signal.SIGCONT)
    _, status = os.waitpid(pid, 0)
    assert status == 0


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def stop_while_locked(page: ControlPage, action: Callable[[], object]) -> None:
    """Run `action`; once this process holds the page's lock, stop it there."""

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if page.lock_holder().pid == os.getpid():
            sys.settrace(None)
            os.kill(os.getpid(), signal.SIGSTOP)
            return None
        return trace

    sys.settrace(trace)
    action()
    sys.settrace(None)


@pytest.mark.parametrize("then", [resume, kill], ids=["resumed", "killed"])
def test_stopped_while_it_holds_the_lock(
    directory: Path, ear: Ear, then: Callable[[int], None]
) -> None:
    """The others serve on and nobody waits long; once it goes on or dies, they fetch again."""
    api = Api()
    first = poller(directory, api)
    assert first.poll() == 1
    page = control_page(directory)

    def act() -> None:
        first.cache.shutdown()  # The child's own: the parent's lease is not its to give back.
        worker = poller(directory, api)
        wait_until(lambda: page.lease().deadline_ns < time.monotonic_ns(), "the lease runs out")
        stop_while_locked(page, worker.poll)

    with stopped(act) as pid:
        assert page.lock_holder().pid == pid
        group = [first, poller(directory, api)]
        api.change()
        began = time.monotonic()
        for _ in range(10):
            assert [one.poll() for one in group] == [1, 1]
            time.sleep(INTERVAL_S)
        assert time.monotonic() - began < 10  # 50 ms for each attempt, at most one per half interval
        assert api.requests == 1
        assert ear.heard("lock was busy")
        then(pid)
        until(group, 2)
    assert temporary_files(directory) == []


def test_stopped_leader_is_replaced_and_cannot_publish_what_it_fetched(
    directory: Path, ear: Ear
) -> None:
    """A leader stopped in its fetch loses the lease; when it goes on, its old answer is dropped."""
    api = Api()
    follower = poller(directory, api)

    def act() -> None:
        worker = poller(directory, api)
        assert worker.cache.should_fetch_flag_definitions()
        answer = api.fetch(None)
        os.kill(os.getpid(), signal.SIGSTOP)
        worker.cache.on_flag_definitions_received(answer)
        assert worker.poll() == 2

    with stopped(act) as pid:
        assert control_page(directory).lease().holder.pid == pid
        api.change()
        until([follower], 2)
        resume(pid)
        assert follower.poll() == 2
    assert control_page(directory).counters()["dropped"] == 1


def test_stopped_follower_catches_up(directory: Path, ear: Ear) -> None:
    """A follower that was stopped over several publishes serves the newest when it goes on."""
    api = Api()
    leader = poller(directory, api, NEVER_S)
    assert leader.poll() == 1

    def act() -> None:
        follower = poller(directory, api, NEVER_S)
        assert follower.poll() == 1
        os.kill(os.getpid(), signal.SIGSTOP)
        assert follower.poll() == 4

    with stopped(act) as pid:
        for _ in range(3):
            until([leader], api.change())
        resume(pid)
