"""The snapshot file: written whole or not at all, checked before it is decoded."""

from __future__ import annotations

import errno
import itertools
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from shmflags import codec, item_index, snapshot
from shmflags.errors import DamagedSnapshotError, UnsafePathError
from shmflags.runtime_dir import RuntimeDir
from shmflags.snapshot import HEADER_BYTES, Draft, Position, Signature
from tests.support import open_descriptors

MAX_BYTES = 1 << 20
DATA: dict[str, Any] = {
    "flags": [{"key": "a"}, {"key": "b"}],
    "group_type_mapping": {"0": "g"},
    "cohorts": {"1": {"type": "AND"}},
}


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
    assert found.decoded.digest == written.digest
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


@pytest.mark.parametrize(
    ("etag", "kept"),
    [
        ("", ""),
        ('W/"abc"', 'W/"abc"'),
        ("MAX", "MAX"),
        ("x" * 88, "x" * 88),
        ("x" * 89, ""),
        ("\u00e9", ""),
        ("\ud800", ""),
        ("a\nb", ""),
    ],
    ids=["none", "weak", "no quotes", "longest", "too long", "no ASCII", "no text", "a line break"],
)
def test_the_etag_travels_with_its_content(home: RuntimeDir, etag: str, kept: str) -> None:
    """A reader learns the API's ETag for what it reads; one that does not fit is left out."""
    encoded, _ = codec.encode(DATA, etag=etag)
    draft = Draft(home, encoded, "1-2-3-4")
    header = draft.put_in_place(Position(5, 7), 9, boot_id=1 << 100, wall_ns=11)
    draft.discard()
    found = snapshot.read(home, MAX_BYTES)
    assert found.header == header
    assert (found.header.etag, found.decoded.etag) == (kept, kept)
    without = codec.encode(DATA)
    assert found.decoded.digest == without[0].digest
    assert (without[0].etag, without[1].etag) == ("", "")


def test_a_draft_is_invisible_until_it_is_put_in_place(home: RuntimeDir) -> None:
    """A draft stands under another name, and leaves nothing behind when it is given up."""
    write(home)
    encoded, _ = codec.encode({**DATA, "flags": []})
    draft = Draft(home, encoded, "1-2-3-5")
    assert snapshot.read(home, MAX_BYTES).decoded.definitions == DATA
    assert home.temporary_files() == [(home.temporary_path("snapshot", "1-2-3-5"), "1-2-3-5")]
    draft.discard()
    assert home.temporary_files() == []
    assert snapshot.read(home, MAX_BYTES).decoded.definitions == DATA


def draft_of(home: RuntimeDir) -> Draft:
    return Draft(home, codec.encode(DATA)[0], "1-2-3-5")


def test_giving_up_a_draft_twice_closes_one_descriptor(home: RuntimeDir) -> None:
    """The draft's descriptor is closed once; a number that is another file's by then is left alone."""
    before = open_descriptors()
    draft = draft_of(home)
    assert len(open_descriptors()) == len(before) + 1
    draft.discard()
    assert open_descriptors() == before
    with open(os.devnull, "rb"):
        others = open_descriptors()
        draft.discard()
        assert open_descriptors() == others


def test_a_draft_may_have_the_number_of_standard_input(home: RuntimeDir) -> None:
    """In a daemon that has closed its standard input the draft gets descriptor 0, and gives it back."""
    saved = os.dup(0)
    os.close(0)
    try:
        draft = draft_of(home)
        assert os.path.samestat(os.fstat(0), os.stat(home.temporary_path("snapshot", "1-2-3-5")))
        draft.discard()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(0)
    finally:
        os.dup2(saved, 0)
        os.close(saved)


@pytest.mark.parametrize("mask", [0, 0o022, 0o777])
def test_the_umask_does_not_matter(
    home: RuntimeDir, monkeypatch: pytest.MonkeyPatch, mask: int
) -> None:
    """The file is ours to read and nobody else's, at no time, whatever the umask says."""
    modes: list[int] = []
    set_mode = os.fchmod

    def noted(descriptor: int, mode: int) -> None:
        modes.append(os.fstat(descriptor).st_mode & 0o7777)
        set_mode(descriptor, mode)

    monkeypatch.setattr(os, "fchmod", noted)
    before = os.umask(mask)
    try:
        write(home)
    finally:
        os.umask(before)
    assert modes == [0o600 & ~mask]
    assert os.stat(home.snapshot_path).st_mode & 0o7777 == 0o600


