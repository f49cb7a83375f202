"""uvicorn with several workers, started for real."""

from __future__ import annotations

import sys

from tests.servers.running import WORKERS, Site, check_workers


def test_the_recipe(site: Site) -> None:
    """Workers that load the flags as they import the application make the requests of one."""
    server = site.start_http(
        *(sys.executable, "-m", "uvicorn", "--workers", str(WORKERS), "--uds", str(site.socket)),
        *("--lifespan", "off", "--no-access-log", "tests.servers.asgi_app:application"),
    )
    check_workers(server)
