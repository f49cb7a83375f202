"""The README's gunicorn.conf.py, as the demo runs it.

What differs is that host and intervals come from the demo, which sets these variables.
"""

from __future__ import annotations

import os

import posthog

from shmflags import SharedMemoryFlagCache

POLL_INTERVAL_S = float(os.environ["SHMFLAGS_DEMO_POLL_INTERVAL"])


def post_fork(server: object, worker: object) -> None:
    cache = SharedMemoryFlagCache("shmflags-demo", poll_interval=POLL_INTERVAL_S)
    posthog.default_client = posthog.Posthog(
        os.environ["POSTHOG_PROJECT_API_KEY"],
        secret_key=os.environ["POSTHOG_SECRET_KEY"],
        host=os.environ["SHMFLAGS_DEMO_HOST"],
        poll_interval=POLL_INTERVAL_S,  # pyright: ignore[reportArgumentType]  # It takes any number.
        flag_definition_cache_provider=cache,
    )
    cache.attach(posthog.default_client)


def worker_exit(server: object, worker: object) -> None:
    posthog.shutdown()
