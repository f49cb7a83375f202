"""Definitions loaded before the fork are shared: a real gunicorn, memory as the kernel counts it."""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from bench.data import make
from tests.servers.running import RECIPES, WORKERS, Running, Site
from tests.support import WAIT_S

FLAGS = 5000
KEYS = 20
LIMIT_BYTES = 4_000_000

# Three polls, ten evaluations each of twenty flags by their keys; then all of them at once.
APPLICATION = """
import gc, json, os, warnings

import flags

KEYS = os.environ["KEYS"].split()
warnings.simplefilter("ignore", DeprecationWarning)


def own_bytes():
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith("Private_"))


def work():
    client = flags.client
    if client.feature_flags is None:
        client.load_feature_flags()
    polls = []
    for _ in range(3):
        before = client.feature_flags
        client._load_feature_flags()
        polls.append(client.feature_flags is before)
    for _ in range(10):
        for key in KEYS:
            client.get_feature_flag(
                key, "somebody", only_evaluate_locally=True, send_feature_flag_events=False
            )
    gc.collect()  # as happens in any worker, sooner or later
    by_key = own_bytes()
    client.evaluate_flags("somebody", flag_keys=KEYS, only_evaluate_locally=True)
    return {"unchanged": all(polls), "flags": len(client.feature_flags), "by_key": by_key,
            "together": own_bytes()}


done = None


def application(environ, start_response):
    global done
    if done is None:
        done = work()
    body = json.dumps({"pid": os.getpid(), **done}).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
"""


@dataclass(frozen=True)
class Own:
    """Bytes that a worker of gunicorn shares with nobody, the median of all workers."""

    by_key: float
    together: float

    def __sub__(self, other: Own) -> Own:
        return Own(self.by_key - other.by_key, self.together - other.together)


def own_memory(flag_count: int, recipe: str) -> Own:
    """Start gunicorn with a recipe, let each worker poll and evaluate, and see what it has for itself."""
    data = make(flag_count)
    keys = [one["key"] for one in data["flags"]][:: flag_count // KEYS][:KEYS]
    with Site() as site:
        site.api.set_definitions(data)
        (site.home / "app.py").write_text(APPLICATION)
        (site.home / "gunicorn.conf.py").write_text((RECIPES / recipe).read_text() if recipe else "")
        server = site.start(
            *(sys.executable, "-m", "gunicorn", "--bind", f"unix:{site.socket}"),
            *("--workers", str(WORKERS), "--worker-tmp-dir", str(site.home), "app"),
            KEYS=" ".join(keys),
            POSTHOG_POLL_INTERVAL="30",
        )
        answers = _ask_each_worker(site, server)
        assert {answer["flags"] for answer in answers} == {flag_count}
        assert all(answer["unchanged"] for answer in answers)
        assert site.api.count == 1, server.log
        for answer in answers:
            # The kernel's account and psutil's are one.
            seen = psutil.Process(answer["pid"]).memory_full_info().uss
            assert abs(seen - answer["together"]) < 2_000_000
        server.stop()
        return Own(
            statistics.median(answer["by_key"] for answer in answers),
            statistics.median(answer["together"] for answer in answers),
        )


def _ask_each_worker(site: Site, server: Running) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}

    def asked() -> bool:
        # At once, so that they go to different workers.
        with ThreadPoolExecutor(WORKERS) as threads:
            for answer in threads.map(lambda _: _ask(site), range(WORKERS)):
                if answer is not None:
                    found[answer["pid"]] = answer
        return len(found) == WORKERS

    server.wait_until(asked, "each worker has answered")
    return list(found.values())


def _ask(site: Site) -> dict[str, Any] | None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(WAIT_S)
        try:
            connection.connect(os.fspath(site.socket))
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            text = b"".join(iter(lambda: connection.recv(4096), b""))
        except OSError:
            return None  # It does not listen yet.
    head, _, body = text.partition(b"\r\n\r\n")
    assert b" 200 " in head, text.decode()
    answer: dict[str, Any] = json.loads(body)
    return answer


@pytest.mark.long
def test_flags_loaded_before_the_fork_are_shared() -> None:
    """5,000 flags add less than 4 MB to each worker of the recipe, and several times that without it.

    That is with flags evaluated by key. `evaluate_flags` goes through all flags, and so copies a part.
    """
    nothing = own_memory(KEYS, "gunicorn_memory.py")
    shared = own_memory(FLAGS, "gunicorn_memory.py")
    alone = own_memory(FLAGS, "") - own_memory(KEYS, "")
    added = shared - nothing
    assert added.by_key < LIMIT_BYTES
    assert alone.by_key > 4 * LIMIT_BYTES
    assert added.together < alone.together
