"""Other local users, as a second real uid: they read nothing, plant nothing, and hold up nobody."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import (
    NOBODY_UID,
    Api,
    Ear,
    Poller,
    become,
    control_page,
    in_child,
    mount_tmpfs,
    private_mounts,
    runtime_dir,
)
from tests.support import require_root

ATTACKER = NOBODY_UID
VICTIMS = [0, 4321]
POISON = 666


@pytest.fixture
def shared() -> Iterator[Path]:
    """A base directory that all users may write to, as /dev/shm is."""
    require_root()
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="shmflags-test-", dir=base) as path:
        os.chmod(path, 0o1777)
        yield Path(path)


def as_user(uid: int, act: Callable[[], None]) -> None:
    """Run `act` in a child that is that user for good."""

    def child() -> None:
        become(uid)
        act()

    in_child(child)


def poller(base: Path | None, api: Api | None = None) -> Poller:
    return Poller(base, api or Api(), poll_interval=60.0, lease_ttl=None, cold_start_timeout=0.0)


def publish(base: Path) -> None:
    """Publish as the user that this process is, and leave the files behind."""
    assert poller(base).poll() == 1
    assert control_page(base).is_serving()


def refused(action: Callable[..., object], *arguments: object) -> bool:
    """Whether the system does not let us."""
    try:
        action(*arguments)
    except PermissionError:
        return True
    return False


# -- reading, changing, locking


@pytest.mark.parametrize("victim", VICTIMS)
def test_another_user_gets_at_nothing(shared: Path, victim: int) -> None:
    """Another user can neither list, read, write, lock, move nor remove what is ours."""
    as_user(victim, lambda: publish(shared))
    theirs = _tree_of(shared, victim)
    paths = [theirs / "page", theirs / "snapshot"]
    directories = [theirs, theirs.parent, theirs.parent.parent]

    def attack() -> None:
        for path in paths:
            for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_PATH):
                assert refused(os.open, path, flags), (path, flags)
            assert refused(path.stat)
            assert refused(path.unlink)
            assert refused(os.link, path, shared / "mine")
        for directory in directories:
            assert refused(os.listdir, directory)
            assert refused((directory / "planted").touch)
            # Without a descriptor there is no lock to be held.
            assert refused(os.open, directory, os.O_RDONLY | os.O_DIRECTORY)
        top = directories[-1]
        assert refused(top.chmod, 0o777)
        assert refused(top.rename, shared / "moved")
        assert refused(top.rmdir)

    as_user(ATTACKER, attack)
    as_user(victim, lambda: _serves(shared, 1))


def _tree_of(base: Path, uid: int) -> Path:
    (version,) = (base / f"shmflags-{uid}").iterdir()
    (tree,) = version.iterdir()
    return tree


def _serves(base: Path, stamp: int) -> None:
    api = Api()
    assert poller(base, api).poll() == stamp
    assert api.requests == 0


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_umask_opens_nothing(directory: Path, umask: int) -> None:
    """Files and directories are private whatever the umask of the process."""

    def child() -> None:
        os.umask(umask)
        publish(directory)

    in_child(child)
    home = runtime_dir(directory)
    for path, mode in (
        (home.user_path, 0o700),
        (home.version_path, 0o700),
        (home.path, 0o700),
        (home.page_path, 0o600),
        (home.snapshot_path, 0o600),
    ):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_lock_on_the_base_holds_up_nobody(shared: Path, victim: int) -> None:
    """All that another user can lock is the base, and nobody waits for that."""
    reader, writer = os.pipe()
    held_reader, held_writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(writer)
            become(ATTACKER)
            descriptor = os.open(shared, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.write(held_writer, b"!")
            os.read(reader, 1)  # until the test closes its end
        finally:
            os._exit(0)
    try:
        assert os.read(held_reader, 1) == b"!"
        as_user(victim, lambda: publish(shared))
        as_user(victim, lambda: _serves(shared, 1))
    finally:
        for descriptor in (reader, writer, held_reader, held_writer):
            os.close(descriptor)
        os.waitpid(pid, 0)


# -- squatting


def _a_directory(squat: Path) -> None:
    squat.mkdir(mode=0o777)
    squat.chmod(0o777)


def _a_tree_of_poison(squat: Path) -> None:
    """All that a cache of the attacker's makes, under the victim's name."""
    base = squat.parent
    api = Api()
    api.stamp = POISON
    assert poller(base, api).poll() == POISON
    (base / f"shmflags-{ATTACKER}").rename(squat)


def _a_symlink_to_poison(squat: Path) -> None:
    elsewhere = squat.parent / "poison"
    _a_tree_of_poison(elsewhere)
    squat.symlink_to(elsewhere)


def _a_symlink_to_the_victims_own(squat: Path) -> None:
    squat.symlink_to(squat.parent / "home")


def _a_dangling_symlink(squat: Path) -> None:
    squat.symlink_to(squat.parent / "home" / "new")


def _a_file(squat: Path) -> None:
    squat.touch(mode=0o666)


def _a_fifo(squat: Path) -> None:
    os.mkfifo(squat, 0o666)


SQUATS = [
    _a_directory,
    _a_tree_of_poison,
    _a_symlink_to_poison,
    _a_symlink_to_the_victims_own,
    _a_dangling_symlink,
    _a_file,
    _a_fifo,
]


@pytest.mark.parametrize("squat", SQUATS)
@pytest.mark.parametrize("victim", VICTIMS)
def test_squatting_our_name(shared: Path, victim: int, squat: Callable[[Path], None]) -> None:
    """What another user puts where our directory would be is neither read nor written, and logged."""
    home = shared / "home"
    home.mkdir(mode=0o700)
    os.chown(home, victim, victim)
    name = shared / f"shmflags-{victim}"
    as_user(ATTACKER, lambda: squat(name))
    before = _listing(shared)

    def use() -> None:
        ear = _listen()
        api = Api()
        worker = poller(shared, api)
        for number in range(1, 4):
            assert worker.poll() == api.stamp
            assert api.requests == number
            api.change()
        reader = Poller(shared, api, role="reader", cold_start_timeout=0.0).cache
        assert reader.should_fetch_flag_definitions() is False
        assert reader.get_flag_definitions() is None
        assert ear.heard("refused", "UnsafePathError", os.fspath(name), "remove it")
        ear.assert_no_surprise()

    as_user(victim, use)
    assert _listing(shared) == before


def _listing(base: Path) -> dict[str, tuple[int, int, int, int]]:
    found = {}
    for directory, names, files in os.walk(base):
        for name in names + files:
            path = os.path.join(directory, name)
            info = os.lstat(path)
            found[path] = (info.st_ino, info.st_uid, info.st_mode, info.st_size)
    return found


def _listen() -> Ear:
    ear = Ear()
    logging.getLogger("shmflags").addHandler(ear)
    return ear


# -- a process that changes its user


def test_a_process_that_drops_its_privileges(shared: Path) -> None:
    """After a change of user a process has files of its own, and leaves those of before alone."""

    def child() -> None:
        api = Api()
        worker = poller(shared, api)
        assert worker.poll() == 1
        roots = runtime_dir(shared)
        become(ATTACKER)
        api.change()
        worker.definitions = None
        assert worker.poll() == 2
        assert worker.leads
        assert runtime_dir(shared).user_path.name == f"shmflags-{ATTACKER}"
        assert control_page(shared).lease().holder.pid == os.getpid()
        assert refused(os.listdir, roots.user_path)
        worker.cache.shutdown()

    in_child(child)
    # Root's lease is as it was: the process that left could not give it back, and did not try.
    as_user(0, lambda: _serves(shared, 1))
    as_user(ATTACKER, lambda: _serves(shared, 2))


# -- the base


def with_own_default_base(
    monkeypatch: pytest.MonkeyPatch, options: str, act: Callable[[], None]
) -> None:
    """Run `act` as user 4321 in a child, whose /dev/shm is one of its own, mounted with `options`."""
    require_root()
    monkeypatch.delenv("SHMFLAGS_DIR", raising=False)

    def child() -> None:
        private_mounts()
        mount_tmpfs(Path("/dev/shm"), f"size=1m,{options}")
        become(4321)
        act()

    in_child(child)


def test_a_default_base_that_others_can_tamper_with(monkeypatch: pytest.MonkeyPatch, ear: Ear) -> None:
    """A world-writable /dev/shm without sticky bit is refused, and nothing is made there."""

    def child() -> None:
        api = Api()
        assert [poller(None, api).poll() for _ in range(2)] == [1, 1]
        assert api.requests == 2
        assert os.listdir("/dev/shm") == []
        assert ear.heard("refused", "UnsafePathError", "/dev/shm", "no sticky bit", "chmod +t")

    with_own_default_base(monkeypatch, "mode=0777", child)


def test_a_default_base_that_is_as_it_should_be(monkeypatch: pytest.MonkeyPatch, ear: Ear) -> None:
    """A world-writable /dev/shm with its sticky bit is where the files go, without a word."""

    def child() -> None:
        api = Api()
        assert [poller(None, api).poll() for _ in range(2)] == [1, 1]
        assert api.requests == 1
        assert os.listdir("/dev/shm") == ["shmflags-4321"]
        assert not ear.heard("not as it should be")

    with_own_default_base(monkeypatch, "mode=1777", child)


def test_a_default_base_of_another_user(monkeypatch: pytest.MonkeyPatch, ear: Ear) -> None:
    """A /dev/shm that belongs to somebody else than root is refused."""

    def child() -> None:
        assert poller(None).poll() == 1
        assert os.listdir("/dev/shm") == []
        assert ear.heard("refused", "UnsafePathError", f"belongs to user {ATTACKER}", "directory=")

    with_own_default_base(monkeypatch, f"mode=1777,uid={ATTACKER}", child)


def test_an_explicit_base_is_warned_about(tmp_path: Path, ear: Ear) -> None:
    """The same directory, named on purpose, is used, with a warning that says what is wrong."""
    require_root()
    base = tmp_path / "emptydir"
    base.mkdir()
    base.chmod(0o777)
    api = Api()
    assert [poller(base, api).poll() for _ in range(2)] == [1, 1]
    assert api.requests == 1
    assert ear.heard("not as it should be", os.fspath(base), "no sticky bit")


def test_two_users_do_not_share(shared: Path) -> None:
    """Each user has a fetcher and files of its own, side by side."""
    for uid, stamp in ((4321, 1), (ATTACKER, 2)):

        def use(stamp: int = stamp) -> None:
            api = Api()
            api.stamp = stamp
            assert poller(shared, api).poll() == stamp

        as_user(uid, use)
    for uid, stamp in ((4321, 1), (ATTACKER, 2)):
        as_user(uid, lambda stamp=stamp: _serves(shared, stamp))  # type: ignore[misc]
    assert sorted(os.listdir(shared)) == ["shmflags-4321", f"shmflags-{ATTACKER}"]
