"""A vigil: an open pidfd, which tells for the price of two cheap system calls that a process runs on.

Reading /proc costs ten times as much, and who leads is looked at in every poll and some times a second.
A vigil only ever spares a closer look; that a process is dead is proved in `processes.py` alone.
"""

from __future__ import annotations

import os
import select
from types import BuiltinFunctionType

# What gevent puts in its place does not look at all when it is told not to wait.
_poll = select.poll if isinstance(getattr(select, "poll", None), BuiltinFunctionType) else None


class Vigil:
    """A pidfd on one process. Raises `OSError` or `AttributeError` where there are none."""

    def __init__(self, pid: int) -> None:
        if _poll is None:
            raise OSError("there is no poll() here")
        self._descriptor = os.pidfd_open(pid)
        self._inode = _inode(self._descriptor)

    def sees_life(self) -> bool:
        """True if the process runs, or is stopped. False proves nothing."""
        assert _poll is not None
        poll = _poll()  # Not kept: two threads must not use one at the same time.
        poll.register(self._descriptor, select.POLLIN)
        # A daemon that closes "all" descriptors closes ours, and its number comes to mean another file.
        return not poll.poll(0) and _inode(self._descriptor) == self._inode

    def close(self) -> None:
        """Harmless when repeated."""
        if self._descriptor >= 0 and _inode(self._descriptor) == self._inode:
            os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "_inode"):
            self.close()


def _inode(descriptor: int) -> tuple[int, int] | None:
    try:
        info = os.fstat(descriptor)
    except OSError:
        return None
    return info.st_dev, info.st_ino
