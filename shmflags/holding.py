"""What a process has: the definitions it decoded, and what it knows of its client.

This, and nothing else, is handed on by a fork: a child of a loaded parent has the parent's objects, on
the parent's pages of memory, and its client has the parent's ETag.
"""

from __future__ import annotations

from shmflags import codec, publication, snapshot
from shmflags.attachment import Attachment
from shmflags.contract import Definitions
from shmflags.election import ClientState
from shmflags.page import ControlPage
from shmflags.processes import Host
from shmflags.snapshot import NOTHING, Position


class Holding:
    """The definitions at `position`, what the client last `received`, and the attached client."""

    def __init__(self) -> None:
        self.decoded: codec.Decoded | None = None
        self.position: Position = NOTHING
        # Digest of what the client last received from the API: what its ETag stands for.
        self.received: bytes | None = None
        self.attachment: Attachment | None = None

    def client_state(self) -> ClientState:
        attached = self.attachment is not None and self.attachment.is_live
        return ClientState(self.received, self.position, attached)

    def adopt(self, decoded: codec.Decoded, position: Position) -> None:
        """These objects are what stands at `position`."""
        self.decoded, self.position = decoded, position

    def load(self, page: ControlPage, host: Host, max_bytes: int) -> bool:
        """Load the snapshot, decoding what is new in it; False if it is not one to be served.

        Raises `OSError`, `UnsafePathError` or `DamagedSnapshotError`; what was held stays.
        """
        found = snapshot.read(page.directory, max_bytes, self.decoded)
        position = found.header.position
        last = page.last_position()
        is_current = position == last or publication.is_successor(position, last, page.incarnation)
        if found.header.boot_id != host.boot_id() or not is_current:
            return False
        self.adopt(found.decoded, position)
        return True

    def client_has(self, decoded: codec.Decoded) -> bool:
        """Whether the attached client evaluates from this very list already."""
        return self.attachment is not None and self.attachment.holds(decoded.definitions["flags"])

    def definitions(self) -> Definitions | None:
        return None if self.decoded is None else self.decoded.definitions
