"""Fuzz targets over the readers: hostile bytes in a snapshot, hostile words in a page.

`test_fuzz.py` drives them with hypothesis. With atheris installed they run for as long as you like:

    python -m tests.faults.fuzz_target snapshot|items|page [libFuzzer's arguments]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shmflags import codec, item_index, snapshot
from shmflags.errors import DamagedSnapshotError
from shmflags.page import PAGE_BYTES
from shmflags.runtime_dir import RuntimeDir
from shmflags.snapshot import Draft, Header, Position, Snapshot
from tests.faults.harness import page_words, runtime_dir
from tests.faults.scene import RealLiveness, Scene

MAX_BYTES = 1 << 20
WORDS = PAGE_BYTES // 8
LENGTH, DEADLINE = 21, 22
LEASE_NS = 3 * 10**9
_PLAIN = (str, int, float, bool, type(None))


def home(base: Path) -> RuntimeDir:
    """A prepared runtime directory."""
    directory = runtime_dir(base)
    directory.prepare(lambda sentence: None)
    return directory


def forge(directory: RuntimeDir, items: Sequence[bytes], flags: int, cohorts: int) -> Header:
    """Put a snapshot in place that is right in all its digests, whatever its items hold."""
    index = b"".join(item_index.ENTRY.pack(len(item), item_index.digest_of(item)) for item in items)
    digest = item_index.content_digest(index, flags, cohorts)
    size = len(index) + codec.BODY_HEAD_BYTES + sum(map(len, items))
    draft = Draft(directory, codec.Encoded(flags, cohorts, index, list(items), digest, size), "forged")
    try:
        return draft.put_in_place(Position(1, 1), 1, 1, 1)
    finally:
        draft.discard()


def read(directory: RuntimeDir, known: codec.Decoded | None = None) -> Snapshot | None:
    """What the reader makes of it: definitions of plain JSON types, or None for a damaged snapshot."""
    try:
        found = snapshot.read(directory, MAX_BYTES, known)
    except DamagedSnapshotError:
        return None
    definitions = found.decoded.definitions
    assert type(definitions) is dict
    assert type(definitions["flags"]) is list
    assert type(definitions["cohorts"]) is dict
    assert all(type(flag) is dict for flag in definitions["flags"])
    assert_plain(definitions)
    return found


def assert_plain(value: Any) -> None:
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if type(part) is dict:
            assert all(type(key) is str for key in part)
            waiting.extend(part.values())
        elif type(part) is list:
            waiting.extend(part)
        else:
            assert type(part) in _PLAIN, f"not of JSON: {part!r}"


def check_snapshot(directory: RuntimeDir, content: bytes) -> None:
    """Any bytes at all in place of a snapshot."""
    directory.snapshot_path.write_bytes(content)
    directory.snapshot_path.chmod(0o600)
    read(directory)


def check_items(directory: RuntimeDir, items: Sequence[bytes], flags: int, cohorts: int) -> None:
    """Any items at all in a snapshot that is otherwise sound, read twice."""
    forge(directory, items, flags, cohorts)
    found = read(directory)
    if found is not None:
        again = read(directory, found.decoded)
        assert again is not None
        assert again.decoded.digest == found.decoded.digest


def check_page(scene: Scene, words: Iterable[tuple[int, int]], *, in_place: bool) -> None:
    """Any values at all in any words of a page: right data, and one leader in the end."""

    def damage() -> None:
        page = page_words(scene.base)
        for word, value in words:
            page[word % WORDS] = value % (1 << 64)
        # A lease as a worker of another pid namespace might hold it has to be sat out.
        if scene.machine.now < page[DEADLINE] <= scene.machine.now + page[LENGTH]:
            page[LENGTH] = min(page[LENGTH], LEASE_NS)
            page[DEADLINE] = min(page[DEADLINE], scene.machine.now + LEASE_NS)

    scene.survive(damage, running=in_place, newcomers=0)


def main() -> None:
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    what = sys.argv.pop(1)
    with tempfile.TemporaryDirectory(prefix="shmflags-fuzz-") as base:
        directory = home(Path(base))
        scene = Scene(Path(base), RealLiveness) if what == "page" else None

        def one(data: bytes) -> None:
            give = atheris.FuzzedDataProvider(data)
            if what == "snapshot":
                check_snapshot(directory, data)
            elif what == "items":
                count = give.ConsumeIntInRange(0, 6)
                sizes = [give.ConsumeIntInRange(0, 200) for _ in range(count)]
                flags, cohorts = give.ConsumeIntInRange(0, 6), give.ConsumeIntInRange(0, 6)
                check_items(directory, [give.ConsumeBytes(size) for size in sizes], flags, cohorts)
            else:
                assert scene is not None
                in_place = give.ConsumeBool()
                count = give.ConsumeIntInRange(1, 16)
                words = [(give.ConsumeUInt(2), give.ConsumeUInt(8)) for _ in range(count)]
                check_page(scene, words, in_place=in_place)

        atheris.instrument_all()
        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
