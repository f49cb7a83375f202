"""What is wrong, in words: a table of situations, and what is said of each."""

from __future__ import annotations

from typing import Any

import pytest

from shmflags import diagnosis
from shmflags.diagnosis import BEHIND, CURRENT, SILENT, View, duration, examine, state_of
from shmflags.page import Grant, Lease, LockHolder
from shmflags.processes import NOBODY, Identity
from shmflags.snapshot import NOTHING, Position
from shmflags.worker_table import SLOTS, Worker

S = 1_000_000_000
NOW = 100_000 * S
HERE = 1
SERVED = Position(7, 4)


def worker(pid: int = 11, *, polled: float = 1, **changes: Any) -> Worker:
    """A worker that polls every 30 s, `polled` seconds ago, and has what is served."""
    usual = Worker(
        slot=0,
        token=pid,
        identity=Identity(pid, 5, HERE),
        started_wall_ns=0,
        last_poll_ns=NOW - int(polled * S),
        loaded=SERVED,
        interval_ns=30 * S,
        spacing_ns=30 * S,
        electable=True,
    )
    return usual._replace(**changes)


def lease(pid: int = 11, **changes: Any) -> Lease:
    """A lease of 90 s that was renewed a second ago."""
    usual = Lease(1, pid, Identity(pid, 5, HERE), 90 * S, NOW + 89 * S, NOW - 500 * S, 0)
    return usual._replace(**changes)


VACATED = lease(token=0, holder=NOBODY, deadline_ns=0, elected_ns=NOW - S)


def view(**changes: Any) -> View:
    """A healthy host: a leader and another worker, four generations so far, the last long ago."""
    healthy = View(
        now_ns=NOW,
        namespace=HERE,
        lease=lease(),
        vacant=False,
        holder_is_dead=False,
        grant=Grant(NOW - S, 11, Identity(11, 5, HERE), 0, 0),
        serving=True,
        served=SERVED,
        unchanged_ns=1000 * S,
        lock=LockHolder(0, 0),
        damage_reported=False,
        workers=(worker(11), worker(12)),
        states={},
    )
    return healthy._replace(**changes)


def problems(seen: View) -> list[str]:
    return [finding.text for finding in examine(seen) if finding.is_problem]


def notes(seen: View) -> list[str]:
    return [finding.text for finding in examine(seen) if not finding.is_problem]


def nothing_served(attempts: int, ago: float, **changes: Any) -> View:
    return view(
        serving=False,
        served=NOTHING,
        workers=(worker(11, loaded=NOTHING),),
        grant=Grant(NOW - int(ago * S), 11, Identity(11, 5, HERE), attempts, 0),
        **changes,
    )


READERS = (worker(11, electable=False), worker(12, electable=False))
AWAY = Identity(11, 5, HERE + 1)

