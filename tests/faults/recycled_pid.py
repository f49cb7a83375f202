"""A leader dies and its pid comes round again: run as process 1 of a pid namespace of its own.

Prints what a second worker makes of it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

from tests.faults.harness import Api, Ear, Poller, control_page

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def fork_leader(base: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            assert poller(base).poll() == 1
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the leader did not get to lead"
    return pid


def fork_as(wanted: int) -> int:
    """A sleeping child with this pid, as the next in turn."""
    for _ in range(100):
        with open("/proc/sys/kernel/ns_last_pid", "w", encoding="ascii") as file:
            file.write(str(wanted - 1))
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        if pid == wanted:
            return pid
        kill(pid)
    raise AssertionError(f"no process got the pid {wanted}")


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def poller(base: Path) -> Poller:
    return Poller(base, Api(), poll_interval=60.0, lease_ttl=3600.0, cold_start_timeout=0.0)


def main(base: Path) -> None:
    ear = Ear()
    logging.getLogger("shmflags").addHandler(ear)
    logging.getLogger("shmflags").setLevel(logging.INFO)
    dead = fork_leader(base)
    time.sleep(2 * TICK_S)  # A process started within the same tick could not be told from it.
    stranger = fork_as(dead)
    try:
        survivor = poller(base)
        assert control_page(base).lease().holder.pid == stranger
        assert survivor.poll() == 1
        assert survivor.leads, "it took the stranger for the leader"
        ear.assert_no_surprise()
        print("taken over" if ear.heard("took over", str(dead), "holder is dead") else ear.lines)
    finally:
        kill(stranger)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
