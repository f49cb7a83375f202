"""The client as the cache sees it: which list it evaluates from, and that it is held weakly."""

from __future__ import annotations

import gc
from collections.abc import Iterator
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
    attachment.clear_etag()
    attachment.reload()