PROBLEMS = [
    pytest.param(
        view(workers=(worker(11), worker(12, polled=300))),
        ["Process 12 last polled 5 min ago, and should every 30 s: its poller has ended"],
        id="a worker whose poller ended",
    ),
    pytest.param(
        view(workers=(worker(11), worker(12, polled=300)), states={12: "stopped"}),
        ["Process 12 last polled 5 min ago, and should every 30 s: it is stopped; continue it"],
        id="a worker that is stopped",
    ),
    pytest.param(
        view(workers=(worker(11), worker(12, polled=300, identity=AWAY._replace(pid=12)))),
        ["Process 12 last polled 5 min ago, and should every 30 s: it is in another pid namespace"],
        id="a silent worker of another container",
    ),
    pytest.param(
        view(workers=(worker(11), worker(12, loaded=Position(7, 3)))),
        ["Process 12 polls, but has generation 3 loaded where generation 4 is served"],
        id="a worker that polls and does not load",
    ),
    pytest.param(
        view(workers=(worker(11), worker(12, loaded=NOTHING))),
        ["Process 12 polls, but has nothing loaded where generation 4 is served"],
        id="a worker that never loaded",
    ),
    pytest.param(
        view(workers=(worker(11), worker(12, spacing_ns=60 * S))),
        ["Process 12 polls every 60 s, and its cache was told 30 s: give the client"],
        id="a client with a longer poll_interval than its cache",
    ),
    pytest.param(
        view(vacant=True, holder_is_dead=True, workers=()),
        ["The leader, process 11, is dead, and no worker polls that could follow it: start workers."],
        id="a dead leader with nobody to follow",
    ),
    pytest.param(
        view(vacant=True, holder_is_dead=True, workers=READERS[1:]),
        ["The leader, process 11, is dead, and no worker polls that could follow it: start workers."],
        id="a dead leader with only readers to follow",
    ),
    pytest.param(
        view(vacant=True, lease=lease(deadline_ns=NOW - S), workers=()),
        ["The leader, process 11, no longer polls, and its lease has run out, and no worker polls"],
        id="a lease that ran out with nobody to follow",
    ),
    pytest.param(
        view(vacant=True, lease=VACATED._replace(elected_ns=NOW - 300 * S)),
        ["Nobody has led for 5 min, though 2 workers could"],
        id="no leader though workers live that could lead",
    ),
    pytest.param(
        view(vacant=True, lease=lease(deadline_ns=NOW - 300 * S), workers=(worker(12),)),
        ["Nobody has led for 6 min, though 1 worker could"],
        id="a lease that ran out long ago and was not taken",
    ),
    pytest.param(
        nothing_served(1, ago=60),
        ["There is nothing to serve: 1 fetch brought no flags, the last 60 s ago by process"],
        id="a first fetch that failed",
    ),
    pytest.param(
        nothing_served(3, ago=1),
        ["There is nothing to serve: 3 fetches brought no flags, the last 1 s ago by process"],
        id="fetches that fail",
    ),
    pytest.param(
        view(
            serving=False,
            served=NOTHING,
            vacant=True,
            lease=VACATED,
            grant=Grant(0, 0, NOBODY, 0, 0),
            workers=tuple(reader._replace(loaded=NOTHING) for reader in READERS),
        ),
        ["There is nothing to serve, and all workers are readers"],
        id="only readers and nothing published",
    ),
    pytest.param(
        view(damage_reported=True),
        ["A worker found the snapshot damaged or missing"],
        id="a damaged snapshot",
    ),
    pytest.param(
        view(lock=LockHolder(12, NOW - 5 * S), states={12: "stopped"}),
        ["Process 12 is stopped and has held the page's lock for 5 s"],
        id="a lock held by a stopped process",
    ),
]

NOTES = [
    pytest.param(
        view(vacant=True, holder_is_dead=True, workers=(worker(12),)),
        ["The leader, process 11, is dead. A worker follows at its next poll, within 30 s."],
        id="a leader that died just now",
    ),
    pytest.param(
        view(vacant=True, lease=VACATED, workers=(worker(12),)),
        ["Nobody leads. A worker follows at its next poll, within 30 s."],
        id="a leader that stepped back just now",
    ),
    pytest.param(
        view(vacant=True, lease=VACATED, workers=READERS),
        ["All workers are readers: nobody fetches"],
        id="readers of what was published from a file",
    ),
    pytest.param(
        view(vacant=True, lease=VACATED, workers=()), ["No worker lives."], id="all have shut down"
    ),
    pytest.param(
        nothing_served(1, ago=3), ["The first fetch has been under way for 3 s"], id="a cold start"
    ),
    pytest.param(
        view(workers=(worker(11), worker(12, spacing_ns=10 * S))),
        ["Process 12 polls every 10 s, and its cache was told 30 s: unless something is published"],
        id="a client with a shorter poll_interval than its cache",
    ),
    pytest.param(
        view(workers=(worker(11, identity=AWAY), worker(12))),
        ["1 worker is in another pid namespace"],
        id="a worker of another container",
    ),
    pytest.param(
        view(workers=tuple(worker(pid) for pid in range(11, 11 + SLOTS))),
        [f"The table of workers is full with {SLOTS}"],
        id="more workers than slots",
    ),
]

