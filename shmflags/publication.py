"""Putting a snapshot in its place: publishing, restoring, and rolling the page forward.

The order of a publish is: the draft is written (no lock), then under the page's lock the fence is
checked, the header completed, the file renamed, and the page written. A process killed before the
rename has changed nothing. One killed after it leaves a snapshot whose header is newer than the page;
whoever tends the snapshot next, as leader, or publishes next, rolls the page forward to it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from shmflags import codec, election, snapshot
from shmflags.errors import (
    DamagedSnapshotError,
    InvalidDefinitionsError,
    ShmFlagsError,
    UnsafePathError,
)
from shmflags.page import ControlPage, Fence
from shmflags.snapshot import Draft, Header, Position, Signature

_OLD_NS = 3600 * 1_000_000_000


class Result(enum.Enum):
    """What became of a publish."""

    PUBLISHED = "published"
    UNCHANGED = "unchanged"
    DROPPED = "dropped"


class Publication(NamedTuple):
    """A publish that came to its end, the position that is served after it, and what was mended."""

    result: Result
    position: Position
    event: str = ""


def publish(
    page: ControlPage, encoded: codec.Encoded, noted: Fence, owner: str, max_bytes: int
) -> Publication:
    """Publish what was fetched under `noted`, if nothing overtook it.

    Raises `OSError`, `LockTimeoutError`, `PageReplacedError` or `UnsafePathError`; then it may be
    tried again, as nothing was published.
    """
    host = page.host
    draft: Draft | None = None
    try:
        if page.digest() != encoded.digest:
            draft = Draft(page.directory, encoded, owner)
        with page.locked():
            event = _roll_forward(page, max_bytes)
            if not election.may_publish(noted, page.fence(), serving=page.is_serving()):
                page.count("dropped")
                return Publication(Result.DROPPED, page.position(), event)
            if page.digest() == encoded.digest:
                page.accept_unchanged(host.wall_ns())
                page.count("unchanged")
                return Publication(Result.UNCHANGED, page.position(), event)
            if draft is not None:
                header = draft.put_in_place(
                    _next_position(page), noted.publications + 1, host.boot_id(), host.wall_ns()
                )
                page.accept_snapshot(header)
                page.count("published")
                return Publication(Result.PUBLISHED, header.position, event)
    finally:
        if draft is not None:
            draft.discard()
    # The content was published when we looked, and is not any more: now a draft is needed.
    return publish(page, encoded, noted, owner, max_bytes)


def confirm(page: ControlPage, noted: Fence) -> None:
    """What was asked for under `noted` is what is published: an unchanged publish, nothing written.

    Does nothing if something overtook it. Raises `OSError`, `LockTimeoutError` or `PageReplacedError`.
    """
    with page.locked():
        if election.may_publish(noted, page.fence(), serving=page.is_serving()):
            page.accept_unchanged(page.host.wall_ns())
            page.count("unchanged")


class Tended(NamedTuple):
    """What the leader did about the snapshot.

    `signature` is that of the file as it was left, None if it should be looked at again;
    `restored` is the position under which our own content was written again.
    """

    signature: Signature | None
    restored: Position | None = None
    event: str = ""


def needs_tending(page: ControlPage, last: Signature | None, holding: codec.Decoded | None) -> bool:
    """Whether the snapshot is another file than when it was last looked at. Cheap, no lock."""
    found = snapshot.signature(page.directory.snapshot_path)
    if found != last or page.damage_is_reported():
        return True
    return found is None if page.is_serving() else holding is not None


def tend(page: ControlPage, holding: codec.Decoded | None, owner: str, max_bytes: int) -> Tended:
    """As (would-be) leader: check the snapshot, and mend what is wrong with it.

    `holding` is the content of the last snapshot, if this process has it: then a lost or damaged one
    is written again; else it is given up, and the next grant brings a new one. Raises as `publish`.
    """
    directory = page.directory
    found = snapshot.signature(directory.snapshot_path)
    problem = ""
    header: Header | None = None
    try:
        header = snapshot.verify(directory, max_bytes)
    except FileNotFoundError:
        problem = "it is gone"
    except (DamagedSnapshotError, UnsafePathError) as error:
        problem = f"{error.reason}"
    sound = header is not None and header.position == page.last_position()
    encoded = None if sound else _encoded_again(holding)
    with page.locked():
        if snapshot.signature(directory.snapshot_path) != found:
            return Tended(None)  # Replaced while we looked; the next poll looks again.
        if header is not None:
            if header.position == page.last_position():
                page.restore_snapshot(header)
                return Tended(found)
            if _is_newer(header, page):
                page.accept_snapshot(header)
                page.count("repaired")
                return Tended(found, event=_goes_on_at(header.position))
            problem = f"it is {_name(header.position)}, not the last one"
        if encoded is None:
            if not page.is_serving():
                return Tended(found)
            page.clear_snapshot()
            return Tended(found, event=f"lost: the snapshot, as {problem}; a fetch will mend it")
    return _restore(page, encoded, owner, problem)


def _encoded_again(holding: codec.Decoded | None) -> codec.Encoded | None:
    """The bytes of what we hold, or None if we hold nothing or somebody changed our objects."""
    if holding is None:
        return None
    try:
        encoded, _ = codec.encode(holding.definitions, holding, holding.etag)
    except InvalidDefinitionsError:
        return None
    return encoded if encoded.digest == holding.digest else None


def _restore(page: ControlPage, encoded: codec.Encoded, owner: str, problem: str) -> Tended:
    host = page.host
    last = page.last_position()
    draft = Draft(page.directory, encoded, owner)
    try:
        with page.locked():
            if page.last_position() != last:
                return Tended(None)  # Published meanwhile; the next poll looks again.
            position = last if last.incarnation == page.incarnation else _next_position(page)
            wall_ns = page.times()[0] or host.wall_ns()
            count = page.fence().publications
            page.restore_snapshot(draft.put_in_place(position, count, host.boot_id(), wall_ns))
            page.count("repaired")
    finally:
        draft.discard()
    found = snapshot.signature(page.directory.snapshot_path)
    return Tended(found, position, f"repaired: the snapshot was written again, as {problem}")


def _roll_forward(page: ControlPage, max_bytes: int) -> str:
    """Under the lock: take up a snapshot whose writer died before it could say so in the page.

    Returns what is to be logged of it, "" if there was none.
    """
    try:
        header = snapshot.read_header(page.directory, max_bytes)
    except (OSError, ShmFlagsError):
        return ""
    if not _is_newer(header, page):
        return ""
    page.accept_snapshot(header)
    page.count("repaired")
    return _goes_on_at(header.position)


def _is_newer(header: Header, page: ControlPage) -> bool:
    """Whether the snapshot follows, in this life of the page, the one that the page names."""
    if header.boot_id != page.host.boot_id():
        return False
    return is_successor(header.position, page.last_position(), page.incarnation)


def is_successor(found: Position, last: Position, incarnation: int) -> bool:
    """Whether `found` comes after `last` on a page of this incarnation."""
    if found.incarnation == last.incarnation:
        return found.generation > last.generation
    return found.incarnation == incarnation


def _next_position(page: ControlPage) -> Position:
    last = page.last_position()
    return Position(
        page.incarnation, last.generation + 1 if last.incarnation == page.incarnation else 1
    )


def _goes_on_at(position: Position) -> str:
    return f"repaired: the page goes on at {_name(position)}"


def _name(position: Position) -> str:
    return f"generation {position.generation}"


def clear_litter(page: ControlPage, is_litter: Callable[[str], bool]) -> list[Path]:
    """Remove temporary files whose writer, named by `owner`, is known to be gone, or that are old.

    An old one may be of a container that is no more. Were its writer only stopped, it would miss it,
    and write it again.
    """
    removed = []
    for path, owner in page.directory.temporary_files():
        try:
            if is_litter(owner) or page.host.wall_ns() - path.lstat().st_mtime_ns > _OLD_NS:
                path.unlink()
                removed.append(path)
        except OSError:
            pass
    return removed
