# gunicorn.conf.py
import os

import posthog

from shmflags import SharedMemoryFlagCache

POLL_INTERVAL_S = float(os.environ.get("POSTHOG_POLL_INTERVAL", "30"))


def post_fork(server, worker):
    cache = SharedMemoryFlagCache("my-service", poll_interval=POLL_INTERVAL_S)
    posthog.default_client = posthog.Posthog(
        os.environ["POSTHOG_PROJECT_API_KEY"],
        secret_key=os.environ["POSTHOG_SECRET_KEY"],
        host=os.environ["POSTHOG_HOST"],
        poll_interval=POLL_INTERVAL_S,
        flag_definition_cache_provider=cache,
    )
    cache.attach(posthog.default_client)


def worker_exit(server, worker):
    posthog.shutdown()
