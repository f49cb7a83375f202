"""What JSON can express survives; nothing else is stored or read."""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmflags import codec, item_index
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
    return from_bytes(codec.encode(data)[0], known)


def from_bytes(encoded: codec.Encoded, known: codec.Decoded | None = None) -> codec.Decoded:
    """Decode from the bytes alone, on top of what is `known`."""
    return codec.decode(
        memoryview(encoded.entries),
        memoryview(encoded.body),
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
        {"": {"": []}}, ["\ud800", 2**70, {"\udfff": 2**80}], {"\ud83d\ude00": ["\ud83d\ude00", 2**70]},
    ],
    ids=itertools.count(),
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
        with pytest.raises(InvalidDefinitionsError) as caught:
            codec.encode({"flags": [bad], "group_type_mapping": {}, "cohorts": {}})
        assert caught.value.reason.startswith("flags[0] cannot be stored: ")
        assert (
            caught.value.remedy == "only what JSON can express, at most 511 levels deep, can be shared"
        )


def test_a_subclass_of_list_is_taken_for_the_flags_alone() -> None:
    """The outermost list may be a subclass; one further in is refused, as it would not come back as one."""

    class Flags(list[Any]):
        pass

    data = {"flags": Flags([{"key": "a"}]), "group_type_mapping": {}, "cohorts": {}}
    assert through(data).definitions["flags"] == [{"key": "a"}]
    data["flags"] = [{"key": Flags()}]
    with pytest.raises(InvalidDefinitionsError, match=r"flags\[0\]"):
        codec.encode(data)


@pytest.mark.parametrize("other", ["plain", "\ud800", 2**70], ids=["plain", "surrogate", "large"])
def test_what_has_known_bytes_is_refused_all_the_same(other: Any) -> None:
    """A tuple would be written as the list that is known already; it is no list, and is refused."""
    data = {"flags": [{"a": [1]}, {"b": other}], "group_type_mapping": {}, "cohorts": {}}
    known = codec.encode(data)[1]
    assert codec.encode(data, known)[1].digest == known.digest
    data["flags"] = [{"a": (1,)}, {"b": other}]
    with pytest.raises(InvalidDefinitionsError, match=r"^flags\[0\] cannot be stored"):
        codec.encode(data, known)


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
    with pytest.raises(DamagedSnapshotError):
        decoded([good.items[0], item], 1, 0)


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


def letters(text: str, more: int = 0) -> dict[str, Any]:
    """Definitions with a flag for each letter, equal for equal letters."""
    return {
        "flags": [{"key": letter} for letter in text],
        "group_type_mapping": {"0": more},
        "cohorts": {"1": {"type": "OR"}} if more else {},
    }


def test_any_change_of_order_and_number_is_decoded_right() -> None:
    """From any few items to any others, also from and to none: what was there is kept, the rest is made anew."""
    texts = ["".join(one) for size in range(4) for one in itertools.product("ab", repeat=size)]
    every = [*texts, "aaaa", "abab", "abba", "baab", "abcab", "cabc", "abcabc"]
    for old, new, more in itertools.product(every, every, (0, 1)):
        before, data = through(letters(old)), letters(new, more)
        after = through(data, before)
        assert same(after.definitions, data), (old, new)
        flags = before.definitions["flags"]
        for letter in set(new):
            kept = sum(
                any(flag is one for one in flags) for flag in after.definitions["flags"]
                if flag["key"] == letter
            )  # fmt: skip
            assert kept >= min(old.count(letter), new.count(letter)), (old, new)
        assert after.entries == codec.encode(data)[0].entries
        assert same(after.values[1 : 1 + len(new)], data["flags"])


def test_the_payload_is_laid_out_as_its_docstring_says() -> None:
    """Envelope, flags and cohorts in order, JSON text where msgpack has no such value, each with its entry."""
    data = {
        "more": [1],
        "flags": [{"n": 1}, {"n": 2**64}],
        "group_type_mapping": {"0": "g"},
        "cohorts": {"c": {"n": 1}},
    }
    encoded, _ = codec.encode(data)
    assert [msgpack.unpackb(item) for item in encoded.items] == [
        {"more": [1], "flags": None, "group_type_mapping": {"0": "g"}, "cohorts": None},
        {"n": 1},
        '{"n": 18446744073709551616}',
        ["c", {"n": 1}],
    ]
    assert encoded.entries == b"".join(
        len(item).to_bytes(4, "little") + hashlib.sha256(item).digest()[:16] for item in encoded.items
    )
    assert (encoded.flag_count, encoded.cohort_count) == (2, 1)
    assert encoded.body[4:9] == b"\xdd" + (4).to_bytes(4, "big")
    assert encoded.body[9:] == b"".join(encoded.items)
    assert int.from_bytes(encoded.body[:4], "little") == zlib.crc32(encoded.body[4:])
    assert encoded.size == len(encoded.entries) + len(encoded.body)


