"""The lock: `flock` through filelock, on a descriptor opened for one acquisition.

A lock belongs to the open file description, so a descriptor that a forked child inherits is the same
lock: the child must close it and never unlock it. And a lock on a file that was removed or replaced
excludes nobody, so after locking the file is compared with the one at the path.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from shmflags.errors import LockTimeoutError, PageReplacedError, UnsafePathError
from shmflags.processes import Host
from shmflags.runtime_dir import open_private

PATIENCE_S = 0.05
_RETRY_S = 0.001
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Inode(NamedTuple):
    """Which file it is, whatever its name."""

    device: int
    number: int

    @staticmethod
    def of(info: os.stat_result) -> Inode:
        return Inode(info.st_dev, info.st_ino)


class FileLock:
    """The lock of one file of user `uid`, for as long as it stands at its path."""

    def __init__(self, path: Path, inode: Inode, uid: int, host: Host) -> None:
        self._path = path
        self._path_text = os.fspath(path)
        self._inode = inode
        self._uid = uid
        self._host = host
        # Set once the file turned out not to be lockable as it is: then it has to be attached again.
        self._lost = False

    def guards_its_path(self) -> bool:
        """False once the file was removed, replaced, or is not ours alone any more."""
        if self._lost:
            return False
        try:
            info = os.lstat(self._path_text)
        except OSError:
            return False
        return info.st_ino == self._inode.number and info.st_dev == self._inode.device

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock for the block, which must neither wait nor log.

        Raises `LockTimeoutError` after `PATIENCE_S` or for want of descriptors, `PageReplacedError`
        if the file was removed or replaced, `OSError` if it cannot be opened.
        """
        try:
            descriptor = open_private(self._path, os.O_RDWR, self._uid)
        except (FileNotFoundError, UnsafePathError):
            self._lost = True
            raise PageReplacedError("is gone or was replaced", path=self._path) from None
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            # A process that can open nothing cannot fetch either; it must not be told to try.
            raise LockTimeoutError(
                f"its lock cannot be had: {error.strerror}",
                path=self._path,
                remedy="raise the limit, or find what does not close its files",
            ) from None
        with _locked(descriptor, self._host, self._path):
            if Inode.of(os.fstat(descriptor)) != self._inode or not self.guards_its_path():
                raise PageReplacedError("was replaced", path=self._path)
            yield


@contextmanager
def directory_lock(path: Path, host: Host) -> Iterator[None]:
    """Hold the lock of a directory: for replacing a file in it that may not be lockable itself.

    Raises `LockTimeoutError` or `OSError`.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with _locked(os.open(path, flags), host, path):
        yield


def _prepare_for_more_children() -> None:
    """In a process that forks workers: import once what each of them would import at its first poll.

    After a fork, not before one: filelock has at-fork hooks of its own, which belong together.
    """
    try:
        import filelock

        assert filelock
    except Exception:
        pass  # No descriptors or memory to be had, say. Who takes a lock tries again, and tells.


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=_prepare_for_more_children)


# The descriptors on which this process may hold a lock, each with the process that opened it.
_opened: dict[int, int] = {}


@contextmanager
def _locked(descriptor: int, host: Host, path: Path) -> Iterator[None]:
    """Hold the lock of `descriptor` for the block, and close it after. Raises as `acquire` does."""
    from filelock import unlock_descriptor

    pid = os.getpid()
    _opened[descriptor] = pid
    locked = False
    try:
        acquire(descriptor, host, path)
        locked = True
        yield
    finally:
        # Were this frame ever unwound in a forked child, unlocking would free the parent's lock.
        if pid == os.getpid():
            if locked:
                unlock_descriptor(descriptor)
            # Before the number can be another file's.
            del _opened[descriptor]
            os.close(descriptor)


def abandon_inherited() -> None:
    """In a forked child: close the descriptors that came along, without unlocking.

    Else the child would go on holding a lock of its parent's that the parent was killed with.
    """
    for descriptor, opener in list(_opened.items()):
        if opener != os.getpid() and _opened.pop(descriptor, None) is not None:
            os.close(descriptor)


def acquire(descriptor: int, host: Host, path: Path) -> None:
    """Lock `descriptor` within `PATIENCE_S`, or raise `LockTimeoutError`."""
    from filelock import lock_descriptor

    deadline_ns = host.now_ns() + int(PATIENCE_S * 1e9)
    while not lock_descriptor(descriptor, blocking=False):
        if host.now_ns() >= deadline_ns:
            raise LockTimeoutError(
                f"its lock was busy for {PATIENCE_S * 1000:.0f} ms",
                path=path,
                remedy="if this repeats, `shmflags status` names the process that holds it",
            )
        host.sleep(_RETRY_S)
