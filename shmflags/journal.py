"""The log: one logger, `shmflags`. Events once each; repeated trouble once a minute, with a count."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from shmflags.errors import ShmFlagsError

if TYPE_CHECKING:
    import logging

_REPEAT_S = 60.0


class Journal:
    """Logs for one provider; every line carries service key, pid, term and generation (0: none)."""

    def __init__(self, service_key: str) -> None:
        self._service_key = service_key
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._held_back: dict[str, int] = {}

    def after_fork(self) -> None:
        """In a forked child: a lock that another thread held would never be released."""
        self._lock = threading.Lock()

    def event(self, message: str, pid: int, term: int, generation: int) -> None:
        """Something happened, once: elected, yielded, published, …"""
        _logger().info("%s%s", message, self._where(pid, term, generation))

    def trouble(self, what: str, error: object, pid: int, term: int = 0, generation: int = 0) -> None:
        """Something is wrong, and may be wrong again at the next poll."""
        kind = f"{what}: {type(error).__name__}"
        now = time.monotonic()
        with self._lock:
            last = self._last.get(kind)
            if last is not None and now - last < _REPEAT_S:
                self._held_back[kind] = self._held_back.get(kind, 0) + 1
                return
            self._last[kind] = now
            repeats = self._held_back.pop(kind, 0)
        # An unforeseen error comes with its traceback: it is a bug, and its report is precious.
        foreseen = not isinstance(error, Exception) or isinstance(error, (ShmFlagsError, OSError))
        _logger().warning(
            "%s: %s%s%s",
            what,
            f"{type(error).__name__}: {error}" if isinstance(error, Exception) else error,
            f" (and {repeats} times more since the last such line)" if repeats else "",
            self._where(pid, term, generation),
            exc_info=error if isinstance(error, Exception) and not foreseen else None,
        )

    def _where(self, pid: int, term: int, generation: int) -> str:
        return f" [{self._service_key} pid {pid} term {term} generation {generation}]"


def _logger() -> logging.Logger:
    # Imported when there is something to say, so that importing this package is quick.
    import logging

    return logging.getLogger("shmflags")
