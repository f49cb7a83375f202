"""`shmflags publish`: definitions from a file, for development, tests and hosts without a network.

The publisher is a contender like any worker: it takes the lease or is refused, publishes under a
fence, and leaves. While it follows a file it keeps the lease, so that no worker fetches, and restores
what is lost.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from shmflags import codec, publication
from shmflags.errors import (
    InvalidDefinitionsError,
    LockTimeoutError,
    PageReplacedError,
    ShmFlagsError,
)
from shmflags.journal import Journal
from shmflags.member import Member
from shmflags.page import ControlPage, Fence, Lease
from shmflags.processes import Host, command_line
from shmflags.publication import Result
from shmflags.settings import Settings
from shmflags.snapshot import HEADER_BYTES, NOTHING, Signature, signature

LOOK_S = 0.2
"""Seconds between two looks at a file that is followed."""

_RENEW_NS = 5 * 1_000_000_000


class RefusedError(ShmFlagsError):
    """Another process leads, and would publish over what is published here."""


class Published(NamedTuple):
    """What came of it. `changed` is False if just this content was served already."""

    generation: int
    flags: int
    cohorts: int
    size: int
    changed: bool


def read_definitions(path: str) -> dict[str, Any]:
    """The definitions in a JSON file, or from stdin for "-", checked so far as a file by hand needs it.

    Raises `OSError`, or `InvalidDefinitionsError` that says what is wrong, and where.
    """
    name = "stdin" if path == "-" else path
    if path == "-":
        if sys.stdin is None:
            raise InvalidDefinitionsError("is closed", path=name)
        data = sys.stdin.buffer.read()
    else:
        with open(path, "rb") as file:
            data = file.read()
    try:
        found = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_number, parse_float=_finite)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidDefinitionsError(f"is not JSON: {error.msg} in {where}", path=name) from None
    except UnicodeDecodeError as error:
        raise InvalidDefinitionsError(f"is not UTF-8: byte {error.start}", path=name) from None
    except (ValueError, RecursionError) as error:
        raise InvalidDefinitionsError(f"is not JSON that can be used: {error}", path=name) from None
    try:
        codec.encode(found)
        _check_keys(found["flags"])
    except InvalidDefinitionsError as error:
        raise InvalidDefinitionsError(error.reason, path=name, remedy=error.remedy) from None
    definitions: dict[str, Any] = found
    return definitions


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"JSON has no {text}")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large for a floating-point number")
    return value


def _check_keys(flags: list[dict[str, Any]]) -> None:
    seen: dict[str, int] = {}
    for number, flag in enumerate(flags):
        key = flag.get("key")
        if not isinstance(key, str):
            raise InvalidDefinitionsError(
                f"flags[{number}] has no key: it needs a string under 'key', and has {sorted(flag)!r}"
            )
        if key in seen:
            raise InvalidDefinitionsError(
                f"flags[{number}] has the key {key!r}, which flags[{seen[key]}] has already"
            )
        seen[key] = number


class LocalPublisher:
    """Publishes definitions that no API sent. Call `leave` in any case."""

    def __init__(self, settings: Settings, *, force: bool = False) -> None:
        """Touches no file. `force` deposes the process that leads, if there is one."""
        self._settings = settings
        self._host = Host()
        self._member = Member(settings, self._host, Journal(settings.service_key))
        self._force = force
        self._encoded: codec.Encoded | None = None
        self._tended: Signature | None = None
        self._renewed_ns = 0
        self._fence: Fence | None = None

    def publish(self, definitions: dict[str, Any]) -> Published:
        """Take or keep the lease, and publish.

        Raises `RefusedError` if another process leads; `InvalidDefinitionsError`, `UnsafePathError`,
        `LockTimeoutError` or `OSError` for what their names say.
        """
        encoded, _ = codec.encode(definitions)
        limit = self._settings.max_bytes
        if HEADER_BYTES + encoded.size > limit:
            raise InvalidDefinitionsError(
                f"the definitions take {encoded.size} bytes; at most {limit} can be shared"
            )
        self._encoded = encoded
        return self._put(self._member.page(NOTHING), encoded)

    def keep(self) -> None:
        """While following: keep the lease, and restore what was removed. Raises as `publish`."""
        page = self._member.page(NOTHING)
        now_ns = self._host.now_ns()
        encoded = self._encoded
        if encoded is None:
            return
        lease = page.lease()
        if self._was_deposed(page, lease):
            raise RefusedError(
                "another process has led meanwhile, and has left what it published",
                remedy="start it again to publish the file in its place",
            )
        if (
            lease.token != self._member.token
            or page.digest() != encoded.digest
            or publication.needs_tending(page, self._tended, None)
        ):
            self._lead(page)
            publication.tend(page, None, self._member.owner, self._settings.max_bytes)
            self._put(page, encoded)
        elif now_ns - self._renewed_ns > _RENEW_NS:
            self._lead(page)

    def leave(self) -> None:
        """Give the lease back, if there is one to give."""
        try:
            self._member.leave()
        except (OSError, LockTimeoutError, PageReplacedError):
            pass  # It runs out by itself, and a dead holder's may be taken at once.

    def _was_deposed(self, page: ControlPage, lease: Lease) -> bool:
        """Whether somebody led after us, who has gone; on a page that was made since, nobody did."""
        last = self._fence
        return (
            last is not None
            and last.incarnation == page.incarnation
            and last.term != lease.term
            and not lease.token
        )

    def _lead(self, page: ControlPage) -> Fence:
        outcome = self._member.election.claim(page, force=self._force)
        if outcome.fence is None:
            holder = page.lease().holder.pid
            raise RefusedError(
                f"process {holder} leads ({command_line(holder) or 'its command line is hidden'}) and "
                "would publish over this at its next fetch",
                remedy="stop the workers, or give them role='reader', or use --force",
            )
        for event in outcome.events:
            self._member.tell(event)
        # Only the first time: who deposes this publisher later means it.
        self._force = False
        self._renewed_ns = self._host.now_ns()
        self._fence = outcome.fence
        return outcome.fence

    def _put(self, page: ControlPage, encoded: codec.Encoded) -> Published:
        fence = self._lead(page)
        done = publication.publish(page, encoded, fence, self._member.owner, self._settings.max_bytes)
        if done.result is Result.DROPPED:
            raise RefusedError("another process has published meanwhile", remedy="try again")
        self._tended = signature(page.directory.snapshot_path)
        return Published(
            generation=done.position.generation,
            flags=encoded.flag_count,
            cohorts=encoded.cohort_count,
            size=HEADER_BYTES + encoded.size,
            changed=done.result is Result.PUBLISHED,
        )


def look(path: str) -> Signature | None:
    """None if there is no file. A link is followed: Kubernetes replaces files by moving links."""
    try:
        return Signature.of(os.stat(path))
    except OSError:
        return None


def follow(
    publisher: LocalPublisher,
    path: str,
    published: Signature | None,
    say: Callable[[str], None],
    done: Callable[[Published], None],
    sleep: Callable[[float], None],
) -> NoReturn:
    """Publish the file whenever it changes, for ever; `published` is the look at what was published.

    A change is taken up when two looks agree, as an editor may be half-way. `say` takes a sentence
    about what cannot be published, which leaves what is published as it is. Raises `RefusedError`
    if another process takes the lease.
    """
    last = seen = published
    said = ""
    while True:
        sleep(LOOK_S)
        problem = ""
        published_now: Published | None = None
        before, seen = seen, look(path)
        try:
            publisher.keep()
            if seen == last or seen != before:
                continue
            if seen is None:
                last, problem = None, f"{path} is gone"
            else:
                published_now = publisher.publish(read_definitions(path))
                last, said = seen, ""
        except RefusedError:
            raise
        except InvalidDefinitionsError as error:
            last, problem = seen, str(error)
        except (OSError, ShmFlagsError) as error:
            problem = str(error)  # Tried again at the next look.
        # Here: that it cannot be told is no reason to publish it again.
        if published_now is not None:
            done(published_now)
        if problem and problem != said:
            said = problem
            say(f"{problem}: what was published before stays")
