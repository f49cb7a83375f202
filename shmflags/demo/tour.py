"""The steps of the demo: what is done, what has to be seen for each claim, and saying so.

Nothing is assumed. Flags and requests are what each worker process reports over HTTP; with the
embedded API, its own counts have to agree with the sum of what the workers report.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from shmflags.demo.report import FLAG, Report
from shmflags.demo.screen import Screen
from shmflags.demo.server import DefinitionsServer, definitions, flag
from shmflags.demo.workers import WORKERS, Workers

START_TIMEOUT_S = 15.0
PAUSE_S = 0.02  # between two looks at the workers
_REFUSALS = (401, 402, 403)  # asking again will not help
_ANSWERS = {200: "all flags", 304: "unchanged"}


@dataclass(frozen=True)
class Asked:
    """A request for definitions, as the worker that made it reported it."""

    pid: int
    time_s: float  # CLOCK_MONOTONIC, seconds, when its answer came
    status: int


@dataclass
class Lifetime:
    """When a worker was first seen and when it was killed, CLOCK_MONOTONIC, seconds."""

    since_s: float
    until_s: float | None = None  # None: it lives
    requests_at_first: int = 0  # that it had made when it was first seen


class StopTourError(Exception):
    """Without what was just claimed and not observed, the rest has nothing to show."""


def demo_flags(on: bool) -> dict[str, object]:
    return definitions(flag(FLAG, on=on), flag("dark-mode"), flag("beta-search", percentage=25))


class Tour:
    """One run of the demo against `server`, or without one against an API that is not ours."""

    def __init__(
        self,
        screen: Screen,
        workers: Workers,
        interval_s: float,
        latency_s: float,
        server: DefinitionsServer | None,
    ) -> None:
        self._screen = screen
        self._workers = workers
        self._interval_s = interval_s
        self._period_s = interval_s + latency_s  # the SDK sleeps between two polls, then fetches
        self._server = server
        self._latest: dict[int, Report] = {}  # by pid, the living only
        self._lifetimes: dict[int, Lifetime] = {}  # by pid
        self._asked: list[Asked] = []
        self._is_refused = False

    def run(self) -> None:
        """All steps; raises `WorkersGoneError` or `StopTourError` when there is no going on."""
        self._start()
        self._poll()
        if self._server is None:
            self._screen.step("A flag is flipped")
            self._screen.event("skipped: this is your project, its flags are yours to flip")
        else:
            self._screen.step(f"At the server, {FLAG} is switched on")
            self._flip(self._server, on=True)
        self._kill_leader()
        if self._server is not None:
            self._screen.step(f"Under the new leader, {FLAG} is switched off again")
            self._flip(self._server, on=False)

    def say_totals(self) -> None:
        """The requests made, beside those that one poller per worker would have made."""
        made, full, source = len(self._asked), self._full_requests(), "as the workers report them"
        if self._server is not None:
            made, source = self._server.count, "as the API counted them"
        self._screen.say(f"  requests to the API  {made:4}  {full} of them full, {source}")
        self._screen.say(f"  without the cache    {self._would_be():4}  calculated: each polls")

    # The steps

    def _start(self) -> None:
        self._screen.step(f"gunicorn starts {WORKERS} workers, with nothing loaded")
        ready = self._look_until(
            lambda: self._is_refused or (self._all_agree() and self._full_requests() > 0),
            START_TIMEOUT_S,
        )
        full = self._full_requests()
        if not self._screen.result(
            ready and full == 1 and not self._is_refused,
            f"{len(self._latest)} workers have the flags, by {_count(full, 'full request')} to the"
            f" API (without the cache: {WORKERS})",
        ):
            raise StopTourError

    def _poll(self) -> None:
        seconds = (2.5 if self._server is None else 3.5) * self._interval_s
        self._screen.step(f"Each worker polls every {self._interval_s:g} s; watch {seconds:g} s")
        seen, would_be, end_s = len(self._asked), self._would_be(), time.monotonic() + seconds
        self._look_until(lambda: time.monotonic() >= end_s, 2 * seconds)
        would_be = self._would_be() - would_be
        accounted = self._server is None or self._look_until(self._is_accounted, 2.0)
        asked = self._asked[seen:]
        full = sum(one.status == 200 for one in asked)
        askers = {one.pid for one in asked}
        self._screen.result(
            len(askers) == 1 and full == 0 and len(asked) <= seconds / self._interval_s + 1,
            f"{_count(len(asked), 'request')}, {full} of them full, for all workers by worker"
            f" {' and '.join(map(str, askers)) or 'nobody'} (without the cache: {would_be})",
        )
        self._screen.result(self._all_agree(), f"all {len(self._latest)} workers have equal flags")
        if self._server is not None:
            self._screen.result(
                accounted,
                f"the API answered {_count(self._server.answered, 'request')}"
                f" and the workers report {len(self._asked)}",
            )

    def _flip(self, server: DefinitionsServer, *, on: bool) -> None:
        seen, full = len(self._asked), server.full
        told: set[int] = set()
        flipped_s = time.monotonic()
        server.set_definitions(demo_flags(on))

        def all_evaluate_it() -> bool:
            for pid, report in self._latest.items():
                if report.flag_value is on and pid not in told:
                    told.add(pid)
                    after_s = time.monotonic() - flipped_s
                    self._screen.event(f"worker {pid} evaluates it as {on} after {after_s:.2f} s")
            return self._all_agree() and told == set(self._latest)

        reached = self._look_until(all_evaluate_it, 3 * self._period_s + 2)
        end_s = time.monotonic()
        full = server.full - full
        answered_s = [asked.time_s for asked in self._asked[seen:] if asked.status == 200]
        spread = f", {end_s - answered_s[0]:.2f} s after the API's answer" if answered_s else ""
        self._screen.result(
            reached and full == 1,
            f"{len(told)} workers evaluate {FLAG} as {on} after {end_s - flipped_s:.2f} s{spread},"
            f" by {_count(full, 'full request')}",
        )

    def _kill_leader(self) -> None:
        self._screen.step("The worker that fetches for all is killed")
        seen = len(self._asked)
        # Just after a fetch, so that a worker which starts meets a host where none is due.
        if not self._look_until(lambda: len(self._asked) > seen, 3 * self._period_s + 2):
            self._screen.result(False, "a worker fetches for all")
            raise StopTourError
        victim = self._latest.pop(self._asked[-1].pid)
        survivors, seen = set(self._latest), len(self._asked)
        self._workers.kill(victim)
        killed_s = self._lifetimes[victim.pid].until_s = time.monotonic()
        self._screen.event(f"worker {victim.pid} gets SIGKILL")
        replaced = self._look_until(
            lambda: self._all_agree() and len(self._asked) > seen, 3 * self._period_s + 5
        )
        after = self._asked[seen:]
        if not after:
            self._screen.result(False, f"another worker fetches in place of {victim.pid}")
            raise StopTourError
        heir = after[0].pid
        full = sum(asked.status == 200 for asked in after)
        self._screen.result(
            replaced and full <= 1,
            f"worker {heir} fetches in the place of {victim.pid}, {after[0].time_s - killed_s:.2f} s"
            f" after its death, by {_count(full, 'full request')}",
        )
        for pid in set(self._latest) - survivors:
            life = self._lifetimes[pid]
            # On a host so slow that a fetch was due by then, it may have been the one to make it.
            self._screen.result(
                replaced and (life.requests_at_first == 0 or pid == heir),
                f"gunicorn's new worker {pid} had the flags {life.since_s - killed_s:.2f} s after"
                f" the kill, by {_count(life.requests_at_first, 'request')} of its own",
            )

    # Looking

    def _look_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Ask the workers again and again until the condition holds; False after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            for report in self._workers.ask():
                self._note(report)
            if condition():
                return True
            if time.monotonic() > deadline_s:
                return False
            time.sleep(PAUSE_S)

    def _note(self, report: Report) -> None:
        """Take in what a worker says, and print what is new in it."""
        self._is_refused |= any(request.status in _REFUSALS for request in report.requests)
        lifetime = self._lifetimes.setdefault(report.pid, Lifetime(time.monotonic()))
        if lifetime.until_s is not None or report.flag_count is None:
            return
        known = self._latest.get(report.pid)
        self._latest[report.pid] = report
        if known is None:
            self._screen.event(f"worker {report.pid} is up and has {report.flag_count} flags")
            lifetime.requests_at_first = len(report.requests)
        elif known.flag_count != report.flag_count:
            self._screen.event(f"worker {report.pid} now has {report.flag_count} flags")
        for request in report.requests[len(known.requests) if known else 0 :]:
            self._asked.append(Asked(report.pid, request.time_s, request.status))
            self._screen.event(
                f"worker {report.pid} asked the API: {_ANSWERS.get(request.status, 'failed')}"
                f" ({request.status})   requests {len(self._asked):2},"
                f" without the cache {self._would_be():2}"
            )

    def _all_agree(self) -> bool:
        """Whether every worker was heard, and all have the same definitions."""
        digests = {report.digest for report in self._latest.values()}
        return len(self._latest) == WORKERS and len(digests) == 1

    def _is_accounted(self) -> bool:
        """Whether each request that the embedded API answered was reported by a worker."""
        return self._server is not None and self._server.answered == len(self._asked)

    def _full_requests(self) -> int:
        if self._server is not None:
            return self._server.full
        return sum(asked.status == 200 for asked in self._asked)

    def _would_be(self) -> int:
        """Requests by now if each worker polled for itself: one at its start, one per period."""
        now_s = time.monotonic()
        return sum(
            1 + int(((life.until_s or now_s) - life.since_s) / self._period_s)
            for life in self._lifetimes.values()
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
