"""Hostile bytes: the readers give plain JSON types or refuse, in bounded time and memory."""

from __future__ import annotations

import json
import mmap
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmflags import codec, snapshot
from shmflags.errors import DamagedSnapshotError
from shmflags.runtime_dir import RuntimeDir
from shmflags.snapshot import HEADER_BYTES
from tests.faults import fuzz_target
from tests.faults.harness import Ear, in_child, stamped
from tests.faults.scene import RealLiveness, Scene

MIB = 1 << 20
SETTINGS = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ENVELOPE: dict[str, Any] = {"flags": None, "group_type_mapping": {}, "cohorts": None}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def _packed(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, unicode_errors="surrogatepass", use_bin_type=True)
    return packed


BEYOND_JSON = st.recursive(
    st.binary(max_size=8)
    | st.integers(-(2**63), 2**64 - 1)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8))
    | st.builds(msgpack.Timestamp, st.integers(0, 2**32), st.integers(0, 10**9 - 1))
    | st.text(st.characters(exclude_categories=()), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.integers(0, 9) | st.binary(max_size=3) | st.text(max_size=3), inner, max_size=3
        )
    ),
    max_leaves=6,
)
ITEM = st.one_of(
    st.binary(max_size=64),
    BEYOND_JSON.map(_packed),
    st.text(max_size=20).map(_packed),
    JSON.map(lambda value: _packed(json.dumps(value))),
    st.sampled_from([_packed(ENVELOPE), _packed({}), _packed(["k", {}]), _packed({"key": "a"})]),
)


@pytest.fixture
def home(directory: Path) -> RuntimeDir:
    return fuzz_target.home(directory)


@SETTINGS
@given(content=st.binary(max_size=400))
def test_any_bytes_for_a_snapshot(home: RuntimeDir, content: bytes) -> None:
    """Whatever lies there in place of a snapshot is refused without an exception but the one."""
    fuzz_target.check_snapshot(home, content)


SOUND = codec.encode(stamped(1))[0]


@SETTINGS
@given(data=st.data())
def test_a_sound_snapshot_with_bytes_changed(home: RuntimeDir, data: st.DataObject) -> None:
    """Changed bytes anywhere in a snapshot, in its length too, are noticed."""
    fuzz_target.forge(home, SOUND.items, 4, 2)
    content = bytearray(home.snapshot_path.read_bytes())
    original = bytes(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        what = data.draw(st.sampled_from(["change", "insert", "remove"]))
        if what == "change":
            content[at] = data.draw(st.integers(0, 255))
        elif what == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=30))
        else:
            del content[at : at + data.draw(st.integers(1, 30))]
        if not content:
            break
    home.snapshot_path.write_bytes(content)
    assert (fuzz_target.read(home) is not None) == (bytes(content) == original)


@SETTINGS
@given(
    items=st.lists(ITEM, max_size=6),
    envelope=st.sampled_from([True, False]),
    flags=st.integers(0, 5),
    cohorts=st.integers(0, 5),
)
def test_any_items_under_right_digests(
    home: RuntimeDir, items: list[bytes], envelope: bool, flags: int, cohorts: int
) -> None:
    """Items that are no JSON, or of a wrong shape, come out as plain JSON types or not at all."""
    if envelope:
        items.insert(0, _packed(ENVELOPE))
    fuzz_target.check_items(home, items, flags, cohorts)


@SETTINGS
@given(definitions=st.builds(lambda more: {**more, **stamped(1)}, st.dictionaries(st.text(), JSON)))
def test_anything_json_survives(home: RuntimeDir, definitions: dict[str, Any]) -> None:
    """What JSON can express is read as it was written."""
    encoded, _ = codec.encode(definitions)
    fuzz_target.forge(home, encoded.items, encoded.flag_count, encoded.cohort_count)
    found = fuzz_target.read(home)
    assert found is not None
    assert json.dumps(found.decoded.definitions) == json.dumps(definitions)


