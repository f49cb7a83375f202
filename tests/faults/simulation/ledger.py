"""What really happened, kept outside the provider, and the invariants that are checked against it.

The order of things is the server's: each change of the definitions gets a stamp, also a revert that
brings the same content and ETag back. A fetch has the stamp of the moment in which the server read
its answer; a snapshot has that of the newest accepted fetch that brought its content. "Older" is a
lower stamp. The invariants, by name:

fenced      a fetch is accepted only if no other was accepted since its grant, and dropped only then
forward     what is accepted, restored or handed out never has a lower stamp than what was before,
            on the host and in each process; but for a fetch that was begun or ended while there was
            no cache to be had, which may be published where nothing is served; and for a worker
            that missed the whole life of a page, which may restore what it has
unique      a position that somebody has loaded names one content, for ever
granted     each request was granted; grants are half an interval apart, but for the stated exceptions
in office   no poll of a worker that could lead leaves a dead leader in office
silent      no method raises, and no error is logged that nobody foresaw

A process's own fetch that was not accepted is what its client got from the server, not what the cache
published, and is left out of `forward`; `converged` (schedule.py) sees to it in the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shmflags.page import Fence, Grant
from shmflags.publication import Publication, Result
from shmflags.snapshot import Header, Position

from .world import SECOND_NS, Process, Shared, Task, World


@dataclass
class Fetch:
    """One request: what was known when it was granted, and what the server answered."""

    granted: bool
    commits: int
    lost_commits: int
    stamp: int = -1


@dataclass
class Published:
    """What stands at a position."""

    digest: bytes
    stamp: int
    in_order: bool = True
    loaded: bool = False


@dataclass(frozen=True)
class _LastGrant:
    at_ns: int
    holder: tuple[int, int, int]


@dataclass(frozen=True)
class _Office:
    """Who is in office when a poll begins, and when he died, if he did."""

    token: int
    began_ns: int
    is_dead: bool


class Ledger(Shared):
    def __init__(self, world: World, interval_ns: int) -> None:
        self.world = world
        self.interval_ns = interval_ns
        self.commits = 0
        # Published under the lock of a page that was lost meanwhile; the next page may adopt it.
        self.lost_commits = 0
        self.newest_stamp = -1
        # The newest that a page has named or a process has loaded: a snapshot whose writer was killed
        # before the page named it, and which then vanished, was never there.
        self.known_stamp = -1
        # The incarnation of the page on which that was published or confirmed.
        self.newest_page = 0
        self.positions: dict[Position, Published] = {}
        self.requests = 0
        self.grants = 0
        self.drops = 0
        # Times that the page's memory was destroyed; each excuses one early grant.
        self.losses = 0
        self._excuses = 0
        self.files_are_disturbed = False
        self._last_grant: _LastGrant | None = None
        self._origins: dict[int, tuple[list[Any], Position | Fetch]] = {}
        self._fetches: dict[int, tuple[object, Fetch]] = {}

    # -- faults that explain what would otherwise be broken

    def note_loss(self) -> None:
        """The page, or what it says, is lost: whoever never saw it may fetch at once."""
        self.losses += 1
        self._excuses += 1
        self.files_are_disturbed = True

    def note_os_error(self, what: str, error: OSError) -> None:
        if not self.files_are_disturbed:
            self.world.fail(f"silent: an error without a cause: {what}: {error!r}")

    # -- requests

    def note_grant(self, page: Any, grant: Grant) -> None:
        """The running thread was told to fetch."""
        task = self.world.running()
        self.grants += 1
        task.granted = Fetch(True, self.commits, self.lost_commits)
        self.world.note(f"granted a fetch, at {self.commits} commits")
        if page.quiet.lease().token != grant.token:
            self.world.fail("granted: a fetch, to a process that does not hold the lease")
        last = self._last_grant
        holder = (grant.holder.pid, grant.holder.start_ticks, grant.holder.pid_namespace)
        self._last_grant = _LastGrant(grant.at_ns, holder)
        if last is None or grant.at_ns - last.at_ns >= self.interval_ns // 2:
            return
        apart_s = (grant.at_ns - last.at_ns) / SECOND_NS
        if not page.quiet.is_serving() and apart_s >= 1 and last.holder in self.world.deaths:
            return
        if self._excuses > 0:
            self._excuses -= 1
            return
        self.world.fail(f"granted: two fetches {apart_s:.3f} s apart")

    def note_request(self, task: Task) -> Fetch:
        """The running thread asks the server."""
        self.requests += 1
        fetch, task.granted = task.granted, None
        if fetch is None:
            if not task.troubled:
                self.world.fail("granted: a request that nobody granted, and nothing was wrong")
            fetch = Fetch(False, self.commits, self.lost_commits)
        return fetch

    # -- definitions in

    def note_answer(self, flags: list[Any], fetch: Fetch) -> None:
        """The client is about to install what the server answered."""
        self._origins[id(flags)] = (flags, fetch)

    def deliver(self, task: Task, fetch: Fetch, data: dict[str, Any]) -> None:
        """The client is about to hand `data` to the cache."""
        task.delivering = fetch
        self._origins[id(data["flags"])] = (data["flags"], fetch)
        self._fetches[id(data["flags"])] = (data["flags"], fetch)

    def watching_publish(self, publish: Callable[..., Publication]) -> Callable[..., Publication]:
        @functools.wraps(publish)
        def watched(page: Any, encoded: Any, noted: Fence, *rest: Any) -> Publication:
            task = self.world.running()
            fetch = task.publishing = self._fetch_of(task, encoded)
            try:
                done = publish(page, encoded, noted, *rest)
            finally:
                task.publishing = None
            if done.result is Result.DROPPED:
                self.drops += 1
                now = page.quiet.fence()
                same_life = now.incarnation == noted.incarnation and now.term == noted.term
                overtaken = (fetch.commits, fetch.lost_commits) != (self.commits, self.lost_commits)
                if fetch.granted and same_life and not overtaken:
                    self.world.fail("fenced: a fetch was dropped, and nothing had overtaken it")
            return done

        return watched

    def _fetch_of(self, task: Task, encoded: Any) -> Fetch:
        """Which fetch is being published: the one that waited, or the one just delivered."""
        pending = task.process.cache._member.pending
        if pending is None or pending.encoded is not encoded:
            assert task.delivering is not None
            return task.delivering  # type: ignore[no-any-return]
        fetch = self._fetches[id(pending.decoded.definitions["flags"])][1]
        # There was no page to be had when it was delivered, so that nothing is known of its grant.
        fetch.granted &= pending.fence is not None
        return fetch

    def watching_tend(self, tend: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(tend)
        def watched(*arguments: Any) -> Any:
            task = self.world.running()
            task.restoring = task.process.cache._holding.__dict__["position"]
            try:
                return tend(*arguments)
            finally:
                task.restoring = None

        return watched

    def note_snapshot(self, header: Header) -> None:
        """A snapshot was put in its place."""
        task = self.world.running()
        in_order = task.publishing is None or task.publishing.granted
        present = self.positions.get(header.position)
        if present is not None and present.loaded and present.digest != header.digest:
            self.world.fail(f"unique: {_name(header.position)} names two contents")
        if task.publishing is not None:
            stamp = task.publishing.stamp
            if self._page(task.process) is not None:
                self._commit(task.publishing, header.position, "published")
            else:
                self.lost_commits += 1
                self.world.note(f"published into the void: {_name(header.position)}, stamp {stamp}")
        else:
            held = self.positions.get(task.restoring)
            stamp = held.stamp if held is not None else -1
            self.world.note(f"wrote stamp {stamp} again as {_name(header.position)}")
            missed_a_page = self.newest_page not in (0, *task.process.pages)
            if missed_a_page or (held is not None and not held.in_order):
                # It was published on a page that came and went while this process did not look.
                in_order = False
            elif stamp < self.known_stamp:
                self.world.fail(
                    f"forward: stamp {stamp} was restored, {self.known_stamp} was published"
                )
        self.positions[header.position] = Published(
            header.digest, stamp, in_order, present is not None and present.loaded
        )

    def note_named(self, position: Position) -> None:
        """The page names the snapshot at `position`."""
        if position in self.positions:
            self.known_stamp = max(self.known_stamp, self.positions[position].stamp)

    def note_unchanged(self, position: Position) -> None:
        """A fetch was accepted that brought what stands at `position`."""
        task = self.world.running()
        fetch = task.publishing
        if self._page(task.process) is None:
            self.lost_commits += 1
            self.world.note(f"confirmed on a page that is lost: {_name(position)}")
            return
        self._commit(fetch, position, "confirmed")
        if position in self.positions:
            self.positions[position].stamp = max(self.positions[position].stamp, fetch.stamp)
            self.note_named(position)

    def _commit(self, fetch: Fetch, position: Position, what: str) -> None:
        self.world.note(
            f"{what}: stamp {fetch.stamp} at {_name(position)}, granted at {fetch.commits} commits"
        )
        if not fetch.granted:
            # Fetched without a grant, as there was no cache to be had; published as nothing is served.
            self.newest_stamp = min(self.newest_stamp, fetch.stamp)
            self.known_stamp = min(self.known_stamp, fetch.stamp)
        elif fetch.commits != self.commits:
            self.world.fail(
                f"fenced: a fetch begun at {fetch.commits} commits was accepted at {self.commits}"
            )
        if fetch.stamp < self.newest_stamp:
            self.world.fail(
                f"forward: stamp {fetch.stamp} was accepted after stamp {self.newest_stamp}"
            )
        self.commits += 1
        self.newest_page = position.incarnation
        self.newest_stamp = max(self.newest_stamp, fetch.stamp)

    # -- definitions out

    def note_adopted(self, decoded: Any, position: Position) -> None:
        if position in self.positions:
            self.positions[position].loaded = True
            self.note_named(position)
        else:
            self.world.fail(f"unique: {_name(position)} was adopted, and nobody published it")
        flags = decoded.definitions["flags"]
        self._origins[id(flags)] = (flags, position)

    def check_handed_out(self, process: Process, handed: dict[str, Any] | None, before: int) -> None:
        """`get_flag_definitions` has answered; None to a client with flags means those.

        `before` is the newest stamp that had been handed out when it was asked.
        """
        flags = process.client.feature_flags if handed is None else handed["flags"]
        if handed is None and not flags:
            return  # "Fetch now": `note_request` asks whether that was granted.
        _, origin = self._origins.get(id(flags), (None, None))
        if origin is None:
            if flags:
                self.world.fail("forward: definitions were handed out that nobody fetched")
            elif before >= 0:
                self.world.fail("forward: empty definitions were handed out after others")
            return
        if isinstance(origin, Fetch):
            stamp = origin.stamp
        else:
            stamp = self.positions[origin].stamp
            if not self.positions[origin].in_order:
                process.handed_stamp = before = stamp
        if stamp < before:
            self.world.fail(f"forward: {process.name} was handed stamp {stamp} after {before}")
        if not isinstance(origin, Fetch):
            process.handed_stamp = max(process.handed_stamp, stamp)

    def note_fork(self, memo: dict[int, Any]) -> None:
        """Objects were copied for a child: `memo` has the copies by the originals' ids."""
        for number in self._origins.keys() & memo.keys():
            self._origins[id(memo[number])] = (memo[number], self._origins[number][1])
        for number in self._fetches.keys() & memo.keys():
            self._fetches[id(memo[number])] = (memo[number], self._fetches[number][1])

    # -- who leads

    def before_poll(self, process: Process) -> _Office | None:
        page = self._page(process)
        if page is None:
            return None
        lease = page.lease()
        holder = lease.holder
        key = (holder.pid, holder.start_ticks, holder.pid_namespace)
        is_dead = key in self.world.deaths and holder.pid_namespace == process.namespace
        return _Office(lease.token, self.world.clock_ns, bool(lease.deadline_ns) and is_dead)

    def check_office(self, task: Task, office: _Office | None) -> None:
        """After a poll of a worker without trouble of its own, a dead leader is out of office."""
        process = task.process
        if office is None or not office.is_dead or task.troubled:
            return
        page = self._page(process)
        me = process.cache._member
        if page is None or page.lease().token != office.token or not page.lease().deadline_ns:
            return
        if me.closed or not process.cache._settings.electable:
            return
        if max(me.busy_until_ns, me.election._abstain_until_ns) > office.began_ns:
            return
        self.world.fail(f"in office: {task.name} polled, and left a dead leader in office")

    def leader(self, process: Process) -> int:
        """The token in office now, by the page that `process` has; 0 if nobody's."""
        page = self._page(process)
        if page is None or page.lease().deadline_ns <= self.world.clock_ns:
            return 0
        return page.lease().token

    def _page(self, process: Process) -> Any:
        """The page that the process has mapped, if it is the one that stands there."""
        me = process.cache._member
        found = me.known_page if me is not None and me.pid == process.pid else None
        if found is None:
            return None
        quiet = found.quiet
        try:
            info = quiet.directory.page_path.stat()
        except OSError:
            return None
        is_there = (info.st_dev, info.st_ino) == (quiet._lock._inode.device, quiet._lock._inode.number)
        return quiet if is_there else None


def _name(position: Position) -> str:
    return f"{position.incarnation % 0xFFFF:04x}/{position.generation}"
