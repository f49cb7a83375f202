"""What the PostHog client looks like from here. Nobody else knows its attributes.

    feature_flags           the list it evaluates from; None until the first load
    poll_interval           seconds between its polls
    _flags_etag             the ETag it sends with its next request
    _flag_definition_publication_lock
                            held while it installs a list of flags with its ETag
    _load_feature_flags()   one poll: it asks the provider, and fetches if it is told to
    _flag_definition_cache_provider

Seen in posthog 7.91. A client without them is refused by `attach`, loudly and at start-up.
"""

from __future__ import annotations

import weakref
from typing import Any

_NEEDED = (
    "feature_flags",
    "poll_interval",
    "_flags_etag",
    "_flag_definition_publication_lock",
    "_load_feature_flags",
    "_flag_definition_cache_provider",
)


class Attachment:
    """A client, held weakly."""

    def __init__(self, client: Any, provider: object) -> None:
        """Raises `TypeError` if this is no such client, `ValueError` if it has another provider."""
        missing = [name for name in _NEEDED if not hasattr(client, name)]
        if missing:
            raise TypeError(
                f"attach() takes a posthog.Posthog client; {type(client).__name__} object lacks "
                f"{', '.join(missing)}"
            )
        if client._flag_definition_cache_provider is not provider:
            raise ValueError(
                "attach() takes the client that was made with "
                "flag_definition_cache_provider=<this cache>; this one was not"
            )
        self._client = weakref.ref(client)

    @property
    def is_live(self) -> bool:
        return self._client() is not None

    def is_client(self, client: object) -> bool:
        return self._client() is client

    def differs_from(self, interval_s: float) -> str:
        """What is wrong if the client does not poll every `interval_s` seconds; else nothing."""
        client = self._client()
        told_s = interval_s if client is None else float(client.poll_interval)
        if abs(told_s - interval_s) <= 0.01 * interval_s:
            return ""
        return (
            f"the client polls every {told_s:g} s, the cache was told {interval_s:g} s; "
            "give both the same"
        )

    def holds(self, flags: list[Any]) -> bool:
        """Whether the client evaluates from this very list, and it is not empty."""
        client = self._client()
        return client is not None and bool(flags) and client.feature_flags is flags

    def evaluates(self, flags: list[Any]) -> bool:
        """Whether the client evaluates from this very list, or has none as there are none."""
        client = self._client()
        if client is None or client.feature_flags is None:
            return False
        return client.feature_flags is flags or not (flags or client.feature_flags)

    @property
    def is_loaded(self) -> bool:
        """Whether the client has loaded flags, be they none."""
        client = self._client()
        return client is not None and client.feature_flags is not None

    def etag_of(self, flags: object) -> str:
        """The API's ETag for this very list, which the client has just received; "" if it is not known."""
        client = self._client()
        if client is None:
            return ""
        # In this order: had another thread's fetch brought the ETag, its flags were installed before.
        etag = client._flags_etag
        return etag if isinstance(etag, str) and client.feature_flags is flags else ""

    def lend_etag(self, flags: list[Any], etag: str) -> bool:
        """Have the client ask whether this very list, which it has, is current; False if it has another.

        With its lock, or a fetch that ends just now would leave other flags with this ETag.
        """
        client = self._client()
        if client is None or not client._flag_definition_publication_lock.acquire(blocking=False):
            return False
        try:
            if not flags or client.feature_flags is not flags:
                return False
            client._flags_etag = etag
            return True
        finally:
            client._flag_definition_publication_lock.release()

    def clear_etag(self) -> None:
        """Make the client's next request ask for a full answer."""
        client = self._client()
        if client is not None:
            client._flags_etag = None

    def reload(self) -> None:
        """Have the client poll now, unless it has never loaded: then its first use will."""
        client = self._client()
        if client is not None and client.feature_flags is not None:
            client._load_feature_flags()
