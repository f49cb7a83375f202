"""The log: each event once, repeated trouble rarely and with a count."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest

from shmflags import SharedMemoryFlagCache, journal
from shmflags.demo.server import definitions, flag
from shmflags.errors import UnsafePathError
from shmflags.journal import Journal
from tests.test_status import ShiftedHost

ONE, TWO = definitions(flag("one")), definitions(flag("one"), flag("two"))


class Clock:
    """Stands in for `time` in the journal."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(journal, "time", clock)
    return clock


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "shmflags")
    return caplog


class Pair:
    """Two caches of one key in this process, on one clock that the test moves."""

    def __init__(self, directory: Path, log: pytest.LogCaptureFixture) -> None:
        self.host = ShiftedHost()
        self.first = SharedMemoryFlagCache("test", directory=directory)
        self.second = SharedMemoryFlagCache("test", directory=directory)
        self.first._host = self.second._host = self.host
        self._log = log

    def later(self, seconds: float) -> None:
        self.host.shift_s += seconds

    def lines(self, event: str) -> list[str]:
        return [message for message in self._log.messages if message.startswith(f"{event}: ")]


@pytest.fixture
def pair(directory: Path, log: pytest.LogCaptureFixture) -> Pair:
    return Pair(directory, log)


def where(term: int, generation: int) -> str:
    return f" [test pid {os.getpid()} term {term} generation {generation}]"


def poll(cache: SharedMemoryFlagCache) -> bool:
    """One poll without a fetch; whether it was told to fetch."""
    if cache.should_fetch_flag_definitions():
        return True
    cache.get_flag_definitions()
    return False


def test_a_life_in_the_log(pair: Pair) -> None:
    """Elected, published, taken over, deposed, dropped, yielded: each once, with its numbers."""
    first, second = pair.first, pair.second
    assert poll(first)
    first.on_flag_definitions_received(ONE)
    for _ in range(3):
        poll(first)
        poll(second)
    assert pair.lines("elected") == ["elected: to lead, as it was vacant" + where(1, 0)]
    (line,) = pair.lines("published")
    assert line.endswith(" bytes" + where(1, 1))
    assert "1 flags, 0 cohorts" in line

    pair.later(20)
    assert poll(first)
    pair.later(200)
    assert poll(second)
    pid = os.getpid()
    assert pair.lines("took over") == [
        f"took over: from process {pid}, as it had run out" + where(2, 1)
    ]
    second.on_flag_definitions_received(TWO)
    first.on_flag_definitions_received(ONE)
    (line,) = pair.lines("dropped")
    assert line.endswith(where(2, 2))
    for _ in range(3):
        poll(first)
    assert pair.lines("deposed") == [f"deposed: process {pid} leads" + where(2, 2)]

    first.shutdown()
    second.shutdown()
    second.shutdown()
    assert pair.lines("yielded") == ["yielded: shut down" + where(2, 2)]
    assert len(pair.lines("published")) == 2


def test_a_leader_that_makes_way_says_so_once(pair: Pair) -> None:
    """A term that ends by itself is one line, with the reason."""
    assert poll(pair.first)
    pair.first.on_flag_definitions_received(ONE)
    for _ in range(200):
        poll(pair.second)
        if pair.lines("yielded"):
            break
        pair.later(20)
        poll(pair.first)
    assert pair.lines("yielded") == ["yielded: it led for max_term" + where(1, 1)]


def test_what_is_repaired_is_said_once(pair: Pair) -> None:
    """A snapshot written again is one line, however many polls follow."""
    assert poll(pair.first)
    pair.first.on_flag_definitions_received(ONE)
    (Path(pair.first.status().directory) / "snapshot").unlink()
    for _ in range(3):
        poll(pair.first)
    assert pair.lines("repaired") == [
        "repaired: the snapshot was written again, as it is gone" + where(1, 1)
    ]


