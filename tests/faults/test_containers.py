"""Containers that share a directory: a pid means one process here and another one there.

Two pid namespaces, with the /proc of each or with the host's, and the host itself. That a process is
dead can be proved only from within its own namespace; everywhere else its lease has to run out.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shmflags import page_file
from shmflags.demo.server import DefinitionsServer, definitions, flag
from shmflags.page import ControlPage
from shmflags.processes import Host
from shmflags.runtime_dir import locate
from tests.support import Worker, require_program, require_root, wait_until

INTERVAL_S = 1.2
"""While nothing can be served, a fetch that takes half as long, on a machine that is busy, is followed by another."""

SHORT_INTERVAL_S, SHORT_LEASE_S = 0.4, 1.0
_MAIN = """
import sys
from multiprocessing.connection import Connection
from tests.worker_main import main
main(Connection(int(sys.argv[1])))
"""


class Container(Worker):
    """A worker in a pid namespace of its own, where its pid is 1, or 2 below a shell."""

    def __init__(self, own_proc: bool, pid: int) -> None:
        require_root()
        command = [require_program("unshare"), "--pid", "--fork", "--kill-child"]
        if own_proc:
            command.append("--mount-proc")
        if pid == 2:
            command += ["sh", "-c", '"$@" & wait', "sh"]
        self._connection, theirs = multiprocessing.Pipe()
        checkout = Path(__file__).parents[2]
        self._unshare = subprocess.Popen(
            [*command, sys.executable, "-c", _MAIN, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": str(checkout)},
        )
        theirs.close()

    @property
    def pid(self) -> int:
        return self._unshare.pid

    def kill(self) -> None:
        """SIGKILL to all of the container, and wait until its processes are gone."""
        self._unshare.kill()
        self._unshare.wait()

        def gone() -> bool:
            # The worker's end of the pipe is closed when it is gone, and not before.
            try:
                while self._connection.poll(0):
                    self._connection.recv()
            except (EOFError, ConnectionResetError):
                return True
            return False

        wait_until(gone, "the container's processes are gone")


OWN_PROC = pytest.mark.parametrize("own_proc", [True, False], ids=["own-proc", "proc-of-the-host"])


@pytest.fixture
def start(directory: Path, server: DefinitionsServer) -> Iterator[Callable[..., Worker]]:
    """Starts a worker on the host, or in a container with pid 1 or 2, with a cache and a client."""
    with ExitStack() as cleanup:

        def start(
            place: str, own_proc: bool, interval_s: float = INTERVAL_S, lease_s: float = 30.0
        ) -> Worker:
            worker = Worker() if place == "host" else Container(own_proc, pid=int(place))
            cleanup.callback(worker.close)
            worker.call(
                "make_cache",
                directory=str(directory),
                poll_interval=interval_s,
                lease_ttl=lease_s,
                cold_start_timeout=30.0,
            )
            worker.call("make_client", server.url, poll_interval=interval_s)
            return worker

        yield start


def page_of(directory: Path) -> ControlPage:
    return page_file.open_existing(locate(str(directory), "test", os.geteuid()), Host())


@OWN_PROC
@pytest.mark.parametrize("places", [["1", "1"], ["1", "2"], ["host", "1"]], ids=" and ".join)
def test_one_leader(
    start: Callable[..., Worker],
    directory: Path,
    server: DefinitionsServer,
    places: list[str],
    own_proc: bool,
) -> None:
    """Workers of two pid namespaces that share a directory make the requests of one."""
    group = [start(place, own_proc) for place in places]
    for worker in group:
        worker.start("evaluate", "one")
    assert [worker.result() for worker in group] == [True, True]
    assert server.full == 1
    server.set_definitions(definitions(flag("two")))
    for worker in group:
        worker.start("until", "two", True, 60.0)
    assert [worker.result() for worker in group] == [True, True]
    assert server.wait_for(lambda s: s.answered >= 3, 60)
    assert server.full == 2
    elapsed_s = time.monotonic() - server.requests[0].time_s
    assert server.count <= elapsed_s / INTERVAL_S + 2
    assert page_of(directory).lease().term == 1
    workers = page_of(directory).workers.rows()
    assert len({worker.identity.pid_namespace for worker in workers}) == 2


@OWN_PROC
@pytest.mark.parametrize(
    ("leading", "following"),
    [("1", "1"), ("2", "1"), ("1", "2"), ("host", "1"), ("1", "host"), ("2", "host")],
)
def test_a_pid_of_another_namespace_proves_nothing(
    start: Callable[..., Worker], directory: Path, leading: str, following: str, own_proc: bool
) -> None:
    """A leader in another pid namespace keeps its lease until the end, alive or dead."""
    leader, follower = (
        start(place, own_proc, SHORT_INTERVAL_S, SHORT_LEASE_S) for place in (leading, following)
    )
    assert leader.call("should_fetch")
    leader.call("receive", definitions(flag("one")))
    # Nobody renews it from here on: no poller runs.
    lease = page_of(directory).lease()
    if leading != "host":
        # Where the follower lives this pid is free, or it is another process: the follower, say.
        assert lease.holder.pid == int(leading)
        assert lease.holder.pid_namespace not in (0, Host().identity().pid_namespace)
    for _ in range(10):
        assert not follower.call("should_fetch") or time.monotonic_ns() >= lease.deadline_ns
    leader.kill()
    wait_until(lambda: follower.call("should_fetch"), "the follower takes over")
    taken = page_of(directory).lease()
    assert taken.elected_ns >= lease.deadline_ns
    assert taken.term == lease.term + 1
    assert taken.holder != lease.holder
    assert follower.call("get")["flags"][0]["key"] == "one"
