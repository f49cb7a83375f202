"""Who a process is, and when it is provably dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from shmflags.processes import NOBODY, Host, Identity, command_line
from tests.support import identity_of, wait_until


@pytest.fixture
def host() -> Host:
    return Host()


def test_we_are_not_dead(host: Host) -> None:
    """A live process is not provably dead, nor is nobody."""
    me = host.identity()
    assert me.pid == os.getpid()
    assert me.start_ticks > 0
    assert me.pid_namespace > 0
    assert not host.is_provably_dead(me)
    assert not host.is_provably_dead(NOBODY)


def test_a_recycled_pid_proves_death(host: Host) -> None:
    """The same pid with another start time is another process; an unknown start time proves nothing."""
    me = host.identity()
    assert host.is_provably_dead(me._replace(start_ticks=me.start_ticks - 1))
    assert not host.is_provably_dead(me._replace(start_ticks=0))


def test_another_namespace_proves_nothing(host: Host) -> None:
    """A pid of another namespace names another process, dead or alive."""
    me = host.identity()
    assert not host.is_provably_dead(me._replace(start_ticks=1, pid_namespace=me.pid_namespace + 1))
    assert not host.is_provably_dead(Identity(2**22 + 1, 1, 0))


@pytest.mark.parametrize("pid", [-1, 0, 2**31, 2**63, 2**64 - 1])
def test_an_absurd_pid_is_no_error(host: Host, pid: int) -> None:
    """Whatever stands in the page, asking about it neither raises nor signals anybody."""
    assert host.is_provably_dead(host.identity()._replace(pid=pid)) in (True, False)


def test_zombies_and_the_reaped_are_dead_the_stopped_are_not(host: Host) -> None:
    """A stopped process lives; a killed one is dead before and after it is reaped."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        who = identity_of(child.pid, host)
        try:
            child.send_signal(signal.SIGSTOP)
            assert not host.is_provably_dead(who)
        finally:
            child.kill()
        wait_until(lambda: host.is_provably_dead(who), "the killed child is a zombie")
        child.wait(30)
        assert host.is_provably_dead(who)


def test_a_command_name_with_parentheses_is_read_rightly(
    host: Host, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A process whose name holds spaces and parentheses has the start time that its parent sees."""
    program = tmp_path_factory.mktemp("bin") / "a) R (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "60"]) as child:
        try:
            who = identity_of(child.pid, host)
            assert not host.is_provably_dead(who)
            assert host.is_provably_dead(who._replace(start_ticks=who.start_ticks + 1))
        finally:
            child.kill()


def test_the_boot_has_an_id(host: Host) -> None:
    """The boot id is stable, and not the number that stands for not knowing."""
    assert host.boot_id() == Host().boot_id() != 0
    assert host.boot_id() < 1 << 128


def test_a_command_line_is_for_people() -> None:
    """The command line of a process of ours can be had; that of none is empty."""
    assert "pytest" in command_line(os.getpid()) or "python" in command_line(os.getpid())
    assert command_line(2**22 + 1) == ""
