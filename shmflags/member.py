"""What one process is, for one provider: token, page, slot, locks. Never shared with a child.

A fork makes another process; a change of the effective user makes another one too, whose files lie
elsewhere. Both are recognised at the next call by (pid, euid), hooks or no hooks, and get a member of
their own. What may be handed on (definitions, what the client received, the client itself) is the
provider's; what stands here is not handed on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import NamedTuple

from shmflags import codec, page_file
from shmflags.election import Election
from shmflags.journal import Journal
from shmflags.page import ControlPage, Fence, Glance
from shmflags.processes import NOBODY, Host, Identity
from shmflags.runtime_dir import locate
from shmflags.settings import Settings
from shmflags.snapshot import Position, Signature

_LOOK_NS = 300_000_000
"""A leader's death is looked for a few times a second only: that costs more than all other looking."""


class Pending(NamedTuple):
    """A fetch that could not be written yet: the SDK will never give it again.

    There is no `fence` if there was no page; then it may be the first publish, and nothing else.
    """

    encoded: codec.Encoded
    decoded: codec.Decoded
    fence: Fence | None


class _ThreadState(threading.local):
    """Per thread: what its last poll noted for the call that follows.

    Whether it found the page right, and nothing to fetch; the fence, where it was told to fetch; and
    whether its last fetch failed.
    """

    has_looked: bool = False
    fence: Fence | None = None
    fetch_failed: bool = False


class Member:
    """One provider in one process."""

    def __init__(self, settings: Settings, host: Host, journal: Journal) -> None:
        self.account = host.account()
        self.pid = self.account[0]
        self.identity = host.identity()
        self.token = host.random_word()
        self.directory = locate(settings.directory, settings.service_key, self.account[1])
        self.lock = threading.RLock()
        self.thread = _ThreadState()
        self.election = Election(
            host=host,
            token=self.token,
            identity=self.identity,
            interval_ns=settings.interval_ns,
            lease_ns=settings.lease_ns,
            max_term_ns=settings.max_term_ns,
        )
        self.pending: Pending | None = None
        self.tended: Signature | None = None
        self.cold_deadline_ns: int | None = None
        self.busy_until_ns = 0
        self.closed = False
        # The position that we held when a page was lost, if it was the newest one then, and the
        # incarnation of the page that came in its place: only then may we write it again there.
        self.newest_before: tuple[Position, int] | None = None
        self._settings = settings
        self.host = host
        self._journal = journal
        self._page: ControlPage | None = None
        self._slot = -1
        # What `sees_to_do` saw of the page when there was nothing to do, and for how long that will do.
        self._at_rest: Glance | None = None
        self._at_rest_until_ns = 0

    @property
    def known_page(self) -> ControlPage | None:
        """The page as last attached; touches no file."""
        return self._page

    @property
    def owner(self) -> str:
        """A name for temporary files of ours, by which another process tells whether we live."""
        who = self.identity
        nonce = self.host.random_word()
        return f"{who.pid}-{who.start_ticks}-{who.pid_namespace}-{nonce:x}"

    def is_litter(self, owner: str) -> bool:
        """Whether the writer of a temporary file is provably dead."""
        parts = owner.split("-")
        try:
            writer = Identity(int(parts[0]), int(parts[1]), int(parts[2]))
        except (ValueError, IndexError):
            return False
        return writer != NOBODY and self.host.is_provably_dead(writer)

    def inherit(self, parent: Member) -> None:
        """Right after a fork, in the child: the map is shared."""
        if parent.directory.path == self.directory.path:
            self._page = parent._page

    def page(self, held: Position) -> ControlPage:
        """The page, attached again if it was removed or replaced; `held` is what we have loaded.

        Raises `UnsafePathError` or `OSError`.
        """
        last = self._page
        if last is not None and last.is_at_its_path() and not last.objection():
            return last
        with self.lock:
            self.directory.prepare(self._warn)
            found = page_file.attach(
                self.directory, self.host, self.owner, self._settings.max_bytes, last
            )
            if last is not None and held == last.last_position():
                self.newest_before = (held, found.incarnation)
            self._page = found
            self._slot = -1
            self.tended = None
            return found

    def holds_newest(self, attached: ControlPage, held: Position) -> bool:
        """Whether `held` is the newest snapshot there ever was, so that it may be written again."""
        if not held.generation:
            return False
        if held == attached.last_position():
            return True
        return (
            self.newest_before == (held, attached.incarnation)
            and not attached.last_position().generation
        )

    def note_poll(self, attached: ControlPage, held: Position) -> None:
        """Show that we live, and what we hold: in our slot of the worker table.

        The slot is taken at the first poll. Raises `LockTimeoutError` or `PageReplacedError`.
        """
        if attached.workers.note_poll(self._slot, self.token, held):
            return
        if not attached.workers.has_room():
            return  # Not worth the lock, and a walk over the table under it at every poll.
        with attached.locked():
            self._slot = attached.workers.register(
                self.token,
                self.identity,
                self._settings.interval_ns,
                self._settings.electable,
                held,
            )

    def sees_to_do(
        self, held: Callable[[], Position], is_loaded: Callable[[], bool]
    ) -> Hashable | None:
        """For a watcher: that we are behind, nobody leads, or we put off a fetch; None if all is well.

        `held` tells what we have loaded, `is_loaded` whether our client has. Touches no file, and takes
        no lock of the page.
        """
        page = self._page
        if page is None or self.closed:
            return None
        if self.election.puts_off:
            return "a fetch was put off" if is_loaded() else None
        # In a process at rest all that a look touches is out of the processor's caches: the less the better.
        if page.glance() == self._at_rest and self.host.now_ns() < self._at_rest_until_ns:
            return None
        return self._look_closely(page, held)

    def _look_closely(self, attached: ControlPage, held: Callable[[], Position]) -> Hashable | None:
        glance, now_ns = attached.glance(), self.host.now_ns()
        # While another thread of ours publishes, the page is ahead of what is noted here.
        if self.pending is not None or not self.lock.acquire(blocking=False):
            return None
        try:
            position = attached.position()
            if attached.is_serving() and position != held():
                return position
        finally:
            self.lock.release()
        until_ns = now_ns + _LOOK_NS
        if self._settings.electable:
            lease = attached.lease()
            if lease.token != self.token:
                if self.election.may_lead(attached):
                    return ("vacant", lease.term)
                until_ns = min(until_ns, lease.deadline_ns)
        self._at_rest, self._at_rest_until_ns = glance, until_ns
        return None

    def note_reloaded(self) -> None:
        """Our client has polled, as a watcher had it do: a fetch that was put off is over."""
        if self._page is not None:
            self.election.note_answered(self._page)

    def note_loaded(self, attached: ControlPage, position: Position) -> None:
        attached.workers.note_loaded(self._slot, self.token, position)

    def leave(self) -> None:
        """Free our lease and our slot, if the page that has them is still there.

        Raises `OSError`, `LockTimeoutError` or `PageReplacedError`.
        """
        page = self._page
        if page is None or not page.is_at_its_path():
            return
        page.workers.release(self._slot, self.token)
        if self.election.resign(page):
            self.tell("yielded: shut down")

    def numbers(self) -> tuple[int, int]:
        """Term and generation of the page as they are now, for the log; 0 each without a page."""
        page = self._page
        return (0, 0) if page is None else (page.fence().term, page.position().generation)

    def tell(self, event: str) -> None:
        """Log what happened, with the page's numbers."""
        self._journal.event(event, self.pid, *self.numbers())

    def _warn(self, sentence: str) -> None:
        self._journal.trouble("the directory is not as it should be", sentence, self.pid)
