"""The constructor's arguments, checked: a wrong one says what was given and what is allowed."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

from shmflags.contract import validate_provider
from shmflags.errors import UnsupportedPlatformError

_LONGEST_S = 7 * 24 * 3600.0
_NS = 1_000_000_000
ROLES = ("auto", "reader")


class Settings(NamedTuple):
    """Checked arguments; times in ns."""

    service_key: str
    directory: str | None
    interval_ns: int
    cold_start_ns: int
    lease_ns: int
    max_term_ns: int
    max_bytes: int
    electable: bool


def check(
    service_key: object,
    directory: object,
    max_bytes: object,
    poll_interval: object,
    cold_start_timeout: object,
    lease_ttl: object = None,
    max_term: object = None,
    role: object = "auto",
    upstream: object = None,
) -> Settings:
    """Raise `TypeError` or `ValueError` naming argument, value and what is allowed."""
    if sys.platform == "win32":
        raise UnsupportedPlatformError(
            "shmflags needs fork, flock and shared mappings, which Windows does not have",
            remedy="use PostHog's Redis example there, or no cache",
        )
    if not isinstance(service_key, str):
        raise TypeError(f"service_key must be a non-empty str, not {service_key!r}")
    if not service_key:
        raise ValueError("service_key must be a non-empty str, not ''")
    if directory is not None:
        if not isinstance(directory, (str, os.PathLike)):
            raise TypeError(f"directory must be None, a str or a path, not {directory!r}")
        directory = os.fspath(directory)
        if not isinstance(directory, str) or not directory or "\0" in directory:
            raise ValueError(f"directory must name a directory, not {directory!r}")
    interval = seconds("poll_interval", poll_interval, at_least=0.001)
    cold_start = seconds("cold_start_timeout", cold_start_timeout, at_least=0.0)
    if lease_ttl is None:
        lease = max(3 * interval, 45.0)
    else:
        lease = seconds("lease_ttl", lease_ttl, above=interval, note=" (the poll_interval)")
    if max_term is None:
        term = 60 * interval
    else:
        term = seconds("max_term", max_term, above=0.0)
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(map(repr, ROLES))}, not {role!r}")
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
        raise TypeError(f"max_bytes must be an int, not {max_bytes!r}")
    if not 1024 <= max_bytes <= 1 << 40:
        raise ValueError(f"max_bytes must be 1024 to {1 << 40}, not {max_bytes!r}")
    if upstream is not None:
        try:
            validate_provider(upstream)
        except TypeError as error:
            raise TypeError(f"upstream: {error}") from None
    return Settings(
        service_key=service_key,
        directory=directory,
        interval_ns=int(interval * _NS),
        cold_start_ns=int(cold_start * _NS),
        lease_ns=int(lease * _NS),
        max_term_ns=int(term * _NS),
        max_bytes=max_bytes,
        electable=role == "auto",
    )


def seconds(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    note: str = "",
) -> float:
    """`value` as seconds, or a `TypeError` or `ValueError` that says what is allowed."""
    bound = f"more than {above:g}{note}" if above is not None else f"at least {at_least:g}"
    allowed = f"a finite number of seconds, {bound} and at most {_LONGEST_S:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {allowed}, not {value!r}")
    fits = value <= _LONGEST_S  # False for NaN, as are those below.
    if above is not None:
        fits = fits and value > above
    if at_least is not None:
        fits = fits and value >= at_least
    if not fits:
        raise ValueError(f"{name} must be {allowed}, not {value!r}")
    return float(value)
