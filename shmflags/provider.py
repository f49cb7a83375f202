"""The provider: `SharedMemoryFlagCache`. The life of one poll, room by room.

1.  The SDK's poller calls `should_fetch_flag_definitions`. `member.py` tells whether this is still
    the process it was; after a fork or a change of user there is a new member, which inherits what
    was decoded, and nothing else.
2.  `page.py` maps the control page, or finds it mapped; `runtime_dir.py` has checked that nobody
    else can touch it. The worker's slot gets the time.
3.  `election.py` answers. A follower reads a few words, finds a live leader, and the answer is
    False. The leader renews its lease under the page's lock, `publication.py` looks after the
    snapshot, and if the host's last grant is half an interval old the answer is True; what may
    later be published is noted first, as a fence. An attached client then asks with the ETag of what
    is published, if it has that. With an `upstream`, it is asked before the API.
4.  True: the SDK fetches, and on a 200 calls `on_flag_definitions_received`. `codec.py` encodes,
    `snapshot.py` writes a draft, and `publication.py` puts it in place if nothing overtook the
    fetch. On a 304 the SDK calls nothing.
5.  False: the SDK calls `get_flag_definitions`. The page that was just looked at names a position; if
    it is the one that was loaded, the same objects are handed out again (or None, where
    `attachment.py` sees that the client has them). Else `snapshot.py` maps the new one and `codec.py`
    decodes what changed.
6.  Between polls `watcher.py` looks whether we are behind what the page says, nobody leads, or we
    put off a fetch while the client was starting, and then has the client poll at once.

None of the four methods raises, as the SDK takes an exception for "fetch": what goes wrong goes to
`journal.py`, and the answer is the safe one. None of them waits, but for the one cold start: nothing
to serve yet, and somebody is fetching. That wait has one deadline per process; after it the answer
is empty definitions, which keep the SDK from asking again at each evaluation. For an `upstream` the
host's leader waits two seconds at most (upstream.py).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from shmflags import codec, servers, settings
from shmflags.attachment import Attachment
from shmflags.election import ClientState, Outcome
from shmflags.errors import DamagedSnapshotError, LockTimeoutError, PageReplacedError, UnsafePathError
from shmflags.file_lock import abandon_inherited
from shmflags.holding import Holding
from shmflags.journal import Journal
from shmflags.member import Member
from shmflags.page import ControlPage
from shmflags.processes import Host
from shmflags.publisher import Publisher
from shmflags.runtime_dir import locate
from shmflags.snapshot import DEFAULT_MAX_BYTES
from shmflags.watcher import Watcher, Watchers

if TYPE_CHECKING:  # Imported when they are needed: with asyncio, they take longer than all the rest.
    from shmflags.status import Status
    from shmflags.upstream import Upstream


class SharedMemoryFlagCache:
    """PostHog's `FlagDefinitionCacheProvider` in shared memory: one fetch per host.

    `service_key`         names the group of workers: one per PostHog project and environment
    `directory`           base of the files; default $SHMFLAGS_DIR, else /dev/shm, else the
                          temporary directory
    `poll_interval`       seconds; the client's own `poll_interval`
    `cold_start_timeout`  seconds that a process waits, once, for the host's first publish
    `lease_ttl`           seconds without a poll after which a leader is deposed; default
                          max(3 * poll_interval, 45)
    `max_term`            seconds that one process may lead before it makes way for another;
                          default 60 * poll_interval
    `role`                "auto", or "reader": is never elected and never publishes
    `upstream`            another provider, asked by the host's leader before the API
    `max_bytes`           the largest snapshot that is written or read

    Raises `TypeError` or `ValueError` for wrong arguments, and `UnsupportedPlatformError` on
    Windows. Touches no file: a server may build it as root and run its workers as another user.
    """

    def __init__(
        self,
        service_key: str,
        *,
        directory: str | os.PathLike[str] | None = None,
        poll_interval: float = 30.0,
        cold_start_timeout: float = 5.0,
        lease_ttl: float | None = None,
        max_term: float | None = None,
        role: str = "auto",
        upstream: object | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        times = poll_interval, cold_start_timeout, lease_ttl, max_term
        self._settings = settings.check(service_key, directory, max_bytes, *times, role, upstream)
        self._host = Host()
        self._journal = Journal(service_key)
        self._member: Member | None = None
        self._member_lock = threading.Lock()
        # The process in which that lock was made, and the watchers' threads run.
        self._pid = os.getpid()
        # What a fork hands on:
        self._holding = Holding()
        self._publisher = Publisher(self._settings, self._holding, self._complain)
        self._upstream: Upstream | None = None
        if upstream is not None:
            from shmflags.upstream import Upstream

            self._upstream = Upstream(
                upstream, self._settings, self._holding, self._publisher, self._complain
            )
        self._watchers = Watchers(self._notice, self._complain)
        self._reloader: Watcher | None = None
        if hasattr(os, "register_at_fork"):
            this: weakref.ref[SharedMemoryFlagCache] = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _after_fork(this))
        self._told_of_server = False
        self._look_at_server()

    # -- PostHog's protocol

    def should_fetch_flag_definitions(self) -> bool:
        """True if this process is to fetch from the API now. Never raises; waits for an upstream only."""
        member = None
        try:
            member = self._me()
            is_to_fetch = self._poll(member)
            member.thread.has_looked = not is_to_fetch
            return is_to_fetch
        except LockTimeoutError as error:
            if member is not None:
                self._note_busy(member, error)
            return False
        except PageReplacedError:
            return False  # Attached again at the next poll.
        except Exception as error:
            if member is not None:
                member.election.puts_off = False
            self._give_up("no shared cache, so this worker fetches for itself", error)
            return self._settings.electable

    def get_flag_definitions(self) -> Any:
        """The host's definitions: `flags`, `group_type_mapping`, `cohorts` and what else there is.

        None means "fetch now", or, to an attached client, "you have them". Never raises; waits at
        most once per process, for `cold_start_timeout`.
        """
        try:
            member = self._me()
            decoded = self._current(member) or self._first(member)
            self._holding.gave_nothing = decoded is not None and not decoded.digest
            if decoded is None or self._holding.client_has(decoded):
                return None
            return decoded.definitions
        except Exception as error:
            self._give_up("definitions cannot be had from the shared cache", error)
            return self._holding.definitions()

    def on_flag_definitions_received(self, data: Any) -> None:
        """Publish what this process fetched, unless something newer was published meanwhile.

        Never raises: data that cannot be stored is logged, and what is served stays as it is.
        """
        try:
            member = self._me()
            if self._publisher.receive(member, data) and self._upstream is not None:
                self._upstream.publish(member, data)
        except Exception as error:
            self._give_up("what was fetched could not be published", error)

    def shutdown(self) -> None:
        """Hand leadership over at once and stop the watcher. Idempotent; never raises."""
        try:
            self._watchers.stop()
            member = self._me()
            if not member.closed:
                member.closed = True
                try:
                    member.leave()
                finally:
                    if self._upstream is not None:
                        self._upstream.shutdown(member)
        except Exception as error:
            self._complain("shutdown could not hand over", error)

    # -- beyond the protocol

    def attach(self, client: Any, *, watch: bool = True, interval: float = 0.05) -> None:
        """Tell the cache which `posthog.Posthog` client it serves; one client per cache.

        Then an unchanged poll is free, the client never asks with a stale ETag, and (unless `watch` is
        False) a thread has the client poll as soon as something was published, looking every
        `interval` seconds. The client is held weakly. Raises `TypeError` or `ValueError` for what is no
        client of this cache, or a second one.
        """
        attachment = Attachment(client, self)
        if not self._holding.attach(attachment, client):
            return
        if difference := attachment.differs_from(self._settings.interval_ns / 1e9):
            self._complain("poll_interval differs", difference)
        self._reloader = self.watch(self._reload, interval) if watch else None

    def status(self) -> Status:
        """What is going on for this service key on this host, and what is wrong, in words.

        Takes no lock, creates no file, and does not raise.
        """
        from shmflags import status

        told = self._settings
        at = locate(told.directory, told.service_key, self._host.account()[1])
        return status.read(at, self._host, told.max_bytes)

    def watch(self, callback: Callable[[], object], interval: float = 0.05) -> Watcher:
        """Call `callback()` when this process is behind what is published, or has to see who leads and fetches.

        From a second after the process's first poll, a daemon thread looks every `interval` seconds; it
        survives fork, and `shutdown` or its own `stop()` ends it. An exception in `callback` is logged.
        Raises `TypeError` or `ValueError`.
        """
        if not callable(callback):
            raise TypeError(f"callback must be callable, not {callback!r}")
        interval_s = settings.seconds("interval", interval, above=0.0)
        watcher = self._watchers.add(callback, interval_s)
        if self._member is not None and self._member.known_page is not None:
            watcher.hasten()
            self._watchers.start()
        return watcher

    # -- one poll

    def _me(self) -> Member:
        """The member that this process is; a new one after a fork or a change of user."""
        member = self._member
        account = self._host.account()
        if member is not None and member.account == account:
            return member
        is_forked = self._pid != account[0]
        if is_forked:
            # Locks of the parent's threads, which did not come along: one of them may have been
            # about to make the parent's member.
            self._pid = account[0]
            self._member_lock = threading.Lock()
            self._journal.after_fork()
            self._holding.after_fork()
            abandon_inherited()
        with self._member_lock:
            if self._member is member:
                successor = Member(self._settings, self._host, self._journal)
                if member is not None and member.pid != successor.pid:
                    successor.inherit(member)
                self._member = successor
            found = self._member
            assert found is not None
        if is_forked:
            self._watchers.restart()
        return found

    def _poll(self, member: Member) -> bool:
        self._look_at_server()
        member.thread.has_looked = False
        member.thread.fetch_failed = member.thread.fence is not None
        member.thread.fence = None
        self._holding.is_asking &= not member.thread.fetch_failed
        page = member.page(self._holding.position)
        self._watchers.start()
        if self._host.now_ns() < member.busy_until_ns:
            return False
        member.note_poll(page, self._holding.position)
        self._publisher.try_again(member, page)
        if not self._settings.electable or member.closed or not member.election.may_lead(page):
            return False
        with member.lock:
            self._publisher.tend(member, page)
            outcome = member.election.poll(page, self._client_state())
        return self._act_on(member, page, outcome)

    def _client_state(self) -> ClientState:
        watched = self._reloader is not None and self._reloader.is_prompt
        return self._holding.client_state(watched=watched)

    def _act_on(self, member: Member, page: ControlPage, outcome: Outcome) -> bool:
        """Log what happened and note the fence; True if a fetch was granted."""
        for event in outcome.events:
            member.tell(event)
        if member.election.puts_off:
            self._watchers.hasten()
        fence = outcome.fence
        if fence is None:
            return False
        # First: a child that is forked from here on does not know what its client asks with.
        was_asking, self._holding.is_asking = self._holding.is_asking, True
        if outcome.mend_etag:
            with member.lock:
                self._holding.mend_etag(page)
        self._publisher.clean_up(member, page)
        if self._upstream is not None and self._upstream.settles(member, page, fence):
            self._holding.is_asking = was_asking
            return False
        member.thread.fence = fence
        return True

    # -- definitions out

    def _current(self, member: Member) -> codec.Decoded | None:
        """What this process is to serve now: loaded before, or loaded here if there is a newer one."""
        # One look at the path is enough for both calls of a poll: it takes a quarter of their time.
        has_looked, member.thread.has_looked = member.thread.has_looked, False
        page = member.known_page if has_looked else None
        if page is None:
            page = member.page(self._holding.position)
        unshared = self._holding.ahead_of(page, member.token)
        if unshared is not None:
            return unshared
        if page.is_serving() and page.position() != self._holding.position:
            with member.lock:
                if page.position() != self._holding.position:
                    self._load(member, page)
        return self._holding.decoded

    def _load(self, member: Member, page: ControlPage) -> None:
        wanted = page.position()
        try:
            if self._holding.load(page, self._settings.max_bytes):
                member.note_loaded(page, self._holding.position)
        except (FileNotFoundError, DamagedSnapshotError, UnsafePathError) as error:
            page.report_damage(wanted)
            self._complain("the snapshot cannot be read; the leader will mend it", error)
        except OSError as error:
            self._complain("the snapshot cannot be opened; tried again at the next poll", error)

    def _first(self, member: Member) -> codec.Decoded | None:
        """Nothing to serve: fetch if nobody does, else wait for the first publish, once."""
        with member.lock:
            if member.cold_deadline_ns is None:
                member.cold_deadline_ns = self._host.now_ns() + self._settings.cold_start_ns
            deadline_ns = member.cold_deadline_ns
        # Whoever comes back without having published will not find anything by waiting.
        while self._host.now_ns() < deadline_ns and not member.thread.fetch_failed:
            page = member.page(self._holding.position)
            if self._settings.electable and self._take_over(member, page):
                return None
            page.doze(deadline_ns)
            decoded = self._current(member)
            if decoded is not None:
                return decoded
        # Once more: a process that was stopped since it last looked finds the deadline passed, and
        # would take nothing where there is something by now. Under the lock, as another thread of
        # ours may be publishing what its client has installed already.
        with member.lock:
            return self._current(member) or codec.nothing()

    def _take_over(self, member: Member, page: ControlPage) -> bool:
        if member.closed or self._host.now_ns() < member.busy_until_ns:
            return False
        try:
            with member.lock:
                if member.election.may_lead(page):
                    # A first publish that was cut short is a publish; a fetch granted now would only
                    # be dropped for it.
                    self._publisher.tend(member, page)
                outcome = member.election.take_over(page, self._client_state())
        except LockTimeoutError as error:
            self._note_busy(member, error)
            return False
        except PageReplacedError:
            return False
        return self._act_on(member, page, outcome)

    # -- between polls, and trouble

    def _notice(self) -> Hashable | None:
        holding = self._holding
        return self._me().sees_to_do(lambda: holding.position, holding.client_is_loaded)

    def _reload(self) -> None:
        """What a watcher does for an attached client: have it poll."""
        self._holding.reload()
        self._me().note_reloaded()

    def _look_at_server(self) -> None:
        if not self._told_of_server and (objection := servers.objection()):
            self._told_of_server = True
            self._complain("the server is not set up for threads", objection)

    def _note_busy(self, member: Member, error: LockTimeoutError) -> None:
        member.busy_until_ns = self._host.now_ns() + self._settings.interval_ns // 2
        self._complain("no election for half an interval", error)

    def _give_up(self, what: str, error: Exception) -> None:
        if isinstance(error, UnsafePathError):
            what = "refused, so this worker behaves as if it had no cache"
        self._complain(what, error)

    def _complain(self, what: str, error: object) -> None:
        try:
            numbers = self._member.numbers() if self._member is not None else (0, 0)
            self._journal.trouble(what, error, os.getpid(), *numbers)
        except Exception:
            pass  # A broken log handler must not become a stampede on the API.


def _after_fork(this: weakref.ref[SharedMemoryFlagCache]) -> None:
    cache = this()
    if cache is not None and (cache._member is not None or len(cache._watchers)):
        try:
            cache._me()
        except Exception as error:
            cache._complain("the cache could not be taken over by a forked child", error)
