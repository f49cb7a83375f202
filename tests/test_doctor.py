"""`shmflags doctor`: each line ok, or what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import shmflags
from shmflags import SharedMemoryFlagCache, doctor, runtime_dir
from shmflags.demo.server import definitions, flag
from shmflags.doctor import NOTE, OK, WRONG, Check
from shmflags.processes import Host, Identity
from tests.support import require_program
from tests.test_cli import Run, run

__all__ = ["run"]


def examined(directory: Path, host: Host | None = None) -> dict[str, Check]:
    return {check.name: check for check in doctor.examine(str(directory), host or Host())}


def test_a_sound_host_is_ok_line_by_line(run: Run, directory: Path) -> None:
    """Where all is well each line says so, the status is 0, and nothing is left behind."""
    ended = run("doctor", "--directory", directory)
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert all(line.startswith(("ok    ", "note  ")) for line in lines), ended.out
    for name in ("versions", "user", "directory", "safety", "space", "mechanics"):
        assert any(line.startswith(f"ok    {name}: ") for line in lines), name
    for name in ("file system", "/dev/shm", "pid namespace"):
        assert any(line[6:].startswith(f"{name}: ") for line in lines), name
    assert "lock, hard link and shared mapping work" in ended.out
    assert f"shmflags {shmflags.__version__}, Python " in ended.out
    assert os.listdir(directory) == []


def test_as_json(run: Run, directory: Path) -> None:
    """The same lines as objects, with a schema version and whether all is well."""
    found = json.loads(run("doctor", "--json", "--directory", directory).out)
    assert list(found) == ["schema_version", "ok", "checks"]
    assert (found["schema_version"], found["ok"]) == (1, True)
    assert {tuple(check) for check in found["checks"]} == {("name", "verdict", "found", "remedy")}
    assert {check["verdict"] for check in found["checks"]} <= {"ok", "note"}


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_no_directory_is_wrong(run: Run, directory: Path, kind: str) -> None:
    """A base that is no directory is said on stderr with what to do, and ends with 1."""
    place = directory / "place"
    if kind == "a file":
        place.write_text("")
    ended = run("doctor", "--directory", place)
    assert ended.status == 1
    assert ended.err.startswith(f"shmflags: directory: {place} (--directory) ")
    assert "name another one" in ended.err
    found = json.loads(run("doctor", "--json", "--directory", place).out)
    assert found["ok"] is False


def test_a_directory_of_ours_that_is_open_is_wrong(directory: Path) -> None:
    """What the workers would refuse is found before they do, with the same words."""
    ours = directory / f"shmflags-{os.geteuid()}"
    ours.mkdir()
    ours.chmod(0o777)
    check = examined(directory)["safety"]
    assert check.verdict == WRONG
    assert check.found == f"{ours} is open to others (mode 777)"
    assert "remove it" in check.remedy


def test_a_squatted_name_is_wrong(directory: Path) -> None:
    """A directory of our name that belongs to another user is named with its owner."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    ours = directory / "shmflags-0"
    ours.mkdir(mode=0o700)
    os.chown(ours, 12345, 12345)
    check = examined(directory)["safety"]
    assert check.verdict == WRONG
    assert "belongs to user 12345" in check.found


def test_a_base_that_others_can_write_is_a_note_if_it_was_named(directory: Path) -> None:
    """A doubtful base is used if it was named, so it is no error; by default it is one."""
    directory.chmod(0o777)
    check = examined(directory)["safety"]
    assert check.verdict == NOTE
    assert "no sticky bit" in check.found


