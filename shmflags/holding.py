"""What a process has: the definitions it decoded, and what it knows of its client.

This, and nothing else, is handed on by a fork: a child of a loaded parent has the parent's objects, on
the parent's pages of memory, and its client has the parent's ETag.
"""

from __future__ import annotations

from typing import NamedTuple

from shmflags import codec, publication, snapshot
from shmflags.attachment import Attachment
from shmflags.contract import Definitions
from shmflags.election import ClientState
from shmflags.page import ControlPage
from shmflags.snapshot import NOTHING, Position

# Unequal to any digest: what the client has cannot be compared with what is published.
UNKNOWN_DIGEST = b"not to be compared"


class Unshared(NamedTuple):
    """What this process fetched and could not publish; `publications` is the count of them that it had noted.

    It is newer than all that was published until then. Without a page there is no count to note.
    `token` is that of the member who tries again; a forked child does not, and may never be told when
    it is outdated.
    """

    decoded: codec.Decoded
    publications: int | None
    token: int


class Holding:
    """The definitions at `position`, what the client last `received`, and the attached client."""

    def __init__(self) -> None:
        self.decoded: codec.Decoded | None = None
        self.position: Position = NOTHING
        self.unshared: Unshared | None = None
        # Digest of what the client last received from the API: what its ETag stands for.
        self.received: bytes | None = None
        self.attachment: Attachment | None = None
        # Empty definitions were handed out last, for want of others.
        self.gave_nothing = False
        # A thread was told to fetch, and nothing has come back: the client may have an ETag by now
        # of which `received` does not tell yet.
        self.is_asking = False

    def attach(self, attachment: Attachment, client: object) -> bool:
        """Take `client` for ours; False if it is already. Raises `ValueError` if another one is, and lives."""
        present = self.attachment
        if present is None or not present.is_live:
            self.attachment = attachment
            return True
        if not present.is_client(client):
            raise ValueError("this cache already serves another live client; make one cache per client")
        return False

    def reload(self) -> None:
        """Have the attached client poll, if it has loaded before."""
        if self.attachment is not None:
            self.attachment.reload()

    @property
    def is_attached(self) -> bool:
        """Whether there is an attached client."""
        return self.attachment is not None and self.attachment.is_live

    def client_state(self, *, watched: bool) -> ClientState:
        """The client as the election is to see it; `watched` if a watcher looks between its polls."""
        attached = self.is_attached
        received = self.received
        if attached and received is not None and not self._is_evaluated():
            # Two threads of the client loaded at once, and the older load was installed last; being
            # told 304 it would keep that.
            received = UNKNOWN_DIGEST
        # Another thread's fetch may have been installed just before those empty definitions were.
        position = NOTHING if self.gave_nothing and not attached else self.position
        is_starting = attached and watched and not self.client_is_loaded()
        return ClientState(received, position, attached, is_starting)

    def etag_of(self, data: object) -> str:
        """The API's ETag for `data`, which the client has just received; "" if it is not known."""
        if self.attachment is None or not isinstance(data, dict):
            return ""
        return self.attachment.etag_of(data.get("flags"))

    def mend_etag(self, page: ControlPage) -> None:
        """The attached client's ETag is none, or not to be trusted: give it that of what it evaluates.

        If that is what is published, and its ETag is known; else the client asks for a full answer.
        """
        if self.attachment is None:
            return
        held = self.decoded
        if held is not None and held.etag and self.position == page.position():
            self.received = held.digest  # First: a fetch that ends just now is to have the last word.
            if self.attachment.lend_etag(held.definitions["flags"], held.etag):
                return
        self.attachment.clear_etag()

    def after_fork(self) -> None:
        """In a forked child: the answer to a fetch of the parent's went to the parent."""
        if self.is_asking:
            self.received = UNKNOWN_DIGEST
            self.is_asking = False

    def adopt(self, decoded: codec.Decoded, position: Position) -> None:
        """These objects are what stands at `position`."""
        self.decoded, self.position = decoded, position
        self.unshared = None

    def ahead_of(self, page: ControlPage, token: int) -> codec.Decoded | None:
        """What we fetched and could not publish, as long as nothing newer is published.

        Without it the client would go back to what it had before its fetch, or to nothing.
        """
        unshared = self.unshared
        if unshared is None:
            return None
        if page.is_serving() and (page.fence().publications, token) != (
            unshared.publications,
            unshared.token,
        ):
            self.unshared = None
            return None
        return unshared.decoded

    def load(self, page: ControlPage, max_bytes: int) -> bool:
        """Load the snapshot, decoding what is new in it; False if it is not one to be served.

        Raises `OSError`, `UnsafePathError` or `DamagedSnapshotError`; what was held stays.
        """
        found = snapshot.read(page.directory, max_bytes, self.decoded)
        position = found.header.position
        last = page.last_position()
        is_current = position == last or publication.is_successor(position, last, page.incarnation)
        if found.header.boot_id != page.host.boot_id() or not is_current:
            return False
        self.adopt(found.decoded, position)
        return True

    def _is_evaluated(self) -> bool:
        """Whether the attached client evaluates from what is held here."""
        if self.attachment is None or self.decoded is None:
            return False
        return self.attachment.evaluates(self.decoded.definitions["flags"])

    def client_is_loaded(self) -> bool:
        """Whether the attached client has loaded flags."""
        return self.attachment is not None and self.attachment.is_loaded

    def client_has(self, decoded: codec.Decoded) -> bool:
        """Whether the attached client evaluates from this very list already."""
        return self.attachment is not None and self.attachment.holds(decoded.definitions["flags"])

    def definitions(self) -> Definitions | None:
        return None if self.decoded is None else self.decoded.definitions
