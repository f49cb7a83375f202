"""The cyclic collector: paused while items are decoded, and not sent through them afterwards."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from shmflags import collector
from tests.support import WAIT_S
from tests.test_codec import letters, through


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_left_as_it_was_found(was_on: bool) -> None:
    """Nested and concurrent pauses restore the collector once, when the last of them ends."""
    on_before = gc.isenabled()
    try:
        (gc.enable if was_on else gc.disable)()
        inside, leave = threading.Event(), threading.Event()

        def pause() -> None:
            with collector.collector_paused():
                inside.set()
                leave.wait(30)

        thread = threading.Thread(target=pause)
        with collector.collector_paused():
            thread.start()
            assert inside.wait(30)
            with collector.collector_paused():
                assert not gc.isenabled()
            assert not gc.isenabled()
        assert not gc.isenabled()
        leave.set()
        thread.join(30)
        assert gc.isenabled() == was_on
    finally:
        (gc.enable if on_before else gc.disable)()


def test_no_child_inherits_a_pause() -> None:
    """A child forked while another thread decodes has the collector on, and can pause and resume it."""
    assert gc.isenabled()
    inside, leave = threading.Event(), threading.Event()

    def pause() -> None:
        with collector.collector_paused():
            inside.set()
            leave.wait(WAIT_S)

    thread = threading.Thread(target=pause)
    thread.start()
    assert inside.wait(WAIT_S)
    pid = os.fork()
    if not pid:
        seen = [False]
        try:
            seen = [gc.isenabled()]
            with collector.collector_paused():
                seen.append(not gc.isenabled())
            seen.append(gc.isenabled())
        finally:
            os._exit(0 if all(seen) else 1)
    try:
        _, status = os.waitpid(pid, 0)
    finally:
        leave.set()
        thread.join(WAIT_S)
    assert status == 0
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("was_on", "pauses", "is_on"), [(True, 2, True), (True, 0, False), (False, 2, False)]
)
def test_the_end_of_inherited_pauses(
    monkeypatch: pytest.MonkeyPatch, was_on: bool, pauses: int, is_on: bool
) -> None:
    """What the threads of the parent had paused is resumed, and nothing else; the lock is a free one."""
    held = threading.Lock()
    held.acquire()
    monkeypatch.setattr(collector, "_pause_lock", held)
    monkeypatch.setattr(collector, "_pauses", pauses)
    monkeypatch.setattr(collector, "_is_forked", False)
    monkeypatch.setattr(collector, "_collector_was_on", was_on)
    gc.disable()
    try:
        collector._end_inherited_pauses()
        assert gc.isenabled() == is_on
        with collector.collector_paused():
            assert not gc.isenabled()
        assert gc.isenabled() == is_on
    finally:
        gc.enable()


@pytest.fixture
def still_collector() -> Iterator[None]:
    """A collector that takes nothing for old by itself, and nothing frozen."""
    gc.disable()
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.enable()


def is_old(value: object) -> bool:
    """Whether the collector walks `value` in full collections only; what is frozen it never walks."""
    return any(one is value for one in gc.get_objects(generation=2))


def many(count: int) -> dict[str, Any]:
    return {**letters(""), "flags": [{"key": number, "n": [number]} for number in range(count)]}


@pytest.mark.parametrize("frozen", [False, True])
def test_what_was_decoded_is_not_walked_by_the_collector(still_collector: None, frozen: bool) -> None:
    """Many new objects are taken for old at once; where somebody has frozen his own, those stay frozen."""

    theirs = [letters("a")]
    if frozen:
        gc.freeze()
    none = through(many(0))
    found = [through(many(200)), through(many(100), none), through(many(99), none)]
    old = [is_old(one.definitions["flags"][0]) for one in found]
    if frozen:
        assert not is_old(theirs)
        assert old == [False, False, False]
    else:
        assert is_old(theirs)
        assert old == [True, True, False]


@pytest.mark.parametrize(("count", "settled"), [(1999, False), (2000, True)])
def test_in_a_forked_process_fewer_are_left_to_the_collector(
    still_collector: None, monkeypatch: pytest.MonkeyPatch, count: int, settled: bool
) -> None:
    """There, what its parent has frozen would have to be counted for them, which takes as long."""
    monkeypatch.setattr(collector, "_is_forked", True)
    assert is_old(through(many(count), through(many(0))).definitions["flags"][0]) is settled


def test_a_forked_process_knows_that_it_is_one() -> None:
    """In a child it is known, in its parent it is not."""
    pid = os.fork()
    if not pid:
        os._exit(0 if collector._is_forked else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert not collector._is_forked
