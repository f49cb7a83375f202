"""A thread to run foreign code on: one call at a time, and the caller waits only so long.

A call that hangs keeps the thread, so it is never doubled: until it comes back, further calls fail at
once. What a coroutine function returns is run on an event loop of the thread's own, which lives as long
as the thread, as connections of async clients belong to their loop.
"""

from __future__ import annotations

import inspect
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from shmflags.errors import UpstreamTimeoutError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

_T = TypeVar("_T")


class _Call(Generic[_T]):
    def __init__(self, function: Callable[[], _T]) -> None:
        self._function = function
        self._result: _T
        self._error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:  # Even SystemExit must reach the caller, not end the thread.
            self._error = error

    def outcome(self) -> _T:
        if self._error is None:
            return self._result
        if isinstance(self._error, Exception):
            raise self._error
        raise RuntimeError(f"it raised {type(self._error).__name__}: {self._error}")


class HelperThread:
    """One daemon thread, started by its first call. Of no use in a forked child: make another."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._free = threading.Lock()  # Held from a call's start to its end, whoever waits for it.
        self._overdue = False
        self._calls: queue.SimpleQueue[_Call[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: AbstractEventLoop | None = None

    def call(self, function: Callable[[], _T], timeout_s: float) -> _T:
        """What `function` returns or raises, if it does so within `timeout_s`.

        Raises `UpstreamTimeoutError` if not, or if an earlier call has not come back; `RuntimeError` if
        there are no more threads to be had.
        """
        end_s = time.monotonic() + timeout_s
        if not self._free.acquire(timeout=0 if self._overdue else timeout_s):
            raise UpstreamTimeoutError("an earlier call has not come back yet")
        call = _Call(function)
        try:
            self._start()
        except RuntimeError:
            self._free.release()
            raise
        self._calls.put(call)
        if not call.done.wait(max(0.0, end_s - time.monotonic())):
            self._overdue = True
            raise UpstreamTimeoutError(f"it did not answer within {timeout_s:g} s")
        return call.outcome()

    def settle(self, result: Any, timeout_s: float) -> Any:
        """On this thread: `result`, or what it brings if it has to be awaited.

        A coroutine is cancelled after `timeout_s`; then this raises `UpstreamTimeoutError`.
        """
        if not inspect.isawaitable(result):
            return result
        import asyncio
        import selectors

        if self._loop is None:
            # Not epoll: closing its copy of an epoll loop, a forked child would unregister the
            # parent's descriptors, as the kernel's object is shared. And select() ends at 1,024.
            selector = getattr(selectors, "PollSelector", selectors.SelectSelector)()
            self._loop = asyncio.SelectorEventLoop(selector)
        try:
            return self._loop.run_until_complete(asyncio.wait_for(_awaited(result), timeout_s))
        except asyncio.TimeoutError:
            raise UpstreamTimeoutError(f"it did not answer within {timeout_s:g} s") from None

    def finish(self, function: Callable[[], _T], timeout_s: float) -> _T:
        """The thread's last call, after which it ends. It waits for its turn, even behind one that
        hangs; the caller, only for `timeout_s`. Raises as `call` does."""
        call = _Call(function)
        self._start()
        self._calls.put(call)
        self._calls.put(None)
        if not call.done.wait(timeout_s):
            raise UpstreamTimeoutError(f"it did not answer within {timeout_s:g} s")
        return call.outcome()

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        while True:
            call = self._calls.get()
            if call is None:
                break
            call.run()
            self._overdue = False
            if self._free.locked():  # It is not held for the last call.
                self._free.release()
            call.done.set()
            del call  # What it returned is not ours to keep until the next call.
        if self._loop is not None:
            self._loop.close()


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result
