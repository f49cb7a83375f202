"""PostHog flag definitions in shared memory: one fetch per host, shared by all its workers."""

from __future__ import annotations

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
from shmflags.status import Status
from shmflags.watcher import Watcher

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
