"""What the fault tests share: definitions that prove themselves, pollers, children, the log."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import mmap
import os
import pickle
import select
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shmflags import SharedMemoryFlagCache, ShmFlagsError, snapshot
from shmflags.page import PAGE_BYTES, ControlPage
from shmflags.page_file import open_existing
from shmflags.processes import Host
from shmflags.runtime_dir import RuntimeDir, locate

KEY = "faults"
NOBODY_UID = 65534


# -- definitions that prove themselves


def stamped(stamp: int, flags: int = 4, padding: int = 40) -> dict[str, Any]:
    """Definitions whose every part carries `stamp`, with a checksum over the whole."""
    listed = [{"key": f"flag-{i}", "stamp": stamp, "padding": "x" * padding} for i in range(flags)]
    cohorts = {str(i): {"stamp": stamp} for i in range(2)}
    body = {"flags": listed, "group_type_mapping": {}, "cohorts": cohorts, "stamp": stamp}
    return {**body, "checksum": _checksum(body)}


def stamp_of(definitions: dict[str, Any]) -> int:
    """The stamp of definitions made by `stamped`; fails if they are torn, mixed or changed."""
    body = {name: value for name, value in definitions.items() if name != "checksum"}
    assert definitions.get("checksum") == _checksum(body), f"not what was published: {definitions!r}"
    stamps = {body["stamp"], *(flag["stamp"] for flag in body["flags"])}
    stamps |= {cohort["stamp"] for cohort in body["cohorts"].values()}
    assert len(stamps) == 1, f"parts of several publishes: {stamps}"
    return int(body["stamp"])


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


# -- an API and those who poll


class Api:
    """Answers as PostHog does: whoever has the current definitions is told so, and gets nothing."""

    def __init__(self, flags: int = 4, padding: int = 40) -> None:
        self.stamp = 1
        self.requests = 0
        self.full = 0
        self.is_down = False
        self.flags = flags
        self.padding = padding

    def change(self) -> int:
        self.stamp += 1
        return self.stamp

    def fetch(self, etag: int | None) -> dict[str, Any] | None:
        """Fresh objects each time, or None for a 304 or a failure."""
        self.requests += 1
        if self.is_down or etag == self.stamp:
            return None
        self.full += 1
        return stamped(self.stamp, self.flags, self.padding)


class Poller:
    """Does with its cache, in this process, what the SDK's poller does."""

    def __init__(
        self,
        base: Path | None,
        api: Api,
        *,
        host: Host | None = None,
        poll_interval: float = 1.0,
        cold_start_timeout: float = 0.05,
        lease_ttl: float | None = 3.0,
        **arguments: Any,
    ) -> None:
        self.api = api
        self.cache = SharedMemoryFlagCache(
            KEY,
            directory=base,
            poll_interval=poll_interval,
            cold_start_timeout=cold_start_timeout,
            lease_ttl=lease_ttl,
            **arguments,
        )
        if host is not None:
            self.cache._host = host
        self.definitions: dict[str, Any] | None = None
        self.etag: int | None = None
        self.was_granted = False

    def poll(self) -> int | None:
        """One poll; the stamp of what is evaluated from after it, None if there is nothing."""
        self.was_granted = self.cache.should_fetch_flag_definitions()
        fetch = self.was_granted
        if not fetch:
            found = self.cache.get_flag_definitions()
            if found is not None:
                self.definitions = found
            elif not (self.definitions and self.definitions["flags"]):
                fetch = True
        if fetch:
            self.fetch()
        return self.stamp

    def fetch(self) -> None:
        answer = self.api.fetch(self.etag)
        if answer is not None:
            self.definitions, self.etag = answer, self.api.stamp
            self.cache.on_flag_definitions_received(answer)

    @property
    def stamp(self) -> int | None:
        if self.definitions is None or not self.definitions["flags"]:
            return None
        return stamp_of(self.definitions)

    @property
    def leads(self) -> bool:
        member = self.cache._me()
        page = member.known_page
        return page is not None and page.lease().token == member.token