@settings(SETTINGS, max_examples=100)
@given(
    words=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 47), st.integers(128, 200), st.integers(0, fuzz_target.WORDS - 1)),
            st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1])),
        ),
        min_size=1,
        max_size=40,
    ),
    in_place=st.booleans(),
)
def test_any_words_in_a_page(words: list[tuple[int, int]], in_place: bool, ear: Ear) -> None:
    """Whatever stands in the page, workers have right data and one of them leads in the end."""
    with tempfile.TemporaryDirectory(prefix="shmflags-test-") as base:
        fuzz_target.check_page(Scene(Path(base), RealLiveness), words, in_place=in_place)
    ear.assert_no_surprise()


# -- bounds


def _claims(size: int, levels: int) -> bytes:
    """Arrays in arrays, each of which claims to have as many elements as there are bytes."""
    head = b"\xdd" + size.to_bytes(4, "big")
    return (head * levels).ljust(size, b"\xc0")


@pytest.mark.parametrize("size", [1000, 16 * 1024, 64 * 1024, MIB, 16 * MIB])
def test_an_item_that_claims_much_more_than_it_has(directory: Path, size: int) -> None:
    """Arrays that claim more elements than follow cost no memory."""

    def child() -> None:
        home = fuzz_target.home(directory)
        items = [_packed(ENVELOPE), _claims(size, 500)]
        fuzz_target.forge(home, items, 1, 0)
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * mmap.PAGESIZE
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + 100 * MIB + 10 * size, hard))
        began = time.monotonic()
        with pytest.raises(DamagedSnapshotError):
            snapshot.read(home, 64 * MIB)
        assert time.monotonic() - began < 20

    in_child(child)


@pytest.mark.parametrize(
    "item",
    [
        b"\x91" * 100_000,
        b"\x81\xa1a" * 100_000,
        _packed("[" * 100_000),
        _packed('{"a":' * 100_000),
        _packed("9" * 1_000_000),
        _packed("-" + "1" * 1_000_000),
        _packed("[" + "9" * 100_000 + "]"),
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xc1",
        b"",
    ],
    ids=lambda item: repr(item[:8]),
)
@pytest.mark.parametrize("place", ["envelope", "flag", "cohort"])
def test_items_made_to_overwhelm(home: RuntimeDir, item: bytes, place: str) -> None:
    """Deep nesting, endless numbers and lengths beyond the end are refused at once."""
    items = {
        "envelope": [item],
        "flag": [_packed(ENVELOPE), item],
        "cohort": [_packed(ENVELOPE), item],
    }[place]
    fuzz_target.forge(home, items, int(place == "flag"), int(place == "cohort"))
    began = time.monotonic()
    assert fuzz_target.read(home) is None
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("flags", "cohorts"), [(2**32 - 1, 0), (0, 2**32 - 1), (2**32 - 1, 2**32 - 1), (2, 0), (0, 0)]
)
def test_counts_that_do_not_fit(home: RuntimeDir, flags: int, cohorts: int) -> None:
    """Counts of flags and cohorts beyond what is there are refused; no room is made for them."""
    fuzz_target.forge(home, [_packed(ENVELOPE), _packed({"key": "a"})], flags, cohorts)
    assert fuzz_target.read(home) is None
    assert home.snapshot_path.stat().st_size > HEADER_BYTES


@pytest.mark.parametrize("number", [1 << 48, (1 << 64) - 1])
def test_a_header_with_numbers_that_nobody_counted_to(home: RuntimeDir, number: int) -> None:
    """A generation or count that could not be raised any more is refused; its digest may be right."""
    for generation, count in ((number, 1), (1, number)):
        draft = snapshot.Draft(home, SOUND, "forged")
        draft.put_in_place(snapshot.Position(1, generation), count, 1, 1)
        draft.discard()
        assert fuzz_target.read(home) is None
