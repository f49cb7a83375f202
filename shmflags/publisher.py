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
from shmflags.holding import UNKNOWN_DIGEST, Holding, Unshared
from shmflags.member import Member, Pending
from shmflags.page import ControlPage, Fence
from shmflags.publication import Result
from shmflags.settings import Settings
from shmflags.snapshot import HEADER_BYTES


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

    def receive(self, member: Member, data: object) -> bool:
        """The client received `data` from the API: publish it, if nothing overtook the fetch.

        False if it is not for an upstream either: not ours to publish, too large, or overtaken. Raises
        `OSError` or `UnsafePathError` if there is no page to be had.
        """
        fence, member.thread.fence = member.thread.fence, None
        with member.lock:
            member.election.note_received()
            self._holding.received = UNKNOWN_DIGEST
            try:
                etag = self._holding.etag_of(data)
                encoded, decoded = codec.encode(data, self._holding.decoded, etag)
            except InvalidDefinitionsError as error:
                self._complain("what was fetched cannot be shared, and what was served stays", error)
                return False
            if etag or not self._holding.is_attached:
                self._holding.received = decoded.digest
            self._holding.is_asking = False
            if not self._settings.electable or member.closed:
                return False
            try:
                page = member.page(self._holding.position)
            except Exception:
                member.pending = Pending(encoded, decoded, None)
                self._holding.unshared = Unshared(decoded, None, member.token)
                raise
            if fence is None:
                if page.is_serving():
                    self._complain("dropped", "definitions that nobody was told to fetch")
                    return False
                fence = page.fence()
            return self._publish(member, page, Pending(encoded, decoded, fence), fence)

    def copy(
        self,
        member: Member,
        page: ControlPage,
        fence: Fence,
        found: codec.Decoded,
        encoded: codec.Encoded | None,
    ) -> bool:
        """Under the member's lock: publish what the upstream has, with the fence of the grant.

        `encoded` is None if `found` is what we hold. False if it is too large.
        """
        if encoded is None:
            if page.is_serving() and page.digest() == found.digest:
                self._confirm(member, page, fence)
                return True
            encoded, _ = codec.encode(found.definitions, found, found.etag)
        self._publish(member, page, Pending(encoded, found, fence), fence)
        return HEADER_BYTES + encoded.size <= self._settings.max_bytes

    def _confirm(self, member: Member, page: ControlPage, fence: Fence) -> None:
        try:
            publication.confirm(page, fence)
        except (OSError, LockTimeoutError, PageReplacedError) as error:
            self._complain("what the upstream has is confirmed at the next poll", error)

    def try_again(self, member: Member, page: ControlPage) -> None:
        """Publish what could not be written before, if there is such a thing."""
        if member.pending is None:
            return
        with member.lock:
            pending = member.pending
            if pending is None:
                return
            if pending.fence is not None:
                self._publish(member, page, pending, pending.fence)
            elif page.is_serving():
                member.pending = None  # Which of the two is newer, nobody can tell.
            else:
                self._publish(member, page, pending, page.fence())

    def tend(self, member: Member, page: ControlPage) -> None:
        """Look after the snapshot, as the leader does at each poll."""
        held = self._holding
        newest = held.decoded if member.holds_newest(page, held.position) else None
        if not publication.needs_tending(page, member.tended, newest):
            return
        try:
            tended = publication.tend(page, newest, member.owner, self._settings.max_bytes)
        except (OSError, UnsafePathError) as error:
            self._complain("the snapshot could not be restored", error)
            return
        member.tended = tended.signature
        if tended.restored is not None:
            held.position = tended.restored
        if tended.event:
            member.tell(tended.event)

    def clean_up(self, member: Member, page: ControlPage) -> None:
        """Remove what others left when they were killed. Whoever is granted a fetch does this."""
        publication.clear_litter(page, member.is_litter)

    def _publish(self, member: Member, page: ControlPage, pending: Pending, fence: Fence) -> bool:
        self._holding.unshared = Unshared(pending.decoded, fence.publications, member.token)
        size = HEADER_BYTES + pending.encoded.size
        if size > self._settings.max_bytes:
            member.pending = None
            self._complain(
                "what was fetched is not shared, and what was served stays",
                f"it takes {size} bytes; max_bytes is {self._settings.max_bytes}",
            )
            return False
        try:
            done = publication.publish(
                page, pending.encoded, fence, member.owner, self._settings.max_bytes
            )
        except (OSError, LockTimeoutError, PageReplacedError, UnsafePathError) as error:
            member.pending = pending
            self._complain("a publish waits for the next poll", error)
            return True
        member.pending = None
        if done.event:
            member.tell(done.event)
        if done.result is Result.DROPPED:
            overtaken = self._holding.ahead_of(page, member.token) is None
            reason = "something newer was published" if overtaken else "another worker leads by now"
            member.tell(f"dropped: what was fetched, as {reason}")
            # Better than nothing, but not than what is served: whoever leads may be told 304 from now
            # on, and then nothing says when this is outdated.
            self._holding.unshared = Unshared(pending.decoded, None, member.token)
            return False
        self._holding.adopt(pending.decoded, done.position)
        member.tended = snapshot.signature(page.directory.snapshot_path)
        member.note_loaded(page, done.position)
        if done.result is Result.PUBLISHED:
            flags, cohorts = pending.encoded.flag_count, pending.encoded.cohort_count
            member.tell(f"published: {flags} flags, {cohorts} cohorts, {size} bytes")
        return True
