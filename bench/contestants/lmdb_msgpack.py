"""LMDB: one msgpack value, and a lock record in the same database."""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

import lmdb
import msgpack

from bench.contestants import LEASE_INTERVALS, Place

_LOCK, _VALUE = b"lock", b"definitions"
_MAP_BYTES = 1 << 30


class LmdbProvider:
    def __init__(self, directory: str, poll_interval_s: float) -> None:
        self._path = os.path.join(directory, "lmdb")
        self._me = uuid.uuid4().hex
        self._lease_s = poll_interval_s * LEASE_INTERVALS
        self._pid = 0
        self._opened: Any = None

    def _environment(self) -> Any:
        # An environment must not be used on the other side of a fork.
        if self._pid != os.getpid():
            if self._opened is not None:
                self._opened.close()
            self._opened = lmdb.open(self._path, map_size=_MAP_BYTES)
            self._pid = os.getpid()
            self._me = uuid.uuid4().hex
        return self._opened

    def should_fetch_flag_definitions(self) -> bool:
        now_s = time.monotonic()
        with self._environment().begin(write=True) as transaction:
            found = transaction.get(_LOCK)
            holder, until_s = msgpack.unpackb(found) if found else ("", 0.0)
            if holder != self._me and until_s > now_s:
                return False
            transaction.put(_LOCK, msgpack.packb([self._me, now_s + self._lease_s]))
            return True

    def get_flag_definitions(self) -> Any:
        with self._environment().begin(buffers=True) as transaction:
            value = transaction.get(_VALUE)
            return None if value is None else msgpack.unpackb(value)

    def on_flag_definitions_received(self, data: Any) -> None:
        with self._environment().begin(write=True) as transaction:
            transaction.put(_VALUE, msgpack.packb(data))

    def shutdown(self) -> None:
        with self._environment().begin(write=True) as transaction:
            found = transaction.get(_LOCK)
            if found and msgpack.unpackb(found)[0] == self._me:
                transaction.delete(_LOCK)


def make(place: Place, poll_interval_s: float) -> LmdbProvider:
    return LmdbProvider(place.directory, poll_interval_s)
