"""No space, or no directory to write to: what was served stays, and all is well later."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path

import pytest

from tests.faults.harness import (
    NOBODY_UID,
    Ear,
    become,
    in_child,
    mount_tmpfs,
    private_mounts,
    remount_read_only,
    runtime_dir,
    stamp_on_disk,
    take_all,
    temporary_files,
)
from tests.faults.scene import Scene, fetch_in_vain, large, poll_all, small
from tests.support import require_root

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
