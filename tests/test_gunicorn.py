"""gunicorn, started for real: one worker's requests, whatever the worker class and the preloading."""

from __future__ import annotations

import pwd
import signal
import sys
from collections import Counter

import psutil
import pytest

from tests.servers.answers import switched, values
from tests.servers.running import (
    INTERVAL_S,
    RECIPES,
    WORKERS,
    HttpServer,
    Site,
    check_requests,
    check_workers,
)
from tests.support import require_root

CLASSES = ["sync", "gthread", "gevent"]
GLOBAL = "tests.servers.wsgi_global:application"
IMPORTED = "tests.servers.wsgi:application"


def start(
    site: Site, recipes: list[str], *arguments: str, module: str = "gunicorn", **environment: str
) -> HttpServer:
    """gunicorn with the README's recipes, one after the other, as its gunicorn.conf.py."""
    texts = [(RECIPES / f"gunicorn_{name}.py").read_text() for name in recipes]
    (site.home / "gunicorn.conf.py").write_text("\n".join(texts))
    command = [
        *(sys.executable, "-m", module, "--bind", f"unix:{site.socket}"),
        *("--workers", str(WORKERS), "--worker-tmp-dir", str(site.home)),
    ]
    return site.start_http(*command, *arguments, **environment)


def recipes_for(worker_class: str, *recipes: str) -> list[str]:
    return ["gevent", *recipes] if worker_class == "gevent" else [*recipes]


@pytest.mark.parametrize("worker_class", CLASSES)
def test_the_recipe_with_post_fork(site: Site, worker_class: str) -> None:
    """Workers that make their clients in `post_fork` make the requests of one."""
    server = start(site, recipes_for(worker_class, "post_fork"), "--worker-class", worker_class, GLOBAL)
    check_workers(server)


@pytest.mark.parametrize("worker_class", CLASSES)
def test_a_client_made_where_the_application_is_imported(site: Site, worker_class: str) -> None:
    """Workers that each import flags.py make the requests of one."""
    server = start(site, recipes_for(worker_class), "--worker-class", worker_class, IMPORTED)
    check_workers(server)


@pytest.mark.parametrize("loaded", ["", "1"], ids=["created", "loaded"])
@pytest.mark.parametrize("worker_class", CLASSES)
def test_the_recipe_with_preload(site: Site, worker_class: str, loaded: str) -> None:
    """Workers whose master made the client, and loaded it or not, make the requests of one."""
    recipes = recipes_for(worker_class, "preload")
    server = start(site, recipes, "--worker-class", worker_class, IMPORTED, SERVERS_LOAD=loaded)
    check_workers(server)


def test_gevent_patched_too_late(site: Site) -> None:
    """Where the master imports the SDK before gevent patches threads, each worker says so, once.

    Such a worker may hang in the SDK, and be replaced.
    """
    options = ["--worker-class", "gevent", "--timeout", "5"]
    server = start(site, ["post_fork"], *options, GLOBAL)

    def complained() -> Counter[str]:
        lines = server.logged("threads were monkey-patched after shmflags was imported")
        return Counter(line.split(" pid ")[1].split()[0] for line in lines)

    def all_have() -> bool:
        server.ask()
        return len(complained()) >= WORKERS

    server.wait_until(all_have, "all have said so")
    polls = site.api.count + 2
    server.wait_until(lambda: site.api.count >= polls, "they poll again")
    assert set(complained().values()) == {1}


MASTER_MADE = pytest.mark.parametrize(
    ("recipe", "application", "loaded"),
    [("post_fork", GLOBAL, ""), ("preload", IMPORTED, "1")],
    ids=["in-the-worker", "in-the-master"],
)


@MASTER_MADE
def test_workers_that_come_and_go(site: Site, recipe: str, application: str, loaded: str) -> None:
    """Workers that live for a few requests only answer rightly; a new leader is no reason to fetch."""
    interval_s = 4.0
    server = start(
        site,
        [recipe],
        *("--max-requests", "2", "--max-requests-jitter", "2", application),
        SERVERS_LOAD=loaded,
        POSTHOG_POLL_INTERVAL=str(interval_s),
    )
    right = values("cheaper")
    answers = server.ask_until(lambda answer: True, "have come and gone", workers=6 * WORKERS)
    assert [answer for answer in answers if answer.values != right] == []
    assert site.api.full == 1, f"{site.api.requests}\n{server.log}"
    # It may fetch when its predecessor's last fetch is half an interval old.
    check_requests(site.api, apart_s=interval_s / 2)


@MASTER_MADE
def test_a_reload(site: Site, recipe: str, application: str, loaded: str) -> None:
    """After a SIGHUP new workers answer rightly, from the snapshot of the old ones."""
    server = start(site, [recipe], application, SERVERS_LOAD=loaded)
    right = values("cheaper")
    answers = server.ask_until(lambda answer: True, "answer")
    old = {answer.pid for answer in answers}
    server.process.send_signal(signal.SIGHUP)
    answers += server.ask_until(lambda answer: answer.pid not in old, "have come instead")
    server.wait_until(lambda: not any(psutil.pid_exists(pid) for pid in old), "the old ones are gone")
    answers += server.ask_until_requests(site.api.count + 2)
    assert [answer for answer in answers if answer.values != right] == []
    assert site.api.full == 1, f"{site.api.requests}\n{server.log}"
    check_requests(site.api)


AS_NOBODY = ["--user", "nobody", "--group", str(pwd.getpwnam("nobody").pw_gid)]


@pytest.mark.parametrize(
    ("recipe", "application"),
    [("post_fork", GLOBAL), ("preload", IMPORTED)],
    ids=["post_fork", "preload"],
)
def test_a_master_that_is_root(site: Site, recipe: str, application: str) -> None:
    """Workers of a root master run as `nobody` and share what is theirs; nothing is made for root."""
    require_root()
    module = "tests.servers.gunicorn_as_root"
    server = start(site, [recipe], *AS_NOBODY, application, module=module)
    uid = pwd.getpwnam("nobody").pw_uid
    server.ask_until(lambda answer: answer.uid == uid, "run as nobody")
    check_workers(server)
    (theirs,) = (site.home / "shared").iterdir()
    assert theirs.name == f"shmflags-{uid}"
    assert theirs.stat().st_uid == uid


def test_a_master_that_is_root_and_loaded(site: Site) -> None:
    """What root loaded before it forked, workers that run as `nobody` use and keep up to date."""
    require_root()
    module = "tests.servers.gunicorn_as_root"
    server = start(site, ["preload"], *AS_NOBODY, IMPORTED, module=module, SERVERS_LOAD="1")
    before, after = values("cheaper"), values("faster")
    answers = server.ask_until(lambda answer: answer.values == before, "know the flags")
    site.api.set_definitions(switched("faster"))
    answers += server.ask_until(lambda answer: answer.values == after, "know of the change")
    assert [answer for answer in answers if answer.values not in (before, after)] == []
    assert {answer.uid for answer in answers} == {pwd.getpwnam("nobody").pw_uid}
    server.ask_until_requests(6)
    # Root's master is one fetcher, and the workers are another: files of one user are not for others.
    assert site.api.full <= 4
    check_requests(site.api, apart_s=INTERVAL_S / 2)
