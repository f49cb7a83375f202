"""The recipe's Celery application with a broker of files, and tasks that keep all its processes busy.

The worker sends itself as many tasks as it has processes; each answers until it is told to stop, so
that every process has exactly one.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from celery.signals import setup_logging, worker_ready

from tests.servers.answers import keep_answering

logging.basicConfig(level=logging.INFO)
setup_logging.connect(lambda **_: None, weak=False)  # or Celery would replace what stands above

import flags  # noqa: E402
from tasks import app, price  # noqa: E402

if os.environ.get("SERVERS_LOAD"):
    flags.client.load_feature_flags()

HOME = Path.cwd()
ANSWERS = HOME / "answers"
ANSWERS.mkdir(exist_ok=True)
for folder in ("queue", "control"):
    (HOME / folder).mkdir(exist_ok=True)

app.conf.update(
    broker_url="filesystem://",
    broker_transport_options={
        "data_folder_in": str(HOME / "queue"),
        "data_folder_out": str(HOME / "queue"),
        "control_folder": str(HOME / "control"),
    },
    worker_prefetch_multiplier=1,
)


@app.task
def answer() -> None:
    keep_answering(flags.client, ANSWERS)
    assert price.run("somebody") in (90, 100)


@worker_ready.connect
def send_tasks(sender: Any, **_: Any) -> None:
    for _number in range(sender.app.conf.worker_concurrency or 4):
        answer.delay()
