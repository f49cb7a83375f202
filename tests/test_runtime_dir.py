"""Where the files live, and who may touch them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shmflags.errors import UnsafePathError
from shmflags.runtime_dir import (
    RuntimeDir,
    base_objection,
    directory_name,
    file_system,
    locate,
    may_replace,
    open_private,
)

UID = os.geteuid()


def test_a_named_directory_comes_first(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The argument counts before the variable, the variable before the default."""
    monkeypatch.setenv("SHMFLAGS_DIR", str(tmp_path))
    assert locate(directory, "k", UID).base == directory
    assert locate(None, "k", UID).base == tmp_path
    assert locate(None, "k", UID).explicit
    monkeypatch.delenv("SHMFLAGS_DIR")
    default = locate(None, "k", UID)
    assert not default.explicit
    assert str(default.base) in ("/dev/shm", "/tmp", os.environ.get("TMPDIR"))


def test_a_relative_directory_does_not_follow_chdir(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative name is taken from where the process stands when it is first used."""
    monkeypatch.chdir(directory)
    assert locate("here", "k", UID).base == directory / "here"


def test_three_private_directories_are_made(directory: Path) -> None:
    """User, version and key have a directory each, closed to others, whatever the umask."""
    home = locate(directory, "my service", UID)
    before = os.umask(0)
    try:
        home.prepare(lambda sentence: pytest.fail(sentence))
        home.prepare(lambda sentence: pytest.fail(sentence))
    finally:
        os.umask(before)
    assert home.path.parts[-3:-1] == (f"shmflags-{UID}", "v1")
    assert home.path.name.startswith("my-service-")
    for path in (home.user_path, home.version_path, home.path):
        assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("level", ["user_path", "version_path", "path"])
@pytest.mark.parametrize("kind", ["symlink", "file", "wide", "foreign"])
def test_a_doubtful_directory_is_refused(directory: Path, level: str, kind: str) -> None:
    """A symlink, a file, an open directory or somebody else's, at any level, is refused with a remedy."""
    home = locate(directory, "k", UID)
    home.prepare(lambda _: None)
    place: Path = getattr(home, level)
    if kind == "wide":
        place.chmod(0o750)
    elif kind == "foreign":
        if UID != 0:
            pytest.skip("only root can give a directory away")
        os.chown(place, 65534, -1)
    else:
        elsewhere = directory / "elsewhere"
        place.rename(elsewhere)
        if kind == "symlink":
            place.symlink_to(elsewhere)
        else:
            place.write_bytes(b"")
    with pytest.raises(UnsafePathError) as caught:
        home.prepare(lambda _: None)
    assert caught.value.path == str(place)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("mode", "fine"), [(0o755, True), (0o1777, True), (0o777, False), (0o775, False), (0o1775, True)]
)
def test_a_base_that_others_could_tamper_with(directory: Path, mode: int, fine: bool) -> None:
    """Without a sticky bit a base that others can write to is refused, or warned about if it was named."""
    base = directory / "base"
    base.mkdir()
    base.chmod(mode)
    assert (base_objection(base, UID) is None) == fine
    warnings: list[str] = []
    default = RuntimeDir(base, UID, "k", explicit=False)
    if fine:
        default.prepare(warnings.append)
    else:
        with pytest.raises(UnsafePathError, match="sticky"):
            default.prepare(warnings.append)
        assert list(base.iterdir()) == []
    RuntimeDir(base, UID, "k", explicit=True).prepare(warnings.append)
    assert len(warnings) == (0 if fine else 1)


def test_a_network_file_system_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base on NFS is refused with its type as the reason, or warned about if it was named."""
    assert file_system(directory) in ("tmpfs", "ext4", "overlay", "xfs", "btrfs")
    monkeypatch.setattr("shmflags.runtime_dir.file_system", lambda _: "nfs4")
    with pytest.raises(UnsafePathError, match="nfs4"):
        RuntimeDir(directory, UID, "k", explicit=False).prepare(lambda _: None)
    warnings: list[str] = []
    RuntimeDir(directory, UID, "k", explicit=True).prepare(warnings.append)
    assert "nfs4" in warnings[0]


def test_a_base_that_is_no_directory_is_an_error(directory: Path) -> None:
    """A missing base is an OSError that names it; a file is refused."""
    with pytest.raises(FileNotFoundError, match="missing"):
        RuntimeDir(directory / "missing", UID, "k", explicit=True).prepare(lambda _: None)
    (directory / "file").write_bytes(b"")
    with pytest.raises((UnsafePathError, NotADirectoryError)):
        RuntimeDir(directory / "file", UID, "k", explicit=True).prepare(lambda _: None)


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "wide", "foreign"])
def test_only_a_private_file_of_ours_is_opened(directory: Path, kind: str) -> None:
    """A symlink, a FIFO, a directory, an open file or another user's is refused, without hanging."""
    path = directory / "file"
    if kind == "symlink":
        path.symlink_to("/etc/passwd")
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(b"")
        path.chmod(0o640 if kind == "wide" else 0o600)
        if kind == "foreign":
            if UID != 0:
                pytest.skip("only root can give a file away")
            os.chown(path, 65534, -1)
    for flags in (os.O_RDONLY, os.O_RDWR):
        with pytest.raises(UnsafePathError):
            open_private(path, flags, UID)
    if kind in ("directory", "foreign"):
        with pytest.raises(UnsafePathError, match="remove"):
            may_replace(path, UID)
    else:
        may_replace(path, UID)


def test_a_missing_file_is_missing(directory: Path) -> None:
    """No file is FileNotFoundError, and may be replaced."""
    with pytest.raises(FileNotFoundError):
        open_private(directory / "file", os.O_RDONLY, UID)
    may_replace(directory / "file", UID)


def test_names_are_short_and_distinct() -> None:
    """A directory name is a readable slug with a hash, at most some 64 characters long."""
    keys = ["a", "A", "a b", "a-b", "x" * 500, "x" * 501, "é", "\ud800", "..", "/"]
    names = [directory_name(key) for key in keys]
    assert len(set(names)) == len(keys)
    assert all(len(name) <= 64 and "/" not in name and not name.startswith(".") for name in names)
