"""Out of space, descriptors, memory, or allowed size: what was served stays, and all is well later."""

from __future__ import annotations

import gc
import mmap
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EMFILE, ENOSPC
from pathlib import Path

import pytest

from shmflags import codec, snapshot
from shmflags.snapshot import HEADER_BYTES
from tests.faults.harness import (
    NOBODY_UID,
    Api,
    Ear,
    Poller,
    become,
    in_child,
    mount_tmpfs,
    private_mounts,
    remount_read_only,
    runtime_dir,
    stamp_on_disk,
    stamped,
    temporary_files,
)
from tests.faults.scene import Scene
from tests.support import require_root

MIB = 1 << 20


def small(scene: Scene) -> None:
    """The next definitions take some 2 KB."""
    scene.api.padding = 400
    scene.api.change()


def large(scene: Scene, size: int) -> None:
    """The next definitions take some `size` bytes."""
    scene.api.padding = size // scene.api.flags
    scene.api.change()


def poll_all(scene: Scene, rounds: int = 4) -> list[int | None]:
    """What the workers hold after some polls in which nobody fell behind what is served."""
    for _ in range(rounds):
        scene.machine.pass_time(0.5)
        after = [poller.poll() for poller in scene.group]
        assert min(stamp or 0 for stamp in after) >= (stamp_on_disk(scene.base) or 0)
    return after


def fetch_in_vain(scene: Scene) -> None:
    """Poll until one worker has fetched what cannot be shared; the others hold what is served."""
    known, new = scene.api.stamp - 1, scene.api.stamp
    for _ in range(10):
        scene.machine.pass_time(0.5)
        held = [poller.poll() for poller in scene.group]
        if new in held:
            assert sorted(stamp or 0 for stamp in held) == [known] * (len(held) - 1) + [new]
            return
    raise AssertionError(f"nobody fetched; the workers hold {held}")


# -- a file system that is full


def in_tmpfs(base: Path, options: str, act: Callable[[Path], None]) -> None:
    """Run `act` in a child that sees a file system of its own at `base`."""
    require_root()

    def child() -> None:
        private_mounts()
        mount_tmpfs(base, f"mode=700,{options}")
        act(base)

    in_child(child)


def fill_up(base: Path) -> Path:
    """Take all the space that is left."""
    ballast = base / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        take_all(ENOSPC, lambda: file.write(bytes(4096)))
    return ballast


def take_all(number: int, take: Callable[[], object]) -> None:
    """Take and take, until the system refuses with this error."""
    while True:
        try:
            take()
        except OSError as error:
            if error.errno != number:
                raise
            return


@pytest.mark.parametrize("options", ["size=256k", "size=10m,nr_inodes=7"])
def test_a_publish_that_does_not_fit(tmp_path: Path, options: str, ear: Ear) -> None:
    """On a full file system the old snapshot stays, nothing is left over, and the next one works."""

    def act(base: Path) -> None:
        scene = Scene(base)
        free = os.statvfs(base).f_bavail, os.statvfs(base).f_favail
        if "nr_inodes" in options:
            while os.statvfs(base).f_favail:
                (base / f"ballast-{os.statvfs(base).f_favail}").touch()
            small(scene)
        else:
            large(scene, 300_000)
        fetch_in_vain(scene)
        assert scene.start(1)[0].poll() == 1
        poll_all(scene, 10)
        assert stamp_on_disk(base) == 1
        assert temporary_files(base) == []
        assert ear.heard("a publish waits for the next poll", "No space left")
        for file in base.glob("ballast-*"):
            file.unlink()
        assert (os.statvfs(base).f_bavail, os.statvfs(base).f_favail) == free
        small(scene)
        scene.settle()
        scene.assert_sound()

    in_tmpfs(tmp_path, options, act)


def test_space_that_comes_back(tmp_path: Path, ear: Ear) -> None:
    """What could not be written is written once there is space, without another fetch."""

    def act(base: Path) -> None:
        scene = Scene(base)
        ballast = fill_up(base)
        small(scene)
        fetch_in_vain(scene)
        asked = scene.api.full
        ballast.unlink()
        assert set(poll_all(scene, 3)) == {2}
        assert scene.api.full == asked
        scene.assert_sound()

    in_tmpfs(tmp_path, "size=256k", act)