def runtime_dir(base: Path) -> RuntimeDir:
    """Where this process's user has the files."""
    return _located(base, os.geteuid())


@functools.cache
def _located(base: Path, uid: int) -> RuntimeDir:
    return locate(base, KEY, uid)


def control_page(base: Path) -> ControlPage:
    """The page as it is now, mapped anew."""
    return open_existing(runtime_dir(base), Host())


def page_words(base: Path) -> memoryview:
    """The words of the page as it is now, whatever they are, to be written to at will."""
    with open(runtime_dir(base).page_path, "r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), PAGE_BYTES)).cast("Q")


def stamp_on_disk(base: Path) -> int | None:
    """The stamp of the snapshot that lies there, None if there is no sound one."""
    try:
        found = snapshot.read(runtime_dir(base), snapshot.DEFAULT_MAX_BYTES)
    except (OSError, ShmFlagsError):
        return None
    return stamp_of(found.decoded.definitions)


def temporary_files(base: Path) -> list[str]:
    return [path.name for path, _ in runtime_dir(base).temporary_files()]


# -- the log


class Ear(logging.Handler):
    """Keeps the log of the package; what nobody foresaw comes with a traceback."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.surprises: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if record.exc_info or record.levelno >= logging.ERROR:
            error = record.exc_info[1] if record.exc_info else None
            detail = "".join(traceback.format_exception(error)) if error is not None else ""
            self.surprises.append(record.getMessage() + "\n" + detail)

    def heard(self, *parts: str) -> bool:
        """Whether one line has all `parts` in it."""
        return any(all(part in line for part in parts) for line in self.lines)

    def assert_no_surprise(self) -> None:
        assert not self.surprises, "\n".join(self.surprises)


# -- children


def in_child(function: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> Any:
    """Run `function(*arguments)` in a forked child and return its (picklable) result.

    What the child does to itself (limits, user, mounts) ends with it. Fails with the child's
    traceback, or if the child dies or takes longer than `timeout_s`.
    """
    pid, descriptor = start_child(function, *arguments)
    data = b""
    end = time.monotonic() + timeout_s
    try:
        while True:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"{function.__name__} took longer than {timeout_s} s")
            part = os.read(descriptor, 1 << 16)
            if not part:
                break
            data += part
    finally:
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
    assert data, f"the child ended with wait status {status}"
    succeeded, value = pickle.loads(data)
    assert succeeded, f"in the child:\n{value}"
    return value


def start_child(function: Callable[..., Any], *arguments: Any) -> tuple[int, int]:
    """Fork and run `function`; (pid, descriptor from which its pickled outcome can be read)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    try:
        os.close(reader)
        try:
            outcome: tuple[bool, Any] = (True, function(*arguments))
            for handler in logging.getLogger("shmflags").handlers:
                if isinstance(handler, Ear):
                    handler.assert_no_surprise()
        except BaseException:
            outcome = (False, traceback.format_exc())
        data = pickle.dumps(outcome)
        while data:
            data = data[os.write(writer, data) :]
    finally:
        os._exit(0)


def take_all(number: int, take: Callable[[], object]) -> None:
    """Take and take, until the system refuses with this error."""
    while True:
        try:
            take()
        except OSError as error:
            if error.errno != number:
                raise
            return


# -- what only root may do, in a child

_CLONE_NEWNS = 0x00020000
_MS_REC_PRIVATE = 0x4000 | 0x40000
_MS_REMOUNT_READ_ONLY = 0x20 | 0x1


def private_mounts() -> None:
    """From now on this process's mounts are its own, and go when it goes."""
    _check(_libc().unshare(_CLONE_NEWNS))
    _check(_libc().mount(b"none", b"/", None, _MS_REC_PRIVATE, None))


def mount_tmpfs(path: Path, options: str) -> None:
    _check(_libc().mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, options.encode()))


def remount_read_only(path: Path) -> None:
    _check(_libc().mount(b"tmpfs", os.fsencode(path), b"tmpfs", _MS_REMOUNT_READ_ONLY, None))


def become(uid: int) -> None:
    """Drop to another user for good, groups included."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
