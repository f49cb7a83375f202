"""PostHog flag definitions in shared memory: one fetch per host, shared by all its workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmflags._version import __version__
from shmflags.contract import validate_provider
from shmflags.errors import (
    DamagedSnapshotError,
    InvalidDefinitionsError,
    ShmFlagsError,
    UnsafePathError,
    UnsupportedPlatformError,
)
from shmflags.provider import SharedMemoryFlagCache
from shmflags.watcher import Watcher

if TYPE_CHECKING:
    from shmflags.status import Status

__all__ = [
    "DamagedSnapshotError",
    "InvalidDefinitionsError",
    "SharedMemoryFlagCache",
    "ShmFlagsError",
    "Status",
    "UnsafePathError",
    "UnsupportedPlatformError",
    "Watcher",
    "__version__",
    "validate_provider",
]


def __getattr__(name: str) -> object:
    if name == "Status":  # A worker that starts need not import it.
        from shmflags.status import Status

        return Status
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
