"""What heals by itself: files that vanish, a reboot, clocks that jump, pids that come round again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import recycled_pid
from tests.faults.harness import (
    Ear,
    Poller,
    control_page,
    page_words,
    runtime_dir,
    stamp_on_disk,
)
from tests.faults.scene import RealLiveness, Scene
from tests.manual_host import SECOND_NS, ManualHost
from tests.support import EMPTY, require_program, require_root

DAY_NS = 24 * 3600 * SECOND_NS
TERM, TOKEN, HOLDER, LENGTH, DEADLINE, ELECTED, GRANT = 16, 17, 18, 21, 22, 23, 28


@pytest.fixture
def scene(directory: Path, ear: Ear) -> Scene:
    """Three workers that hold the same, at a moment at which no fetch is due."""
    scene = Scene(directory, workers=3)
    scene.api.change()
    scene.settle()
    return scene


def leader_of(scene: Scene) -> Poller:
    (leader,) = (poller for poller in scene.group if poller.leads)
    return leader


def followers_of(scene: Scene) -> list[Poller]:
    return [poller for poller in scene.group if not poller.leads]


# -- files that vanish


def _snapshot(scene: Scene) -> None:
    runtime_dir(scene.base).snapshot_path.unlink()


def _page(scene: Scene) -> None:
    runtime_dir(scene.base).page_path.unlink()


def _directory(scene: Scene) -> None:
    shutil.rmtree(runtime_dir(scene.base).path)


def _everything(scene: Scene) -> None:
    shutil.rmtree(runtime_dir(scene.base).user_path)


VANISHING = [_snapshot, _page, _directory, _everything]


@pytest.mark.parametrize("leader_is", ["first", "last"])
@pytest.mark.parametrize("vanish", VANISHING)
def test_restored_without_a_request(
    scene: Scene, vanish: Callable[[Scene], None], leader_is: str
) -> None:
    """What vanished is there again after one poll of each worker, without a request to the API."""
    leader, followers, asked = leader_of(scene), followers_of(scene), scene.api.requests
    order = [leader, *followers] if leader_is == "first" else [*followers, leader]
    vanish(scene)
    for poller in order:
        assert poller.poll() == 2
    for poller in scene.group:
        page = poller.cache._me().known_page
        assert page is not None
        assert page.is_at_its_path()
    if leader_is == "last" and not leader.leads:
        leader_of(scene).poll()
    assert stamp_on_disk(scene.base) == 2
    assert scene.start(1)[0].poll() == 2
    assert scene.api.requests == asked
    assert len([poller for poller in scene.group if poller.leads]) == 1
    scene.assert_sound()


@pytest.mark.parametrize("vanish", VANISHING)
def test_vanishing_over_and_over(scene: Scene, vanish: Callable[[Scene], None]) -> None:
    """Files that vanish in every round of polls cost no request beyond those that are due."""
    asked = scene.api.requests
    for number in range(20):
        scene.machine.pass_time(0.5)
        vanish(scene)
        for turn in range(3):
            assert scene.group[(number + turn) % 3].poll() == 2
        if not runtime_dir(scene.base).snapshot_path.exists():
            leader_of(scene).poll()
    assert scene.api.requests <= asked + 20
    scene.api.change()
    scene.settle()
    scene.assert_sound()


def test_restored_into_a_page_that_a_newcomer_made(scene: Scene) -> None:
    """Though the new page knows nothing of before, who holds the definitions writes them again."""
    leader = leader_of(scene)
    _everything(scene)
    reader = Poller(scene.base, scene.api, host=leader.cache._host, role="reader")
    assert reader.cache.should_fetch_flag_definitions() is False
    scene.api.is_down = True
    assert leader.poll() == 2
    assert stamp_on_disk(scene.base) == 2
    assert reader.poll() == 2


def test_nobody_left_who_could_restore(scene: Scene) -> None:
    """With the snapshot gone and nobody left who holds it, one fetch brings it back."""
    scene.end_all()
    _snapshot(scene)
    scene.start(3)
    asked = scene.api.full
    scene.machine.pass_time(0.5)
    scene.settle()
    assert scene.api.full == asked + 1


# -- a reboot


def test_a_page_of_another_boot(directory: Path, ear: Ear) -> None:
    """After a reboot nothing of before is served: one worker fetches anew, and leads alone."""
    before = Scene(directory)
    before.end_all()
    incarnation = control_page(directory).incarnation
    after = Scene(directory, workers=0)
    after.machine.boot += 1
    after.machine.now = 5 * SECOND_NS
    after.api.stamp = 7
    group = after.start(3)
    for poller in group:
        assert poller.cache.get_flag_definitions() in (None, {**EMPTY})
    after.settle()
    assert after.api.full == 1
    assert page_words(directory)[1] != incarnation


def test_a_page_without_a_boot_id(directory: Path, ear: Ear) -> None:
    """Where the platform has no boot id, a page of before a reboot still yields one leader."""
    before = Scene(directory, workers=0)
    before.machine.boot, before.machine.now = 0, 500 * DAY_NS
    before.start(2)
    before.settle()
    after = Scene(directory, workers=0)
    after.machine.boot, after.machine.now = 0, 5 * SECOND_NS
    after.api.stamp = 7
    after.start(2)
    after.settle()


# -- clocks


def check_one_fetcher(scene: Scene, rounds: int = 20) -> None:
    """For a while there is one leader after each round, and it fetches no more than it should."""
    scene.settle()
    asked = scene.api.requests
    for _ in range(rounds):
        scene.machine.pass_time(0.5)
        stamps = [poller.poll() for poller in scene.group]
        assert stamps == [scene.api.stamp] * len(scene.group)
        assert sum(poller.leads for poller in scene.group) == 1
    assert asked + rounds / 4 <= scene.api.requests <= asked + rounds


@pytest.mark.parametrize("jump_ns", [-1000 * SECOND_NS + 1, -1, 1, 3 * SECOND_NS, 10 * DAY_NS, 1 << 62])
def test_the_monotonic_clock_jumps(scene: Scene, jump_ns: int) -> None:
    """Wherever the clock jumps to, there is one leader, and no more requests than are due."""
    scene.machine.now += jump_ns
    scene.api.change()
    check_one_fetcher(scene)


class OddWall(ManualHost):
    """A wall clock that can be set."""

    offset_ns = 0

    def wall_ns(self) -> int:
        return max(0, super().wall_ns() + self.offset_ns)


@pytest.mark.parametrize("jump_ns", [-100 * 365 * DAY_NS, -DAY_NS, DAY_NS, 20 * 365 * DAY_NS])
def test_the_wall_clock_jumps(
    directory: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch, jump_ns: int
) -> None:
    """Setting the wall clock changes nothing: not the leader, not the requests, not what is served."""
    scene = Scene(directory, OddWall, workers=3)
    leader = leader_of(scene)
    monkeypatch.setattr(OddWall, "offset_ns", jump_ns)
    check_one_fetcher(scene)
    assert leader_of(scene) is leader
    scene.api.change()
    check_one_fetcher(scene)


@pytest.mark.parametrize("ahead_ns", [3 * SECOND_NS + 1, 10 * DAY_NS, 1 << 62, (1 << 64) - 1])
def test_a_deadline_absurdly_far_ahead(scene: Scene, ahead_ns: int) -> None:
    """A lease that ends later than it is long is taken at once, whoever holds it."""
    scene.end_all()
    words = page_words(scene.base)
    words[HOLDER] = 1  # which lives
    words[DEADLINE] = min(scene.machine.now + ahead_ns, (1 << 64) - 1)
    scene.start(2)
    assert scene.group[0].poll() == 2
    assert scene.group[0].leads
    check_one_fetcher(scene)


def test_a_lease_that_never_ends(scene: Scene, ear: Ear) -> None:
    """A lease longer than any can be is taken at once."""
    scene.end_all()
    words = page_words(scene.base)
    words[HOLDER] = 1  # which lives
    words[LENGTH] = words[DEADLINE] = (1 << 64) - 1
    scene.start(2)
    check_one_fetcher(scene)
    assert ear.heard("longer than any lease")


# -- pids


def test_a_leader_whose_pid_is_anothers_now(directory: Path, ear: Ear) -> None:
    """A lease whose pid lives, but was started at another time, is taken at once."""
    scene = Scene(directory, RealLiveness)
    words = page_words(directory)
    words[TOKEN], words[HOLDER], words[HOLDER + 1] = 1, os.getppid(), 12345
    words[LENGTH], words[DEADLINE] = 3600 * SECOND_NS, scene.machine.now + 3600 * SECOND_NS
    check_one_fetcher(scene)
    assert ear.heard("as its holder is dead")


def test_a_leader_of_another_pid_namespace_is_waited_for(directory: Path, ear: Ear) -> None:
    """A pid of another namespace proves nothing: its lease is sat out, to the end."""
    scene = Scene(directory, RealLiveness)
    words = page_words(directory)
    end = scene.machine.now + 3 * SECOND_NS
    words[TOKEN], words[HOLDER], words[HOLDER + 2] = 1, 2**22 - 1, words[HOLDER + 2] + 1
    words[LENGTH], words[DEADLINE] = 3 * SECOND_NS, end
    while scene.machine.now < end:
        assert not any(poller.leads for poller in scene.group)
        scene.machine.pass_time(0.5)
        assert {poller.poll() for poller in scene.group} == {1}
    check_one_fetcher(scene)


def test_a_pid_that_came_round_again(directory: Path) -> None:
    """With the dead leader's pid taken by another process, for real, its lease is taken at once."""
    require_root()
    result = subprocess.run(
        [
            require_program("unshare"),
            "--pid",
            "--fork",
            "--mount-proc",
            sys.executable,
            "-m",
            recycled_pid.__name__,
            os.fspath(directory),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("taken over"), result.stdout
