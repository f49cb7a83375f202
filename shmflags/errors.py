"""The error tree. Every error says where, why, and what to do about it.

Inside a worker none of these reaches the SDK: the provider logs them and answers with the safe
value. They reach the caller at construction, from the command line, and from `status`.
"""

from __future__ import annotations

import os


class ShmFlagsError(Exception):
    """Base of all errors of this package.

    `path` is the file or directory concerned (or None), `reason` says what is wrong with it,
    `remedy` says what to do.
    """

    def __init__(
        self, reason: str, *, path: str | os.PathLike[str] | None = None, remedy: str = ""
    ) -> None:
        self.path = None if path is None else os.fspath(path)
        self.reason = reason
        self.remedy = remedy
        super().__init__(reason)

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path is not None else ""
        mend = f" ({self.remedy})" if self.remedy else ""
        return f"{where}{self.reason}{mend}"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments are lost by the default reduction.
        return _rebuild, (type(self), self.reason, self.path, self.remedy)


def _rebuild(kind: type[ShmFlagsError], reason: str, path: str | None, remedy: str) -> ShmFlagsError:
    return kind(reason, path=path, remedy=remedy)


class UnsupportedPlatformError(ShmFlagsError):
    """This platform lacks what the cache stands on (fork, flock, shared mappings)."""


class UnsafePathError(ShmFlagsError):
    """A file or directory that another user could have tampered with, or that is not ours."""


class InvalidDefinitionsError(ShmFlagsError):
    """Definitions that cannot be stored: wrong shape, or values that JSON does not have."""


class DamagedSnapshotError(ShmFlagsError):
    """A snapshot whose bytes are not what its writer wrote."""


class LockTimeoutError(ShmFlagsError):
    """The page's lock was busy for longer than a poll may wait, or there was no descriptor for it."""


class UpstreamTimeoutError(ShmFlagsError):
    """The upstream did not answer within the time that a poll may wait for it."""


class RedisUnavailableError(ShmFlagsError):
    """Redis could not be reached, did not answer in time, or refused."""


class PageReplacedError(ShmFlagsError):
    """The control page at the path is no longer the one that is mapped."""
