"""The snapshot file: written whole or not at all, checked before it is decoded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from shmflags import codec, snapshot
from shmflags.errors import DamagedSnapshotError, UnsafePathError
from shmflags.runtime_dir import RuntimeDir, locate
from shmflags.snapshot import HEADER_BYTES, Draft, Position

MAX_BYTES = 1 << 20
DATA: dict[str, Any] = {
    "flags": [{"key": "a"}, {"key": "b"}],
    "group_type_mapping": {"0": "g"},
    "cohorts": {"1": {"type": "AND"}},
}


@pytest.fixture
def home(directory: Path) -> RuntimeDir:
    found = locate(directory, "test", os.geteuid())
    found.prepare(lambda _: None)
    return found


def write(home: RuntimeDir, data: dict[str, Any] = DATA, generation: int = 7) -> snapshot.Header:
    encoded, _ = codec.encode(data)
    draft = Draft(home, encoded, "1-2-3-4")
    try:
        return draft.put_in_place(Position(5, generation), 9, boot_id=1 << 100, wall_ns=11)
    finally:
        draft.discard()


def test_what_is_written_is_read(home: RuntimeDir) -> None:
    """Header and definitions come back as they were given, from a private file."""
    written = write(home)
    found = snapshot.read(home, MAX_BYTES)
    assert found.header == written
    assert found.decoded.definitions == DATA
    assert found.header.position == Position(5, 7)
    assert (found.header.publications, found.header.boot_id, found.header.published_wall_ns) == (
        9,
        1 << 100,
        11,
    )
    assert (found.header.flag_count, found.header.cohort_count) == (2, 1)
    info = os.stat(home.snapshot_path)
    assert info.st_mode & 0o777 == 0o600
    assert info.st_size == written.size
    assert snapshot.verify(home, MAX_BYTES) == snapshot.read_header(home, MAX_BYTES) == written


def test_a_draft_is_invisible_until_it_is_put_in_place(home: RuntimeDir) -> None:
    """A draft stands under another name, and leaves nothing behind when it is given up."""
    write(home)
    encoded, _ = codec.encode({**DATA, "flags": []})
    draft = Draft(home, encoded, "1-2-3-5")
    assert snapshot.read(home, MAX_BYTES).decoded.definitions == DATA
    assert [owner for _, owner in home.temporary_files()] == ["1-2-3-5"]
    draft.discard()
    draft.discard()
    assert home.temporary_files() == []
    assert snapshot.read(home, MAX_BYTES).decoded.definitions == DATA


def test_a_wide_umask_does_not_matter(home: RuntimeDir) -> None:
    """The file is private, and can be read again by us, whatever the umask says."""
    before = os.umask(0o777)
    try:
        write(home)
    finally:
        os.umask(before)
    assert os.stat(home.snapshot_path).st_mode & 0o777 == 0o600


def test_unchanged_items_are_the_objects_of_before(home: RuntimeDir) -> None:
    """Reading a second generation gives the same objects for what did not change."""
    write(home)
    first = snapshot.read(home, MAX_BYTES)
    write(home, {**DATA, "flags": [{"key": "a"}, {"key": "c"}]}, generation=8)
    second = snapshot.read(home, MAX_BYTES, first.decoded)
    before, after = first.decoded.definitions["flags"], second.decoded.definitions["flags"]
    assert after[0] is before[0]
    assert after[1] == {"key": "c"}


def test_every_flipped_bit_of_header_and_index_is_noticed(home: RuntimeDir) -> None:
    """No single bit of header, index or items can change without being noticed."""
    write(home)
    good = home.snapshot_path.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        home.snapshot_path.write_bytes(bad)
        for check in (snapshot.read, snapshot.verify):
            with pytest.raises(DamagedSnapshotError):
                check(home, MAX_BYTES)


def test_every_truncation_is_noticed(home: RuntimeDir) -> None:
    """A snapshot that lacks its end, or has something after it, is refused."""
    write(home)
    good = home.snapshot_path.read_bytes()
    for size in range(len(good)):
        home.snapshot_path.write_bytes(good[:size])
        with pytest.raises(DamagedSnapshotError):
            snapshot.read(home, MAX_BYTES)
    home.snapshot_path.write_bytes(good + b"\0")
    with pytest.raises(DamagedSnapshotError):
        snapshot.read(home, MAX_BYTES)


@pytest.mark.parametrize(("flags", "cohorts"), [(1, 2), (3, 0), (2**32 - 1, 2**32 - 1), (0, 0)])
def test_a_right_digest_on_a_wrong_header_is_refused(
    home: RuntimeDir, flags: int, cohorts: int
) -> None:
    """Counts that do not fit index and items are refused even where the header's digest fits."""
    write(home)
    content = bytearray(home.snapshot_path.read_bytes())
    content[64:68], content[68:72] = flags.to_bytes(4, "little"), cohorts.to_bytes(4, "little")
    content[88:104] = codec.digest_of(bytes(content[:88]))
    home.snapshot_path.write_bytes(content)
    with pytest.raises(DamagedSnapshotError):
        snapshot.read(home, MAX_BYTES)


def test_a_size_out_of_bounds_is_refused_unread(home: RuntimeDir) -> None:
    """A file larger than the maximum, or smaller than a header, is refused by its size alone."""
    size = write(home).size
    assert snapshot.read(home, size).header.size == size
    with pytest.raises(DamagedSnapshotError, match="possible"):
        snapshot.read(home, size - 1)
    os.truncate(home.snapshot_path, 1 << 40)
    with pytest.raises(DamagedSnapshotError, match=str(1 << 40)):
        snapshot.read(home, MAX_BYTES)
    os.truncate(home.snapshot_path, HEADER_BYTES - 1)
    with pytest.raises(DamagedSnapshotError, match="possible"):
        snapshot.read(home, MAX_BYTES)


def test_a_foreign_thing_at_the_path_is_not_replaced(home: RuntimeDir) -> None:
    """A directory where the snapshot should be is refused, with what to do."""
    os.mkdir(home.snapshot_path)
    with pytest.raises(UnsafePathError, match="remove"):
        write(home)
    assert home.temporary_files() == []


def test_a_file_without_a_snapshot_has_no_signature(home: RuntimeDir) -> None:
    """A signature tells one file from the next, and none from one."""
    assert snapshot.signature(home.snapshot_path) is None
    write(home)
    first = snapshot.signature(home.snapshot_path)
    assert first == snapshot.signature(home.snapshot_path)
    write(home)
    assert snapshot.signature(home.snapshot_path) not in (None, first)