def test_no_space_for_the_page(tmp_path: Path, ear: Ear) -> None:
    """Without space for the page each worker fetches for itself; with space, one's fetch is shared."""

    def act(base: Path) -> None:
        ballast = fill_up(base)
        scene = Scene(base, workers=0)
        scene.start(3)
        assert poll_all(scene, 2) == [1, 1, 1]
        assert scene.api.full == 3
        assert temporary_files(base) == []
        scene.api.change()
        assert poll_all(scene, 2) == [2, 2, 2]
        ballast.unlink()
        assert poll_all(scene, 4) == [2, 2, 2]
        assert stamp_on_disk(base) == 2
        newcomer = scene.start(1)[0]
        assert newcomer.poll() == 2
        assert scene.api.full == 6
        scene.api.change()
        scene.settle()
        scene.assert_sound()

    in_tmpfs(tmp_path, "size=256k", act)


def test_stores_into_the_page_of_a_full_file_system(tmp_path: Path, ear: Ear) -> None:
    """Every word of the page has its memory from the start: no store can fail for want of space."""

    def act(base: Path) -> None:
        scene = Scene(base)
        fill_up(base)
        scene.start(250)
        assert set(poll_all(scene, 2)) == {1}
        descriptor = os.open(runtime_dir(base).page_path, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        assert os.lseek(descriptor, 0, os.SEEK_HOLE) == size
        os.close(descriptor)

    in_tmpfs(tmp_path, "size=256k", act)


# -- a directory that cannot be written to, or is not there


def test_a_read_only_file_system(tmp_path: Path, ear: Ear) -> None:
    """Where nothing can be written, each worker fetches for itself, whatever lies there."""

    def act(base: Path) -> None:
        scene = Scene(base)
        scene.end_all()
        gc.collect()  # Nobody maps the page any more, so that the mount can be changed.
        remount_read_only(base)
        scene.start(2)
        scene.api.change()
        assert poll_all(scene) == [2, 2]
        assert ear.heard("Read-only file system")

    in_tmpfs(tmp_path, "size=1m", act)


def test_a_directory_without_write_permission(tmp_path: Path, ear: Ear) -> None:
    """In a directory that may be read only, nothing new is shared, and nobody goes back."""
    require_root()
    base = tmp_path / "base"
    base.mkdir(mode=0o700)
    os.chown(base, NOBODY_UID, NOBODY_UID)
    for directory in (tmp_path, *tmp_path.parents[:-1]):
        if not os.stat(directory).st_mode & 0o001:
            os.chmod(directory, 0o711)

    def child() -> None:
        become(NOBODY_UID)
        scene = Scene(base)
        directory = runtime_dir(base).path
        directory.chmod(0o500)
        scene.api.change()
        assert set(poll_all(scene)) <= {1, 2}
        assert ear.heard("Permission denied")
        directory.chmod(0o700)
        scene.settle()
        scene.assert_sound()

    in_child(child)


def test_no_directory(directory: Path, ear: Ear) -> None:
    """Without its base directory each worker fetches for itself; once it is there, they share."""
    base = directory / "later"
    scene = Scene(base, workers=0)
    scene.start(2)
    assert poll_all(scene) == [1, 1]
    assert ear.heard(os.fspath(base), "No such file or directory")
    base.mkdir(mode=0o700)
    assert poll_all(scene) == [1, 1]
    assert stamp_on_disk(base) == 1
    assert scene.api.full == 2
    scene.api.change()
    scene.settle()
    scene.assert_sound()


def test_a_file_for_a_directory(directory: Path, ear: Ear) -> None:
    """Where the base is no directory, the log says so and each worker fetches for itself."""
    base = directory / "file"
    base.touch()
    scene = Scene(base, workers=0)
    scene.start(2)
    assert poll_all(scene) == [1, 1]
    assert ear.heard(os.fspath(base), "is not a directory", "directory=")


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
    """No more than `more` bytes of address space beyond what is in use."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * mmap.PAGESIZE
    with limited(resource.RLIMIT_AS, used + more):
        yield


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
