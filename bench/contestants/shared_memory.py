"""shmflags."""

from __future__ import annotations

from bench.contestants import Place
from shmflags import SharedMemoryFlagCache


def make(place: Place, poll_interval_s: float) -> SharedMemoryFlagCache:
    return SharedMemoryFlagCache("bench", directory=place.directory, poll_interval=poll_interval_s)
