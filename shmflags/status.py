"""`Status`: what is, and what is wrong, in words.

Reading it takes no lock, creates nothing and disturbs nobody: the page is mapped and its words are
read, the snapshot is mapped and checked. The rules for what is wrong are in `diagnosis.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from shmflags import diagnosis, election, page_file, publication, snapshot
from shmflags.diagnosis import View
from shmflags.errors import DamagedSnapshotError, ShmFlagsError, UnsafePathError
from shmflags.page import ControlPage, Lease
from shmflags.processes import Host, command_line, process_state
from shmflags.runtime_dir import RuntimeDir, directory_name
from shmflags.snapshot import NOTHING, Header, Position
from shmflags.worker_table import Worker

SCHEMA_VERSION = 1
_TRIES = 5
_PAUSE_S = 0.005
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Leader:
    """Who fetches for all. `since` is in seconds since the epoch."""

    pid: int
    command_line: str
    since: float
    term: int
    lease_left_s: float


@dataclass(frozen=True)
class WorkerStatus:
    """One worker. `started` is in seconds since the epoch, what ends in `_s` is a duration.

    `state` is "current", "behind" or "silent"; `generation` is what it has loaded, None if nothing;
    `poll_spacing_s` is how far apart its polls are, None if that is not known yet.
    """

    pid: int
    role: str
    leads: bool
    state: str
    generation: int | None
    started: float
    last_poll_s: float
    poll_interval_s: float
    poll_spacing_s: float | None


@dataclass(frozen=True)
class Counters:
    """How often it happened since the page was made."""

    granted: int = 0
    published: int = 0
    unchanged: int = 0
    takeovers: int = 0
    dropped: int = 0
    damaged: int = 0
    repaired: int = 0


@dataclass(frozen=True)
class Status:
    """One service key on this host. Durations are in seconds; None: never, nothing, or not known.

    `service_key`      "" if only the directory's name is known
    `directory`        where its files are
    `exists`           False if no worker has polled yet
    `at`               when this was read, seconds since the epoch
    `leader`           None if nobody leads
    `term`             how often there was a new leader
    `generation`       number of the snapshot that is served
    `age_s`            since a fetch last brought definitions, changed or not; a 304 leaves no trace
    `unchanged_s`      since their content changed
    `since_grant_s`    since a worker was last told to fetch
    `size`             of the snapshot in bytes
    `flags`, `cohorts` how many are served
    `workers`          those that live
    `problems`         what is wrong, and what to do
    `notes`            what is worth knowing
    """

    service_key: str
    directory: str
    exists: bool
    at: float
    leader: Leader | None = None
    term: int = 0
    generation: int | None = None
    age_s: float | None = None
    unchanged_s: float | None = None
    since_grant_s: float | None = None
    size: int | None = None
    flags: int | None = None
    cohorts: int | None = None
    workers: tuple[WorkerStatus, ...] = ()
    counters: Counters = Counters()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The service key, or the directory's name, which begins like it."""
        return self.service_key or os.path.basename(self.directory)

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON: `schema_version` first, then every field by its name."""
        found = asdict(self)
        found.update({name: list(found[name]) for name in ("workers", "problems", "notes")})
        return {"schema_version": SCHEMA_VERSION, **found}


def read(directory: RuntimeDir, host: Host, max_bytes: int) -> Status:
    """The status of one service key. Raises nothing that the state of the files could cause."""
    notes: list[str] = []
    nothing = Status(directory.service_key, str(directory.path), False, _s(host.wall_ns()))
    try:
        directory.check(lambda sentence: notes.append(f"{sentence}."))
        page = page_file.open_existing(directory, host)
    except FileNotFoundError as error:
        if error.filename == str(directory.base):
            return replace(nothing, problems=(f"{directory.base} does not exist: create it.",))
        notes.append("There is nothing here yet: no worker has polled.")
    except UnsafePathError as error:
        return replace(nothing, problems=(f"The workers refuse to use this: {error}.",))
    except ShmFlagsError as error:
        notes.append(f"{error}: nothing is served from it, and the next poll of a worker replaces it.")
    except OSError as error:
        return replace(nothing, problems=(f"This cannot be read: {error}.",))
    else:
        return _Reader(directory, host, max_bytes, page).status(notes)
    return replace(nothing, notes=tuple(notes))


class _Reader:
    """Reads one page, at one moment."""

    def __init__(self, directory: RuntimeDir, host: Host, max_bytes: int, page: ControlPage) -> None:
        self._directory = directory
        self._host = host
        self._max_bytes = max_bytes
        self._page = page
        self._namespace = host.identity().pid_namespace

    def status(self, notes: list[str]) -> Status:
        header, objection = self._header()
        view = self._view(objection)
        findings = diagnosis.examine(view)
        problems = [finding.text for finding in findings if finding.is_problem]
        if objection:
            problems.insert(0, objection)
        grant, served = view.grant, view.served
        changed_ns, verified_ns = self._page.times()
        wall_ns = self._host.wall_ns()
        return Status(
            service_key=self._service_key(),
            directory=str(self._directory.path),
            exists=True,
            at=_s(wall_ns),
            leader=None if view.vacant else self._leader(view),
            term=view.lease.term,
            generation=served.generation if view.serving else None,
            age_s=_s(max(0, wall_ns - verified_ns)) if verified_ns else None,
            unchanged_s=_s(max(0, wall_ns - changed_ns)) if changed_ns else None,
            since_grant_s=_s(view.now_ns - grant.at_ns) if grant.at_ns else None,
            size=header.size if header else None,
            flags=header.flag_count if header else None,
            cohorts=header.cohort_count if header else None,
            workers=tuple(_worker(worker, view) for worker in view.workers),
            counters=Counters(**self._page.counters()),
            problems=tuple(problems),
            notes=(*notes, *(finding.text for finding in findings if not finding.is_problem)),
        )

    def _service_key(self) -> str:
        told = self._directory.service_key or self._page.service_key()
        return told if directory_name(told) == self._directory.path.name else ""

    def _view(self, objection: str) -> View:
        host, page = self._host, self._page
        lease, grant = _stable(page.lease), _stable(page.grant)
        serving, lock = page.is_serving(), page.lock_holder()
        changed_ns, _ = page.times()
        rows = page.workers.rows()
        now_ns = host.now_ns()
        workers = tuple(
            row
            for row in sorted(rows, key=lambda row: (row.started_wall_ns, row.identity.pid))
            if not host.is_provably_dead(row.identity)
            and not diagnosis.is_gone(row, now_ns, self._namespace)
        )
        asked_about = {lock.pid} if lock.pid else set()
        asked_about.update(
            worker.identity.pid
            for worker in workers
            if worker.identity.pid_namespace == self._namespace
            and diagnosis.is_silent(worker, now_ns, grant)
        )
        return View(
            now_ns=now_ns,
            namespace=self._namespace,
            lease=lease,
            vacant=election.why_takeable(lease, now_ns, host.is_provably_dead) is not None,
            holder_is_dead=bool(lease.token) and host.is_provably_dead(lease.holder),
            grant=grant,
            serving=serving,
            served=page.position() if serving else page.last_position(),
            unchanged_ns=max(0, host.wall_ns() - changed_ns),
            lock=lock,
            damage_reported=not objection and page.damage_is_reported(),
            workers=workers,
            states={pid: process_state(pid) for pid in asked_about},
        )

    def _leader(self, view: View) -> Leader:
        lease: Lease = view.lease
        here = lease.holder.pid_namespace == self._namespace
        return Leader(
            pid=lease.holder.pid,
            command_line=command_line(lease.holder.pid) if here else "",
            since=_s(lease.elected_wall_ns),
            term=lease.term,
            lease_left_s=_s(lease.deadline_ns - view.now_ns),
        )

    def _header(self) -> tuple[Header | None, str]:
        """The header of the snapshot that the page names, and what is wrong with it."""
        page = self._page
        header, reason = None, ""
        for _ in range(_TRIES):
            serving, position = page.is_serving(), page.position()
            header, reason = self._verified()
            if page.position() != position:
                continue  # Published meanwhile.
            if not serving:
                return None, ""
            if header is not None and self._is_as_new(header.position, position):
                return header, ""
            reason = reason or "it is not the one that the page names"
            self._host.sleep(_PAUSE_S)
        return header, (
            f"The snapshot cannot be used: {reason}. Workers go on with what they have loaded, and "
            "the leader writes it again at its next poll; if this stays, look in its log for lines of "
            "shmflags."
        )

    def _is_as_new(self, found: Position, named: Position) -> bool:
        """A newer one is that of a publisher that is about to say so in the page."""
        return found == named or publication.is_successor(found, named, self._page.incarnation)

    def _verified(self) -> tuple[Header | None, str]:
        try:
            return snapshot.verify(self._directory, self._max_bytes), ""
        except FileNotFoundError:
            return None, "it is missing"
        except (DamagedSnapshotError, UnsafePathError) as error:
            return None, error.reason
        except OSError as error:
            return None, str(error)


def _stable(record: Callable[[], _Record]) -> _Record:
    """A record of several words, read without the lock until two readings agree."""
    found = record()
    for _ in range(_TRIES):
        again = record()
        if again == found:
            break
        found = again
    return found


def _worker(worker: Worker, view: View) -> WorkerStatus:
    return WorkerStatus(
        pid=worker.identity.pid,
        role="auto" if worker.electable else "reader",
        leads=not view.vacant and worker.token == view.lease.token,
        state=diagnosis.state_of(worker, view),
        generation=worker.loaded.generation if worker.loaded != NOTHING else None,
        started=_s(worker.started_wall_ns),
        last_poll_s=_s(view.silence_ns(worker)),
        poll_interval_s=_s(worker.interval_ns),
        poll_spacing_s=_s(worker.spacing_ns) if worker.spacing_ns else None,
    )


def _s(duration_ns: int) -> float:
    return round(duration_ns / 1e9, 3)