@pytest.mark.parametrize("kind", ["file", "symlink", "dangling symlink"])
def test_a_draft_takes_nothing_for_its_own(home: RuntimeDir, tmp_path: Path, kind: str) -> None:
    """What stands at the draft's name already, a planted symlink too, is neither written to nor removed."""
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    taken = home.temporary_path("snapshot", "1-2-3-5")
    if kind == "file":
        taken.write_bytes(b"another's")
    else:
        taken.symlink_to(target if kind == "symlink" else tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        draft_of(home)
    assert target.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["target"]
    assert os.path.lexists(taken)
    assert home.temporary_files() == [(taken, "1-2-3-5")]


@pytest.mark.parametrize("call", ["fchmod", "pwrite"])
def test_a_draft_that_cannot_be_written_leaves_nothing_behind(
    home: RuntimeDir, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """When the disk is full there is neither a file nor an open descriptor of the draft."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, call, fail)
    before = open_descriptors()
    with pytest.raises(OSError, match="no space"):
        draft_of(home)
    assert open_descriptors() <= before
    assert home.temporary_files() == []


def test_a_write_that_is_cut_short_is_continued(
    home: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may take fewer bytes than it is given: the rest follows, at its place."""
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda to, data, at: whole(to, bytes(data[:7]), at))
    write(home)
    assert snapshot.read(home, MAX_BYTES).decoded.definitions == DATA
    content = home.snapshot_path.read_bytes()
    monkeypatch.undo()
    write(home)
    assert home.snapshot_path.read_bytes() == content


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


FIELDS = struct.Struct("<8sQQQ16sQQII16s88s")
NAMES = "magic incarnation generation count boot size wall flags cohorts digest etag".split()
NOT_OF_A_SNAPSHOT = "its header is not that of a snapshot of this size"
TOP = 2**64 - 1


def forge(home: RuntimeDir, *, cut: int | None = None, tail: bytes = b"", **changes: Any) -> None:
    """Write a snapshot, change fields of its header, and give that the right digest again.

    `cut` is where the file ends then, if not at its end, and `tail` what stands in the end's place.
    """
    write(home)
    content = home.snapshot_path.read_bytes()
    fields = dict(zip(NAMES, FIELDS.unpack(content[: FIELDS.size]), strict=True))
    header = FIELDS.pack(*{**fields, **changes}.values())
    content = header + item_index.digest_of(header) + content[HEADER_BYTES:]
    content = content[:cut]
    home.snapshot_path.write_bytes(content[: len(content) - len(tail)] + tail)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"magic": b"shmflagX"}, NOT_OF_A_SNAPSHOT),
        ({"incarnation": 0}, NOT_OF_A_SNAPSHOT),
        ({"generation": 0}, NOT_OF_A_SNAPSHOT),
        ({"generation": 1 << 48}, NOT_OF_A_SNAPSHOT),
        ({"count": 1 << 48}, NOT_OF_A_SNAPSHOT),
        ({"size": 0}, NOT_OF_A_SNAPSHOT),
        ({"size": TOP}, NOT_OF_A_SNAPSHOT),
        ({"digest": bytes(16)}, "its index does not match its digest"),
        ({"flags": 1, "cohorts": 2}, "its index does not match its digest"),
        ({"flags": 3, "cohorts": 0}, "its index does not match its digest"),
        ({"flags": 0, "cohorts": 0}, "its index does not match its digest"),
        ({"flags": 2**32 - 1, "cohorts": 2**32 - 1}, "its index is cut off"),
        ({"size": HEADER_BYTES, "cut": HEADER_BYTES}, "its index is cut off"),
        ({"size": HEADER_BYTES + 79, "cut": HEADER_BYTES + 79}, "its index is cut off"),
        (
            {"size": HEADER_BYTES + 80, "cut": HEADER_BYTES + 80},
            "index and payload do not fit each other",
        ),
        ({"tail": b"X"}, "the items do not match their checksum"),
    ],
    ids=itertools.count(),
)
def test_a_forged_header_is_refused_for_its_reason(
    home: RuntimeDir, changes: dict[str, Any], reason: str
) -> None:
    """Whatever in a header does not fit is refused even where its digest fits, with what and where it is."""
    forge(home)
    assert snapshot.read(home, MAX_BYTES).decoded.definitions == DATA
    forge(home, **changes)
    for check in (snapshot.read, snapshot.verify):
        with pytest.raises(DamagedSnapshotError) as caught:
            check(home, MAX_BYTES)
        assert (caught.value.reason, caught.value.path) == (reason, os.fspath(home.snapshot_path))


