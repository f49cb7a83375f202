"""Who is compared. Each is a real provider, as one would write it with that tool.

A contestant's module has `make(place, poll_interval_s)`, which returns a provider, or None for the SDK
alone. All but ours follow the same plan, that of PostHog's documented Redis example: a lock with a
time limit of two poll intervals, renewed at each poll by whoever holds it, and one value with all
definitions, read and decoded at each poll.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import uuid
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from bench import redis_server

_MODULES = {
    "shmflags": "bench.contestants.shared_memory",
    "sdk": "bench.contestants.sdk_alone",
    "redis": "bench.contestants.redis_json",
    "lmdb": "bench.contestants.lmdb_msgpack",
    "diskcache": "bench.contestants.diskcache_msgpack",
    "file": "bench.contestants.json_file",
}
TITLES = {
    "shmflags": "shmflags",
    "sdk": "SDK alone",
    "redis": "Redis",
    "lmdb": "LMDB",
    "diskcache": "diskcache",
    "file": "JSON file",
}
LEASE_INTERVALS = 2
"""How many poll intervals a lock lasts unrenewed: 60 s at 30 s in PostHog's example."""


@dataclass(frozen=True)
class Place:
    """Where a contestant keeps its definitions."""

    directory: str
    redis_url: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


class HolderName:
    """Under what name a process takes the lock; a forked child has another one."""

    def __init__(self) -> None:
        self._pid, self._name = os.getpid(), uuid.uuid4().hex

    def __call__(self) -> str:
        if self._pid != os.getpid():
            self._pid, self._name = os.getpid(), uuid.uuid4().hex
        return self._name


_chosen: set[str] = set(_MODULES)


def choose(names: list[str]) -> None:
    """Compare only these. Raises `ValueError` for one that is not there, or not installed."""
    if unknown := sorted(set(names) - set(available())):
        raise ValueError(
            f"no such contestant: {', '.join(unknown)}; there are {', '.join(available())}"
        )
    _chosen.intersection_update(names)


def available() -> list[str]:
    """The contestants whose tools are installed, unless others were chosen."""
    needs = {"lmdb": "lmdb", "diskcache": "diskcache", "redis": "redis"}
    return [
        name
        for name in _MODULES
        if name in _chosen
        and (name not in needs or importlib.util.find_spec(needs[name]) is not None)
        and (name != "redis" or redis_server.is_installed())
    ]


def module(name: str) -> ModuleType:
    """The module of a contestant, imported."""
    return importlib.import_module(_MODULES[name])


def make(name: str, place: dict[str, str], poll_interval_s: float) -> Any:
    """The provider of a contestant; `place` is a `Place` as JSON."""
    return module(name).make(Place(**place), poll_interval_s)
