"""`shmflags doctor`: whether this host and this user can share flags, line by line.

What it creates to find out, it creates in a temporary directory beside the real ones, and removes.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from shmflags import runtime_dir, status
from shmflags._version import __version__
from shmflags.diagnosis import count
from shmflags.errors import ShmFlagsError, UnsafePathError
from shmflags.processes import Host
from shmflags.runtime_dir import DIRECTORY_VARIABLE, RuntimeDir
from shmflags.snapshot import DEFAULT_MAX_BYTES
from shmflags.status import SCHEMA_VERSION
from shmflags.table import size

OK, NOTE, WRONG = "ok", "note", "wrong"
_LITTLE_BYTES = 16 * 1000 * 1000
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
_SEEN_POSTHOG = (7, 91)
_HUMAN_UID = 1000


class Check(NamedTuple):
    """One line: what was looked at, what was found, and (unless `ok`) what to do."""

    name: str
    verdict: str
    found: str
    remedy: str = ""


def as_dict(checks: list[Check]) -> dict[str, Any]:
    """For JSON."""
    return {
        "schema_version": SCHEMA_VERSION,
        "ok": all(check.verdict != WRONG for check in checks),
        "checks": [check._asdict() for check in checks],
    }


def examine(directory: str | None, host: Host) -> list[Check]:
    """All checks for the base `directory` (None: the default one)."""
    at = runtime_dir.locate(directory, "", os.geteuid())
    checks = [_versions(), _user(at), *_directory(at, directory)]
    if os.path.isdir(at.base):
        checks += [_safety(at), _file_system(at), _space(at)]
        checks += [_mechanics(at.base)] if os.access(at.base, os.W_OK | os.X_OK) else []
    checks += [_shared_memory(), *_processes(host), *_removal(at)]
    for found in runtime_dir.found(directory, at.uid):
        checks.append(_key(status.read(found, host, DEFAULT_MAX_BYTES)))
    return checks


def user_name(uid: int) -> str:
    """The name of a user; if there is none, "#1234", which sudo takes for one."""
    import pwd  # Not on Windows, where the command is to say so, and not to fail at its imports.

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"


def command_as(user: str, command: str, at: RuntimeDir) -> str:
    """What to type for the same as another user, whose environment will not be ours."""
    place = f" --directory {shlex.quote(str(at.base))}" if at.explicit else ""
    return f"sudo -u {shlex.quote(user)} shmflags {command}{place}"


def _versions() -> Check:
    versions = {name: _version(name) for name in ("filelock", "msgpack", "psutil", "posthog")}
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    text = f"shmflags {__version__}, Python {platform.python_version()}, {known}"
    posthog = versions["posthog"]
    if not posthog:
        return Check(
            "versions",
            NOTE,
            f"{text}; posthog is not installed here",
            "pip install posthog, if you use it",
        )
    numbers = tuple(int(part) for part in posthog.split(".")[:2] if part.isdigit())
    if numbers < _SEEN_POSTHOG:
        return Check("versions", NOTE, text, "attach() was made for posthog 7.91 and later: upgrade it")
    return Check("versions", OK, text)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _user(at: RuntimeDir) -> Check:
    others = [user_name(uid) for uid in runtime_dir.users_with_files(at.base) if uid != at.uid]
    text = f"{user_name(at.uid)} ({at.uid})"
    if not others:
        return Check("user", OK, text)
    return Check(
        "user",
        NOTE,
        f"{text}; there are files of {', '.join(others)} too",
        "workers of one user share with each other: look at others' by "
        f"{command_as(others[0], 'doctor', at)}",
    )


def _directory(at: RuntimeDir, told: str | None) -> Iterator[Check]:
    by = "--directory" if told is not None else f"${DIRECTORY_VARIABLE}" if at.explicit else "default"
    text = f"{at.base} ({by})"
    if not os.path.exists(at.base):
        yield Check("directory", WRONG, f"{text} does not exist", "create it, or name another one")
    elif not os.path.isdir(at.base):
        yield Check("directory", WRONG, f"{text} is not a directory", "name another one")
    elif not os.access(at.base, os.W_OK | os.X_OK) and not os.path.isdir(at.user_path):
        yield Check(
            "directory", WRONG, f"{text} cannot be written by {user_name(at.uid)}", "name another one"
        )
    else:
        yield Check("directory", OK, text)


def _safety(at: RuntimeDir) -> Check:
    doubt = None
    try:
        doubt = runtime_dir.base_objection(at.base, at.uid)
        if doubt is not None and not at.explicit:
            raise doubt
        for path in (at.user_path, at.version_path):
            runtime_dir.check_directory(path, at.uid)
        text = f"{at.user_path} is for {user_name(at.uid)} alone"
    except FileNotFoundError:
        text = f"{at.user_path} is not made yet; the first worker makes it"
    except UnsafePathError as error:
        return Check("safety", WRONG, f"{error.path} {error.reason}", error.remedy)
    except OSError as error:
        return Check("safety", WRONG, str(error), "let this user read it")
    if doubt is not None:
        return Check(
            "safety", NOTE, f"{doubt.path}: {doubt.reason}", "used all the same, as it was named"
        )
    return Check("safety", OK, text)


def _file_system(at: RuntimeDir) -> Check:
    kind = runtime_dir.file_system(at.base) or "unknown"
    if kind in _MEMORY_FILE_SYSTEMS:
        return Check("file system", OK, kind)
    return Check("file system", NOTE, kind, "it works on any local one; on tmpfs it saves disk writes")


def _space(at: RuntimeDir) -> Check:
    info = os.statvfs(at.base)
    free = info.f_bavail * info.f_frsize
    text = f"{size(free)} free of {size(info.f_blocks * info.f_frsize)}"
    if info.f_files and not info.f_favail:
        return Check("space", WRONG, f"{text}, but no more files can be made", "remove files there")
    if free < _LITTLE_BYTES:
        remedy = "free some: a snapshot is written beside the last one; 5,000 flags take some 5 MB each"
        return Check("space", WRONG, text, remedy)
    return Check("space", OK, text)


def _shared_memory() -> Check:
    try:
        info = os.statvfs("/dev/shm")
    except OSError:
        return Check("/dev/shm", NOTE, "there is none", "name a directory, best on tmpfs")
    total = info.f_blocks * info.f_frsize
    if total < 2 * _LITTLE_BYTES:
        return Check("/dev/shm", NOTE, size(total), "enlarge it (docker run --shm-size=64m)")
    return Check("/dev/shm", OK, size(total))


def _mechanics(base: Path) -> Check:
    """Do once, for real, what the cache does all the time."""
    attempts: tuple[tuple[str, Callable[[Path], None]], ...] = (
        ("lock", _try_lock),
        ("hard link", _try_link),
        ("shared mapping", _try_mapping),
    )
    try:
        directory = Path(tempfile.mkdtemp(prefix="shmflags-doctor-", dir=base))
    except OSError as error:
        return Check("mechanics", WRONG, f"no directory can be made: {error}", "name another directory")
    try:
        for name, attempt in attempts:
            try:
                attempt(directory)
            except (OSError, ShmFlagsError) as error:
                return Check("mechanics", WRONG, f"{name}: {error}", "name another directory")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return Check("mechanics", OK, "lock, hard link and shared mapping work")


def _try_lock(directory: Path) -> None:
    from filelock import lock_descriptor, unlock_descriptor

    path = directory / "lock"
    first = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    second = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not lock_descriptor(first, blocking=False):
            raise ShmFlagsError("a free lock could not be had", path=path)
        if lock_descriptor(second, blocking=False):
            raise ShmFlagsError("two could hold the lock at once", path=path)
        unlock_descriptor(first)
        if not lock_descriptor(second, blocking=False):
            raise ShmFlagsError("the lock was not freed", path=path)
        unlock_descriptor(second)
    finally:
        os.close(first)
        os.close(second)


def _try_link(directory: Path) -> None:
    (directory / "written").write_bytes(b"x")
    os.link(directory / "written", directory / "linked")
    os.replace(directory / "written", directory / "linked")


def _try_mapping(directory: Path) -> None:
    path = directory / "mapped"
    path.write_bytes(bytes(mmap.PAGESIZE))
    with (
        open(path, "r+b") as one,
        open(path, "r+b") as other,
        mmap.mmap(one.fileno(), 0) as writing,
        mmap.mmap(other.fileno(), 0) as reading,
    ):
        writing[0] = 1
        if reading[0] != 1:
            raise ShmFlagsError("what one writes, the other does not see", path=path)


def _processes(host: Host) -> Iterator[Check]:
    identity = host.identity()
    if not identity.pid_namespace or not identity.start_ticks:
        yield Check(
            "pid namespace",
            NOTE,
            "/proc does not show this process, so no death can be proven",
            "mount the /proc of this container; else a dead leader is replaced when its lease runs out",
        )
    else:
        yield Check(
            "pid namespace", OK, f"{identity.pid_namespace}; deaths of workers in it can be proven"
        )
    if not host.boot_id():
        yield Check(
            "boot id", NOTE, "not known", "keep the directory on tmpfs, so that a reboot empties it"
        )


def _removal(at: RuntimeDir) -> Iterator[Check]:
    """systemd removes what users have in shared memory when they log out, unless told otherwise."""
    shm = Path("/dev/shm")
    if (
        at.uid < _HUMAN_UID
        or not at.base.is_relative_to(shm)
        or not os.path.isdir("/run/systemd/system")
    ):
        return
    configuration = ""
    for path in ("/usr/lib/systemd/logind.conf", "/etc/systemd/logind.conf"):
        try:
            configuration += Path(path).read_text(errors="replace")
        except OSError:
            continue
    if removes_at_logout(configuration):
        yield Check(
            "RemoveIPC",
            NOTE,
            f"systemd removes files of {user_name(at.uid)} from /dev/shm at the end of the last login",
            "workers make them anew; to spare them that, name a directory under /run",
        )


def removes_at_logout(configuration: str) -> bool:
    """What the text of logind.conf says of RemoveIPC; its own default is yes."""
    settings = re.findall(r"^\s*RemoveIPC\s*=\s*(\S+)", configuration, re.MULTILINE)
    return not settings or settings[-1].lower() not in ("no", "false", "off", "0", "n", "f")


def _key(found: status.Status) -> Check:
    if found.problems:
        return Check(f"key {found.name}", WRONG, found.problems[0], f"see shmflags status {found.name}")
    workers = count(len(found.workers), "worker")
    return Check(f"key {found.name}", OK, f"{workers}, generation {found.generation or 'none'}")