@pytest.mark.parametrize("etag", [b"\xff", b"a\r\nb", b"a\0b"], ids=["no ASCII", "lines", "a zero"])
def test_a_forged_etag_is_none(home: RuntimeDir, etag: bytes) -> None:
    """What could not be sent in a request is left out, and the rest is served."""
    forge(home, etag=etag)
    found = snapshot.read(home, MAX_BYTES)
    assert (found.header.etag, found.decoded.definitions) == ("", DATA)


def test_damage_of_the_header_is_named(home: RuntimeDir) -> None:
    """A header that was damaged is told from one that does not fit."""
    write(home)
    content = bytearray(home.snapshot_path.read_bytes())
    content[8] ^= 1
    home.snapshot_path.write_bytes(content)
    for check in (snapshot.read, snapshot.verify, snapshot.read_header):
        with pytest.raises(DamagedSnapshotError) as caught:
            check(home, MAX_BYTES)
        assert caught.value.reason == "its header does not match its digest"
        assert caught.value.path == os.fspath(home.snapshot_path)


def test_items_of_a_wrong_shape_are_damage_with_a_place(home: RuntimeDir) -> None:
    """What is found only while decoding names the file, too."""
    items = [codec.encode(DATA)[0].items[0], b"\x80", b"\x91\x80"]
    index = b"".join(item_index.ENTRY.pack(len(item), item_index.digest_of(item)) for item in items)
    digest = item_index.content_digest(index, 1, 1)
    size = len(index) + codec.BODY_HEAD_BYTES + sum(map(len, items))
    encoded = codec.Encoded(1, 1, index, items, digest, size)
    draft = Draft(home, encoded, "1-2-3-4")
    draft.put_in_place(Position(5, 7), 9, boot_id=1, wall_ns=11)
    draft.discard()
    snapshot.verify(home, MAX_BYTES)
    with pytest.raises(DamagedSnapshotError, match="wrong shape") as caught:
        snapshot.read(home, MAX_BYTES)
    assert caught.value.path == os.fspath(home.snapshot_path)


@pytest.mark.parametrize(
    "changes", [{"incarnation": TOP}, {"generation": 1}, {"generation": (1 << 48) - 1}, {"count": 0},
                {"count": (1 << 48) - 1}, {"wall": TOP}, {"boot": b"\xff" * 16}], ids=itertools.count()
)  # fmt: skip
def test_the_outermost_values_of_a_header_are_accepted(
    home: RuntimeDir, changes: dict[str, Any]
) -> None:
    """Whatever can be counted to, and any time and boot, may stand in a header."""
    forge(home, **changes)
    header = snapshot.read(home, MAX_BYTES).header
    assert (header.position, header.publications, header.published_wall_ns, header.boot_id) == (
        Position(changes.get("incarnation", 5), changes.get("generation", 7)),
        changes.get("count", 9),
        changes.get("wall", 11),
        2**128 - 1 if "boot" in changes else 1 << 100,
    )


def test_a_size_out_of_bounds_is_refused_unread(home: RuntimeDir) -> None:
    """A file larger than the maximum, or smaller than a header, is refused by its size alone."""
    size = write(home).size
    assert snapshot.read(home, size).header.size == size
    for length, most in ((size, size - 1), (1 << 40, MAX_BYTES), (HEADER_BYTES - 1, MAX_BYTES)):
        os.truncate(home.snapshot_path, length)
        with pytest.raises(DamagedSnapshotError) as caught:
            snapshot.read_header(home, most)
        reason = f"its size is {length} bytes; {HEADER_BYTES} to {most} are possible"
        assert (caught.value.reason, caught.value.path) == (reason, os.fspath(home.snapshot_path))


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


def test_a_signature_is_of_all_that_tells_files_apart(home: RuntimeDir) -> None:
    """Another file, another size or another time of change is another signature."""
    write(home)
    info = os.stat(home.snapshot_path)
    assert Signature.of(info) == (
        info.st_dev,
        info.st_ino,
        info.st_size,
        info.st_mtime_ns,
        info.st_ctime_ns,
    )
