"""What is wrong, in words, each with what to do. Rules over a view of the page; no I/O.

A problem is something to act on, and makes `shmflags status` exit with 1. A note is worth knowing
and mends itself, or is meant to be so. Where a healthy host passes through a state for a moment (the
second after a leader's death, the fetch that brings the first flags), that is a note for as long as it
may take, and a problem afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from shmflags.page import Grant, Lease, LockHolder
from shmflags.processes import Identity
from shmflags.snapshot import NOTHING, Position
from shmflags.worker_table import SLOTS, Worker, gone_after_ns

CURRENT, BEHIND, SILENT = "current", "behind", "silent"
"""States of a worker: it has what is served; it polls and has it not; it no longer polls."""

_SECOND_NS = 1_000_000_000
# The SDK's longest fetch: 10 s, three tries, and the pauses between them.
_FETCH_NS = 35 * _SECOND_NS
_LEEWAY_NS = 2 * _SECOND_NS
_LOCK_NS = _SECOND_NS


class View(NamedTuple):
    """The page's records as they were read; times in CLOCK_MONOTONIC ns.

    `workers` are those that live, or may. `vacant` says that the lease may be taken, `holder_is_dead`
    that its holder is provably dead. `served` is the position that a worker is to have, and
    `unchanged_ns` for how long it has been. `states` holds the states, as psutil names them, of
    processes that keep silent or hold the lock; "" if there is no such process.
    """

    now_ns: int
    namespace: int
    lease: Lease
    vacant: bool
    holder_is_dead: bool
    grant: Grant
    serving: bool
    served: Position
    unchanged_ns: int
    lock: LockHolder
    damage_reported: bool
    workers: tuple[Worker, ...]
    states: Mapping[int, str]

    def silence_ns(self, worker: Worker) -> int:
        return max(0, self.now_ns - worker.last_poll_ns)

    def candidates(self) -> list[Worker]:
        """The workers that could be elected at their next poll."""
        return [
            worker
            for worker in self.workers
            if worker.electable and not is_silent(worker, self.now_ns, self.grant)
        ]

    def has_only_readers(self) -> bool:
        return bool(self.workers) and not any(worker.electable for worker in self.workers)


class Finding(NamedTuple):
    """One sentence or two, and whether it is a problem or a note."""

    is_problem: bool
    text: str


def _problem(text: str) -> Finding:
    return Finding(True, text)


def _note(text: str) -> Finding:
    return Finding(False, text)


def is_gone(worker: Worker, now_ns: int, namespace: int) -> bool:
    """Whether a worker whose death cannot be proven from here is to be taken for gone."""
    silence_ns = now_ns - worker.last_poll_ns
    return _is_elsewhere(worker.identity, namespace) and silence_ns > gone_after_ns(worker.interval_ns)


def is_silent(worker: Worker, now_ns: int, grant: Grant) -> bool:
    """Whether a worker has not polled for longer than a healthy one ever does."""
    allowed_ns = max(worker.interval_ns * 5 // 2, worker.interval_ns + _LEEWAY_NS)
    if grant.token == worker.token and grant.at_ns >= worker.last_poll_ns:
        allowed_ns += _FETCH_NS  # It was told to fetch, and polls again when that is over.
    return now_ns - worker.last_poll_ns > allowed_ns


def state_of(worker: Worker, view: View) -> str:
    """CURRENT, BEHIND or SILENT. A worker that had no second poll since a change is not behind."""
    if is_silent(worker, view.now_ns, view.grant):
        return SILENT
    had_its_chance_ns = view.silence_ns(worker) + worker.interval_ns * 3 // 2 + _LEEWAY_NS
    if view.serving and worker.loaded != view.served and view.unchanged_ns > had_its_chance_ns:
        return BEHIND
    return CURRENT


def examine(view: View) -> list[Finding]:
    """All that is to be said, problems and notes."""
    findings = [*_the_leader(view), *_what_is_served(view), *_the_lock(view)]
    for worker in view.workers:
        findings.extend(_a_worker(worker, view))
    return [*findings, *_the_table(view)]


def _the_leader(view: View) -> Iterator[Finding]:
    if not view.vacant:
        return
    pid = view.lease.holder.pid
    how = "is dead" if view.holder_is_dead else "no longer polls, and its lease has run out"
    former = f"The leader, process {pid}, {how}" if view.lease.token else "Nobody leads"
    candidates = view.candidates()
    if candidates:
        vacant_ns, interval_ns = _vacant_for_ns(view), max(each.interval_ns for each in candidates)
        if vacant_ns > interval_ns * 5 // 2 + _LEEWAY_NS:
            yield _problem(
                f"Nobody has led for {duration(vacant_ns)}, though {count(len(candidates), 'worker')} "
                "could: look in their logs for lines of shmflags, and restart them."
            )
        else:
            yield _note(f"{former}. A worker follows at its next poll, within {duration(interval_ns)}.")
    elif view.lease.token:
        yield _problem(f"{former}, and no worker polls that could follow it: start workers.")
    elif view.has_only_readers() and view.serving:
        yield _note("All workers are readers: nobody fetches, and what was published last stays.")
    elif not view.workers:
        yield _note("No worker lives.")


def _vacant_for_ns(view: View) -> int:
    """Since when nobody leads; of a leader that died, only its last sign of life is known."""
    lease = view.lease
    since_ns = (
        lease.deadline_ns - lease.length_ns if lease.token and lease.deadline_ns else lease.elected_ns
    )
    return max(0, view.now_ns - since_ns) if since_ns > 0 else 0


def _what_is_served(view: View) -> Iterator[Finding]:
    if view.damage_reported:
        yield _problem(
            "A worker found the snapshot damaged or missing: the leader mends it at its next poll; "
            "if this stays, look in its log for lines of shmflags."
        )
    if view.serving:
        return
    attempts, since_ns = view.grant.attempts, max(0, view.now_ns - view.grant.at_ns)
    fetcher = f"process {view.grant.holder.pid}"
    if attempts == 1 and since_ns <= _FETCH_NS:
        yield _note(f"The first fetch has been under way for {duration(since_ns)}, by {fetcher}.")
    elif attempts:
        yield _problem(
            f"There is nothing to serve: {count(attempts, 'fetch', 'fetches')} brought no flags, the "
            f"last {duration(since_ns)} ago by {fetcher}. Check host, secret key and network; the "
            f"logger posthog in {fetcher} says what the API answered."
        )
    elif view.has_only_readers():
        yield _problem(
            "There is nothing to serve, and all workers are readers, which do not fetch: use "
            "`shmflags publish`, or start a worker whose role is auto."
        )
    else:
        yield _note("There is nothing to serve yet, and nobody was told to fetch.")


def _the_lock(view: View) -> Iterator[Finding]:
    pid, held_ns = view.lock.pid, view.now_ns - view.lock.since_ns
    state = view.states.get(pid, "")
    if not pid or held_ns <= _LOCK_NS or state in ("", "zombie", "dead"):
        return  # Nobody, or one who died: the kernel has freed its lock.
    mend = f"continue it (kill -CONT {pid}) or end it" if state == "stopped" else "end it if this stays"
    yield _problem(
        f"Process {pid} is {state} and has held the page's lock for {duration(held_ns)}: meanwhile "
        f"nobody can be elected or publish; {mend}."
    )


def _a_worker(worker: Worker, view: View) -> Iterator[Finding]:
    state = state_of(worker, view)
    pid, told = worker.identity.pid, duration(worker.interval_ns)
    spacing = duration(worker.spacing_ns)
    if state == SILENT:
        yield _problem(_about_silence(worker, view))
    elif state == BEHIND:
        has = f"generation {worker.loaded.generation}" if worker.loaded != NOTHING else "nothing"
        yield _problem(
            f"Process {pid} polls, but has {has} loaded where generation {view.served.generation} is "
            "served: look in its log for lines of shmflags, and restart it if this stays."
        )
    elif worker.spacing_ns * 5 > worker.interval_ns * 7 and worker.spacing_ns > _LEEWAY_NS:
        yield _problem(
            f"Process {pid} polls every {spacing}, and its cache was told {told}: give the client and "
            "the cache the same poll_interval."
        )
    elif 0 < worker.spacing_ns * 5 < worker.interval_ns * 2:
        # Polls that a watcher brings stand closer, so this is no proof.
        yield _note(
            f"Process {pid} polls every {spacing}, and its cache was told {told}: unless something is "
            "published as often, give the client and the cache the same poll_interval."
        )


def _about_silence(worker: Worker, view: View) -> str:
    pid = worker.identity.pid
    silence, interval = duration(view.silence_ns(worker)), duration(worker.interval_ns)
    silent = f"Process {pid} last polled {silence} ago, and should every {interval}"
    if view.states.get(pid) == "stopped":
        return f"{silent}: it is stopped; continue it (kill -CONT {pid}) or end it."
    if _is_elsewhere(worker.identity, view.namespace):
        return (
            f"{silent}: it is in another pid namespace (a container), and may be gone; restart it if "
            "it is there."
        )
    return (
        f"{silent}: its poller has ended, or was lost in a fork. Restart it; under uWSGI set lazy-apps "
        "or py-call-uwsgi-fork-hooks, so that each worker has a poller."
    )


def _the_table(view: View) -> Iterator[Finding]:
    elsewhere = sum(_is_elsewhere(worker.identity, view.namespace) for worker in view.workers)
    if elsewhere:
        yield _note(
            f"{count(elsewhere, 'worker is', 'workers are')} in another pid namespace (a container): "
            "the pids are those of that one, and their deaths are noticed by silence only."
        )
    if len(view.workers) >= SLOTS:
        yield _note(f"The table of workers is full with {SLOTS}: there may be more than it shows.")


def _is_elsewhere(identity: Identity, namespace: int) -> bool:
    return identity.pid_namespace != namespace


def duration(duration_ns: int) -> str:
    """A duration for people: "0.4 s", "31 s", "12 min", "5 h", "3 days"."""
    value = duration_ns / _SECOND_NS
    if value < 10:
        return f"{value:.1f} s".replace(".0 s", " s")
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if value < limit:
            return f"{value / unit:.0f} {name}"
    return f"{value / 86400:.0f} days"


def count(number: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 worker, 2 workers."""
    return f"{number} {one}" if number == 1 else f"{number} {many or one + 's'}"
