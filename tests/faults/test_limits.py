"""Out of descriptors or memory, or beyond an allowed size: what was served stays, and is mended."""

from __future__ import annotations

import gc
import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EMFILE
from pathlib import Path

import pytest

from shmflags import codec, snapshot
from shmflags.snapshot import HEADER_BYTES
from tests.faults.harness import (
    Api,
    Ear,
    Poller,
    in_child,
    runtime_dir,
    stamp_on_disk,
    stamped,
    take_all,
    temporary_files,
)
from tests.faults.scene import Scene, fetch_in_vain, large, poll_all, small

MIB = 1 << 20


# -- limits of the process


@contextmanager
def limited(what: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Not one more descriptor is to be had."""
    taken: list[int] = []
    gc.collect()  # or maps of earlier tests would give theirs back meanwhile
    with limited(resource.RLIMIT_NOFILE, 256):
        take_all(EMFILE, lambda: taken.append(os.open("/dev/null", os.O_RDONLY)))
        try:
            yield
        finally:
            for descriptor in taken:
                os.close(descriptor)


def test_out_of_descriptors(directory: Path, ear: Ear) -> None:
    """Without descriptors workers serve on and ask nobody; with them again, they go on as before."""

    def child() -> None:
        scene = Scene(directory)
        scene.api.change()
        asked = scene.api.requests
        with no_descriptors():
            assert poll_all(scene, 20) == [1, 1]
        assert scene.api.requests == asked
        scene.settle()
        scene.assert_sound()

    in_child(child)


def test_out_of_descriptors_at_the_start(directory: Path, ear: Ear) -> None:
    """A worker that starts without descriptors fetches for itself, and joins the others later."""

    def child() -> None:
        scene = Scene(directory)
        late = scene.start(1)[0]
        with no_descriptors():
            assert late.poll() == 1
        scene.api.change()
        scene.settle()

    in_child(child)


def test_a_limit_on_the_size_of_files(directory: Path, ear: Ear) -> None:
    """A snapshot beyond RLIMIT_FSIZE is not shared, and leaves nothing behind; a smaller one is."""

    def child() -> None:
        scene = Scene(directory)
        large(scene, 200_000)
        with limited(resource.RLIMIT_FSIZE, 100_000):
            fetch_in_vain(scene)
            poll_all(scene)
            assert temporary_files(directory) == []
            assert stamp_on_disk(directory) == 1
            small(scene)
            scene.settle()
        large(scene, 200_000)
        scene.settle()
        scene.assert_sound()

    in_child(child)


def test_a_limit_below_the_size_of_the_page(directory: Path, ear: Ear) -> None:
    """Where not even the page may be written, each worker fetches for itself."""

    def child() -> None:
        scene = Scene(directory, workers=0)
        scene.start(2)
        with limited(resource.RLIMIT_FSIZE, 20_000):
            assert poll_all(scene) == [1, 1]
            assert temporary_files(directory) == []
            assert not runtime_dir(directory).page_path.exists()
        scene.api.change()
        scene.settle()
        scene.assert_sound()

    in_child(child)


@contextmanager
def address_space(more: int) -> Iterator[None]:
    """No more than `more` bytes of memory are to be had in large pieces."""
    ballast: list[bytes] = []
    with limited(resource.RLIMIT_AS, _used()):
        # What earlier tests have freed may lie in the heap, to be had again without asking the system.
        with suppress(MemoryError):
            while True:
                ballast.append(bytes(MIB // 4))
        del ballast[-4:]  # What is needed to go on at all.
        with limited(resource.RLIMIT_AS, _used() + more):
            yield
    ballast.clear()


def _used() -> int:
    """The address space that this process has, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * mmap.PAGESIZE


@pytest.mark.parametrize("room", [MIB, 40 * MIB])
def test_a_reader_out_of_address_space(directory: Path, ear: Ear, room: int) -> None:
    """A worker that has no memory to load what is new keeps what it has, and loads it when it can."""

    def child() -> None:
        scene = Scene(directory)
        reader = next(poller for poller in scene.group if not poller.leads)
        leader = next(poller for poller in scene.group if poller.leads)
        large(scene, 30 * MIB)
        while leader.poll() == 1:
            scene.machine.pass_time(0.5)
        with address_space(room):
            for _ in range(3):
                assert reader.cache.should_fetch_flag_definitions() is False
                found = reader.cache.get_flag_definitions()
                assert found is not None
                reader.definitions = found
        if room == MIB:
            assert reader.stamp == 1
            assert ear.heard("Cannot allocate memory") or ear.heard("MemoryError")
        # Want of memory may come up anywhere, and so comes with a traceback.
        ear.surprises = [line for line in ear.surprises if "MemoryError" not in line]
        scene.settle()
        scene.assert_sound()

    in_child(child)


@pytest.mark.parametrize("room", [MIB, 40 * MIB])
def test_a_publisher_out_of_address_space(directory: Path, ear: Ear, room: int) -> None:
    """A worker that has no memory to publish leaves the others what they have, and publishes later."""

    def child() -> None:
        scene = Scene(directory)
        leader = next(poller for poller in scene.group if poller.leads)
        other = next(poller for poller in scene.group if not poller.leads)
        large(scene, 30 * MIB)
        answer = stamped(2, scene.api.flags, scene.api.padding)
        scene.machine.pass_time(1.0)
        assert leader.cache.should_fetch_flag_definitions()
        with address_space(room):
            leader.cache.on_flag_definitions_received(answer)
        if room == MIB:
            assert stamp_on_disk(directory) == 1
            assert ear.heard("MemoryError")
        ear.surprises = [line for line in ear.surprises if "MemoryError" not in line]
        leader.definitions, leader.etag = answer, 2
        assert [leader.poll(), other.poll()] in ([2, 1], [2, 2], [1, 1])
        scene.settle()
        scene.assert_sound()

    in_child(child)


# -- size


def test_definitions_of_64_mib(directory: Path, ear: Ear) -> None:
    """Definitions of 64 MiB are published and read."""
    api = Api(flags=128, padding=MIB // 2)
    first, second = (Poller(directory, api, poll_interval=60.0, lease_ttl=None) for _ in range(2))
    assert first.poll() == 1
    assert second.poll() == 1
    assert api.requests == 1
    assert runtime_dir(directory).snapshot_path.stat().st_size > 64 * MIB


def test_more_than_the_maximum(directory: Path, ear: Ear) -> None:
    """Definitions beyond `max_bytes` are refused with both numbers in the log; the old ones stay."""
    size = HEADER_BYTES + codec.encode(stamped(2, 4, 5_000))[0].size
    for maximum, fits in ((size, True), (size - 1, False)):
        base = directory / f"{maximum}"
        base.mkdir()
        scene = Scene(base, max_bytes=maximum)
        scene.api.padding = 5_000
        scene.api.change()
        if fits:
            scene.settle()
            assert runtime_dir(base).snapshot_path.stat().st_size == maximum
        else:
            fetch_in_vain(scene)
            poll_all(scene)
            assert stamp_on_disk(base) == 1
            assert ear.heard("is not shared", f"{size} bytes", f"max_bytes is {maximum}")
            small(scene)
            scene.settle()
        scene.assert_sound()


def test_the_maximum_can_be_raised(directory: Path, ear: Ear) -> None:
    """The maximum is 256 MiB unless told otherwise, and may be set from 1 KiB to 1 TiB."""
    assert snapshot.DEFAULT_MAX_BYTES == 256 * MIB
    for maximum in (1024, 1 << 40):
        Poller(directory, Api(), max_bytes=maximum)
    for maximum in (1023, (1 << 40) + 1):
        with pytest.raises(ValueError, match="max_bytes"):
            Poller(directory, Api(), max_bytes=maximum)
