"""A pool as in the recipe, by any start method, whose processes answer until they are told to stop.

python -m tests.servers.pool_worker METHOD
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from pathlib import Path

logging.basicConfig(level=logging.INFO)

import flags  # noqa: E402

from tests.servers.answers import keep_answering  # noqa: E402
from tests.servers.running import WORKERS  # noqa: E402

ANSWERS = Path.cwd() / "answers"


def work(_number: int) -> None:
    keep_answering(flags.client, ANSWERS)


def main() -> None:
    context = multiprocessing.get_context(sys.argv[1])
    if os.environ.get("SERVERS_PRELOAD"):
        context.set_forkserver_preload(["flags"])
    if os.environ.get("SERVERS_LOAD"):
        flags.client.load_feature_flags()
    ANSWERS.mkdir()
    with context.Pool(WORKERS) as pool:
        # A process is busy until the end, so each gets one.
        pool.map(work, range(WORKERS), chunksize=1)
        pool.close()
        pool.join()


if __name__ == "__main__":
    main()
