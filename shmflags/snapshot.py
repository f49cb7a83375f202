"""The snapshot: one generation of the definitions, in an immutable file.

It is written whole under a temporary name, with write(), so that a full disk is an `OSError` and not
a SIGBUS, and then renamed over the last one. It never changes afterwards. Readers map it read-only,
check it, and decode from the map. Layout, little-endian:

    offset  size  field
    0       8     magic, b"shmflags"
    8       8     incarnation of the page it was published under
    16      8     generation within that incarnation, 1 and up
    24      8     publication count at which it was published
    32      16    boot id
    48      8     total length of the file in bytes
    56      8     wall-clock time of publication, nanoseconds since the epoch
    64      4     number of flags
    68      4     number of cohorts
    72      16    content digest (over the index and the two counts)
    88      88    the API's ETag for this content, in printable ASCII, padded with zeros; empty if
                  it is not known, longer, or anything else
    176     16    digest of the 176 bytes before
    192     20*n  index: n = 1 + flags + cohorts entries (item_index.py)
    …             body: a checksum, and the items' bytes (codec.py)

So the header vouches for the index, the index for each item, and a reader that holds an item
already need not look at its bytes again. A generation is meaningful only together with its
incarnation: (incarnation, generation) is a `Position`.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from shmflags import codec, item_index
from shmflags.errors import DamagedSnapshotError
from shmflags.runtime_dir import RuntimeDir, may_replace, open_private

_MAGIC = b"shmflags"
_ETAG_BYTES = 88
_FIELDS = struct.Struct(f"<8sQQQ16sQQII16s{_ETAG_BYTES}s")
HEADER_BYTES = _FIELDS.size + item_index.DIGEST_BYTES
DEFAULT_MAX_BYTES = 256 * 1024 * 1024
# No number that rises by one at a time gets here; one that is there already was not written by us.
IMPOSSIBLE = 1 << 48


class Position(NamedTuple):
    """Which snapshot: a generation, and the incarnation in which it counts. Not ordered across."""

    incarnation: int
    generation: int


NOTHING = Position(0, 0)


class Header(NamedTuple):
    """The first bytes of a snapshot, checked."""

    position: Position
    publications: int
    boot_id: int
    size: int
    published_wall_ns: int
    flag_count: int
    cohort_count: int
    digest: bytes
    etag: str = ""


class Signature(NamedTuple):
    """What stat() tells of a file; another file, or another content, has another one."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @staticmethod
    def of(info: os.stat_result) -> Signature:
        return Signature(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


class Snapshot(NamedTuple):
    """A decoded snapshot, and where it stands."""

    header: Header
    decoded: codec.Decoded


def signature(path: Path) -> Signature | None:
    """The signature of the file at `path`, None if there is none."""
    try:
        return Signature.of(os.lstat(path))
    except OSError:
        return None


class MappedSnapshot:
    """A snapshot file mapped read-only, its header and index checked. A context manager."""

    def __init__(self, directory: RuntimeDir, max_bytes: int) -> None:
        path = directory.snapshot_path
        descriptor = open_private(path, os.O_RDONLY, directory.uid)
        try:
            # The size is compared before the map is touched: beyond the end lies SIGBUS.
            size = os.fstat(descriptor).st_size
            if not HEADER_BYTES <= size <= max_bytes:
                raise DamagedSnapshotError(
                    f"its size is {size} bytes; {HEADER_BYTES} to {max_bytes} are possible",
                    path=path,
                )
            self._map = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        self._views: list[memoryview] = []
        try:
            self.header = _checked_header(self._view(0, HEADER_BYTES), size)
            end = HEADER_BYTES + item_index.ENTRY.size * (
                1 + self.header.flag_count + self.header.cohort_count
            )
            if end > size:
                raise DamagedSnapshotError("its index is cut off")
            self.index = self._view(HEADER_BYTES, end)
            self.body = self._view(end, size)
            counts = self.header.flag_count, self.header.cohort_count
            if item_index.content_digest(self.index, *counts) != self.header.digest:
                raise DamagedSnapshotError("its index does not match its digest")
        except DamagedSnapshotError as error:
            self.close()
            raise DamagedSnapshotError(error.reason, path=path) from None

    def _view(self, start: int, end: int) -> memoryview:
        view = memoryview(self._map)[start:end]
        self._views.append(view)
        return view

    def __enter__(self) -> MappedSnapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        # A map with views on it cannot be closed.
        for view in self._views:
            view.release()
        try:
            self._map.close()
        except BufferError:
            pass  # A traceback still holds a slice; the map goes when that goes.


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give damage found in the block the path of the file."""
    try:
        yield
    except DamagedSnapshotError as error:
        raise DamagedSnapshotError(error.reason, path=path) from None


def read(directory: RuntimeDir, max_bytes: int, known: codec.Decoded | None = None) -> Snapshot:
    """Read and decode the snapshot, reusing the objects of `known`.

    Raises `FileNotFoundError`, other `OSError`, `UnsafePathError` or `DamagedSnapshotError`.
    """
    with _named(directory.snapshot_path), MappedSnapshot(directory, max_bytes) as mapped:
        header = mapped.header
        counts = header.flag_count, header.cohort_count
        decoded = codec.decode(mapped.index, mapped.body, *counts, header.digest, known, header.etag)
        return Snapshot(header, decoded)


def verify(directory: RuntimeDir, max_bytes: int) -> Header:
    """Check every byte of the snapshot without decoding it. Raises as `read` does."""
    with _named(directory.snapshot_path), MappedSnapshot(directory, max_bytes) as mapped:
        codec.check_items(mapped.index, mapped.body)
        return mapped.header


def read_header(directory: RuntimeDir, max_bytes: int) -> Header:
    """Check header and index only. Raises as `read` does."""
    with MappedSnapshot(directory, max_bytes) as mapped:
        return mapped.header


def _checked_header(view: memoryview, size: int) -> Header:
    fields = bytes(view[: _FIELDS.size])
    if item_index.digest_of(fields) != view[_FIELDS.size :]:
        raise DamagedSnapshotError("its header does not match its digest")
    (magic, incarnation, generation, count, boot, length, wall, flags, cohorts, digest, etag) = (
        _FIELDS.unpack(fields)
    )
    if magic != _MAGIC or length != size or not incarnation or not 0 < generation < IMPOSSIBLE > count:
        raise DamagedSnapshotError("its header is not that of a snapshot of this size")
    return Header(
        position=Position(incarnation, generation),
        publications=count,
        boot_id=int.from_bytes(boot, "little"),
        size=length,
        published_wall_ns=wall,
        flag_count=flags,
        cohort_count=cohorts,
        digest=digest,
        etag=_sound_etag(etag.rstrip(b"\0").decode("latin-1")),
    )


class Draft:
    """A snapshot being written: everything but the header, under a temporary name.

    The bulk is written before the lock is taken; under the lock, when position and count are
    known, `put_in_place` writes the header and renames. Until then nobody can read it.
    """

    def __init__(self, directory: RuntimeDir, encoded: codec.Encoded, owner: str) -> None:
        """Write the draft. `owner` names the writing process in the file's name.

        Raises `OSError` (no space, no directory, no descriptors); then nothing is left behind.
        """
        self._target = directory.snapshot_path
        self._uid = directory.uid
        self._encoded = encoded
        self.size = HEADER_BYTES + encoded.size
        self._path = directory.temporary_path("snapshot", owner)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        # Open until the end: under the lock no descriptor must be had that might not be had.
        self._descriptor = os.open(self._path, flags, 0o600)
        try:
            os.fchmod(self._descriptor, 0o600)  # Whatever the umask says.
            beginning = bytes(HEADER_BYTES) + encoded.entries
            _write_all(self._descriptor, beginning, 0)
            _write_all(self._descriptor, encoded.body, len(beginning))
        except BaseException:
            self.discard()
            raise

    def put_in_place(self, position: Position, count: int, boot_id: int, wall_ns: int) -> Header:
        """Complete the header and make this the snapshot. Raises `OSError`, `UnsafePathError`."""
        encoded = self._encoded
        etag = _sound_etag(encoded.etag)
        fields = _FIELDS.pack(
            _MAGIC,
            position.incarnation,
            position.generation,
            count,
            boot_id.to_bytes(16, "little"),
            self.size,
            wall_ns,
            encoded.flag_count,
            encoded.cohort_count,
            encoded.digest,
            etag.encode("ascii"),
        )
        _write_all(self._descriptor, fields + item_index.digest_of(fields), 0)
        may_replace(self._target, self._uid)
        os.replace(self._path, self._target)
        return Header(
            position,
            count,
            boot_id,
            self.size,
            wall_ns,
            encoded.flag_count,
            encoded.cohort_count,
            encoded.digest,
            etag,
        )

    def discard(self) -> None:
        """Close, and remove the temporary file if it is still there. Harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        try:
            os.unlink(self._path)
        except OSError:
            pass


def _sound_etag(etag: str) -> str:
    """The ETag if it can be stored, and sent in a request; else none."""
    return etag if len(etag) <= _ETAG_BYTES and etag.isascii() and etag.isprintable() else ""


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
