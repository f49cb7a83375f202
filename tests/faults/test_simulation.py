"""Thousands of seeded schedules of the real provider on a simulated host (simulation/)."""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from shmflags import election, file_lock, provider, publication
from shmflags.holding import Holding
from shmflags.page import ControlPage, Fence, Lease
from tests.conftest import IN_CI
from tests.faults.simulation import FAULTS, Plan, Schedule, simulate, strike
from tests.support import open_descriptors

FILE = "tests/faults/test_simulation.py"

SHARES = 4
"""The schedules are run in so many tests, for as many cores."""


def replayed(seed: int) -> str:
    """The trace of a seed, with each suspension, and how to see it again."""
    schedule = simulate(seed, verbose=True, drawn=plan_for(seed))
    return "\n".join(
        (
            *schedule.trace,
            f"seed {seed}: {schedule.world.failure or 'nothing is broken: the replay differs'}",
            f"replay: pytest {FILE} -k no_schedule --seed {seed} --simulations 1",
        )
    )


def of_etags(random: Random) -> Plan:
    """Where everything turns on ETags: attached clients, and definitions that go back to what they were."""
    return replace(Plan.of(random), attached="all", etags="content", contents=2)


def of_leases(random: Random) -> Plan:
    """Where nothing goes wrong but leases, which end far in the future."""
    return replace(Plan.of(random), faults=("lease",))


def plan_for(seed: int) -> Callable[[Random], Plan]:
    """Each fourth seed is about ETags."""
    return of_etags if seed % 4 == 3 else Plan.of


@pytest.mark.timeout(0)
@pytest.mark.parametrize("share", range(SHARES))
def test_no_schedule_breaks_an_invariant(share: int, request: pytest.FixtureRequest) -> None:
    """Whoever is overtaken, stopped, killed or forked, whenever: the invariants of ledger.py hold."""
    count = request.config.getoption("--simulations")
    first = request.config.getoption("--seed")
    seeds = range(first + share, first + count, SHARES)
    happened: Counter[str] = Counter()
    commits = drops = 0
    for seed in seeds:
        schedule = simulate(seed, drawn=plan_for(seed))
        if schedule.world.failure:
            pytest.fail(replayed(seed), pytrace=False)
        happened.update(schedule.faults.happened)
        commits += schedule.ledger.commits
        drops += schedule.ledger.drops
    if len(seeds) >= 125:
        assert set(happened) == set(FAULTS), "each kind of fault happened"
        assert commits > len(seeds), "fetches were accepted"
        assert drops > 0, "others were dropped"


@pytest.mark.parametrize(
    ("later", "attached"), [(False, "none"), (True, "none"), (True, "all")], ids=str
)
@pytest.mark.parametrize("fault", ["kill", "stop", "fork", "page", "snapshot", "directory", "disk"])
def test_a_fault_at_every_step_of_a_poll(
    fault: str, later: bool, attached: str, thorough: bool
) -> None:
    """Each fault at each step of the first fetch, and of a change: another worker copes with what is left.

    It is each fifteenth step, unless all is done that is done in continuous integration.
    """
    stride = 1 if thorough else 15
    step = 1
    while True:
        schedule = strike(fault, step, later=later, attached=attached)
        if schedule.world.failure:
            schedule = strike(fault, step, later=later, attached=attached, verbose=True)
            pytest.fail("\n".join(schedule.trace), pytrace=False)
        if not schedule.was_struck:
            break
        step += stride
    assert step > 100, "the poll was stepped through"


def test_a_seed_is_a_schedule() -> None:
    """A seed that is run again does the same, step by step."""
    for seed in range(20):
        assert simulate(seed, verbose=True).trace == simulate(seed, verbose=True).trace


def test_a_simulation_leaves_nothing_behind() -> None:
    """After a simulation the modules are as they were, and no descriptor is left open."""
    before = open_descriptors()
    for seed in range(20):
        simulate(seed)
    assert provider.os is os
    assert provider.threading is threading
    assert file_lock.os is os
    assert open_descriptors() <= before


