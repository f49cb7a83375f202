"""The index of a payload: which items there are, by their digests, and where two indexes differ.

It has one entry per item, in order:

    offset  size  field
    0       4     length of the item's bytes (u32, little-endian)
    4       16    digest of the item's bytes (the first half of SHA-256, which CPUs have
                  instructions for, and no policy forbids)

The content digest is the digest of the index with the two counts: equal digests mean equal bytes.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Callable

DIGEST_BYTES = 16
ENTRY = struct.Struct(f"<I{DIGEST_BYTES}s")
_COUNTS = struct.Struct("<II")
_RUN = 64


def digest_of(data: bytes | memoryview) -> bytes:
    """The 16-byte digest by which contents are compared."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def content_digest(index: bytes | memoryview, flag_count: int, cohort_count: int) -> bytes:
    """The digest of whole definitions, from the digests of their items."""
    return digest_of(bytes(index) + _COUNTS.pack(flag_count, cohort_count))


def unequal_parts(old: bytes, new: bytes) -> list[tuple[int, int, int]]:
    """Where two indexes differ, so that only there each entry need be looked at.

    Each with its start, its end in the old one and its end in the new one, in bytes and in order; all
    else is the same in both. Most changes leave both ends as they were; if what lies between is of the
    same size, it is compared run by run.
    """
    head, tail = _common_ends(old, new)
    old_stop, stop = len(old) - tail, len(new) - tail
    if old_stop != stop:
        return [(head, old_stop, stop)]
    run = _RUN * ENTRY.size
    ends = [(start, min(start + run, stop)) for start in range(head, stop, run)]
    return [(start, end, end) for start, end in ends if old[start:end] != new[start:end]]


def _common_ends(old: bytes, new: bytes) -> tuple[int, int]:
    """How many bytes, in whole entries, two indexes have in common at their start, and then at their end."""
    old_size, size = len(old), len(new)
    head = _common_bytes(min(old_size, size), lambda a, b: old[a:b] == new[a:b])
    tail = _common_bytes(
        min(old_size, size) - head,
        lambda a, b: old[old_size - b : old_size - a] == new[size - b : size - a],
    )
    return head, tail


def _common_bytes(most: int, same: Callable[[int, int], bool]) -> int:
    """How many of `most` bytes, in whole entries, two indexes have in common.

    `same` compares what stands between two distances from the end at which they are compared.
    """
    low, high = 0, most // ENTRY.size
    while low < high:
        middle = (low + high + 1) // 2
        if same(low * ENTRY.size, middle * ENTRY.size):
            low = middle
        else:
            high = middle - 1
    return low * ENTRY.size


def digests_in(entries: bytes) -> list[bytes]:
    return [digest for _, digest in ENTRY.iter_unpack(entries)]


def total_length(entries: bytes) -> int:
    words = array("I", entries)
    if sys.byteorder == "big":
        words.byteswap()
    return sum(words[:: ENTRY.size // words.itemsize])
