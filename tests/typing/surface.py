"""The public surface as users write it. Checked by mypy, never run."""

from __future__ import annotations

from pathlib import Path

from posthog import Posthog
from posthog.flag_definition_cache import FlagDefinitionCacheProvider

from shmflags import SharedMemoryFlagCache, ShmFlagsError, UnsafePathError, validate_provider

cache = SharedMemoryFlagCache("my-service")
everything = SharedMemoryFlagCache(
    "my-service",
    directory=Path("/run/my-service"),
    poll_interval=30,
    cold_start_timeout=5.0,
    lease_ttl=None,
    max_term=600,
    role="reader",
    upstream=cache,
    max_bytes=1 << 20,
)

provider: FlagDefinitionCacheProvider = cache
client = Posthog("phc_key", secret_key="phx_key", flag_definition_cache_provider=cache)
cache.attach(client)
cache.attach(client, watch=False, interval=0.1)

watcher = cache.watch(lambda: None, interval=0.05)
watcher.stop()

should: bool = cache.should_fetch_flag_definitions()
cache.shutdown()
validate_provider(provider)


def explain(error: ShmFlagsError) -> tuple[str | None, str, str]:
    """Each error has a path, a reason and a remedy."""
    if isinstance(error, UnsafePathError):
        return error.path, error.reason, error.remedy
    return None, str(error), ""
