"""One worker of the storm: it polls every 20 ms, fetches when it is told to, and notes what it saw.

What it fetches is a stamp from one authority, the size of a file that everybody appends to: atomic,
rising, and nobody can be killed or stopped in a way that holds up the others.
"""

from __future__ import annotations

import logging
import os
import random
import struct
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from shmflags import SharedMemoryFlagCache
from tests.faults.harness import KEY, Ear, stamp_of, stamped

INTERVAL_S = 0.02
LEASE_S = 0.4
LATENCY_S = 0.03  # an answer takes up to this long
FLAGS, PADDING = 30, 600  # some 20 KB: several pages of memory, so that a torn read would show

NOTHING, SEEN, FETCHED = range(3)
_NOTE = struct.Struct("<QQQQ")


@dataclass(frozen=True)
class Note:
    """One poll: when it began and ended (CLOCK_MONOTONIC ns), and the stamp seen or fetched."""

    kind: int
    began_ns: int
    ended_ns: int
    stamp: int


def read_notes(path: Path) -> list[Note]:
    """What a worker noted until its end; a note is written whole or not at all."""
    data = path.read_bytes() if path.exists() else b""
    return [Note(*fields) for fields in _NOTE.iter_unpack(data)]


def main(base: Path, record: Path, seed: int) -> None:
    """Poll until killed. Notes go to `record`, anything that should not be to `record`.errors."""
    ear = Ear()
    logging.getLogger("shmflags").addHandler(ear)
    notes = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    authority = os.open(base / "authority", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        cache = SharedMemoryFlagCache(
            KEY,
            directory=base,
            poll_interval=INTERVAL_S,
            lease_ttl=LEASE_S,
            cold_start_timeout=0.0,
        )
        pick = random.Random(seed)
        while True:
            began = time.monotonic_ns()
            kind, stamp = _poll(cache, authority, pick)
            os.write(notes, _NOTE.pack(kind, began, time.monotonic_ns(), stamp))
            ear.assert_no_surprise()
            time.sleep(max(0.001, INTERVAL_S - (time.monotonic_ns() - began) / 1e9))
    except BaseException:
        record.with_suffix(".errors").write_text(traceback.format_exc())
        raise


def _poll(cache: SharedMemoryFlagCache, authority: int, pick: random.Random) -> tuple[int, int]:
    if cache.should_fetch_flag_definitions():
        os.write(authority, b".")
        stamp = os.lseek(authority, 0, os.SEEK_CUR)
        time.sleep(pick.uniform(0.0, LATENCY_S))
        cache.on_flag_definitions_received(stamped(stamp, FLAGS, PADDING))
        return FETCHED, stamp
    found = cache.get_flag_definitions()
    assert found is not None, "told to fetch by get(), with nobody fetching for 0 s"
    if not found["flags"]:
        return NOTHING, 0
    return SEEN, stamp_of(found)
