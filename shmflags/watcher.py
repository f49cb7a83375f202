"""The thread that notices, between two polls, that there is something to do.

It looks at a few words of the mapped page, some twenty times a second, and calls back when this
process is behind the published generation, when nobody leads, or when a fetch was put off until the client
had flags. It waits for no lock and opens no snapshot.
Calls back do not multiply requests: a grant is due or it is not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

from shmflags import servers

_AGAIN_S = 1.0
# A process is never as busy as when it starts: a look would wait for the GIL again and again, and what is
# loaded then is new.
_START_S = 1.0
# In a forked child the client's own at-fork hook, which makes its locks anew, may run after ours.
_SETTLE_S = 0.2


class Watcher:
    """A daemon thread that calls `callback()` whenever `notice()` has something new.

    `notice` returns None, or what is to be seen: the same thing is reported at once the first
    time, and then once a second while it lasts. The thread begins with `start`, looks for the first
    time a second later, or as soon as it is told to `hasten`, and survives a fork through `restart`.
    """

    def __init__(
        self,
        notice: Callable[[], Hashable | None],
        callback: Callable[[], object],
        interval_s: float,
        on_error: Callable[[Exception], None],
    ) -> None:
        self._notice = notice
        self._callback = callback
        self._interval_s = interval_s
        self._on_error = on_error
        self._stop = threading.Event()
        self._begin = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def start(self) -> None:
        """Start the thread, unless there is one in this process, or `stop` was called."""
        if self._thread is None:
            with self._starting:
                if self._thread is None and not self._stop.is_set():
                    self._start(_START_S)

    def restart(self) -> None:
        """In a forked child, where the parent's thread did not come along: start one, if it had one."""
        parents, self._thread = self._thread, None
        self._starting = threading.Lock()
        if not self._stop.is_set():
            self._stop, self._begin = threading.Event(), threading.Event()
            if parents is not None:
                self._start(_SETTLE_S)

    def _start(self, settle_s: float) -> None:
        told = self._stop, self._begin, settle_s
        thread = threading.Thread(target=self._run, args=told, name="shmflags-watcher", daemon=True)
        thread.start()
        self._thread = thread

    def hasten(self) -> None:
        """There is something to see: do not wait with the first look."""
        self._begin.set()

    def stop(self) -> None:
        """End the thread; at most a running callback is waited for, and not from within it."""
        self._stop.set()
        self._begin.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=1.0)

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_prompt(self) -> bool:
        """Whether what there is to see is seen within a second."""
        return self.is_alive and self._interval_s <= _AGAIN_S

    def _run(self, stop: threading.Event, begin: threading.Event, settle_s: float) -> None:
        seen: Hashable | None = None
        quiet_s = 0.0
        begin.wait(settle_s)
        while not stop.wait(self._interval_s):
            quiet_s += self._interval_s
            try:
                found = self._notice()
                if found is None:
                    seen = None
                elif found != seen or quiet_s >= _AGAIN_S:
                    seen, quiet_s = found, 0.0
                    self._callback()
            except Exception as error:
                self._on_error(error)


class Watchers:
    """The watchers of one cache. A thread that cannot be had is complained about, and no more."""

    def __init__(
        self,
        notice: Callable[[], Hashable | None],
        complain: Callable[[str, Exception], None],
    ) -> None:
        self._notice = notice
        self._complain = complain
        self._all: list[Watcher] = []

    def __len__(self) -> int:
        return len(self._all)

    def add(self, callback: Callable[[], object], interval_s: float) -> Watcher:
        """One more, not yet started."""
        watcher = Watcher(
            self._notice,
            callback,
            interval_s,
            lambda error: self._complain("a watcher's callback failed", error),
        )
        self._all.append(watcher)
        return watcher

    def start(self) -> None:
        """Start those that have no thread, unless that would hurt the next fork."""
        if self._all and not servers.forks_without_hooks():
            self._each(Watcher.start)

    def hasten(self) -> None:
        """Have those that have only been started look at once."""
        self._each(Watcher.hasten)

    def restart(self) -> None:
        """In a forked child: start those again that had a thread in the parent."""
        self._each(Watcher.restart)

    def stop(self) -> None:
        """End them all, and forget them."""
        stopped, self._all = self._all, []
        for watcher in stopped:
            watcher.stop()

    def _each(self, action: Callable[[Watcher], None]) -> None:
        for watcher in self._all:
            try:
                action(watcher)
            except RuntimeError as error:  # No more threads to be had.
                self._complain("a watcher could not be started", error)