HEALTHY = [
    pytest.param(view(), id="a leader and a worker"),
    pytest.param(view(workers=(worker(11), worker(12, polled=74))), id="a poll that is late"),
    pytest.param(
        view(workers=(worker(11, polled=100),), grant=Grant(NOW - 99 * S, 11, NOBODY, 0, 0)),
        id="a leader in a fetch that hangs",
    ),
    pytest.param(
        view(workers=(worker(11), worker(12, loaded=Position(7, 3))), unchanged_ns=20 * S),
        id="a change that not all have polled yet",
    ),
    pytest.param(
        view(workers=(worker(11), worker(12, loaded=Position(7, 3), polled=0)), unchanged_ns=40 * S),
        id="a worker that is loading a change",
    ),
    pytest.param(
        view(lock=LockHolder(12, NOW - S // 2), states={12: "running"}), id="a lock held shortly"
    ),
    pytest.param(view(lock=LockHolder(12, NOW - 50 * S), states={12: ""}), id="a holder that died"),
    pytest.param(
        view(workers=(worker(11), worker(12, interval_ns=S, spacing_ns=int(1.9 * S)))),
        id="a short interval on a slow machine",
    ),
    pytest.param(view(workers=(worker(12),)), id="a leader that is no worker"),
]


@pytest.mark.parametrize(("seen", "expected"), PROBLEMS)
def test_what_is_wrong_is_said_with_what_to_do(seen: View, expected: list[str]) -> None:
    """Each thing that is wrong gives one problem, which names it and says what to do."""
    found = problems(seen)
    assert len(found) == len(expected), found
    for sentence, beginning in zip(found, expected, strict=True):
        assert sentence.startswith(beginning)
        assert sentence.endswith(".")


@pytest.mark.parametrize(("seen", "expected"), NOTES)
def test_what_mends_itself_is_a_note(seen: View, expected: list[str]) -> None:
    """What a healthy host passes through, or what is meant to be so, is a note and no problem."""
    assert problems(seen) == []
    found = notes(seen)
    assert len(found) == len(expected), found
    for sentence, beginning in zip(found, expected, strict=True):
        assert sentence.startswith(beginning)


@pytest.mark.parametrize("seen", HEALTHY)
def test_a_healthy_host_gives_no_alarm(seen: View) -> None:
    """Nothing is said of states that a healthy host is in all the time."""
    assert examine(seen) == []


def test_the_state_of_a_worker() -> None:
    """A worker is current, behind or silent, and silent outweighs behind."""
    old = Position(7, 3)
    assert state_of(worker(), view()) == CURRENT
    assert state_of(worker(loaded=old), view()) == BEHIND
    assert state_of(worker(loaded=old, polled=300), view()) == SILENT
    assert state_of(worker(loaded=old), view(serving=False)) == CURRENT


def test_a_worker_of_another_container_is_gone_after_long_silence() -> None:
    """Where a death cannot be proven, silence of 20 intervals and ten minutes stands for it."""
    away = worker(identity=AWAY, polled=601)
    assert diagnosis.is_gone(away, NOW, HERE)
    assert not diagnosis.is_gone(worker(identity=AWAY, polled=599), NOW, HERE)
    assert not diagnosis.is_gone(worker(polled=86400), NOW, HERE)
    assert not diagnosis.is_gone(away._replace(interval_ns=60 * S), NOW, HERE)


@pytest.mark.parametrize(
    ("value_s", "text"),
    [
        (0, "0 s"),
        (0.44, "0.4 s"),
        (1, "1 s"),
        (9.96, "10 s"),
        (31.4, "31 s"),
        (119, "119 s"),
        (720, "12 min"),
        (18000, "5 h"),
        (3 * 86400, "3 days"),
    ],
)
def test_durations_read_well(value_s: float, text: str) -> None:
    """A duration is said in the unit that a person would choose."""
    assert duration(int(value_s * S)) == text
