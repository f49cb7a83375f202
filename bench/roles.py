"""Called in measuring processes: whoever publishes, whoever reads, and the clock."""

from __future__ import annotations

import gc
import json
import logging
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench import contestants, data

_GRANT_PATIENCE_S = 30.0
LONG_S = 3600.0
"""A poll interval within which nothing falls due."""


@dataclass
class _Here:
    """What this process has, from one call to the next."""

    provider: Any = None
    variants: list[dict[str, Any]] = field(default_factory=list)
    client: Any = None
    held: Any = None
    told_to_fetch_s: float = 0.0  # CLOCK_MONOTONIC


_here = _Here()


def _mean_time(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def open_provider(contestant: str, place: dict[str, str], poll_interval_s: float = LONG_S) -> None:
    """Make this process's provider."""
    use_provider(contestants.make(contestant, place, poll_interval_s))


def use_provider(provider: Any) -> None:
    """Have this process's client ask this provider; None for the SDK alone."""
    _here.provider = provider
    if provider is not None:
        _note_answers(provider)


def _note_answers(provider: Any) -> None:
    ask = provider.should_fetch_flag_definitions

    def noting() -> bool:
        answer: bool = ask()
        if answer:
            _here.told_to_fetch_s = time.monotonic()
        return answer

    provider.should_fetch_flag_definitions = noting


def last_told_to_fetch() -> float:
    """When our provider last answered that we should fetch, CLOCK_MONOTONIC; 0 if never."""
    return _here.told_to_fetch_s


def publish_first(flags: int) -> None:
    """Lead, and publish definitions with so many flags. Raises `RuntimeError` if somebody else leads."""
    _wait_for_grant()
    _here.provider.on_flag_definitions_received(data.make(flags))


def publish(definitions: dict[str, Any]) -> float:
    """Publish when a fetch is due; when that began, CLOCK_MONOTONIC in seconds."""
    _wait_for_grant()
    start_s = time.monotonic()
    _here.provider.on_flag_definitions_received(definitions)
    return start_s


def prepare_variants(flags: int) -> None:
    """Have two answers of the API at hand: what `publish_first` published, and that with one flag changed.

    The first is published next in rounds of even numbers, the second in those of odd ones, such as -1.
    """
    _here.variants[:] = [data.make(flags), data.change_one_flag(data.make(flags), 1)]
    gc.collect()


def publish_variant(number: int) -> float:
    """Publish one of them; the seconds that the provider's call took."""
    _wait_for_grant()
    variant = _here.variants[number % len(_here.variants)]
    start = time.perf_counter()
    _here.provider.on_flag_definitions_received(variant)
    return time.perf_counter() - start


def dump_variant(number: int) -> float:
    """The seconds that `json.dumps` alone takes for one of them."""
    variant = _here.variants[number % len(_here.variants)]
    start = time.perf_counter()
    text = json.dumps(variant)
    seconds = time.perf_counter() - start
    del text  # Freed outside of the time.
    return seconds


def follow(flags: int) -> None:
    """Read as a follower, once. Raises `RuntimeError` if that is not what we are, or it is wrong."""
    if _here.provider.should_fetch_flag_definitions():
        raise RuntimeError("this process was to follow, and is told to fetch")
    _here.held = _here.provider.get_flag_definitions()
    if _here.held is None or len(_here.held["flags"]) != flags:
        raise RuntimeError("the follower did not get what was published")


def timed_read() -> float:
    """The seconds that `get_flag_definitions` takes; what was read before is freed afterwards."""
    start = time.perf_counter()
    found = _here.provider.get_flag_definitions()
    seconds = time.perf_counter() - start
    if found is None or found == _here.held:
        raise RuntimeError("there was to be something new to read")
    _here.held = found
    return seconds


def timed_first_read(flags: int) -> float:
    """The same for the first read of a process that has polled once and knows that it follows."""
    import posthog  # As in any worker: its objects are what the collector walks through.

    if posthog and _here.provider.should_fetch_flag_definitions():
        raise RuntimeError("this process was to follow, and is told to fetch")
    start = time.perf_counter()
    found = _here.provider.get_flag_definitions()
    seconds = time.perf_counter() - start
    if found is None or len(found["flags"]) != flags:
        raise RuntimeError("the first read did not bring what was published")
    return seconds


def time_calls(calls: int) -> float:
    """Seconds per poll that the provider's two calls take while nothing changes, the mean of some."""

    def poll() -> None:
        if _here.provider.should_fetch_flag_definitions():
            raise RuntimeError("no fetch was to be due")
        _here.provider.get_flag_definitions()

    return _mean_time(poll, calls)


def open_client(
    url: str, flags: int, *, poll_interval_s: float = LONG_S, attach: bool = True, watch: bool = True
) -> None:
    """Make a client with this process's provider, and load its flags."""
    from posthog import Posthog

    logging.getLogger("posthog").setLevel(logging.ERROR)
    _here.client = Posthog(
        "phc_bench",
        secret_key="phx_bench",
        host=url,
        poll_interval=poll_interval_s,
        flag_definition_cache_provider=_here.provider,
        sync_mode=True,
    )
    if attach and hasattr(_here.provider, "attach"):
        _here.provider.attach(_here.client, watch=watch)
    _here.client.load_feature_flags()
    if len(_here.client.feature_flags or []) != flags:
        raise RuntimeError("the client did not load what was published")


def time_client_polls(calls: int) -> float:
    """Seconds per poll of the SDK, `_load_feature_flags`, while nothing changes, the mean of some."""
    return _mean_time(_here.client._load_feature_flags, calls)


def timed_changed_poll() -> float:
    """Seconds of a poll of the SDK that finds another version of the definitions."""
    before = _here.client.feature_flags
    start = time.perf_counter()
    _here.client._load_feature_flags()
    seconds = time.perf_counter() - start
    if _here.client.feature_flags is before:
        raise RuntimeError("there was to be something new to load")
    return seconds


def start_worker(
    contestant: str,
    place: dict[str, str],
    poll_interval_s: float,
    url: str,
    flags: int,
    key: str,
    within_s: float = 0.0,
) -> float:
    """Seconds from nothing but imports to the first evaluation, as in a worker that starts.

    It starts at some time `within_s` seconds: pollers are rarely in step.
    """
    time.sleep(random.uniform(0, within_s))
    start = time.perf_counter()
    open_provider(contestant, place, poll_interval_s)
    open_client(url, flags, poll_interval_s=poll_interval_s)
    evaluate(key)
    return time.perf_counter() - start


def evaluate_first(key: str) -> float:
    """Seconds until the first evaluation in a worker whose client was loaded before the fork."""
    start = time.perf_counter()
    evaluate(key)
    return time.perf_counter() - start


def evaluate(key: str) -> None:
    """Evaluate a flag for somebody, locally. Raises `RuntimeError` if it is not known."""
    if key not in _here.client.feature_flags_by_key:
        raise RuntimeError(f"no definition of {key!r}")
    _here.client.get_feature_flag(
        key, "somebody", only_evaluate_locally=True, send_feature_flag_events=False
    )


def work(*, polls: int, rounds: int, keys: list[str], together: bool) -> int:
    """Poll, then evaluate the flags round after round; the bytes that are this process's own then.

    They are evaluated one by one, each looked up by its key, or `together`, by the SDK's `evaluate_flags`,
    which goes through all flags to pick them. A full collection follows, as in any worker sooner or later.
    """
    warnings.simplefilter("ignore", DeprecationWarning)
    for _ in range(polls):
        _here.client._load_feature_flags()
    for _ in range(rounds):
        if together:
            _here.client.evaluate_flags("somebody", flag_keys=keys, only_evaluate_locally=True)
        else:
            for key in keys:
                evaluate(key)
    gc.collect()
    return unique_set_size()


def unique_set_size() -> int:
    """Bytes of memory that would be free if this process ended: what it shares with nobody."""
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith("Private_"))


def see(key: str, name: str, timeout_s: float) -> float:
    """Wait until the flag has this name; when that was, CLOCK_MONOTONIC in seconds."""
    end = time.monotonic() + timeout_s
    while (now := time.monotonic()) < end:
        if _here.client.feature_flags_by_key[key]["name"] == name:
            return now
        time.sleep(0.004)
    raise RuntimeError(f"{key!r} was not to be seen as {name!r} within {timeout_s} s")


def _wait_for_grant() -> None:
    end = time.monotonic() + _GRANT_PATIENCE_S
    while not _here.provider.should_fetch_flag_definitions():
        if time.monotonic() > end:
            raise RuntimeError("this process was to publish, and is never told to fetch")
        time.sleep(0.002)
