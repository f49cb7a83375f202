"""The file of the control page: made whole, linked into place, replaced if it is not ours to use.

Nobody ever maps an empty or half-written page: it is written, with `write()` so that a full disk is an
error here and not a SIGBUS later, under a temporary name, and then linked to its path, which fails
if another worker was first. A page of another size, another boot, or none at all is replaced, never
mended, under the lock of the directory.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from shmflags import snapshot
from shmflags.errors import PageReplacedError, ShmFlagsError, UnsafePathError
from shmflags.file_lock import Inode, directory_lock
from shmflags.page import PAGE_BYTES, ControlPage, new_page
from shmflags.processes import Host
from shmflags.runtime_dir import RuntimeDir, may_replace, open_private
from shmflags.snapshot import Header


class _UnusablePage(ShmFlagsError):
    """A page of another boot, another size, or no page at all."""


def attach(
    directory: RuntimeDir, host: Host, owner: str, max_bytes: int, last: ControlPage | None = None
) -> ControlPage:
    """Map the page of `directory`, which is prepared, making it if there is none.

    `last` is the page that this process had until now: a new page goes on from its last grant and
    term, so that a lost page costs no extra request. Raises `OSError` or `UnsafePathError`.
    """
    for _ in range(10):
        try:
            return open_existing(directory, host)
        except FileNotFoundError:
            _create(directory, host, owner, max_bytes, last)
        except (UnsafePathError, _UnusablePage):
            _replace(directory, host, owner, max_bytes, last)
    raise PageReplacedError("is being replaced over and over", path=directory.page_path)


def open_existing(directory: RuntimeDir, host: Host) -> ControlPage:
    """Map the page if there is a usable one.

    Raises `FileNotFoundError`, `UnsafePathError`, or another `ShmFlagsError` for garbage.
    """
    path = directory.page_path
    descriptor = open_private(path, os.O_RDWR, directory.uid)
    try:
        info = os.fstat(descriptor)
        if info.st_size != PAGE_BYTES:
            raise _UnusablePage(f"has {info.st_size} bytes instead of {PAGE_BYTES}", path=path)
        mapped = mmap.mmap(descriptor, PAGE_BYTES)
    finally:
        os.close(descriptor)
    page = ControlPage(directory, host, memoryview(mapped).cast("Q"), Inode.of(info))
    objection = page.objection()
    if objection:
        raise _UnusablePage(objection, path=path)
    return page


def _create(
    directory: RuntimeDir, host: Host, owner: str, max_bytes: int, last: ControlPage | None
) -> None:
    # Linked into place whole: nobody ever maps an empty or half-written page.
    with _written(directory, host, owner, max_bytes, last) as temporary:
        try:
            os.link(temporary, directory.page_path)
        except FileExistsError:
            pass  # Another worker was first; its page is as good.


def _replace(
    directory: RuntimeDir, host: Host, owner: str, max_bytes: int, last: ControlPage | None
) -> None:
    # What stands there may be no file that can be locked, so the directory is locked instead.
    with directory_lock(directory.path, host):
        try:
            open_existing(directory, host)
            return  # Another worker has replaced it meanwhile.
        except FileNotFoundError:
            return
        except (UnsafePathError, _UnusablePage):
            may_replace(directory.page_path, directory.uid)
        with _written(directory, host, owner, max_bytes, last) as temporary:
            os.replace(temporary, directory.page_path)


@contextmanager
def _written(
    directory: RuntimeDir, host: Host, owner: str, max_bytes: int, last: ControlPage | None
) -> Iterator[str]:
    """A temporary file with the content of a new page, gone after the block unless it was moved."""
    temporary = os.fspath(directory.temporary_path("page", owner))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600)
    try:
        try:
            os.fchmod(descriptor, 0o600)
            adopted = _adoptable(directory, host.boot_id(), max_bytes)
            content = memoryview(new_page(directory, host, adopted, last))
            while content:
                # write(), not ftruncate(): a full disk must fail here, not at the first store.
                content = content[os.write(descriptor, content) :]
        finally:
            os.close(descriptor)
        yield temporary
    finally:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass


def _adoptable(directory: RuntimeDir, boot: int, max_bytes: int) -> Header | None:
    """The header of the snapshot that lies there, if it is sound and of this boot."""
    try:
        header = snapshot.read_header(directory, max_bytes)
    except (OSError, ShmFlagsError):
        return None
    return header if header.boot_id == boot else None
