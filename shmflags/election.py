"""Who fetches, and when: a lease, grants that are due, and a fence for what was fetched.

Theory of operation, as rules. The first part of the file states them as pure functions over
records and a clock; `Election` applies them to the page, under its lock.

1.  The leader is the process whose token is in the page while the deadline is ahead. It renews by
    polling and in no other way: a process whose poller died loses the lease.
2.  The lease may be taken when it is vacant, has run out, ends further ahead than it is long (a
    clock that jumped), or its holder is provably dead. Taking it raises the term.
3.  The leader is granted a fetch when the host's last grant is half a poll interval old. So restarts
    cost nothing: it is the host's grant that counts, not the leader's.
4.  With nothing to serve, a grant whose grantee is provably dead may follow sooner: after 1 s, then
    2 s, 4 s, … up to half an interval.
5.  A fetch is accepted only if nothing was published since its grant, in the same life of the page,
    and in the same term unless nothing can be served. Holding the lease is no argument: a leader
    deposed and elected again must not publish what it fetched before.
6.  The SDK sends the ETag of what it last received from the API, which need not be what is published
    or what it holds. An answer of 304 would then freeze old flags. Where the client is attached it
    is given that of the snapshot, if it evaluates from it, and else none; where it is not, the grant
    must bring a publish before the next poll, or the leader steps back and lets another worker fetch.
7.  The same holds for a leader that is granted a fetch while nothing can be served: one without a
    key, or whose requests fail, makes way.
8.  A 304 and a failure look alike from here, so after `max_term` the leader makes way once, if another
    worker lives. This bounds how long a silent failure goes unnoticed.
9.  Who makes way, or would lead with an ETag that cannot be trusted, abstains for one interval.
10. A leader whose client is only starting takes what is served first, and fetches when it has that: it
    need not wait for the API, and asks with the snapshot's ETag. But only where somebody looks
    between polls, until the host's last grant is one and a half intervals old, and not if the last
    such fetch never came to its end: else workers that live for a moment might put it off for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from shmflags.page import ControlPage, Fence, Grant, Lease
from shmflags.processes import Host, Identity
from shmflags.snapshot import Position

_SECOND_NS = 1_000_000_000
# Three of the longest poll intervals are less; a lease this long is garbage, and would bar all for ever.
_IMPOSSIBLE_LEASE_NS = 30 * 24 * 3600 * _SECOND_NS


def why_takeable(lease: Lease, now_ns: int, is_dead: Callable[[Identity], bool]) -> str | None:
    """The reason for which the lease may be taken (rule 2), or None."""
    if not lease.token or not lease.deadline_ns:
        return "it was vacant"
    if lease.deadline_ns <= now_ns:
        return "it had run out"
    if lease.deadline_ns - now_ns > lease.length_ns:
        return "its deadline was further ahead than it is long"
    if lease.length_ns > _IMPOSSIBLE_LEASE_NS:
        return "it was longer than any lease can be"
    if is_dead(lease.holder):
        return "its holder is dead"
    return None


def is_due(
    grant: Grant,
    now_ns: int,
    interval_ns: int,
    *,
    serving: bool,
    is_dead: Callable[[Identity], bool],
) -> bool:
    """Whether the host may ask the API again (rules 3 and 4)."""
    since_ns = now_ns - grant.at_ns
    # A grant in the future is one of a clock that jumped.
    if not grant.at_ns or since_ns < 0 or since_ns >= interval_ns // 2:
        return True
    if serving:
        return False
    pause_ns = _SECOND_NS << min(max(grant.attempts - 1, 0), 32)
    return since_ns >= pause_ns and is_dead(grant.holder)


def may_publish(noted: Fence, current: Fence, *, serving: bool) -> bool:
    """Whether what was fetched under `noted` may still be published (rule 5)."""
    if (noted.incarnation, noted.publications) != (current.incarnation, current.publications):
        return False
    return noted.term == current.term or not serving


def may_wait(grant: Grant, now_ns: int, interval_ns: int) -> bool:
    """Whether a fetch that is due may be put off for a moment (rule 10), while something is served."""
    return not grant.attempts and 0 <= now_ns - grant.at_ns < interval_ns * 3 // 2


class ClientState(NamedTuple):
    """What is known of this process's client when it polls.

    `received` is the digest of what it last received from the API (None: nothing yet, so it has no
    ETag), `position` the snapshot that it holds, `attached` whether its ETag can be mended, and
    `is_starting` whether it has no flags yet and will be polled again as soon as it has.
    """

    received: bytes | None
    position: Position
    attached: bool
    is_starting: bool = False


class Outcome(NamedTuple):
    """What became of a poll. `fence` is set if, and only if, a fetch was granted.

    `mend_etag` if the client must not fetch with the ETag that it has, or has none.
    """

    leads: bool
    fence: Fence | None = None
    mend_etag: bool = False
    events: tuple[str, ...] = ()


FOLLOW = Outcome(leads=False)


class _Outstanding(NamedTuple):
    """A grant that must bring a publish (rules 6 and 7), and the thread that fetches."""

    thread: int
    at_ns: int


class Election:
    """One contender: one provider in one process. Not shared with forked children."""

    def __init__(
        self,
        host: Host,
        token: int,
        identity: Identity,
        *,
        interval_ns: int,
        lease_ns: int,
        max_term_ns: int,
    ) -> None:
        self.host = host
        self.token = token
        self.identity = identity
        self.interval_ns = interval_ns
        self.lease_ns = lease_ns
        self.max_term_ns = max_term_ns
        self.puts_off = False
        """Whether we lead, and have put off a fetch that is due (rule 10)."""
        self._makes_up = False
        self._leads = False
        self._outstanding: _Outstanding | None = None
        self._abstain_until_ns = 0
        self._abstained_term = -1
        self._events: list[str] = []

    def may_lead(self, page: ControlPage) -> bool:
        """Without the lock: whether `poll` has anything to do here. A hint."""
        lease = page.lease()
        if lease.token == self.token:
            return True
        if self._leads:
            return True  # Deposed; `poll` says so once.
        now_ns = self.host.now_ns()
        if now_ns < self._abstain_until_ns:
            return False
        return why_takeable(lease, now_ns, self.host.has_ended) is not None

    def poll(self, page: ControlPage, client: ClientState) -> Outcome:
        """A poll of ours: renew or take the lease, and be granted a fetch if one is due.

        Raises `LockTimeoutError` or `PageReplacedError`; then nothing has changed.
        """
        with page.locked():
            now_ns = self.host.now_ns()
            lease = page.lease()
            if lease.token == self.token:
                may_fetch = self._renew_or_make_way(page, lease, now_ns)
            else:
                may_fetch = self._take(page, lease, client, now_ns)
            return self._conclude(page, client, now_ns, may_fetch)

    def take_over(self, page: ControlPage, client: ClientState) -> Outcome:
        """Nothing can be served: if nobody is fetching, take the lease and be granted a fetch.

        Renews nothing (rule 1). Raises as `poll` does.
        """
        if not self._could_fetch_now(page):
            return FOLLOW
        with page.locked():
            now_ns = self.host.now_ns()
            lease = page.lease()
            if page.is_serving():
                return FOLLOW
            mine = lease.token == self.token
            may_fetch = mine or self._take(page, lease, client, now_ns)
            return self._conclude(page, client, now_ns, may_fetch)

    def claim(self, page: ControlPage, *, force: bool = False) -> Outcome:
        """Lead, without being told to fetch: for one who brings definitions from elsewhere.

        The fence is that of a publish now. FOLLOW if another process leads, unless `force` deposes
        it. What is ours is renewed. Raises as `poll` does.
        """
        with page.locked():
            now_ns = self.host.now_ns()
            lease = page.lease()
            if lease.token == self.token:
                self._prolong(page, lease, now_ns)
            else:
                reason = why_takeable(lease, now_ns, self.host.is_provably_dead)
                if reason is None and not force:
                    return FOLLOW
                self._seize(page, lease, now_ns, reason or "it was told to")
            events, self._events = tuple(self._events), []
            return Outcome(True, page.fence(), events=events)

    def note_received(self) -> None:
        """The client has received definitions: a grant that had to bring some, did."""
        self._outstanding = None

    def note_doubt(self) -> None:
        """The fetch just granted must bring a publish: its ETag turned out to be doubtful."""
        self._outstanding = _Outstanding(threading.get_ident(), self.host.now_ns())

    def note_answered(self, page: ControlPage) -> None:
        """A fetch that was put off has come to its end, whatever it brought. Raises as `poll` does."""
        if not self._makes_up:
            return
        self._makes_up = False
        with page.locked():
            grant = page.grant()
            if grant.token == self.token:
                page.write_grant(grant._replace(attempts=0))

    def resign(self, page: ControlPage) -> bool:
        """Free the lease if it is ours. Raises as `poll` does."""
        self._leads = self.puts_off = False
        if page.lease().token != self.token:
            return False
        with page.locked():
            if page.lease().token != self.token:
                return False
            page.vacate()
            return True

    def _could_fetch_now(self, page: ControlPage) -> bool:
        now_ns = self.host.now_ns()
        if page.lease().token != self.token and not self.may_lead(page):
            return False
        return is_due(
            page.grant(),
            now_ns,
            self.interval_ns,
            serving=False,
            is_dead=self.host.is_provably_dead,
        )

    # -- under the lock

    def _take(self, page: ControlPage, lease: Lease, client: ClientState, now_ns: int) -> bool:
        if self._leads:
            self._leads = False
            successor = f"process {lease.holder.pid} leads" if lease.token else "nobody leads now"
            self._events.append(f"deposed: {successor}")
        reason = why_takeable(lease, now_ns, self.host.is_provably_dead)
        if reason is None or now_ns < self._abstain_until_ns:
            return False
        distrusted = page.is_serving() and not client.attached and not _trusts(page, client)
        if distrusted and lease.term != self._abstained_term and self._others_live(page, now_ns):
            self._abstain(lease.term, now_ns)
            return False
        self._seize(page, lease, now_ns, reason)
        return True

    def _seize(self, page: ControlPage, lease: Lease, now_ns: int, reason: str) -> None:
        page.write_lease(
            Lease(
                term=lease.term + 1,
                token=self.token,
                holder=self.identity,
                length_ns=self.lease_ns,
                deadline_ns=now_ns + self.lease_ns,
                elected_ns=now_ns,
                elected_wall_ns=self.host.wall_ns(),
            )
        )
        self._leads = True
        self._outstanding = None
        if lease.token and lease.deadline_ns:
            page.count("takeovers")
            self._events.append(f"took over: from process {lease.holder.pid}, as {reason}")
        else:
            self._events.append(f"elected: to lead, as {reason}")

    def _renew_or_make_way(self, page: ControlPage, lease: Lease, now_ns: int) -> bool:
        """Whether the leader may fetch at this poll; it holds the lease still unless it made way."""
        self._leads = True
        fruitless = self._is_fruitless(now_ns)
        if fruitless:
            self._outstanding = None
        others_live = (fruitless or now_ns - lease.elected_ns > self.max_term_ns) and self._others_live(
            page, now_ns
        )
        if others_live:
            page.vacate()
            self._leads = False
            self._abstain(lease.term, now_ns)
            reason = "its fetch brought nothing" if fruitless else "it led for max_term"
            self._events.append(f"yielded: {reason}")
            return False
        self._prolong(page, lease, now_ns)
        # Alone, and fetching in vain with a doubtful ETag: take what is published, then try again.
        return not (fruitless and page.is_serving())

    def _prolong(self, page: ControlPage, lease: Lease, now_ns: int) -> None:
        page.write_lease(
            Lease(
                term=lease.term,
                token=self.token,
                holder=self.identity,
                length_ns=self.lease_ns,
                deadline_ns=now_ns + self.lease_ns,
                elected_ns=lease.elected_ns,
                elected_wall_ns=lease.elected_wall_ns,
            )
        )

    def _is_fruitless(self, now_ns: int) -> bool:
        """Whether a fetch that had to bring a publish has ended without one."""
        owed = self._outstanding
        if owed is None:
            return False
        # Another thread may poll while the fetch goes on; after an interval it counts as failed.
        return threading.get_ident() == owed.thread or now_ns - owed.at_ns >= self.interval_ns

    def _conclude(
        self, page: ControlPage, client: ClientState, now_ns: int, may_fetch: bool
    ) -> Outcome:
        fence = None
        mend_etag = False
        grant = page.grant()
        serving = page.is_serving()
        due = may_fetch and is_due(
            grant,
            now_ns,
            self.interval_ns,
            serving=serving,
            is_dead=self.host.is_provably_dead,
        )
        waits = serving and client.is_starting and may_wait(grant, now_ns, self.interval_ns)
        was_put_off, self.puts_off = self.puts_off, due and waits
        if due and not waits:
            trusted = _trusts(page, client)
            mend_etag = client.attached and (client.received is None or not trusted)
            must_publish = not serving or not (trusted or client.attached)
            self._outstanding = _Outstanding(threading.get_ident(), now_ns) if must_publish else None
            page.write_grant(
                Grant(
                    at_ns=now_ns,
                    token=self.token,
                    holder=self.identity,
                    attempts=int(was_put_off) if serving else grant.attempts + 1,
                    at_wall_ns=self.host.wall_ns(),
                )
            )
            page.count("granted")
            self._makes_up = was_put_off
            fence = page.fence()
        events, self._events = tuple(self._events), []
        return Outcome(self._leads, fence, mend_etag, events)

    def _abstain(self, term: int, now_ns: int) -> None:
        self._abstained_term = term
        self._abstain_until_ns = now_ns + self.interval_ns

    def _others_live(self, page: ControlPage, now_ns: int) -> bool:
        """Whether another worker is there to lead: electable, polling, and not dead."""
        return any(
            worker.electable
            and worker.token != self.token
            and abs(now_ns - worker.last_poll_ns) <= worker.interval_ns * 5 // 2
            and not self.host.is_provably_dead(worker.identity)
            for worker in page.workers.rows()
        )


def _trusts(page: ControlPage, client: ClientState) -> bool:
    """Whether a 304 to this client would mean that the published content is the current one."""
    if client.received is None:
        return True  # It has no ETag and gets a full answer.
    return client.received == page.digest() and client.position == page.position()
