"""The provider protocol of PostHog's SDKs, and a check for it.

The protocol is `posthog.flag_definition_cache.FlagDefinitionCacheProvider`; it is written out
here so that the package imports without posthog. `validate_provider` is the Ruby SDK's
`validate!`. `Exchange` is what an upstream of ours answers that has more than the protocol's methods.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

PROVIDER_METHODS = (
    "get_flag_definitions",
    "should_fetch_flag_definitions",
    "on_flag_definitions_received",
    "shutdown",
)

Definitions = dict[str, Any]
"""What the SDK fetches: `flags` (list of dict), `group_type_mapping` (dict), `cohorts` (dict),
and whatever else the API adds."""


class FlagDefinitionCacheProvider(Protocol):
    """The four methods the SDK calls; each may be a plain function or a coroutine function."""

    def get_flag_definitions(self) -> Any: ...

    def should_fetch_flag_definitions(self) -> Any: ...

    def on_flag_definitions_received(self, data: Any) -> Any: ...

    def shutdown(self) -> Any: ...


def validate_provider(provider: object) -> None:
    """Raise `TypeError` naming every one of the four methods that `provider` lacks."""
    missing = [name for name in PROVIDER_METHODS if not callable(getattr(provider, name, None))]
    if missing:
        raise TypeError(
            f"{type(provider).__name__} object is not a flag definition cache provider: it lacks "
            f"{', '.join(name + '()' for name in missing)}; a provider has all of "
            f"{', '.join(name + '()' for name in PROVIDER_METHODS)}"
        )


NO_DIGEST = b""
"""In an `Exchange`: there is nothing that could have a digest."""


class Exchange(NamedTuple):
    """What an upstream answered, in one call (see upstream.py).

    `digest` is the content digest of what it has, `NO_DIGEST` if it has nothing, None if that is not
    known; then it is taken from `definitions`, if there are any.
    """

    fetch: bool
    definitions: object | None = None
    digest: bytes | None = None

    @property
    def is_empty(self) -> bool:
        """Told not to fetch, and there is nothing."""
        return not self.fetch and self.definitions is None
