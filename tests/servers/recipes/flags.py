# flags.py
import os

from posthog import Posthog

from shmflags import SharedMemoryFlagCache

POLL_INTERVAL_S = float(os.environ.get("POSTHOG_POLL_INTERVAL", "30"))

cache = SharedMemoryFlagCache("my-service", poll_interval=POLL_INTERVAL_S)
client = Posthog(
    os.environ["POSTHOG_PROJECT_API_KEY"],
    secret_key=os.environ["POSTHOG_SECRET_KEY"],
    host=os.environ["POSTHOG_HOST"],
    poll_interval=POLL_INTERVAL_S,
    flag_definition_cache_provider=cache,
)
cache.attach(client)
