"""uWSGI, started for real, with the README's recipe and without."""

from __future__ import annotations

import pytest

from tests.servers.answers import switched, values
from tests.servers.running import RECIPES, WORKERS, HttpServer, Site, check_workers
from tests.support import require_program

RECIPE = ["--ini", str(RECIPES / "uwsgi.ini")]
LAZY = ["--lazy-apps", "--enable-threads"]
THREADS = "enable-threads = true"
HOOKS = "py-call-uwsgi-fork-hooks = true"


def start(site: Site, *arguments: str, **environment: str) -> HttpServer:
    return site.start_http(
        *(require_program("uwsgi"), "--master", "--processes", str(WORKERS), *arguments),
        *("--module", "tests.servers.wsgi:application", "--need-app"),
        *("--http-socket", str(site.socket), "--die-on-term", "--disable-logging"),
        **environment,
    )


def objections(server: HttpServer) -> list[str]:
    return server.logged("the server is not set up for threads")


@pytest.mark.parametrize("loaded", ["", "1"], ids=["created", "loaded"])
@pytest.mark.parametrize("arguments", [RECIPE, LAZY], ids=["recipe", "lazy-apps"])
def test_workers_set_up_for_threads(site: Site, arguments: list[str], loaded: str) -> None:
    """With the recipe, or with lazy-apps, workers make the requests of one, and nothing is logged."""
    server = start(site, *arguments, SERVERS_LOAD=loaded)
    check_workers(server)
    assert objections(server) == []


@pytest.mark.parametrize("arguments", [[], ["--enable-threads"]], ids=["default", "enable-threads"])
def test_workers_that_load_after_the_fork(site: Site, arguments: list[str]) -> None:
    """Without fork hooks, clients that were not loaded before the fork still make the requests of one.

    What is missing is logged once, by the master.
    """
    server = start(site, *arguments)
    check_workers(server)
    (line,) = objections(server)
    assert HOOKS in line
    assert (THREADS in line) == (arguments == [])
    assert f"pid {server.process.pid} " in line


@pytest.mark.parametrize("arguments", [[], ["--enable-threads"]], ids=["default", "enable-threads"])
def test_workers_that_loaded_before_the_fork(site: Site, arguments: list[str]) -> None:
    """Without fork hooks, a client that was loaded before the fork answers from what it had.

    It cannot learn of changes, as nothing of it runs there any more; so it is logged once, by the
    master, before there are workers.
    """
    server = start(site, *arguments, SERVERS_LOAD="1")
    before = values("cheaper")
    answers = server.ask_until(lambda answer: answer.values == before, "know the flags")
    site.api.set_definitions(switched("faster"))
    # The master's own client polls; workers that did would know by its next poll.
    server.wait_until(lambda: server.ask() != [] and site.api.full == 2, "the master knows")
    answers += server.ask_until_requests(site.api.count + 1)
    answers += server.ask_until(lambda answer: True, "answer")
    assert {answer.parent_pid for answer in answers} == {server.process.pid}
    assert [answer for answer in answers if answer.values != before] == []
    (line,) = objections(server)
    assert HOOKS in line
    assert (THREADS in line) == (arguments == [])
    assert f"pid {server.process.pid} " in line


@pytest.mark.parametrize("loaded", ["", "1"], ids=["created", "loaded"])
@pytest.mark.parametrize(
    ("arguments", "watched"), [(["--enable-threads"], False), (RECIPE, True)], ids=["threads", "recipe"]
)
def test_no_thread_of_ours_where_a_fork_may_hang(
    site: Site, arguments: list[str], watched: bool, loaded: str
) -> None:
    """Without fork hooks, no thread of the cache is there to hold the GIL when the master forks.

    A worker that is forked then would wait for the GIL for ever. With them, a loaded master has one.
    """
    server = start(site, *arguments, SERVERS_LOAD=loaded)
    server.ask_until(lambda answer: answer.values == values("cheaper"), "know the flags", workers=1)
    (threads,) = server.logged("at import: ")
    assert ("shmflags-watcher" in threads) == (watched and loaded != "")


@pytest.mark.parametrize("arguments", [["--lazy-apps"], ["--py-call-uwsgi-fork-hooks"]])
def test_workers_without_threads(site: Site, arguments: list[str]) -> None:
    """Where only enable-threads is missing, that is what is logged, once for all workers."""
    server = start(site, *arguments)
    check_workers(server)
    (line,) = objections(server)
    assert THREADS in line
    assert HOOKS not in line