def test_a_page_that_is_rolled_forward_is_said(pair: Pair) -> None:
    """If a publisher died between the file and the page, who finds it says what it mended."""
    first = pair.first
    assert poll(first)
    first.on_flag_definitions_received(ONE)
    page = Path(first.status().directory) / "page"
    pair.later(20)
    assert poll(first)
    before = page.read_bytes()
    first.on_flag_definitions_received(TWO)
    with page.open("r+b") as file:  # In place: it stays the file that is mapped.
        file.write(before)
    pair.later(20)
    assert poll(first)
    first.on_flag_definitions_received(ONE)
    poll(first)
    assert pair.lines("repaired") == ["repaired: the page goes on at generation 2" + where(1, 2)]


def test_a_directory_that_is_refused_is_said_once(
    directory: Path, log: pytest.LogCaptureFixture
) -> None:
    """Every poll meets the same unsafe directory; the log has one line: what kind, why, what to do."""
    cache = SharedMemoryFlagCache("test", directory=directory)
    unsafe = directory / f"shmflags-{os.geteuid()}"
    unsafe.mkdir(mode=0o755)
    unsafe.chmod(0o755)
    for _ in range(5):
        assert cache.should_fetch_flag_definitions()
        assert cache.get_flag_definitions() is None
        cache.on_flag_definitions_received(ONE)
    (line,) = log.messages
    assert line.startswith("refused, so this worker behaves as if it had no cache: UnsafePathError: ")
    assert f"{unsafe}: is open to others (mode 755) (stop the workers and remove it" in line
    assert line.endswith(where(0, 0))
    assert log.records[0].levelno == logging.WARNING


def test_repeated_trouble_is_said_once_a_minute_with_a_count(
    clock: Clock, log: pytest.LogCaptureFixture
) -> None:
    """Within a minute the same trouble is counted, and the next line says how often it was."""
    journal = Journal("key")
    for _ in range(100):
        journal.trouble("it failed", OSError(28, "No space left on device"), 7, 3, 4)
        clock.now_s += 0.5
    assert log.messages == [
        "it failed: OSError: [Errno 28] No space left on device [key pid 7 term 3 generation 4]"
    ]
    log.clear()
    clock.now_s += 30
    journal.trouble("it failed", OSError(28, "No space left on device"), 7, 3, 4)
    (line,) = log.messages
    assert " (and 99 times more since the last such line) [key pid 7 term 3 generation 4]" in line
    log.clear()
    clock.now_s += 61
    journal.trouble("it failed", OSError(28, "No space left on device"), 7, 3, 4)
    assert "times more" not in log.text


def test_trouble_of_another_kind_is_not_held_back(clock: Clock, log: pytest.LogCaptureFixture) -> None:
    """Another cause, or another kind of error, has a line of its own."""
    journal = Journal("key")
    journal.trouble("one", OSError("x"), 7)
    journal.trouble("two", OSError("x"), 7)
    journal.trouble("two", UnsafePathError("x", path="/p", remedy="mend it"), 7)
    assert len(log.messages) == 3
    assert log.messages[-1] == "two: UnsafePathError: /p: x (mend it) [key pid 7 term 0 generation 0]"


def test_only_a_bug_brings_its_traceback(log: pytest.LogCaptureFixture) -> None:
    """What was foreseen is one line; what was not comes with where it happened."""
    journal = Journal("key")
    for error in (UnsafePathError("x"), OSError("x"), RuntimeError("a bug")):
        journal.trouble(f"because of {type(error).__name__}", error, 7)
    assert [bool(record.exc_info) for record in log.records] == [False, False, True]


def test_every_line_is_of_one_logger_and_says_where(pair: Pair, log: pytest.LogCaptureFixture) -> None:
    """All lines come from the logger `shmflags`, and end with key, pid, term and generation."""
    poll(pair.first)
    pair.first.on_flag_definitions_received({"not": "definitions"})
    pair.first.shutdown()
    assert len(log.records) == 3
    assert log.records[1].getMessage().endswith(where(1, 0))
    for record in log.records:
        assert record.name == "shmflags"
        assert re.search(r" \[test pid \d+ term \d+ generation \d+\]$", record.getMessage())
