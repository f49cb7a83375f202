"""`shmflags demo`: gunicorn's workers with the real SDK sharing one fetch, for everybody to watch.

`command` is the way in, `tour` the steps and the claims, `workers` gunicorn, `gunicorn_conf` and
`app` what runs in it, `server` the API.
"""

from __future__ import annotations

from shmflags.demo.command import add_arguments, main, run

__all__ = ["add_arguments", "main", "run"]
