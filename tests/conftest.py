"""Fixtures shared by all tests, and the options of the long ones."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmflags.demo.server import DefinitionsServer, definitions, flag
from shmflags.runtime_dir import RuntimeDir, locate
from tests.servers.running import Site

IN_CI = 3000
"""So many schedules continuous integration runs, with all that is left out at somebody's desk."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--storm-seconds",
        type=float,
        default=10.0,
        help="how long the storm of kills and stops blows at least (tests/faults/test_storm.py)",
    )
    parser.addoption(
        "--simulations",
        type=int,
        default=300,
        help="how many schedules the simulation runs (tests/faults/test_simulation.py); from "
        f"{IN_CI} on, all is done that continuous integration does (see CONTRIBUTING.md)",
    )
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        help="the first of them; with --simulations 1, the one to replay",
    )


def pytest_configure() -> None:
    """What the processes that tests start are to inherit, whatever the shell."""
    # There are hundreds of them, and without byte code each compiles the package again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # A shell's background jobs ignore Ctrl-C, and so would a process that a test wants to end by it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: tests often wait for processes that they started, so that two cores can do five at a time."""
    cores = len(os.sched_getaffinity(0))
    return max(cores, min(5 * cores // 2, 8))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """With `-n`: who has run his tests takes some of another's, so that the long ones are not left for the end."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have each of several workers begin with one of the tests that are marked `long`."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    long = [item for item in items if item.get_closest_marker("long")]
    share = len(items) // workers
    items[:] = [item for item in items if item not in long]
    for number, item in enumerate(long):
        items.insert(number % workers * share + number // workers, item)


@pytest.fixture
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether to do all that there is, as in continuous integration, and not only some of it."""
    return int(request.config.getoption("--simulations")) >= IN_CI


@pytest.fixture
def directory() -> Iterator[Path]:
    """A base directory of the test's own, in memory where there is memory to be had."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="shmflags-test-", dir=base) as path:
        os.chmod(path, 0o700)
        yield Path(path)


@pytest.fixture
def home(directory: Path) -> RuntimeDir:
    """Where a worker has its files, made ready; nothing lies there yet."""
    found = locate(directory, "test", os.geteuid())
    found.prepare(lambda _: None)
    return found


@pytest.fixture
def server() -> Iterator[DefinitionsServer]:
    """A definitions server with one flag, `one`, which is on."""
    with DefinitionsServer(definitions(flag("one"))) as running:
        yield running


@pytest.fixture
def site() -> Iterator[Site]:
    """A place to start a real server in."""
    with Site() as place:
        yield place
