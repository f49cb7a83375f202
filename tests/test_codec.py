"""What JSON can express survives; nothing else is stored or read."""

from __future__ import annotations

import gc
import json
import threading
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmflags import codec
from shmflags.errors import DamagedSnapshotError, InvalidDefinitionsError

any_text = st.text(st.characters(exclude_categories=()), max_size=8)
any_integer = st.one_of(st.integers(-(2**64), 2**65), st.integers(-(2**200), 2**200))
scalars = st.one_of(st.none(), st.booleans(), any_integer, st.floats(allow_nan=False), any_text)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(any_text, inner, max_size=4)),
    max_leaves=12,
)
flags = st.dictionaries(any_text, json_values, max_size=4)
definitions = st.builds(
    lambda flags, mapping, cohorts, more: {
        **more,
        "flags": flags,
        "group_type_mapping": mapping,
        "cohorts": cohorts,
    },
    st.lists(flags, max_size=5),
    st.dictionaries(any_text, json_values, max_size=3),
    st.dictionaries(any_text, json_values, max_size=4),
    st.dictionaries(any_text, json_values, max_size=3),
)


def same(left: Any, right: Any) -> bool:
    """Equal in value, type and key order, all through."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return left.hex() == right.hex()
    return bool(left == right)


def through(data: Any, known: codec.Decoded | None = None) -> codec.Decoded:
    """Encode, and decode from the bytes alone."""
    encoded, _ = codec.encode(data)
    return codec.decode(
        memoryview(encoded.entries),
        memoryview(b"".join(encoded.items)),
        encoded.flag_count,
        encoded.cohort_count,
        encoded.digest,
        known,
    )


@given(definitions)
@settings(deadline=None)
def test_whatever_json_can_express_survives(data: dict[str, Any]) -> None:
    """Equal values, equal types and equal key order come back from the bytes."""
    assert same(through(data).definitions, data)


@pytest.mark.parametrize(
    "value",
    [
        2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 2**200, -(2**200), 0.0, -0.0, 1.0, 1e308, 5e-324,
        float("inf"), "", "\ud800", "\udc00\ud800", "\ud83d\ude00", "\U0001f600", "\0", True, 1,
        {"": {"": []}}, ["\ud800", 2**70, {"\udfff": 2**80}],
    ],
    ids=ascii,
)  # fmt: skip
def test_edges_of_json_survive(value: Any) -> None:
    """Large integers, lone and adjacent surrogates, signed zeros and empty keys come back exactly."""
    data = {
        "flags": [{"key": "a", "value": value}],
        "group_type_mapping": {},
        "cohorts": {"\ud800": value},
        "more": value,
    }
    assert same(through(data).definitions, data)


def test_a_depth_of_a_hundred_survives() -> None:
    """Lists and dicts nested a hundred deep come back, with integers that only JSON text can hold too."""
    for leaf in (1, 2**100):
        nested: Any = leaf
        for level in range(50):
            nested = {"level": level, "inner": [nested]}
        data = {"flags": [{"key": "deep", "value": nested}], "group_type_mapping": {}, "cohorts": {}}
        assert same(through(data).definitions, data)


def test_deeper_than_the_limit_is_refused() -> None:
    """Nesting that a reader could not follow is refused when it is published, and so is a cycle."""
    nested: Any = []
    for _ in range(2000):
        nested = [nested]
    cycle: dict[str, Any] = {"key": "c"}
    cycle["self"] = cycle
    for bad in ({"key": "deep", "value": nested}, cycle):
        with pytest.raises(InvalidDefinitionsError, match="511"):
            codec.encode({"flags": [bad], "group_type_mapping": {}, "cohorts": {}})


def test_a_subclass_of_list_is_taken_for_the_flags_alone() -> None:
    """The outermost list may be a subclass; one further in is refused, as it would not come back as one."""

    class Flags(list[Any]):
        pass

    data = {"flags": Flags([{"key": "a"}]), "group_type_mapping": {}, "cohorts": {}}
    assert through(data).definitions["flags"] == [{"key": "a"}]
    data["flags"] = [{"key": Flags()}]
    with pytest.raises(InvalidDefinitionsError, match=r"flags\[0\]"):
        codec.encode(data)


@pytest.mark.parametrize(
    "item",
    [
        msgpack.packb({"key": b"bytes"}),
        msgpack.packb({"key": b""}),
        msgpack.packb({"key": msgpack.ExtType(1, b"x")}),
        msgpack.packb({"key": msgpack.ExtType(1, b"")}),
        msgpack.packb({"key": msgpack.Timestamp(1)}),
        msgpack.packb({1: 2}),
        msgpack.packb([1]),
        msgpack.packb(None),
        msgpack.packb("[1]"),
        msgpack.packb("{"),
        msgpack.packb({"a": 1}) + b"\x00",
        b"",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 2000,
        msgpack.packb("[" * 100_000),
    ],
    ids=lambda item: item[:12].hex(),
)
def test_what_encode_would_not_have_written_is_damage(item: bytes) -> None:
    """Bytes, extension types, wrong shapes and bombs are refused, even under a right digest."""
    good, _ = codec.encode({"flags": [{}], "group_type_mapping": {}, "cohorts": {}})
    items = [good.items[0], item]
    index = b"".join(codec.ENTRY.pack(len(part), codec.digest_of(part)) for part in items)
    with pytest.raises(DamagedSnapshotError):
        codec.decode(
            memoryview(index), memoryview(b"".join(items)), 1, 0, codec.content_digest(index, 1, 0)
        )


def test_only_what_changed_is_decoded_again() -> None:
    """Flags and cohorts whose bytes are the same are the same objects as before."""
    data: dict[str, Any] = {
        "flags": [{"key": str(number), "n": [number]} for number in range(20)],
        "group_type_mapping": {},
        "cohorts": {str(number): {"n": [number]} for number in range(5)},
    }
    before = through(data)
    changed = json.loads(json.dumps(data))
    changed["flags"][7]["n"] = [700]
    changed["cohorts"]["3"]["n"] = [300]
    after = through(changed, before)
    assert same(after.definitions, changed)
    kept = [
        new is old
        for new, old in zip(after.definitions["flags"], before.definitions["flags"], strict=True)
    ]
    assert kept == [number != 7 for number in range(20)]
    for key in data["cohorts"]:
        same_object = after.definitions["cohorts"][key] is before.definitions["cohorts"][key]
        assert same_object == (key != "3")


def test_the_content_digest_tells_contents_apart() -> None:
    """Moving an item between flags and cohorts, or reordering, changes the digest; equal content does not."""
    base: dict[str, Any] = {"flags": [{"a": 1}, {"b": 1}], "group_type_mapping": {}, "cohorts": {}}
    digests = {
        codec.encode(data)[0].digest
        for data in (
            base,
            {**base, "flags": [{"b": 1}, {"a": 1}]},
            {**base, "flags": [{"a": 1}]},
            {**base, "flags": [{"a": 1}, {"b": True}]},
            {**base, "cohorts": {"a": {}}},
            {**base, "more": None},
        )
    }
    assert len(digests) == 6
    assert codec.encode(json.loads(json.dumps(base)))[0].digest in digests


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_left_as_it_was_found(was_on: bool) -> None:
    """Nested and concurrent pauses restore the collector once, when the last of them ends."""
    on_before = gc.isenabled()
    try:
        (gc.enable if was_on else gc.disable)()
        inside, leave = threading.Event(), threading.Event()

        def pause() -> None:
            with codec.collector_paused():
                inside.set()
                leave.wait(30)

        thread = threading.Thread(target=pause)
        with codec.collector_paused():
            thread.start()
            assert inside.wait(30)
            with codec.collector_paused():
                assert not gc.isenabled()
            assert not gc.isenabled()
        assert not gc.isenabled()
        leave.set()
        thread.join(30)
        assert gc.isenabled() == was_on
    finally:
        (gc.enable if on_before else gc.disable)()
