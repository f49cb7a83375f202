"""What a server does to a worker that the SDK's threads do not survive, in words for the log.

uWSGI forks its workers in C. Unless it is told to, it does not run Python's fork hooks in them, by
which the SDK's poller and our watcher start again; a client that was loaded before the fork then keeps
its flags for ever, and nothing of ours is ever called there. And without `enable-threads` it lets
threads run only while a request is handled, so a leader may stop at any point between two requests.
Its options can be read, so the process that makes the cache says it, before there are workers.

gevent replaces what stands in `threading`. Locks and thread-local state that were made before then take
all greenlets of a thread for one, in the SDK (whose requests fail with "Cannot switch to a different
thread") as here.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

_local_at_import = threading.local


def objection() -> str:
    """What is wrong with the server that runs this process, and what to do; "" if nothing is known."""
    uwsgi = sys.modules.get("uwsgi")
    if uwsgi is not None:
        return _uwsgi_objection(uwsgi)
    if threading.local is not _local_at_import:
        return (
            "threads were monkey-patched after shmflags was imported, so greenlets cannot be told "
            "apart; patch first, in gunicorn's configuration file if the master imports shmflags"
        )
    return ""


def _uwsgi_objection(uwsgi: Any) -> str:
    try:
        worker, options = uwsgi.worker_id(), uwsgi.opt
        will_fork = worker == 0 and (uwsgi.numproc > 1 or _is_on(options, "master"))
        has_threads = _is_on(options, "enable-threads") or _is_on(options, "gevent")
        has_threads = has_threads or _number(options, "threads") > 1
        has_hooks = _is_on(options, "py-call-uwsgi-fork-hooks") or _is_on(
            options, "py-call-osafterfork"
        )
    except (AttributeError, TypeError, ValueError):
        return ""  # Something else of that name.
    wrong = []
    # One of the workers says it for all.
    if worker <= 1 and not has_threads:
        wrong.append(
            "without enable-threads, flags are polled for only while a request is handled; set "
            "enable-threads = true"
        )
    if will_fork and not has_hooks:
        wrong.append(
            "its workers do not run Python's fork hooks, so the SDK does not poll in them if it did "
            "before the fork; set py-call-uwsgi-fork-hooks = true or lazy-apps = true"
        )
    return "uWSGI: " + "; and ".join(wrong) if wrong else ""


def _is_on(options: dict[str, Any], name: str) -> bool:
    return options.get(name, False) not in (False, None, b"0", b"false", b"off", b"no")


def _number(options: dict[str, Any], name: str) -> int:
    return int(options.get(name) or 0)
