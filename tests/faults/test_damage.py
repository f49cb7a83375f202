"""Damaged, replaced and removed files: nobody crashes, hangs or sees wrong data, and it is mended."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from shmflags import snapshot
from shmflags.page import PAGE_BYTES
from shmflags.snapshot import HEADER_BYTES
from tests.faults.harness import (
    NOBODY_UID,
    Ear,
    Poller,
    runtime_dir,
    temporary_files,
)
from tests.faults.scene import Scene
from tests.support import require_root

FILES = ["page", "snapshot"]
STATES = ["running", "rest"]
HEADER_FIELDS = (0, 8, 16, 24, 32, 48, 56, 64, 68, 72, 88, 176, 192)
USED_WORDS, PAGE_HEADER_WORDS = 70, 128
FILLINGS: dict[str, Callable[[int], bytes]] = {
    "zeros": bytes,
    "ones": lambda size: b"\xff" * size,
    "random": random.Random(4).randbytes,
}


@pytest.fixture
def scene(directory: Path, ear: Ear) -> Scene:
    return Scene(directory)


def flip(bit: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[bit // 8] ^= 1 << bit % 8

    return change


def cut(length: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        del content[length:]

    return change


def grow(more: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content.extend(bytes(more))

    return change


# -- content


@pytest.mark.parametrize("state", STATES)
def test_every_bit_of_the_snapshots_header_flipped(scene: Scene, state: str, thorough: bool) -> None:
    """A snapshot with any one bit of its header flipped is recognised, and mended; in CI it is each of them."""
    for bit in range(8 * snapshot.HEADER_BYTES)[:: 1 if thorough else 7]:
        scene.survive(scene.edit("snapshot", flip(bit)), running=state == "running")


@pytest.mark.parametrize("state", STATES)
def test_bits_of_the_snapshots_items_flipped(scene: Scene, state: str) -> None:
    """A snapshot with a bit of its index or its items flipped is recognised, and mended."""
    size = scene.path("snapshot").stat().st_size
    bits = range(8 * snapshot.HEADER_BYTES, 8 * size)
    for bit in random.Random(1).sample(bits, 200):
        scene.survive(scene.edit("snapshot", flip(bit)), running=state == "running")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("part", range(8))
def test_every_bit_of_the_pages_header_flipped(
    scene: Scene, state: str, part: int, thorough: bool
) -> None:
    """A page with any one bit before its worker table flipped yields one leader and right data; in CI each."""
    bits = range(USED_WORDS * 64)
    unused = random.Random(part).sample(range(bits.stop, PAGE_HEADER_WORDS * 64), 25)
    for bit in [*bits[part :: 8 if thorough else 56], *unused]:
        scene.survive(scene.edit("page", flip(bit)), running=state == "running")


@pytest.mark.parametrize("state", STATES)
def test_bits_of_the_worker_table_flipped(scene: Scene, state: str) -> None:
    """A page with a bit of its worker table flipped yields one leader and right data."""
    taken = range(PAGE_HEADER_WORDS * 64, PAGE_HEADER_WORDS * 64 + 4 * 16 * 64)
    free = range(taken.stop, 8 * PAGE_BYTES)
    pick = random.Random(2)
    for bit in pick.sample(taken, 150) + pick.sample(free, 50):
        scene.survive(scene.edit("page", flip(bit)), running=state == "running")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", FILES)
def test_truncated(scene: Scene, name: str, state: str) -> None:
    """A file cut off anywhere, header boundaries included, or grown, is recognised and mended."""
    size = scene.path(name).stat().st_size
    boundaries = set(HEADER_FIELDS) | {HEADER_BYTES + 20 * i for i in range(8)}
    if name == "page":
        boundaries |= {8 * word for word in (*range(USED_WORDS), PAGE_HEADER_WORDS)} | {4096, 8192}
    for edge in sorted(boundaries):
        boundaries |= {edge + 1, max(edge - 1, 0)}
    boundaries |= {size - 1, *random.Random(3).sample(range(size), 30)}
    for length in sorted(boundaries):
        assert length < size
        scene.survive(scene.edit(name, cut(length)), running=state == "running")
    for more in (1, 8, 4096):
        scene.survive(scene.edit(name, grow(more)), running=state == "running")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("filling", FILLINGS)
def test_overwritten(scene: Scene, name: str, state: str, filling: str) -> None:
    """Zeros, 0xFF or random bytes, of any size, in place of a file are recognised and mended."""
    size = scene.path(name).stat().st_size
    fill = FILLINGS[filling]
    for length in (0, 1, 8, HEADER_BYTES, size - 1, size, size + 1, PAGE_BYTES, 1 << 20):
        scene.survive(partial(scene.put, name, fill(length)), running=state == "running")
    # The first words as they are, which is as far as some would look; then the filling.
    for kept in (8, 16, 32, 64, 128, 136, 144, 256, 512, 1024):
        scene.survive(scene.edit(name, _fill(kept, fill)), running=state == "running")


def _fill(kept: int, fill: Callable[[int], bytes]) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[kept:] = fill(max(len(content) - kept, 0))

    return change


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", FILES)
def test_an_older_file_in_its_place(scene: Scene, name: str, state: str) -> None:
    """A file as it was some publishes ago, as from a backup, takes nobody back."""
    content = scene.path(name).read_bytes()
    for _ in range(3):
        scene.api.change()
        scene.settle()
    scene.survive(lambda: scene.put(name, content), running=state == "running")


def test_an_older_snapshot_is_not_served(scene: Scene) -> None:
    """A worker that comes while an old snapshot lies there is given nothing rather than that."""
    content = scene.path("snapshot").read_bytes()
    scene.api.change()
    scene.settle()
    scene.put("snapshot", content)
    found = scene.start(1)[0].cache.get_flag_definitions()
    assert not found or not found["flags"]
    scene.settle()
    scene.assert_sound()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", FILES)
def test_a_sparse_terabyte(scene: Scene, name: str, state: str) -> None:
    """A file that claims a terabyte is neither mapped nor read."""

    def damage() -> None:
        scene.put(name, scene.path(name).read_bytes())
        os.truncate(scene.path(name), 1 << 40)

    scene.survive(damage, running=state == "running")


# -- what is no file of ours


def _remove(path: Path) -> None:
    path.unlink()


def _link(path: Path) -> None:
    moved = path.rename(path.with_name("elsewhere"))
    path.symlink_to(moved)


def _dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nonexistent/victim")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _socket(path: Path) -> None:
    import socket

    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))
    path.chmod(0o600)


def _open_to_others(mode: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.chmod(mode)

    return damage


OURS_TO_REPLACE = {
    "removed": _remove,
    "symlink": _link,
    "dangling": _dangle,
    "loop": _loop,
    "fifo": _fifo,
    "socket": _socket,
    "0666": _open_to_others(0o666),
    "0640": _open_to_others(0o640),
    "0604": _open_to_others(0o604),
    "0777": _open_to_others(0o777),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", OURS_TO_REPLACE)
def test_replaced_by_what_we_may_replace(scene: Scene, name: str, damage: str, state: str) -> None:
    """A file of ours that is removed, no regular file, or open to others is made anew."""
    for newcomers in (1, 0):
        path = scene.path(name)
        scene.survive(
            partial(OURS_TO_REPLACE[damage], path), running=state == "running", newcomers=newcomers
        )
        path.with_name("elsewhere").unlink(missing_ok=True)


def test_a_planted_symlink_is_not_followed(scene: Scene, tmp_path: Path) -> None:
    """What a planted symlink points to is neither read nor written."""
    for name in FILES:
        victim = tmp_path / name
        content = scene.path(name).read_bytes()
        victim.write_bytes(content)
        victim.chmod(0o600)

        def plant(name: str = name, victim: Path = victim) -> None:
            scene.path(name).unlink()
            scene.path(name).symlink_to(victim)

        scene.survive(plant, running=False)
        assert victim.read_bytes() == content


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


def _of_another_user(path: Path) -> None:
    require_root()
    os.chown(path, NOBODY_UID, NOBODY_UID)


NOT_OURS = {"directory": _directory, "another user's": _of_another_user}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", NOT_OURS)
def test_replaced_by_what_is_not_ours(
    scene: Scene, ear: Ear, name: str, damage: str, state: str
) -> None:
    """What is not ours to replace is left alone: the log says why, and the workers have right data."""
    path = scene.path(name)
    if state == "rest":
        scene.end_all()
        scene.start(2)
    NOT_OURS[damage](path)
    before = os.lstat(path)
    for _ in range(3):
        scene.api.change()
        _ride_out(scene)
    now = os.lstat(path)
    assert (now.st_ino, now.st_uid, now.st_mode) == (before.st_ino, before.st_uid, before.st_mode)
    assert temporary_files(scene.base) == []
    reason = "is a directory" if damage == "directory" else f"belongs to user {NOBODY_UID}"
    assert ear.heard("UnsafePathError", os.fspath(path), reason, "remove it")
    # Once the user has done what the log says, all is well.
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    scene.api.change()
    scene.settle()
    scene.assert_sound()


def _ride_out(scene: Scene) -> None:
    """Poll for a while; nobody has less than what was served last, and somebody has the newest."""
    newest = 0
    for _ in range(10):
        scene.machine.pass_time(0.5)
        stamps = [poller.poll() or 1 for poller in scene.group]
        assert min(stamps) >= 1
        newest = max(newest, *stamps)
    assert newest == scene.api.stamp


# -- directories


def _levels(scene: Scene) -> Iterator[Path]:
    directory = runtime_dir(scene.base)
    yield from (directory.path, directory.version_path, directory.user_path)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("level", range(3))
def test_a_directory_removed(scene: Scene, state: str, level: int) -> None:
    """With the whole directory removed, at any level, workers serve on and make it again."""
    for _ in range(3):
        path = list(_levels(scene))[level]
        scene.survive(partial(shutil.rmtree, path), running=state == "running")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("level", range(3))
def test_a_directory_moved_away(scene: Scene, state: str, level: int) -> None:
    """A directory moved away under running workers is made again; the old one does not come back."""
    path = list(_levels(scene))[level]
    scene.survive(lambda: _move_away(path), running=state == "running")


def _move_away(path: Path) -> None:
    path.rename(path.with_name("moved-away"))


def _to_symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


UNSAFE_DIRECTORIES: dict[str, Callable[[Path], None]] = {
    "is open to others": lambda path: path.chmod(0o755),
    f"belongs to user {NOBODY_UID}": _of_another_user,
    "is not a directory": _to_symlink,
}


REMEDIES = {
    "is open to others": "stop the workers and remove it",
    f"belongs to user {NOBODY_UID}": "have its owner remove it, or name another base",
    "is not a directory": "remove it",
}


@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize("reason", UNSAFE_DIRECTORIES)
def test_an_unsafe_directory_is_refused(scene: Scene, ear: Ear, reason: str, level: int) -> None:
    """A directory that others could tamper with is refused, with why and what to do; each worker fetches."""
    scene.end_all()
    path = list(_levels(scene))[level]
    UNSAFE_DIRECTORIES[reason](path)
    files = runtime_dir(scene.base).path
    before = {name: os.lstat(files / name) for name in os.listdir(files)}
    pollers = scene.start(2)
    asked = scene.api.requests
    for _ in range(3):
        scene.api.change()
        scene.machine.pass_time(1.0)
        assert [poller.poll() for poller in pollers] == [scene.api.stamp] * 2
    assert scene.api.requests == asked + 6
    assert {name: os.lstat(files / name) for name in os.listdir(files)} == before
    assert ear.heard("refused", "UnsafePathError", os.fspath(path), reason, REMEDIES[reason])


def test_a_reader_refuses_an_unsafe_directory_without_fetching(scene: Scene, ear: Ear) -> None:
    """A reader that may not use the directory answers False and None."""
    scene.end_all()
    runtime_dir(scene.base).path.chmod(0o755)
    reader = Poller(scene.base, scene.api, role="reader").cache
    assert reader.should_fetch_flag_definitions() is False
    assert reader.get_flag_definitions() is None
