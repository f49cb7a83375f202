"""The client as the cache sees it: which list it evaluates from, and that it is held weakly."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from posthog import Posthog

from shmflags import SharedMemoryFlagCache
from shmflags.attachment import Attachment

FLAGS = [{"key": "one"}]


@pytest.fixture
def provider(directory: Path) -> SharedMemoryFlagCache:
    return SharedMemoryFlagCache("test", directory=directory)


@pytest.fixture
def client(provider: SharedMemoryFlagCache) -> Iterator[Posthog]:
    made = client_of(provider)
    yield made
    made.shutdown()


def client_of(provider: SharedMemoryFlagCache) -> Posthog:
    return Posthog(
        "phc_test", host="http://127.0.0.1:9", send=False, flag_definition_cache_provider=provider
    )


@pytest.mark.parametrize(
    ("has", "asked", "evaluates", "holds"),
    [
        (FLAGS, FLAGS, True, True),
        (FLAGS, [*FLAGS], False, False),
        ([], [], True, False),
        ([], FLAGS, False, False),
        (FLAGS, [], False, False),
        (None, FLAGS, False, False),
        (None, [], False, False),
    ],
    ids=["that", "equal", "both empty", "it was emptied", "others", "not loaded", "nor are there any"],
)
def test_which_flags_the_client_evaluates(
    provider: SharedMemoryFlagCache,
    client: Posthog,
    has: list[Any] | None,
    asked: list[Any],
    evaluates: bool,
    holds: bool,
) -> None:
    """It evaluates from a list if it has that very one, or if there are no flags; it holds none that is empty."""
    attachment = Attachment(client, provider)
    if has is not None:
        client.feature_flags = has
    assert attachment.evaluates(asked) is evaluates
    assert attachment.holds(asked) is holds


def test_the_etag_of_what_was_received(provider: SharedMemoryFlagCache, client: Posthog) -> None:
    """It is the client's, as long as the client has that very list; else it may be that of another."""
    attachment = Attachment(client, provider)
    assert not attachment.is_loaded
    client.feature_flags = FLAGS
    assert attachment.is_loaded
    assert attachment.etag_of(FLAGS) == ""
    client._flags_etag = '"1"'
    assert attachment.etag_of(FLAGS) == '"1"'
    assert attachment.etag_of([*FLAGS]) == ""
    assert attachment.etag_of(None) == ""


@pytest.mark.parametrize(
    ("has", "flags", "lent"),
    [(FLAGS, FLAGS, True), ([*FLAGS], FLAGS, False), (None, FLAGS, False), ([], [], False)],
    ids=["that", "equal", "not loaded", "none"],
)
def test_an_etag_is_lent_for_the_very_list(
    provider: SharedMemoryFlagCache, client: Posthog, has: Any, flags: list[Any], lent: bool
) -> None:
    """The client asks with it only if it evaluates from that very list, and there are flags in it."""
    attachment = Attachment(client, provider)
    client.feature_flags = has
    assert attachment.lend_etag(flags, '"1"') is lent
    assert client._flags_etag == ('"1"' if lent else None)


def test_an_etag_is_not_lent_while_the_client_installs_others(
    provider: SharedMemoryFlagCache, client: Posthog
) -> None:
    """Whoever installs flags with their ETag at this moment is not waited for, and not disturbed."""
    attachment = Attachment(client, provider)
    client.feature_flags = FLAGS
    with client._flag_definition_publication_lock:
        lent = ThreadPoolExecutor().submit(attachment.lend_etag, FLAGS, '"1"').result(60)
    assert not lent
    assert client._flags_etag is None
    assert attachment.lend_etag(FLAGS, '"1"')


def test_a_client_that_is_gone(provider: SharedMemoryFlagCache) -> None:
    """Being attached keeps no client alive, and one that is gone evaluates nothing and is asked for nothing."""
    client = client_of(provider)
    attachment = Attachment(client, provider)
    client.feature_flags = FLAGS
    assert attachment.is_live
    client.shutdown()
    del client
    gc.collect()
    assert not attachment.is_live
    assert not attachment.evaluates(FLAGS)
    assert not attachment.evaluates([])
    assert not attachment.holds(FLAGS)
    assert attachment.differs_from(1.0) == ""
    assert not attachment.is_loaded
    assert attachment.etag_of(FLAGS) == ""
    assert not attachment.lend_etag(FLAGS, '"1"')
    attachment.clear_etag()
    attachment.reload()
