"""diskcache: one msgpack value, and a lock entry that expires."""

from __future__ import annotations

import os
from typing import Any

import diskcache
import msgpack

from bench.contestants import LEASE_INTERVALS, HolderName, Place

_LOCK, _VALUE = "lock", "definitions"


class DiskcacheProvider:
    def __init__(self, directory: str, poll_interval_s: float) -> None:
        self._cache = diskcache.Cache(os.path.join(directory, "diskcache"))
        self._name = HolderName()
        self._lease_s = poll_interval_s * LEASE_INTERVALS

    def should_fetch_flag_definitions(self) -> bool:
        me = self._name()
        if self._cache.add(_LOCK, me, expire=self._lease_s):
            return True
        if self._cache.get(_LOCK) != me:
            return False
        return bool(self._cache.touch(_LOCK, expire=self._lease_s))

    def get_flag_definitions(self) -> Any:
        value = self._cache.get(_VALUE)
        return None if value is None else msgpack.unpackb(value)

    def on_flag_definitions_received(self, data: Any) -> None:
        self._cache.set(_VALUE, msgpack.packb(data))

    def shutdown(self) -> None:
        with self._cache.transact():
            if self._cache.get(_LOCK) == self._name():
                self._cache.delete(_LOCK)


def make(place: Place, poll_interval_s: float) -> DiskcacheProvider:
    return DiskcacheProvider(place.directory, poll_interval_s)
