"""What a process brings to its host: it publishes what it fetched, and looks after the snapshot.

All of it happens under the member's lock: between the moment at which the page names a snapshot of ours
and the one at which we note it as ours, another thread that polls would take us for being behind.
"""

from __future__ import annotations

from collections.abc import Callable

from shmflags import codec, publication, snapshot
from shmflags.errors import (
    InvalidDefinitionsError,
    LockTimeoutError,
    PageReplacedError,
    UnsafePathError,
)
from shmflags.holding import Holding
from shmflags.member import Member, Pending
from shmflags.page import ControlPage
from shmflags.publication import Result
from shmflags.settings import Settings

# Unequal to any digest: what the client has cannot be compared with what is published.
_UNKNOWN_DIGEST = b"could not be encoded"


class Publisher:
    """Publishes for one provider. `complain(what, error)` logs trouble that may repeat."""

    def __init__(
        self,
        settings: Settings,
        holding: Holding,
        complain: Callable[[str, object], None],
    ) -> None:
        self._settings = settings
        self._holding = holding
        self._complain = complain

    def receive(self, member: Member, data: object) -> None:
        """The client received `data` from the API: publish it, if nothing overtook the fetch.

        Raises `OSError` or `UnsafePathError` if there is no page to be had.
        """
        fence, member.thread.fence = member.thread.fence, None
        with member.lock:
            member.election.note_received()
            self._holding.received = _UNKNOWN_DIGEST
            try:
                encoded, decoded = codec.encode(data, self._holding.decoded)
            except InvalidDefinitionsError as error:
                self._complain("what was fetched cannot be shared, and what was served stays", error)
                return
            self._holding.received = decoded.digest
            if not self._settings.electable or member.closed:
                return
            page = member.page(self._holding.position)
            if fence is None:
                if page.is_serving():
                    self._complain("dropped", "definitions that nobody was told to fetch")
                    return
                fence = page.fence()
            self._publish(member, page, Pending(encoded, decoded, fence))

    def try_again(self, member: Member, page: ControlPage) -> None:
        """Publish what could not be written before, if there is such a thing."""
        if member.pending is not None:
            with member.lock:
                if member.pending is not None:
                    self._publish(member, page, member.pending)

    def tend(self, member: Member, page: ControlPage) -> None:
        """Look after the snapshot, as the leader does at each poll."""
        held = self._holding
        newest = held.decoded if member.holds_newest(page, held.position) else None
        if not publication.needs_tending(page, member.tended, newest):
            return
        try:
            tended = publication.tend(page, member.host, newest, member.owner, self._settings.max_bytes)
        except (OSError, UnsafePathError) as error:
            self._complain("the snapshot could not be restored", error)
            return
        member.tended = tended.signature
        if tended.restored is not None:
            held.position = tended.restored
        if tended.event:
            member.tell(tended.event, page)
        publication.clear_litter(page, member.is_litter)

    def _publish(self, member: Member, page: ControlPage, pending: Pending) -> None:
        size = pending.encoded.size
        if size > self._settings.max_bytes:
            member.pending = None
            self._complain(
                "what was fetched is not shared, and what was served stays",
                f"it takes {size} bytes; max_bytes is {self._settings.max_bytes}",
            )
            return
        try:
            done = publication.publish(
                page,
                member.host,
                pending.encoded,
                pending.fence,
                member.owner,
                self._settings.max_bytes,
            )
        except (OSError, LockTimeoutError, PageReplacedError, UnsafePathError) as error:
            member.pending = pending
            self._complain("a publish waits for the next poll", error)
            return
        member.pending = None
        if done.event:
            member.tell(done.event, page)
        if done.result is Result.DROPPED:
            member.tell("dropped: what was fetched, as something newer was published", page)
            return
        self._holding.adopt(pending.decoded, done.position)
        member.tended = snapshot.signature(page.directory.snapshot_path)
        member.note_loaded(page, done.position)
        if done.result is Result.PUBLISHED:
            flags, cohorts = pending.encoded.flag_count, pending.encoded.cohort_count
            member.tell(f"published: {flags} flags, {cohorts} cohorts, {size} bytes", page)
