"""`shmflags clear`: remove what is shared for a service key."""

from __future__ import annotations

import os
from pathlib import Path

from shmflags import page_file, status
from shmflags.diagnosis import count
from shmflags.errors import LockTimeoutError, ShmFlagsError
from shmflags.processes import Host
from shmflags.runtime_dir import RuntimeDir
from shmflags.snapshot import DEFAULT_MAX_BYTES
from shmflags.status import Status

_MOST_NAMED = 5


class InUseError(ShmFlagsError):
    """Workers live that use it."""


def clear(directory: RuntimeDir, host: Host, *, force: bool) -> bool:
    """Remove page, snapshot and what lies about; False if there was nothing.

    Raises `InUseError` if workers live, unless `force`: they make it all anew. Raises
    `UnsafePathError`, `LockTimeoutError` or `OSError` if it may not or cannot be removed.
    """
    try:
        # What workers refuse is not followed here either: it may lead elsewhere.
        directory.check(lambda _: None)
    except FileNotFoundError:
        return False
    if not force:
        _require_unused(directory, status.read(directory, host, DEFAULT_MAX_BYTES))
    try:
        page = page_file.open_existing(directory, host)
    except (FileNotFoundError, ShmFlagsError):
        _remove(directory)  # No page that anybody could use, and so no lock either.
        return True
    try:
        with page.locked():  # Nobody is half-way in a publish.
            _remove(directory)
    except LockTimeoutError:
        if not force:
            raise
        _remove(directory)
    return True


def _require_unused(directory: RuntimeDir, found: Status) -> None:
    pids = [worker.pid for worker in found.workers]
    if found.leader is not None and found.leader.pid not in pids:
        pids.append(found.leader.pid)
    if pids:
        named = ", ".join(map(str, pids[:_MOST_NAMED])) + (", …" if len(pids) > _MOST_NAMED else "")
        raise InUseError(
            f"{count(len(pids), 'process uses', 'processes use')} it: {named}",
            path=directory.path,
            remedy="stop them, or use --force: then they make it anew at their next polls",
        )


def _remove(directory: RuntimeDir) -> None:
    # The snapshot first: a page made meanwhile would adopt it.
    _unlink(directory.snapshot_path)
    for path, _ in directory.temporary_files():
        _unlink(path)
    _unlink(directory.page_path)
    try:
        os.rmdir(directory.path)
    except OSError:
        pass  # A worker has begun anew in it.


def _unlink(path: Path) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
