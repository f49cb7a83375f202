"""A worker killed at any step: a survivor repairs what it left, and leads.

The victim is a forked child that sends itself SIGKILL at the n-th step (stepper.py), for every n.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import (
    Api,
    Ear,
    Poller,
    control_page,
    page_words,
    runtime_dir,
    stamp_of,
    stamp_on_disk,
    temporary_files,
)
from tests.faults.stepper import Stepper, package_code

INTERVAL_S = 0.002
NEVER_S = 7 * 24 * 3600.0  # nobody gets anywhere by waiting: only proof of death frees the lease

# -- stepping


def steps_of(victim: Victim) -> int:
    """How many steps the victim's action takes when nothing stops it."""
    assert package_code()  # so that the children find it looked up
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            victim.prepare()
            stepper = Stepper()
            stepper.run(victim.act)
            os.write(writer, str(stepper.steps).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    return int(text)


def kill_at(step: int, victim: Victim) -> bool:
    """Run the victim in a child until it kills itself; False if its action ended before."""
    pid = os.fork()
    if pid == 0:
        try:
            victim.prepare()
            Stepper(step).run(victim.act)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert status == 0
    return False


# -- what the victim was about


class Victim(ABC):
    """A worker of its own in a directory that `stage` has set; `prepare` and `act` run in the child."""

    may_lose_the_snapshot = False
    least_steps = 80

    def __init__(self, base: Path) -> None:
        self.base = base
        self.api = Api()
        self.follower: Poller | None = None

    def poller(self) -> Poller:
        return Poller(
            self.base,
            self.api,
            poll_interval=INTERVAL_S,
            lease_ttl=NEVER_S,
            max_term=NEVER_S,
            cold_start_timeout=0.0,
        )

    def stage(self) -> None:
        """In the test's process: definitions are published, their publisher is gone, one follows."""
        first = self.poller()
        assert first.poll() == 1
        for _ in range(2):
            self.api.change()
            _until_granted(first)
        first.cache.shutdown()
        self.follower = self.poller()
        self.follower.cache._settings = _never_elected(self.follower)
        assert self.follower.poll() == self.api.stamp

    def prepare(self) -> None:
        """In the child, before the steps count."""
        self.worker = self.poller()
        self.worker.cache.get_flag_definitions()

    @abstractmethod
    def act(self) -> None:
        """In the child, step by step."""


def _never_elected(poller: Poller) -> Any:
    return poller.cache._settings._replace(electable=False)


class FirstOfAll(Victim):
    """Makes the directory and the page, is elected, fetches, and publishes the first snapshot."""

    def stage(self) -> None:
        pass

    def prepare(self) -> None:
        self.worker = self.poller()

    def act(self) -> None:
        self.worker.poll()


class PublishesNew(Victim):
    """Takes the lease, and publishes new content over an older snapshot."""

    def act(self) -> None:
        self.api.change()
        _until_granted(self.worker)


class PublishesUnchanged(Victim):
    """Takes the lease, and publishes the content that is there already."""

    def act(self) -> None:
        _until_granted(self.worker)


class Renews(Victim):
    """Leads, and renews its lease."""

    least_steps = 20

    def prepare(self) -> None:
        super().prepare()
        _until_granted(self.worker)

    def act(self) -> None:
        self.worker.poll()


class TakesOver(Victim):
    """Takes the lease of a leader that died, and publishes."""

    def stage(self) -> None:
        super().stage()
        dead = _dead_leader(self)
        assert control_page(self.base).lease().holder.pid == dead

    def act(self) -> None:
        self.api.change()
        _until_granted(self.worker)


class Restores(Victim):
    """Leads, and writes a snapshot again that was removed, and that nobody else can write again."""

    may_lose_the_snapshot = True

    def prepare(self) -> None:
        super().prepare()
        _until_granted(self.worker)
        runtime_dir(self.base).snapshot_path.unlink()

    def act(self) -> None:
        self.worker.poll()


class ReplacesThePage(Victim):
    """Finds a page of another boot, and makes another."""

    def stage(self) -> None:
        super().stage()
        words = page_words(self.base)
        words[2] ^= 1
        self.follower = None

    def prepare(self) -> None:
        self.worker = self.poller()

    def act(self) -> None:
        self.worker.poll()


class MakesAllAgain(Victim):
    """Leads, and finds the whole directory removed."""

    def prepare(self) -> None:
        super().prepare()
        _until_granted(self.worker)
        shutil.rmtree(runtime_dir(self.base).user_path)

    def act(self) -> None:
        self.worker.poll()
        self.worker.poll()


class LeavesForGood(Victim):
    """Leads, and hands over at its shutdown."""

    least_steps = 20

    def prepare(self) -> None:
        super().prepare()
        _until_granted(self.worker)

    def act(self) -> None:
        self.worker.cache.shutdown()


def _until_granted(poller: Poller) -> None:
    for _ in range(1000):
        poller.poll()
        if poller.was_granted:
            return
        time.sleep(INTERVAL_S / 4)
    raise AssertionError("no grant")


def _dead_leader(victim: Victim) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _until_granted(victim.poller())
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    return pid


# -- the survivors


def check_survivors(victim: Victim) -> None:
    """Two workers come: one leads, both serve what was published or newer, and nothing is left over."""
    api = victim.api
    served = 0
    if victim.follower is not None:
        seen = victim.follower.poll()
        assert seen is not None
        served = seen
    api.stamp += 2  # In between is what the victim may have published, or not.
    one, other = victim.poller(), victim.poller()
    found = _served(one)
    assert found is None or found >= served
    on_disk = stamp_on_disk(victim.base)
    api.is_down = True
    one.poll()
    if on_disk is not None:
        found = _served(other)
        assert (found or 0) >= on_disk, "a sound snapshot was given up"
    api.is_down = False
    grants_after = 0
    while grants_after < 3:
        stamps = [one.poll(), other.poll()]
        assert all(stamp is None or stamp >= served for stamp in stamps)
        served = max(served, *(stamp or 0 for stamp in stamps))
        if stamps == [api.stamp] * 2:
            grants_after += one.was_granted + other.was_granted
        time.sleep(INTERVAL_S / 4)
    assert [one.leads, other.leads].count(True) == 1
    assert temporary_files(victim.base) == []
    if victim.follower is not None:
        assert victim.follower.poll() == api.stamp
    for poller in (one, other):
        poller.cache.shutdown()


def _served(poller: Poller) -> int | None:
    """What a newcomer is given without fetching."""
    found = poller.cache.get_flag_definitions()
    if not found or not found["flags"]:
        return None
    return stamp_of(found)


ACTIONS = [
    FirstOfAll,
    PublishesNew,
    PublishesUnchanged,
    Renews,
    TakesOver,
    Restores,
    ReplacesThePage,
    MakesAllAgain,
    LeavesForGood,
]


SHARES = 3


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_killed_at_every_step(
    directory: Path, ear: Ear, action: type[Victim], share: int, thorough: bool
) -> None:
    """Whatever the step at which a worker is killed, the others serve, lead, repair and clean up.

    It is every fifth step, unless all is done that is done in continuous integration.
    """
    stride = SHARES if thorough else 5 * SHARES
    rehearsal = action(directory / "rehearsal")
    rehearsal.base.mkdir()
    rehearsal.stage()
    steps = steps_of(rehearsal)
    assert steps >= action.least_steps
    killed = 0
    for step in range(1 + share, steps + 1, stride):
        victim = action(directory / str(step))
        victim.base.mkdir()
        victim.stage()
        if kill_at(step, victim):
            killed += 1
            try:
                check_survivors(victim)
                assert victim.may_lose_the_snapshot or not ear.heard("lost: ")
            except AssertionError as error:
                raise AssertionError(f"killed at step {step} of {steps}: {error}") from error
        shutil.rmtree(victim.base)
    # Waiting takes more steps one time than another, so the last ones may not be reached.
    assert killed >= steps // stride * 3 // 4


def test_killed_between_the_file_and_the_page(directory: Path, ear: Ear) -> None:
    """A publish that only the file knows of is one: what was fetched before it is dropped."""
    api = Api()
    slow, quick = (
        Poller(
            directory, api, poll_interval=INTERVAL_S, lease_ttl=2 * INTERVAL_S, cold_start_timeout=0.0
        )
        for _ in range(2)
    )
    assert slow.cache.should_fetch_flag_definitions()
    old = api.fetch(None)
    api.change()

    def publish_and_die() -> None:
        _until_granted(quick)

    pid = os.fork()
    if pid == 0:
        try:
            Stepper(after="replace").run(publish_and_die)
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert stamp_on_disk(directory) == 2
    assert not control_page(directory).is_serving()

    slow.cache.on_flag_definitions_received(old)
    found = slow.cache.get_flag_definitions()
    assert found is not None
    assert stamp_of(found) == 2
    assert ear.heard("dropped: what was fetched, as something newer was published")
