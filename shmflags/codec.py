"""Definitions to and from payload; the only file that knows msgpack.

A payload is a list of items, each encoded by itself and known by the digest of its bytes, so that a
reader decodes only what it has not decoded before and checks exactly what it decodes:

    item 0               the envelope: the definitions with `flags` and `cohorts` set to None, which
                         keeps the key order and all keys that we do not know
    then one per flag    the flag, in order
    then one per cohort  [key, cohort], in order

An item is msgpack. Where msgpack cannot express a value that JSON can (integers beyond 64 bits), the
item is the JSON text, as one msgpack string: no flag, cohort or envelope is a string, so the two
cannot be confused. Lone surrogates travel as UTF-8 with `surrogatepass`.

The index (item_index.py) has one entry per item, in order. The body follows it, and is one msgpack
value, so that a first read is one call:

    offset  size  field
    0       4     CRC-32 of all that follows (u32, little-endian)
    4       1     0xdd: a msgpack array, the number of whose elements follows
    5       4     number of items (u32, big-endian)
    9       …     the items' bytes, one after the other

A reader that decodes some of the items compares these with their digests; one that decodes all of them,
as it has none, compares the body with its checksum.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import Any, NamedTuple, cast

import msgpack

from shmflags.collector import collector_paused, settle
from shmflags.contract import Definitions
from shmflags.errors import DamagedSnapshotError, InvalidDefinitionsError
from shmflags.item_index import (
    DIGEST_BYTES,
    ENTRY,
    content_digest,
    digest_of,
    digests_in,
    total_length,
    unequal_parts,
)

_CHECKSUM = struct.Struct("<I")
_ARRAY = struct.Struct(">BI")
_ARRAY_MARK = 0xDD
BODY_HEAD_BYTES = _CHECKSUM.size + _ARRAY.size

# -2: the smallest length of a bin or ext is 0, and -1 means "no limit" to msgpack.
_PLAIN_JSON_ONLY = {
    "max_bin_len": -2,
    "max_ext_len": -2,
    "strict_map_key": True,
    "unicode_errors": "surrogatepass",
}
_WALKED_FIRST = 16 * 1024
_CONTAINERS = {dict, list}
_PLAIN_TYPES = frozenset((str, int, float, bool, type(None)))


class Encoded(NamedTuple):
    """Definitions as bytes: `entries`, the index, and the `items` of the body; `size` is of both.

    `etag` is the API's name for them, "" if it is not known.
    """

    flag_count: int
    cohort_count: int
    entries: bytes
    items: list[bytes]
    digest: bytes
    size: int
    etag: str = ""

    @property
    def body(self) -> bytes:
        """The body, as it is written behind the index."""
        items = b"".join([_ARRAY.pack(_ARRAY_MARK, len(self.items)), *self.items])
        return _CHECKSUM.pack(zlib.crc32(items)) + items


class Decoded(NamedTuple):
    """Definitions as objects; `values` are the items' objects, one for each of the index's `entries`.

    `etag` is the API's name for them, "" if it is not known.
    """

    definitions: Definitions
    digest: bytes
    entries: bytes
    values: list[Any]
    etag: str = ""


def nothing() -> Decoded:
    """Empty definitions, which nobody published: their digest is of no content."""
    return Decoded({"flags": [], "group_type_mapping": {}, "cohorts": {}}, b"", b"", [])


def encode(data: object, known: Decoded | None = None, etag: str = "") -> tuple[Encoded, Decoded]:
    """Encode definitions as the SDK hands them over.

    Returns the bytes, and `data` itself as `Decoded`: its publisher keeps the objects it was given.
    Items that stand in `known` are not examined again. Raises `InvalidDefinitionsError` for a wrong
    shape, for values that JSON does not have, and for nesting deeper than msgpack's 511 levels.
    """
    definitions = _checked_shape(data)
    envelope = dict(definitions)
    envelope["flags"] = envelope["cohorts"] = None
    flags, cohorts = definitions["flags"], definitions["cohorts"]
    values: list[Any] = [envelope, *flags, *map(list, cohorts.items())]
    items = _pack_all(values, len(flags))
    sha256 = hashlib.sha256  # `digest_of`, without a call for each of thousands.
    digests = [sha256(item).digest()[:DIGEST_BYTES] for item in items]
    index = b"".join(map(ENTRY.pack, map(len, items), digests))
    # msgpack also takes bytes and keys that are no strings; what a reader would refuse is
    # refused here. Bytes seen before were examined when they were first seen.
    old = known.entries if known is not None else b""
    parts = unequal_parts(old, index)
    seen = {digest for start, old_stop, _ in parts for digest in digests_in(old[start:old_stop])}
    for start, _, stop in parts:
        for number in range(start // ENTRY.size, stop // ENTRY.size):
            if digests[number] not in seen:
                _require_plain(values[number], number, len(flags))
    digest = content_digest(index, len(flags), len(cohorts))
    size = len(index) + BODY_HEAD_BYTES + sum(map(len, items))
    encoded = Encoded(len(flags), len(cohorts), index, items, digest, size, etag)
    return encoded, Decoded(definitions, digest, index, values, etag)


def decode(
    index: memoryview,
    body: memoryview,
    flag_count: int,
    cohort_count: int,
    digest: bytes,
    known: Decoded | None = None,
    etag: str = "",
) -> Decoded:
    """Decode definitions, reusing the objects of every item that stands in `known`.

    (An item that is there twice for the first time may be decoded once more.)

    `index` must have been checked against `digest`; each item is checked before it is decoded.
    Raises `DamagedSnapshotError` for anything that `encode` would not have written.
    """
    entries = bytes(index)
    with collector_paused():
        values = _values(entries, body, known)
        if len(values) != 1 + flag_count + cohort_count:
            raise DamagedSnapshotError("index and payload do not fit each other")
        try:
            definitions: Definitions = dict(values[0])
            definitions["flags"] = values[1 : 1 + flag_count]
            cohorts = values[1 + flag_count :]
            definitions["cohorts"] = {key: value for key, value in cohorts}
            _checked_shape(definitions)
            # A list of pairs makes a dict, and a dict of two keys can be unpacked like a pair.
            if type(values[0]) is not dict or not set(map(type, cohorts)) <= {list}:
                raise DamagedSnapshotError("items of a wrong shape: an envelope or a cohort")
        except (TypeError, ValueError, InvalidDefinitionsError) as error:
            raise DamagedSnapshotError(f"items of a wrong shape: {error}") from None
    return Decoded(definitions, digest, entries, values, etag)


def _values(entries: bytes, body: memoryview, known: Decoded | None) -> list[Any]:
    """The objects of all items: those of `known` where the digests are the same, else decoded."""
    old, old_values = (known.entries, known.values) if known is not None else (b"", [])
    if not old and (values := _first_values(entries, body)):
        settle(len(values))
        return values
    parts = unequal_parts(old, entries)
    seen: dict[bytes, Any] = {}
    for start, old_stop, _ in parts:
        there = old_values[start // ENTRY.size : old_stop // ENTRY.size]
        seen.update(zip(digests_in(old[start:old_stop]), there, strict=True))
    values = []
    offset, fresh = BODY_HEAD_BYTES, 0
    old_place = place = 0
    for start, old_stop, stop in parts:
        values += old_values[old_place // ENTRY.size : start // ENTRY.size]
        offset += total_length(entries[place:start])
        for length, digest in ENTRY.iter_unpack(entries[start:stop]):
            value = seen.get(digest)
            if value is None:
                value = _unpack(body[offset : offset + length], length, digest)
                fresh += 1
            values.append(value)
            offset += length
        old_place, place = old_stop, stop
    if offset + total_length(entries[place:]) != len(body):
        raise DamagedSnapshotError("index and payload do not fit each other")
    settle(fresh)
    return values + old_values[old_place // ENTRY.size :]


def _first_values(entries: bytes, body: memoryview) -> list[Any]:
    """The objects of all items where none is known: unpacked in one go, which is quicker than one by one.

    Empty if that cannot be done. Raises `DamagedSnapshotError` if the body is not what was written.
    """
    _check_body(entries, body)
    most = {"max_array_len": _WALKED_FIRST, "max_map_len": _WALKED_FIRST}
    items = body[_CHECKSUM.size :]
    try:
        values = msgpack.unpackb(items, **most, **_PLAIN_JSON_ONLY)
    except (ValueError, RecursionError, msgpack.UnpackException):
        return []
    return values if set(map(type, values)) <= _CONTAINERS else []


def _check_body(entries: bytes | memoryview, body: memoryview) -> None:
    if BODY_HEAD_BYTES + total_length(bytes(entries)) != len(body):
        raise DamagedSnapshotError("index and payload do not fit each other")
    array_head = _ARRAY.pack(_ARRAY_MARK, len(entries) // ENTRY.size)
    head = _CHECKSUM.pack(zlib.crc32(body[_CHECKSUM.size :])) + array_head
    if body[:BODY_HEAD_BYTES] != head:
        raise DamagedSnapshotError("the items do not match their checksum")


def check_items(entries: bytes | memoryview, body: memoryview) -> None:
    """Raise `DamagedSnapshotError` unless all that a reader could look at is what was written."""
    _check_body(entries, body)
    offset = BODY_HEAD_BYTES
    for length, digest in ENTRY.iter_unpack(entries):
        if digest_of(body[offset : offset + length]) != digest:
            raise DamagedSnapshotError("an item's bytes do not match its digest")
        offset += length


def _checked_shape(data: object) -> Definitions:
    if not isinstance(data, dict):
        raise InvalidDefinitionsError(
            f"definitions are a dict with flags, group_type_mapping and cohorts, not {_kind(data)}"
        )
    for name, kind in (("flags", list), ("group_type_mapping", dict), ("cohorts", dict)):
        if name not in data:
            raise InvalidDefinitionsError(f"definitions lack {name!r}; they have {list(data)!r}")
        if not isinstance(data[name], kind):
            raise InvalidDefinitionsError(
                f"definitions[{name!r}] is {_kind(data[name])}, not a {kind.__name__}"
            )
    flags = data["flags"]
    if not set(map(type, flags)) <= {dict}:
        number = next(number for number, flag in enumerate(flags) if type(flag) is not dict)
        raise InvalidDefinitionsError(f"flags[{number}] is {_kind(flags[number])}, not a dict")
    if not set(map(type, data["cohorts"])) <= {str}:
        key = next(key for key in data["cohorts"] if type(key) is not str)
        raise InvalidDefinitionsError(f"cohorts has the key {key!r}; JSON has only strings")
    return data


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _place(number: int, flag_count: int) -> str:
    if number == 0:
        return "definitions"
    return f"flags[{number - 1}]" if number <= flag_count else f"cohort {number - flag_count - 1}"


def _pack_all(values: list[Any], flag_count: int) -> list[bytes]:
    pack = msgpack.Packer(strict_types=True).pack
    try:
        return [pack(value) for value in values]
    except Exception:  # One of them needs more than plain msgpack, or cannot be stored.
        return [_pack(value, number, flag_count) for number, value in enumerate(values)]


def _pack(value: Any, number: int, flag_count: int) -> bytes:
    try:
        try:
            # Lone surrogates: the packer that takes them is slower.
            return cast(bytes, msgpack.packb(value, strict_types=True, unicode_errors="surrogatepass"))
        except OverflowError:
            return _pack_text(value, number, flag_count)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDefinitionsError(
            f"{_place(number, flag_count)} cannot be stored: {error}",
            remedy="only what JSON can express, at most 511 levels deep, can be shared",
        ) from None


def _pack_text(value: Any, number: int, flag_count: int) -> bytes:
    _require_plain(value, number, flag_count)
    import json

    text = json.dumps(value, ensure_ascii=False)
    return cast(bytes, msgpack.packb(text, unicode_errors="surrogatepass"))


def _require_plain(value: Any, number: int, flag_count: int) -> None:
    """Raise `InvalidDefinitionsError` unless `value` is of JSON's types all through."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        kind = type(part)
        if kind is dict:
            for key in part:
                if type(key) is not str:
                    raise InvalidDefinitionsError(
                        f"{_place(number, flag_count)} has the key {key!r}; JSON has only strings"
                    )
            waiting.extend(part.values())
        elif kind is list:
            waiting.extend(part)
        elif kind not in _PLAIN_TYPES:
            raise InvalidDefinitionsError(
                f"{_place(number, flag_count)} holds {_kind(part)}, which JSON does not have"
            )


def _unpack(item: memoryview, length: int, digest: bytes) -> Any:
    if len(item) != length or digest_of(item) != digest:
        raise DamagedSnapshotError("an item's bytes do not match its digest")
    try:
        if length > _WALKED_FIRST:
            # Before 1.2.4 msgpack takes room for as many elements as an array claims to have, at each
            # level of nesting; a walk finds the claim to be false and takes none.
            walk = msgpack.Unpacker(max_buffer_size=length)
            walk.feed(item)
            walk.skip()
        value = msgpack.unpackb(item, **_PLAIN_JSON_ONLY)
        if type(value) is str:
            import json

            value = json.loads(value)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise DamagedSnapshotError(f"an item cannot be decoded: {error}") from None
    return value
