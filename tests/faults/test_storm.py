"""A storm of kills and stops: nobody reads torn or older data, and somebody always fetches."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from shmflags.page import ControlPage
from tests.faults import storm_worker
from tests.faults.harness import (
    Api,
    Ear,
    Poller,
    control_page,
    runtime_dir,
    stamp_on_disk,
    temporary_files,
)
from tests.faults.storm_worker import FETCHED, INTERVAL_S, LEASE_S, SEEN, Note, read_notes
from tests.support import state_of

WORKERS = 8
MOST_STOPPED = 3
LONGEST_STOP_S = 2.5
TICK_S = 0.002
LATE_S = 0.25  # a blow takes less, unless the machine has no time for us
SLACK_S = 1.0  # of a busy machine
SECOND_NS = 1_000_000_000

_context = multiprocessing.get_context("forkserver")


@dataclass
class Contender:
    """A worker process, and what is done to it."""

    process: multiprocessing.process.BaseProcess
    record: Path
    stopped_ns: int = 0
    resume_ns: int = 0
    holds_lock: bool = False

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            self.process.join(60)
            errors = self.record.with_suffix(".errors")
            detail = errors.read_text() if errors.exists() else ""
            raise AssertionError(f"a worker ended with {self.process.exitcode}\n{detail}") from None


@dataclass
class Storm:
    """Eight workers, and the weather."""

    base: Path
    records: Path
    seed: int
    group: list[Contender] = field(default_factory=list)
    started: int = 0
    done: Counter[str] = field(default_factory=Counter)
    grants_ns: list[int] = field(default_factory=list)
    ended_ns: int = 0
    # (from, to) in CLOCK_MONOTONIC ns: a stopped process held the lock; this process was not scheduled.
    held: list[tuple[int, int]] = field(default_factory=list)
    late: list[tuple[int, int]] = field(default_factory=list)

    def blow(self, seconds: float) -> float:
        """For so long, or up to thrice that until what is rare has happened; returns for how long."""
        pick = random.Random(self.seed)
        while len(self.group) < WORKERS:
            self._start()
        self._wait_for_page()
        page = control_page(self.base)
        began = next_blow = last = time.monotonic_ns()
        end = began + int(seconds * SECOND_NS)
        latest = began + 3 * int(seconds * SECOND_NS)
        while last < end or (last < latest and not self._saw_what_is_rare(page)):
            granted = page.grant().at_ns
            if granted and (not self.grants_ns or granted != self.grants_ns[-1]):
                self.grants_ns.append(granted)
            if last >= next_blow:
                self._strike(pick, page)
                next_blow = last + int(pick.uniform(0.02, 0.15) * SECOND_NS)
            for contender in self.group:
                if 0 < contender.resume_ns <= last:
                    self._resume(contender)
            time.sleep(TICK_S)
            now = time.monotonic_ns()
            if now - last > LATE_S * SECOND_NS:
                self.late.append((last, now))
            last = now
        self.ended_ns = last
        return (last - began) / SECOND_NS

    def _saw_what_is_rare(self, page: ControlPage) -> bool:
        return self.done["stopped holding the lock"] > 0 and page.counters()["dropped"] > 0

    def _start(self) -> None:
        self.started += 1
        record = self.records / f"{self.started}"
        process = _context.Process(
            target=storm_worker.main, args=(self.base, record, self.seed + self.started), daemon=True
        )
        process.start()
        self.group.append(Contender(process, record))

    def _wait_for_page(self) -> None:
        end = time.monotonic() + 60
        while not runtime_dir(self.base).page_path.exists():
            assert time.monotonic() < end, "the workers did not start"
            time.sleep(TICK_S)

    def _strike(self, pick: random.Random, page: ControlPage) -> None:
        target = pick.choice(self.group)
        if pick.random() < 0.6:
            target = self._process(page.lease().holder.pid) or target
        what = pick.random()
        if what < 0.3:
            self._kill(target)
            self._start()
        elif sum(one.stopped_ns > 0 for one in self.group) < MOST_STOPPED and not target.stopped_ns:
            if what < 0.5:
                self._stop_holding_the_lock(target, page)
            else:
                self._stop((what < 0.75 and self._who_fetches(page)) or target)
            for one in self.group:
                if one.stopped_ns and not one.resume_ns:
                    pause_ns = int(pick.uniform(0.0, LONGEST_STOP_S) * SECOND_NS)
                    one.resume_ns = one.stopped_ns + pause_ns

    def _process(self, pid: int) -> Contender | None:
        return next((one for one in self.group if one.pid == pid and not one.stopped_ns), None)

    def _who_fetches(self, page: ControlPage) -> Contender | None:
        """Whoever is granted a fetch next, as soon as it is, if that is soon."""
        before, end = page.grant().at_ns, time.monotonic() + 5 * INTERVAL_S
        while page.grant().at_ns == before and time.monotonic() < end:
            time.sleep(0)
        return self._process(page.grant().holder.pid)

    def _stop_holding_the_lock(self, target: Contender, page: ControlPage) -> None:
        """Somebody, at a moment at which he holds the lock, if it can be had soon; else `target`, at any."""
        end = time.monotonic() + 5 * INTERVAL_S
        while time.monotonic() < end:
            holder = self._process(page.lock_holder().pid)
            if holder is not None:
                self._stop(holder)
                if holder.holds_lock:
                    return
                self._resume(holder)
            time.sleep(0)
        self._stop(target)

    def _kill(self, target: Contender) -> None:
        target.signal(signal.SIGKILL)
        self._note_held(target)
        target.process.join(60)
        assert target.process.exitcode == -signal.SIGKILL, f"it had ended: {target.process.exitcode}"
        self.group.remove(target)
        self.done["killed while stopped" if target.stopped_ns else "killed"] += 1

    def _stop(self, target: Contender) -> None:
        target.signal(signal.SIGSTOP)
        while state_of(target.pid) not in "TtZ":
            time.sleep(0)
        target.stopped_ns = time.monotonic_ns()
        target.holds_lock = _holds_lock(target.pid, runtime_dir(self.base).page_path)
        self.done["stopped"] += 1
        self.done["stopped holding the lock"] += target.holds_lock

    def _resume(self, target: Contender) -> None:
        target.signal(signal.SIGCONT)
        self._note_held(target)
        target.stopped_ns = target.resume_ns = 0
        self.done["resumed"] += 1

    def _note_held(self, target: Contender) -> None:
        if target.holds_lock:
            self.held.append((target.stopped_ns, time.monotonic_ns()))
            target.holds_lock = False

    def end(self) -> None:
        while self.group:
            contender = self.group.pop()
            self._note_held(contender)
            contender.process.kill()
            contender.process.join(60)

    def excused_ns(self, start: int, stop: int) -> int:
        """How long, between two moments, a stopped process held the lock, or nobody was scheduled."""
        return sum(max(0, min(stop, b) - max(start, a)) for a, b in self.held + self.late)

    def notes(self) -> dict[int, list[Note]]:
        return {n: read_notes(self.records / f"{n}") for n in range(1, self.started + 1)}


def _holds_lock(pid: int, path: Path) -> bool:
    inode = path.stat().st_ino
    with open("/proc/locks", encoding="ascii") as file:
        return any(
            line.split()[1] == "FLOCK" and line.split()[4] == str(pid) and f":{inode} " in line
            for line in file
        )


# -- what must hold


def check_order(notes: dict[int, list[Note]], published: dict[int, int]) -> None:
    """Nobody goes back; and whoever is new starts no earlier than anybody was before."""
    for number, own in notes.items():
        seen = [note for note in own if note.kind == SEEN]
        for before, after in pairwise(seen):
            assert after.stamp >= before.stamp, f"worker {number} went back: {before}, {after}"
        if seen:
            known = [stamp for stamp, since in published.items() if since < own[0].began_ns]
            assert seen[0].stamp >= max(known, default=0), f"worker {number} began with old data"


def published_at(notes: dict[int, list[Note]]) -> dict[int, int]:
    """When each stamp was first seen by somebody who had not fetched it."""
    fetcher = {
        note.stamp: number for number, own in notes.items() for note in own if note.kind == FETCHED
    }
    first: dict[int, int] = {}
    for number, own in notes.items():
        for note in own:
            if note.kind == SEEN and fetcher.get(note.stamp) != number:
                first[note.stamp] = min(note.ended_ns, first.get(note.stamp, note.ended_ns))
    return first


def check_everybody_keeps_up(notes: dict[int, list[Note]], published: dict[int, int]) -> int:
    """Every worker sees at least half of what it could, but for one; returns how much that was in all.

    Not all of it: a leader that is killed or stopped between the snapshot and the position has published
    for those that read for the first time, and for the others only when somebody fetches again.
    """
    timeline = sorted((since, stamp) for stamp, since in published.items())
    total = 0
    for number, own in notes.items():
        caught, possible, known, position = 0, 0, 0, 0
        for note in own:
            if note.kind != SEEN:
                continue
            newest = known
            while position < len(timeline) and timeline[position][0] < note.began_ns:
                newest = max(newest, timeline[position][1])
                position += 1
            if newest > known:
                possible += 1
                caught += note.stamp >= newest
            known = max(newest, note.stamp)
        assert caught >= possible / 2 - 1, f"worker {number} saw {caught} of {possible} generations"
        total += possible
    return total


@pytest.mark.long
@pytest.mark.timeout(0)  # As long as it is asked to be; each wait in it has a bound of its own.
def test_storm(request: pytest.FixtureRequest, directory: Path, tmp_path: Path, ear: Ear) -> None:
    """Under random kills and stops nobody reads torn or older data, and grants keep coming."""
    seconds = float(request.config.getoption("--storm-seconds"))
    seed = random.SystemRandom().randrange(1 << 32)
    storm = Storm(directory, tmp_path, seed)
    try:
        seconds = storm.blow(seconds)
        counters = control_page(directory).counters()
        granted, takeovers = counters["granted"], counters["takeovers"]
    finally:
        storm.end()
    errors = [path.read_text() for path in tmp_path.glob("*.errors")]
    assert not errors, errors[0]

    notes = storm.notes()
    published = published_at(notes)
    check_order(notes, published)
    possible = check_everybody_keeps_up(notes, published)

    assert granted <= 2 * seconds / INTERVAL_S + SLACK_S / INTERVAL_S
    gaps = [
        ((b - a - storm.excused_ns(a, b)) / SECOND_NS, (b - a) / SECOND_NS)
        for a, b in pairwise([*storm.grants_ns, storm.ended_ns])
    ]
    print(
        f"\nseed {seed}, {seconds:g} s: {dict(storm.done)}; {counters}; seen {len(published)}, to be seen"
        f" {possible}; longest time without a grant {max(b for _, b in gaps):.2f} s,"
        f" {max(a for a, _ in gaps):.2f} s unexcused"
    )
    assert max(gaps)[0] <= LEASE_S + INTERVAL_S + SLACK_S

    # The storm was one.
    assert storm.done.total() >= 4 * seconds
    assert storm.done["killed"] >= seconds
    assert storm.done["stopped"] >= seconds
    assert storm.done["stopped holding the lock"] > 0
    assert takeovers >= seconds / 2
    assert counters["dropped"] > 0
    assert len(published) >= seconds
    assert possible >= WORKERS * seconds

    # And after it.
    last = stamp_on_disk(directory)
    assert last is not None
    assert last >= max(published)
    api = Api()
    api.stamp = last + 1
    survivor = Poller(directory, api, poll_interval=INTERVAL_S, lease_ttl=LEASE_S)
    end = time.monotonic() + 60
    while survivor.poll() != api.stamp:
        assert survivor.stamp == last
        assert time.monotonic() < end, "the survivor does not get to publish"
        time.sleep(INTERVAL_S / 2)
    assert temporary_files(directory) == []
