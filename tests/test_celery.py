"""Celery's prefork pool, started for real, with a broker of files."""

from __future__ import annotations

import re
import sys

import pytest

from tests.servers.running import WORKERS, Running, Site, check_busy_workers, stop_answering


def start(site: Site, *arguments: str, **environment: str) -> Running:
    return site.start(
        *(sys.executable, "-m", "celery", "--app", "tests.servers.celery_worker", "worker"),
        *("--pool", "prefork", "--concurrency", str(WORKERS), *arguments),
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
        **environment,
    )


@pytest.mark.parametrize("loaded", ["", "1"], ids=["created", "loaded"])
def test_the_recipe(site: Site, loaded: str) -> None:
    """Processes whose parent made the client, and loaded it or not, make the requests of one."""
    check_busy_workers(start(site, SERVERS_LOAD=loaded))


def test_the_leader_hands_over(site: Site) -> None:
    """At a warm shutdown the process that leads makes way; one that then leads does so in its turn."""
    server = start(site)
    check_busy_workers(server)
    stop_answering(server)
    server.stop()
    assert server.process.returncode == 0
    terms = [re.search(r"term (\d+)", line) for line in server.logged("yielded: shut down")]
    assert [int(term[1]) for term in terms if term] == list(range(1, len(terms) + 1)) != []
