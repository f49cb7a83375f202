"""The cyclic collector, kept from walking what is being decoded: many objects, and no garbage."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# So many new items are worth settling. To learn in a forked process that its heap is frozen takes as long as
# the collector takes to walk thousands.
_MANY = 100
_MANY_IN_A_CHILD = 2000
# So few frozen objects are Python's own: 3.12 starts with hundreds, and has tens of thousands to freeze.
_FROZEN_BY_PYTHON = 1000

_pause_lock = threading.Lock()
_pauses = 0
_collector_was_on = False
_is_forked = False


def _end_inherited_pauses() -> None:
    """In a forked child: the threads that had paused the collector are not here to resume it."""
    global _pause_lock, _pauses, _is_forked
    _is_forked = True
    _pause_lock = threading.Lock()
    if _pauses and _collector_was_on:
        gc.enable()
    _pauses = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_inherited_pauses)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Run the block without the cyclic collector, and restore it as it was found.

    Decoding makes a great many objects and no garbage; the collector would walk them all, again
    and again: at 5,000 flags for a third of the time, or much more where there are few other objects.
    Nested and concurrent blocks count.
    """
    global _pauses, _collector_was_on
    with _pause_lock:
        if _pauses == 0:
            _collector_was_on = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _pause_lock:
            _pauses -= 1
            if _pauses == 0 and _collector_was_on:
                gc.enable()


def settle(fresh: int) -> None:
    """After decoding many items: have the cyclic collector take what is young for old, without looking.

    What was decoded is here to stay, and free of cycles; once resumed, the collector would walk it all
    and find nothing, which takes as long as decoding it. What else is young waits for a full collection:
    so this is not done for a few items.
    """
    # What somebody has frozen, before a fork, must stay so.
    many = _MANY_IN_A_CHILD if _is_forked else _MANY
    if fresh >= many and gc.get_freeze_count() < _FROZEN_BY_PYTHON:
        gc.freeze()
        gc.unfreeze()
