"""What a server does to a worker that the SDK's threads do not survive, in words for the log.

uWSGI forks its workers in C. Unless it is told to, it does not run Python's fork hooks in them, by
which the SDK's poller and our watcher start again; a client that was loaded before the fork then keeps
its flags for ever, and nothing of ours is ever called there. Nor does it take the GIL: a worker that is
forked while another thread of the master holds it, waits for it for ever. And without `enable-threads`
threads run only while a request is handled, so a leader may stop at any point between two requests.
The options can be read, so the process that makes the cache says it, before there are workers.

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


def forks_without_hooks() -> bool:
    """Whether this process will be forked so that no thread of ours should run in it until then."""
    uwsgi = sys.modules.get("uwsgi")
    return uwsgi is not None and _forks_without_hooks(uwsgi)


def _uwsgi_objection(uwsgi: Any) -> str:
    wrong = []
    if _lacks_threads(uwsgi):
        wrong.append(
            "without enable-threads, flags are polled for only while a request is handled; set "
            "enable-threads = true"
        )
    if _forks_without_hooks(uwsgi):
        wrong.append(
            "its workers do not run Python's fork hooks, so the SDK does not poll in them if it did "
            "before the fork, and they may hang; set py-call-uwsgi-fork-hooks = true or lazy-apps = true"
        )
    return "uWSGI: " + "; and ".join(wrong) if wrong else ""


def _lacks_threads(uwsgi: Any) -> bool:
    try:
        if uwsgi.worker_id() > 1:
            return False  # The first of the workers says it for all.
        options = uwsgi.opt
        has_threads = _is_on(options, "enable-threads") or int(options.get("threads") or 0) > 1
        return not (has_threads or _is_on(options, "gevent"))
    except (AttributeError, TypeError, ValueError):
        return False  # Something else of that name.


def _forks_without_hooks(uwsgi: Any) -> bool:
    try:
        if uwsgi.worker_id() != 0:
            return False
        options = uwsgi.opt
        will_fork = uwsgi.numproc > 1 or _is_on(options, "master")
        has_hooks = _is_on(options, "py-call-uwsgi-fork-hooks")
        return will_fork and not (has_hooks or _is_on(options, "py-call-osafterfork"))
    except (AttributeError, TypeError):
        return False


def _is_on(options: dict[str, Any], name: str) -> bool:
    return options.get(name, False) not in {False, None, b"0", b"false", b"off", b"no"}
