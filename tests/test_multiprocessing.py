"""multiprocessing's pools, by each start method."""

from __future__ import annotations

import ast
import sys

import pytest

from tests.servers.running import RECIPES, WORKERS, Site, check_busy_workers, stop_answering


@pytest.mark.parametrize(
    ("method", "environment"),
    [
        pytest.param("fork", {}, marks=pytest.mark.thorough),
        ("fork", {"SERVERS_LOAD": "1"}),
        pytest.param("forkserver", {}, marks=pytest.mark.thorough),
        ("forkserver", {"SERVERS_PRELOAD": "1"}),
        ("spawn", {}),
    ],
    ids=["fork-created", "fork-loaded", "forkserver", "forkserver-preloaded", "spawn"],
)
def test_a_pool(site: Site, method: str, environment: dict[str, str]) -> None:
    """The processes of a pool make the requests of one, however they are started."""
    server = site.start(sys.executable, "-m", "tests.servers.pool_worker", method, **environment)
    check_busy_workers(server)
    stop_answering(server)
    server.wait()
    assert server.process.returncode == 0, server.log


def test_the_recipe(site: Site) -> None:
    """The README's pool computes what it is to compute, with one full request."""
    server = site.start(sys.executable, str(RECIPES / "pool.py"))
    server.wait()
    assert server.process.returncode == 0, server.log
    assert ast.literal_eval(server.log.splitlines()[-1]) == [90] * WORKERS
    assert site.api.full == 1
    assert site.api.remote_evaluations == 0
