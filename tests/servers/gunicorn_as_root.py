"""gunicorn, with all that its workers use imported by root.

Where Python is installed for root alone, the workers' user could import nothing.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401  # for host names, at the first request

import filelock  # noqa: F401
from gunicorn.app.wsgiapp import run

import tests.servers.wsgi_global  # noqa: F401

run()