def test_a_doubtful_default_base_is_wrong(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same base, if nobody named it, is refused by workers and so is wrong."""
    directory.chmod(0o777)
    monkeypatch.delenv("SHMFLAGS_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    monkeypatch.setattr(os, "access", lambda path, _: str(path) != "/dev/shm")
    checks = {check.name: check for check in doctor.examine(None, Host())}
    assert checks["directory"].found.startswith(f"{directory} (default)")
    assert checks["safety"].verdict == WRONG


def test_the_environment_names_the_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said by whom the directory was named."""
    monkeypatch.setenv("SHMFLAGS_DIR", str(directory))
    checks = {check.name: check for check in doctor.examine(None, Host())}
    assert checks["directory"] == Check("directory", OK, f"{directory} ($SHMFLAGS_DIR)")


def test_little_space_is_wrong(tmp_path: Path) -> None:
    """A file system that is almost full is wrong, on a real one of 8 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    unshare = require_program("unshare")
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from shmflags import doctor\n"
        "from shmflags.processes import Host\n"
        "checks = {check.name: check for check in doctor.examine(sys.argv[1], Host())}\n"
        "print(checks['space'].verdict, checks['mechanics'].verdict, checks['file system'].found)\n"
        "open(sys.argv[1] + '/full', 'wb').truncate(0)\n"
        "file = open(sys.argv[1] + '/full', 'wb', buffering=0)\n"
        "try:\n"
        "    while True: file.write(bytes(65536))\n"
        "except OSError: pass\n"
        "checks = {check.name: check for check in doctor.examine(sys.argv[1], Host())}\n"
        "print(checks['space'].verdict, checks['mechanics'].verdict)\n"
    )
    script = 'mount -t tmpfs -o size=8m tmpfs "$1" && exec "$2" -c "$3" "$1" "$4"'
    parent = str(Path(shmflags.__file__).parents[1])
    ended = subprocess.run(
        [unshare, "-m", "sh", "-c", script, "sh", str(tmp_path), sys.executable, program, parent],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "permission denied" in ended.stderr.lower() or "not permitted" in ended.stderr.lower():
        pytest.skip("no mounts in this container")
    assert ended.stdout.splitlines() == ["wrong ok tmpfs", "wrong wrong"], ended.stderr


def test_a_small_shared_memory_is_found(tmp_path: Path) -> None:
    """A /dev/shm of 24 MB, where containers have 64, is shown with its size and how to enlarge it."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    unshare = require_program("unshare")
    script = 'mount -t tmpfs -o size=24m tmpfs /dev/shm && exec "$1" -m shmflags doctor'
    ended = subprocess.run(
        [unshare, "-m", "sh", "-c", script, "sh", sys.executable],
        env={
            **{name: value for name, value in os.environ.items() if name != "SHMFLAGS_DIR"},
            "PYTHONPATH": str(Path(shmflags.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    if "permission denied" in ended.stderr.lower() or "not permitted" in ended.stderr.lower():
        pytest.skip("no mounts in this container")
    assert ended.returncode == 0, ended.stderr
    assert "note  /dev/shm: 25.2 MB -> enlarge it (docker run --shm-size=64m)\n" in ended.stdout
    assert "ok    directory: /dev/shm (default)\n" in ended.stdout
    assert "ok    file system: tmpfs\n" in ended.stdout


def test_a_hidden_proc_is_a_note(directory: Path) -> None:
    """Where no death can be proven, what that costs is said, and it is not wrong."""

    class Blind(Host):
        def identity(self) -> Identity:
            return Identity(os.getpid(), 0, 0)

        def boot_id(self) -> int:
            return 0

    checks = examined(directory, Blind())
    assert checks["pid namespace"].verdict == NOTE
    assert "when its lease runs out" in checks["pid namespace"].remedy
    assert checks["boot id"].verdict == NOTE


def test_a_lock_that_does_not_exclude_is_wrong(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system whose lock lets two in, doctor says so."""
    monkeypatch.setattr("filelock.lock_descriptor", lambda *_, **__: True)
    check = examined(directory)["mechanics"]
    assert check.verdict == WRONG
    assert "two could hold the lock at once" in check.found
    assert os.listdir(directory) == []


def test_files_of_other_users_are_a_note(directory: Path) -> None:
    """Who looks as root for what www-data does is told how to look."""
    (directory / "shmflags-54321").mkdir()
    check = examined(directory)["user"]
    assert check.verdict == NOTE
    assert "there are files of #54321 too" in check.found
    assert f"sudo -u '#54321' shmflags doctor --directory {directory}" in check.remedy


def test_each_key_has_a_line(run: Run, directory: Path) -> None:
    """What is shared is counted, and what is wrong with a key makes doctor end with 1."""
    cache = SharedMemoryFlagCache("my-service", directory=directory)
    assert cache.should_fetch_flag_definitions()
    cache.on_flag_definitions_received(definitions(flag("one")))
    ended = run("doctor", "--directory", directory)
    assert ended.status == 0
    assert "ok    key my-service: 1 worker, generation 1\n" in ended.out
    (Path(cache.status().directory) / "snapshot").unlink()
    ended = run("doctor", "--directory", directory)
    assert ended.status == 1
    assert "key my-service: The snapshot cannot be used: it is missing" in ended.err
    assert ended.err.endswith("for lines of shmflags: see shmflags status my-service\n")


def test_a_disk_is_a_note(tmp_path: Path) -> None:
    """A directory on a disk works, and it is said that memory would be better."""
    check = examined(tmp_path)["file system"]
    if runtime_dir.file_system(tmp_path) == "tmpfs":
        assert check.verdict == OK
    else:
        assert (check.verdict, check.found) == (NOTE, runtime_dir.file_system(tmp_path))


def test_an_old_sdk_is_a_note(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A posthog older than the one that attach() was made for is said, and so is none."""
    versions = {"posthog": "6.9.1", "filelock": "4", "msgpack": "1", "psutil": "7"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    check = examined(directory)["versions"]
    assert check.verdict == NOTE
    assert "upgrade it" in check.remedy
    versions["posthog"] = ""
    assert "posthog is not installed here" in examined(directory)["versions"].found


@pytest.mark.parametrize(
    ("configuration", "removes"),
    [
        ("", True),
        ("[Login]\n#RemoveIPC=no\n", True),
        ("[Login]\nRemoveIPC=no\n", False),
        ("RemoveIPC=no\n[Login]\n RemoveIPC = yes\n", True),
        ("RemoveIPC=yes\nRemoveIPC=off\n", False),
    ],
)
def test_what_logind_removes(configuration: str, removes: bool) -> None:
    """The last setting counts, a comment does not, and without one systemd removes."""
    assert doctor.removes_at_logout(configuration) == removes