# Faults of the code, planted: each is what an implementation without one of its rules would do.


def _always(*_: Any, **__: Any) -> bool:
    return True


def _never(*_: Any, **__: Any) -> bool:
    return False


def _no_event(*_: Any) -> str:
    return ""


def _ignoring_jumps(lease: Lease, now_ns: int, is_dead: Callable[..., bool]) -> str | None:
    gone = not lease.deadline_ns or lease.deadline_ns <= now_ns or is_dead(lease.holder)
    return "it was to be had" if gone else None


def _nothing(*_: Any) -> None:
    return None


def _lend_anything(self: Holding, _: ControlPage) -> None:
    held, attachment = self.decoded, self.attachment
    if attachment is not None and held is not None and (client := attachment._client()) is not None:
        client._flags_etag, self.received = held.etag or None, held.digest


PLANTED: dict[str, list[tuple[Any, str, Any]]] = {
    "no fencing": [(election, "may_publish", _always)],
    "grants without pause": [(election, "is_due", _always)],
    "lock on a file that was replaced": [(file_lock.FileLock, "guards_its_path", _always)],
    "a child keeps the locks of its parent": [(provider, "abandon_inherited", _nothing)],
    "a deadline far ahead is believed": [(election, "why_takeable", _ignoring_jumps)],
}

SOON_FOUND = {"a deadline far ahead is believed": of_leases}
"""Plans that show a fault within some seeds, where any plan would take a thousand."""


def first_broken(simulation: Callable[[int], Schedule]) -> str:
    """What the first failing seed of those that are run in CI says; fails if none does."""
    for seed in range(IN_CI):
        failure = simulation(seed).world.failure
        if failure:
            return f"seed {seed}: {failure}"
    pytest.fail(f"not found within {IN_CI} seeds")


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch, thorough: bool) -> None:
    """With this rule of the code disabled, one of the seeds that are run in CI breaks an invariant."""
    for place, name, stand_in in PLANTED[fault]:
        monkeypatch.setattr(place, name, stand_in)
    drawn = Plan.of if thorough else SOON_FOUND.get(fault, Plan.of)
    assert first_broken(functools.partial(simulate, drawn=drawn))


@pytest.mark.parametrize(
    ("place", "name", "stand_in"),
    [(election, "_trusts", _always), (Holding, "mend_etag", _lend_anything)],
    ids=["ETag ignored", "an ETag lent for what is not published"],
)
def test_a_planted_fault_of_etags_is_found(
    place: object, name: str, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever goes by an ETag that is not that of what is published serves old flags for ever."""
    monkeypatch.setattr(place, name, stand_in)
    assert "converged" in first_broken(functools.partial(simulate, drawn=of_etags))


def test_generation_from_the_page_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """If only what the page says counts, a publish that it does not say yet is undone after a kill."""
    monkeypatch.setattr(publication, "_roll_forward", _no_event)
    monkeypatch.setattr(publication, "_is_newer", _never)
    for step in itertools.count(1):
        schedule = strike("kill", step, later=True, attached="none")
        if schedule.world.failure:
            break
        assert schedule.was_struck, "not found, whatever the step"
    assert "forward" in schedule.world.failure


def test_whoever_holds_the_lease_may_publish_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the lease for a fence, a leader deposed and elected again publishes its old fetch."""
    running: list[Schedule] = []

    def holds_the_lease(noted: Fence, current: Fence, *, serving: bool) -> bool:
        me = running[-1].world.process().cache._member
        return bool(me.known_page.quiet.lease().token == me.token)

    monkeypatch.setattr(election, "may_publish", holds_the_lease)
    assert "fenced" in first_broken(lambda seed: simulate(seed, told=running.append))


def test_a_pid_without_start_time_is_found() -> None:
    """With the pid for proof of life, a process that was given it keeps a dead leader in office."""
    broken = first_broken(lambda seed: simulate(seed, knows_start_times=False))
    assert "in office" in broken