def test_what_is_known_is_not_examined_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher examines the items that have changed, not all of them at each publish."""
    examined: list[int] = []
    require = codec._require_plain

    def noted(value: Any, number: int, flag_count: int) -> None:
        examined.append(number)
        require(value, number, flag_count)

    monkeypatch.setattr(codec, "_require_plain", noted)
    known = codec.encode(letters("abcdef", 1))[1]
    assert examined == list(range(8))
    for text, again in (
        ("abcdef", []),
        ("abXdef", [3]),
        ("fabcde", []),
        ("bacdXe", [5]),
        ("abcdefX", [7]),
    ):
        examined.clear()
        codec.encode(letters(text, 1), known)
        assert examined == again, text


def test_what_is_new_is_examined_wherever_it_stands() -> None:
    """Of changes far apart, none is taken for known."""
    data = letters("".join(map(chr, range(0x4E00, 0x4E00 + 300))))
    known = codec.encode(data)[1]
    flags: list[Any] = list(data["flags"])
    flags[3] = {"key": "new"}
    for place in (4, 150, 299):
        bad = [*flags[:place], {"key": b"bytes"}, *flags[place + 1 :]]
        with pytest.raises(InvalidDefinitionsError, match=rf"flags\[{place}\]"):
            codec.encode({**data, "flags": bad}, known)


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many entries of the former index each look at some of them has taken."""
    counts: list[int] = []
    digests = codec.digests_in

    def noted(entries: bytes) -> list[bytes]:
        counts.append(len(entries) // item_index.ENTRY.size)
        return digests(entries)

    monkeypatch.setattr(codec, "digests_in", noted)
    return counts


def test_only_what_lies_between_common_ends_is_walked(walked: list[int]) -> None:
    """However many flags there are, those that both versions begin and end with are not even looked at."""
    for size in (0, 1, 2, 3, 7, 20):
        old = "abcdefghijklmnopqrst"[:size]
        before = through(letters(old))
        cases = [
            (new, 0) for new in (old, old + "X", "X" + old, old[: size // 2] + "XYZ" + old[size // 2 :])
        ]
        for place in range(size):
            cases += [(old[:place] + new + old[place + 1 :], 1) for new in ("", "X", "XYZ")]
        for new, count in cases:
            walked.clear()
            through(letters(new), before)
            assert sum(walked) == count, (old, new)


@pytest.mark.parametrize(
    ("size", "places", "most"),
    [
        (63, [0, 62], 63),
        (64, [0, 63], 64),
        (65, [0, 64], 65),
        (66, [0, 1, 65], 66),
        (300, [3, 290], 64 + 32),
        (300, [5, 150, 299], 64 + 64 + 39),
        (300, [0, 64, 65, 299], 64 + 64 + 44),
    ],
)
def test_between_changes_far_apart_whole_runs_are_skipped(
    walked: list[int], size: int, places: list[int], most: int
) -> None:
    """As long as there are as many items as before."""
    old = "".join(map(chr, range(0x4E00, 0x4E00 + size)))
    new = "".join("X" if number in places else letter for number, letter in enumerate(old))
    before = through(letters(old))
    walked.clear()
    after = through(letters(new), before)
    assert sum(walked) == most
    kept = [number for number in range(size) if after.values[1 + number] is before.values[1 + number]]
    assert kept == [number for number in range(size) if number not in places]
    assert after.definitions == letters(new)


@pytest.mark.parametrize(
    ("text", "more", "special", "one_by_one"),
    [
        ("", 0, [], 0),
        ("ab", 0, [], 0),
        ("ab", 1, [], 0),
        ("a", 0, [2**70], 3),
        ("a", 0, ["x" * 20_000], 0),
        ("a", 0, [[0] * 16_384], 0),
        ("a", 0, [[0] * 16_385], 3),
        ("a", 0, [dict.fromkeys(map(str, range(16_385)))], 3),
        ("a" * 16_383, 0, [], 0),
        ("a" * 16_384, 0, [], 16_385),
    ],
    ids=[
        "no flags",
        "no cohorts",
        "both",
        "large integer",
        "long",
        "wide",
        "too wide",
        "too many keys",
        "as many",
        "too many",
    ],
)
def test_a_first_read_is_done_in_one_go(
    monkeypatch: pytest.MonkeyPatch, text: str, more: int, special: list[Any], one_by_one: int
) -> None:
    """All items are unpacked at once where none is known, unless one of them needs care."""
    unpacked: list[int] = []
    unpack = codec._unpack

    def noted(item: memoryview, length: int, digest: bytes) -> Any:
        unpacked.append(length)
        return unpack(item, length, digest)

    monkeypatch.setattr(codec, "_unpack", noted)
    data = letters(text, more)
    data["flags"] += [{"special": value} for value in special]
    assert same(through(data).definitions, data)
    assert len(unpacked) == one_by_one


BIG = {"key": "big", "value": 2**70}
LONG = {"key": "long", "value": ["x" * 100] * 300}


@pytest.mark.parametrize("special", [BIG, LONG], ids=["as text", "over 16 KiB"])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    "known", [None, codec.nothing(), through(letters("b"))], ids=["", "nothing", "b"]
)
def test_an_item_that_needs_care_is_one_like_any_other(
    special: dict[str, Any], place: int, known: codec.Decoded | None
) -> None:
    """Items that travel as text or are long are decoded at the first read and on top of others, and kept."""
    data = letters("ab")
    data["flags"].insert(place, special)
    data["cohorts"] = {"1": special}
    first = through(data, known)
    assert same(first.definitions, data)
    changed = {**data, "group_type_mapping": {"0": "other"}}
    second = through(changed, first)
    assert same(second.definitions, changed)
    assert second.definitions["flags"][place] is first.definitions["flags"][place]
    assert second.definitions["cohorts"]["1"] is first.definitions["cohorts"]["1"]


def test_nothing_is_empty_and_equals_no_content() -> None:
    """Empty definitions that nobody published have no digest, and what is published equally empty has one."""
    empty = {"flags": [], "group_type_mapping": {}, "cohorts": {}}
    assert codec.nothing() == codec.Decoded(empty, b"", b"", [])
    assert same(through(empty, codec.nothing()).definitions, empty)
    assert through(empty).digest == codec.encode(empty)[0].digest != b""


def body_of(items: list[bytes]) -> bytes:
    """A body of these items, with the right checksum."""
    return codec.Encoded(0, 0, b"", items, b"", 0).body


def decoded(
    items: list[bytes],
    flags: int,
    cohorts: int,
    *,
    known: codec.Decoded | None = None,
    body: bytes | None = None,
) -> codec.Decoded:
    """Decode items as they are, under an index that has their right digests."""
    index = b"".join(item_index.ENTRY.pack(len(item), item_index.digest_of(item)) for item in items)
    return codec.decode(
        memoryview(index),
        memoryview(body_of(items) if body is None else body),
        flags,
        cohorts,
        item_index.content_digest(index, flags, cohorts),
        known,
    )


ITEMS = codec.encode(letters("ab", 1))[0].items
OTHERS = ["", "a", "b", "ab", "cd"]


@pytest.mark.parametrize("known", [None, *(through(letters(text, 1)) for text in OTHERS)])
@pytest.mark.parametrize(("flags", "cohorts"), [(2, 0), (1, 1), (2, 2), (3, 1), (0, 0), (2**32 - 1, 1)])
def test_counts_that_do_not_fit_the_index_are_damage(
    known: codec.Decoded | None, flags: int, cohorts: int
) -> None:
    """As many flags and cohorts as are counted must be there, whatever is known already."""
    assert same(decoded(ITEMS, 2, 1, known=known).definitions, letters("ab", 1))
    with pytest.raises(DamagedSnapshotError, match=r"^index and payload do not fit each other$"):
        decoded(ITEMS, flags, cohorts, known=known)


@pytest.mark.parametrize("known", [None, *(through(letters(text, 1)) for text in OTHERS)])
@pytest.mark.parametrize("change", [b"\x80", -1, None])
def test_a_payload_that_does_not_fit_the_index_is_damage(
    known: codec.Decoded | None, change: bytes | int | None
) -> None:
    """More bytes than the index has entries for, fewer, or none are refused."""
    good = body_of(ITEMS)
    body = good + change if isinstance(change, bytes) else good[: change or 0]
    with pytest.raises(
        DamagedSnapshotError, match=r"^(index and payload do not|an item's bytes do not)"
    ):
        decoded(ITEMS, 2, 1, known=known, body=body)


@pytest.mark.parametrize("text", [None, *OTHERS])
@pytest.mark.parametrize("place", range(len(ITEMS)))
def test_other_bytes_of_an_item_are_damage_unless_it_is_known(text: str | None, place: int) -> None:
    """Each item that is decoded is compared with its digest, whatever is known of others."""
    known = None if text is None else through(letters(text, 1))
    items = list(ITEMS)
    items[place] = items[place][:-1] + bytes([items[place][-1] ^ 1])
    body = body_of(ITEMS)[: codec.BODY_HEAD_BYTES] + b"".join(items)
    if known is not None and item_index.digest_of(ITEMS[place]) in known.entries:
        assert same(decoded(ITEMS, 2, 1, known=known, body=body).definitions, letters("ab", 1))
        return
    wrong = (
        "the items do not match their checksum"
        if known is None
        else ("an item's bytes do not match its digest")
    )
    with pytest.raises(DamagedSnapshotError, match=f"^{wrong}$"):
        decoded(ITEMS, 2, 1, known=known, body=body)


@pytest.mark.parametrize("known", [None, through(letters("c", 1))], ids=["", "c"])
@pytest.mark.parametrize(
    ("number", "item", "reason"),
    [
        (0, b"\xc0", ""),
        (1, b"\xc0", "flags[0] is None, not a dict"),
        (2, b"\x90", "flags[1] is a list, not a dict"),
        (3, b"\xc0", ""),
        (3, b"\x91\x80", ""),
        (3, b"\x92\xc0\x80", "cohorts has the key None; JSON has only strings"),
        # As pairs these would do for Python: [["group_type_mapping", {}]], and {"a": 1, "b": 1}.
        (0, msgpack.packb([["group_type_mapping", {}]]), "an envelope or a cohort"),
        (3, b"\x82\xa1a\x01\xa1b\x01", "an envelope or a cohort"),
    ],
    ids=lambda value: value.hex() if isinstance(value, bytes) else str(value),
)
def test_an_item_of_a_wrong_shape_is_damage(
    known: codec.Decoded | None, number: int, item: bytes, reason: str
) -> None:
    """An envelope, a flag and a cohort each have their shape, and null is none of them."""
    items = list(ITEMS)
    items[number] = item
    with pytest.raises(DamagedSnapshotError) as caught:
        decoded(items, 2, 1, known=known)
    assert caught.value.reason.startswith(f"items of a wrong shape: {reason}")


@pytest.mark.parametrize(
    ("items", "flags"),
    [
        ([b"\x80\x80", b""], 2),
        ([b"\x80\x80", b"\x81\xa1a", b"\x01"], 3),
        ([b"\x81\xa1a", b"\x80\x80\x80"], 2),
        ([b"", b"\x80\x80"], 2),
        ([b"\x80", b"\x80\x81"], 2),
    ],
    ids=["two and none", "two, and one in two", "split", "none and two", "half a third"],
)
def test_an_item_is_one_value(items: list[bytes], flags: int) -> None:
    """Bytes that make as many values as there are entries, but not one each, are damage where some are known."""
    with pytest.raises(DamagedSnapshotError, match=r"^an item cannot be decoded"):
        decoded([ITEMS[0], *items], flags, 0, known=through(letters("c")))


@pytest.mark.parametrize(
    "items", [[b"\x80\x80"], [b"\x80", b"\x80\x80"], [b"\x81\xa1a"], [b""]], ids=repr
)
@pytest.mark.parametrize("known", [None, codec.nothing()], ids=["", "nothing"])
def test_a_body_has_as_many_values_as_items(items: list[bytes], known: codec.Decoded | None) -> None:
    """A first read, too, refuses a body that holds more values than items, or fewer."""
    with pytest.raises(DamagedSnapshotError, match=r"^an item cannot be decoded"):
        decoded([ITEMS[0], *items], len(items), 0, known=known)


def test_a_body_is_one_array() -> None:
    """Anything but the head of an array of so many items is damage, even under a right checksum."""
    items = b"".join(ITEMS)
    for head in (b"\xdd\0\0\0\5", b"\xdd\0\0\0\3", b"\xdf\0\0\0\2", b"\xc6\0\0\0\4", bytes(5)):
        body = zlib.crc32(head + items).to_bytes(4, "little") + head + items
        with pytest.raises(DamagedSnapshotError, match=r"^the items do not match their checksum$"):
            decoded(ITEMS, 2, 1, body=body)


@pytest.mark.parametrize("known", [None, through(letters("c"))], ids=["", "c"])
def test_an_item_that_claims_more_than_it_holds_is_damage(known: codec.Decoded | None) -> None:
    """Nested arrays that each claim to be huge are refused before room is made for them, short or long."""
    for padding in (0, 20_000):
        bomb = b"\xdd\x00\xff\xff\xff" * 200 + b"\xc0" * padding
        with pytest.raises(DamagedSnapshotError, match=r"^an item cannot be decoded"):
            decoded([ITEMS[0], bomb], 1, 0, known=known)


def test_checking_items_looks_at_all_of_them() -> None:
    """All bytes are accounted for, and compared with the checksum and with the items' digests."""
    for sizes in ([], [0], [3], [3, 7, 5], [7, 7], [300_000, 1]):
        items = [bytes([number]) * size for number, size in enumerate(sizes)]
        index = b"".join(item_index.ENTRY.pack(len(item), item_index.digest_of(item)) for item in items)
        body = body_of(items)
        codec.check_items(index, memoryview(body))
        with pytest.raises(DamagedSnapshotError, match=r"^index and payload do not fit each other$"):
            codec.check_items(index, memoryview(body + b"x"))
        for place in range(0, len(body), 1000):
            bad = bytearray(body)
            bad[place] ^= 0xFF
            with pytest.raises(DamagedSnapshotError, match=r"^the items do not match their checksum$"):
                codec.check_items(index, memoryview(bytes(bad)))
            if place >= codec.BODY_HEAD_BYTES:
                bad[:4] = zlib.crc32(bad[4:]).to_bytes(4, "little")
                with pytest.raises(
                    DamagedSnapshotError, match=r"^an item's bytes do not match its digest$"
                ):
                    codec.check_items(index, memoryview(bytes(bad)))


FLAG = {"key": "a"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "definitions are a dict with flags, group_type_mapping and cohorts, not None"),
        ([], "definitions are a dict with flags, group_type_mapping and cohorts, not a list"),
        ({"flags": [], "cohorts": {}}, "definitions lack 'group_type_mapping'; they have ['flags', 'cohorts']"),
        ({**letters(""), "flags": None}, "definitions['flags'] is None, not a list"),
        ({**letters(""), "cohorts": []}, "definitions['cohorts'] is a list, not a dict"),
        ({**letters(""), "flags": [FLAG, None]}, "flags[1] is None, not a dict"),
        ({**letters(""), "flags": [FLAG, FLAG, "a"]}, "flags[2] is a str, not a dict"),
        ({**letters(""), "cohorts": {"1": {}, 2: {}}}, "cohorts has the key 2; JSON has only strings"),
        ({**letters(""), "more": b"x"}, "definitions holds a bytes, which JSON does not have"),
        ({**letters(""), "more": {1: 2}}, "definitions has the key 1; JSON has only strings"),
        ({**letters("ab"), "more": 2**70, "date": b""}, "definitions holds a bytes, which JSON does not have"),
        ({**letters(""), "flags": [FLAG, {"key": b"x"}]}, "flags[1] holds a bytes, which JSON does not have"),
        ({**letters(""), "flags": [FLAG, {"key": [{None: 1}]}]}, "flags[1] has the key None; JSON has only strings"),
        ({**letters("ab"), "cohorts": {"1": {}, "2": [b"x"]}}, "cohort 1 holds a bytes, which JSON does not have"),
        ({**letters("ab"), "cohorts": {"1": b"x"}}, "cohort 0 holds a bytes, which JSON does not have"),
        ({**letters("a"), "cohorts": {"1": {}, "2": {1: 2**70}}}, "cohort 1 has the key 1; JSON has only strings"),
        ({**letters(""), "flags": [FLAG, {"a": set()}]}, "flags[1] cannot be stored: can not serialize 'set' object"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(data: Any, reason: str) -> None:
    """What cannot be shared is refused with its place, so that whoever is on call finds it."""
    with pytest.raises(InvalidDefinitionsError) as caught:
        codec.encode(data)
    assert caught.value.reason == reason


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
