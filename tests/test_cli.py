"""The command `shmflags`: what it prints, how it ends, and what it does to the files."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import shmflags
from shmflags import SharedMemoryFlagCache, cli, doctor
from shmflags.demo.server import DefinitionsServer, definitions, flag
from shmflags.table import fitting
from tests.support import call_all, poll_in_turn, workers

LIMIT_S = 60.0
ONE = definitions(flag("one"))
TWO = definitions(flag("one"), flag("two"))


@dataclass(frozen=True)
class Ended:
    """What a command did."""

    status: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process."""

    def running(*arguments: object) -> Ended:
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        found = capsys.readouterr()
        return Ended(status, found.out, found.err)

    return running


@contextmanager
def started(*arguments: object, **keywords: Any) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own, gone after the block."""
    environment = {**os.environ, "PYTHONPATH": str(Path(shmflags.__file__).parents[1])}
    environment.update(keywords.pop("environment", {}))
    keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **keywords}
    with subprocess.Popen(
        [sys.executable, "-m", "shmflags", *map(str, arguments)],
        text=True,
        env=environment,
        **keywords,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    wait_readable(process.stdout.fileno())
    return process.stdout.readline()


def wait_readable(descriptor: int) -> None:
    """Not by select(), which knows no descriptor beyond 1023."""
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    assert waiting.poll(LIMIT_S * 1000), "nothing was written"


def end_of(process: subprocess.Popen[str]) -> Ended:
    """Wait until it has ended by itself."""
    out, err = process.communicate(timeout=LIMIT_S)
    return Ended(process.returncode, out or "", err or "")


def cache_at(directory: Path, key: str = "test", **arguments: Any) -> SharedMemoryFlagCache:
    return SharedMemoryFlagCache(key, directory=directory, **arguments)


def served(directory: Path, key: str = "test") -> Any:
    """What a reader that comes now gets."""
    reader = cache_at(directory, key, role="reader", cold_start_timeout=0)
    reader.should_fetch_flag_definitions()
    try:
        return reader.get_flag_definitions()
    finally:
        reader.shutdown()


@pytest.fixture
def leader(directory: Path) -> Iterator[SharedMemoryFlagCache]:
    """A cache that leads and has published `ONE`."""
    cache = cache_at(directory)
    assert cache.should_fetch_flag_definitions()
    cache.on_flag_definitions_received(ONE)
    yield cache
    cache.shutdown()


def files_below(directory: Path) -> set[str]:
    return {os.path.join(root, name) for root, _, names in os.walk(directory) for name in names}


# -- usage


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["status", "one", "two"],
        ["status", ""],
        ["status", "--directory", ""],
        ["export"],
        ["publish", "key"],
        ["publish", "key", "-", "--follow"],
        ["clear", "--force"],
        ["doctor", "extra"],
        ["demo", "--host"],
    ],
)
def test_wrong_usage_ends_with_2(run: Run, arguments: list[str]) -> None:
    """What cannot be understood is said on stderr, with the usage, and ends with 2."""
    ended = run(*arguments)
    assert ended.status == 2
    assert ended.out == ""
    assert ended.err.startswith("usage: shmflags")


@pytest.mark.parametrize("command", ["status", "export", "publish", "clear", "doctor", "demo"])
def test_every_command_has_help_and_a_directory(run: Run, command: str) -> None:
    """Each command explains itself, and takes --directory."""
    ended = run(command, "--help")
    assert ended.status == 0
    assert "--directory PATH" in ended.out


def test_the_version_is_that_of_the_package(run: Run) -> None:
    """`--version` tells it."""
    assert run("--version").out == f"shmflags {shmflags.__version__}\n"


def test_the_directory_stands_before_or_after_the_command_or_in_the_environment(
    run: Run, directory: Path, leader: SharedMemoryFlagCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three ways name the same place, and none is lost."""
    after = run("export", "test", "--directory", directory)
    before = run("--directory", directory, "export", "test")
    monkeypatch.setenv("SHMFLAGS_DIR", str(directory))
    by_environment = run("export", "test")
    assert json.loads(after.out) == json.loads(before.out) == json.loads(by_environment.out) == ONE


def test_a_bug_is_told_without_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong inside, the user gets one line and status 1."""

    def broken(*_: object) -> None:
        raise RuntimeError("broken\ninside")

    monkeypatch.setattr(doctor, "examine", broken)
    ended = run("doctor")
    assert ended.status == 1
    assert ended.err == "shmflags: unexpected RuntimeError: broken inside; please report it\n"


# -- status


def test_status_of_nothing_is_said_in_words(run: Run, directory: Path) -> None:
    """With nothing there it says so and creates nothing; who names a key gets status 1."""
    ended = run("status", "--directory", directory)
    assert (ended.status, ended.err) == (0, "")
    assert "There is nothing here yet" in ended.out
    ended = run("status", "test", "--directory", directory)
    assert ended.status == 1
    assert ended.err == "shmflags: test: There is nothing here yet: no worker has polled.\n"
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "a file", "open to others"])
@pytest.mark.parametrize("as_json", [[], ["--json"]], ids=["table", "json"])
def test_status_of_a_place_that_is_no_good(
    run: Run, directory: Path, kind: str, as_json: list[str]
) -> None:
    """Where workers could share nothing, that nothing is to be seen is a problem, and ends with 1."""
    base = directory / "base"
    if kind == "a file":
        base.write_text("")
    elif kind == "open to others":
        (base / f"shmflags-{os.geteuid()}").mkdir(parents=True)
        (base / f"shmflags-{os.geteuid()}").chmod(0o777)
    ended = run("status", "--directory", base, *as_json)
    assert ended.status == 1
    assert ended.err.startswith("shmflags: ")
    assert str(base) in ended.err
    assert ended.err.count("\n") == 1
    if as_json:
        assert json.loads(ended.out) == {"schema_version": 1, "keys": []}
    else:
        assert "There is nothing here yet" in ended.out


def test_status_points_to_what_belongs_to_another_user(run: Run, directory: Path) -> None:
    """On call one is often root, and the workers are not: whose files there are is said."""
    (directory / "shmflags-54321").mkdir()
    ended = run("status", "--directory", directory)
    assert ended.status == 0
    command = f"sudo -u '#54321' shmflags status --directory {directory}"
    assert ended.out.endswith(f"There is something of #54321: {command}\n")


def test_status_shows_what_a_person_wants_to_know(
    run: Run, directory: Path, leader: SharedMemoryFlagCache
) -> None:
    """Leader, lease, generation, flags, age, counters and workers stand in the table."""
    ended = run("status", "test", "--directory", directory)
    assert (ended.status, ended.err) == (0, "")
    pid = os.getpid()
    assert re.search(r"^test  ok  ", ended.out)
    assert re.search(
        rf"^  leader   process {pid}, term 1, since \d{{4}}-.*lease left 90 s$", ended.out, re.MULTILINE
    )
    assert re.search(
        r"^  serving  generation 1: 1 flag, 0 cohorts, \d+ bytes$", ended.out, re.MULTILINE
    )
    assert re.search(
        r"^  age      fetched .* ago, changed .* ago, last grant .* ago$", ended.out, re.MULTILINE
    )
    assert "1 granted, 1 published, 0 unchanged" in ended.out
    assert re.search(rf"^ +{pid}  leader .* 1  current$", ended.out, re.MULTILINE)
    assert "\033" not in ended.out


def test_status_shows_all_keys_if_none_is_named(run: Run, directory: Path) -> None:
    """Each key has its block, under its own name, and as JSON its object."""
    for key in ("one", "schlüssel"):
        cache_at(directory, key).should_fetch_flag_definitions()
    ended = run("status", "--directory", directory)
    assert re.findall(r"^(\S+)  ok", ended.out, re.MULTILINE) == ["one", "schlüssel"]
    found = json.loads(run("status", "--json", "--directory", directory).out)
    assert found["schema_version"] == 1
    assert [one["service_key"] for one in found["keys"]] == ["one", "schlüssel"]


def test_status_of_one_key_as_json(run: Run, directory: Path, leader: SharedMemoryFlagCache) -> None:
    """It is what `cache.status()` gives, and nothing but JSON is on stdout."""
    found = json.loads(run("status", "test", "--json", "--directory", directory).out)
    expected = leader.status().as_dict()
    for one in (found, expected):
        for name in ("at", "age_s", "unchanged_s", "since_grant_s", "workers"):
            assert one.pop(name) is not None
        assert one["leader"].pop("lease_left_s") > 0
    assert found == expected


def test_a_directory_s_name_will_do_as_key(run: Run, directory: Path) -> None:
    """What status shows for a key too long to be kept can be given back to it."""
    cache_at(directory, "k" * 600).should_fetch_flag_definitions()
    (name,) = [path.name for path in directory.glob("shmflags-*/v1/*")]
    assert run("status", "--directory", directory).out.startswith(f"{name}  ok")
    assert run("status", name, "--directory", directory).status == 0


def test_what_is_wrong_is_on_stderr_and_ends_with_1(
    run: Run, directory: Path, leader: SharedMemoryFlagCache
) -> None:
    """A problem makes the exit status 1 and is said on stderr; stdout is as ever, also as JSON."""
    (Path(leader.status().directory) / "snapshot").unlink()
    ended = run("status", "test", "--directory", directory)
    assert ended.status == 1
    assert ended.err.startswith("shmflags: test: The snapshot cannot be used: it is missing.")
    assert ended.out.startswith("test  1 problem  ")
    ended = run("status", "--json", "--directory", directory)
    assert ended.status == 1
    assert json.loads(ended.out)["keys"][0]["problems"][0] in ended.err


def test_a_key_cannot_command_the_terminal(run: Run, directory: Path) -> None:
    """Control characters of a key or of a command line do not reach the terminal."""
    cache_at(directory, "evil\033[2J\ud800").should_fetch_flag_definitions()
    ended = run("status", "--directory", directory)
    assert ended.out.startswith("evil?[2J?  ok")


def test_watch_shows_it_again_and_ends_quietly(directory: Path, leader: SharedMemoryFlagCache) -> None:
    """`status --watch` prints again and again what is then so; Ctrl-C ends it with 0 and no word."""
    with started("status", "--watch", "--json", "--directory", directory) as process:
        assert json.loads(line_of(process))["keys"][0]["flags"] == 1
        run_publish = [sys.executable, "-m", "shmflags", "publish", "test", "-", "--force"]
        subprocess.run(
            [*run_publish, "--directory", str(directory)],
            input=json.dumps(TWO).encode(),
            check=True,
            capture_output=True,
            timeout=LIMIT_S,
        )
        end_s = time.monotonic() + LIMIT_S
        while json.loads(line_of(process))["keys"][0]["flags"] != 2:
            assert time.monotonic() < end_s
        process.send_signal(signal.SIGINT)
        ended = end_of(process)
        assert (ended.status, ended.err) == (0, "")


def test_watch_ends_quietly_when_nobody_reads_it(
    directory: Path, leader: SharedMemoryFlagCache
) -> None:
    """`shmflags status --watch | head -1` ends, with 0 and without a complaint."""
    with started("status", "--watch", "--directory", directory) as process:
        line_of(process)
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(LIMIT_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def watched_on_a_terminal(directory: Path, **environment: str) -> bytes:
    """What `status --watch` writes to a terminal until it has painted the table twice."""
    ours, theirs = pty.openpty()
    try:
        with started(
            "status",
            "--watch",
            "--directory",
            directory,
            stdout=theirs,
            environment={"TERM": "xterm", **environment},
        ) as process:
            seen = b""
            while seen.count(b"\033[H") < 2:
                wait_readable(ours)
                seen += os.read(ours, 65536)
            process.send_signal(signal.SIGINT)
            assert end_of(process).status == 0
    finally:
        os.close(ours)
        os.close(theirs)
    return seen


@pytest.mark.parametrize("colours", [True, False])
def test_watch_on_a_terminal(
    directory: Path,
    leader: SharedMemoryFlagCache,
    colours: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a terminal the table is painted over itself, in colours unless the user wants none."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    told = {} if colours else {"NO_COLOR": "1"}
    seen = watched_on_a_terminal(directory, COLUMNS="80", LINES="24", **told)
    assert (b"\033[32mok\033[0m" in seen) == colours
    assert b"generation 1" in seen


def test_watch_does_not_scroll(directory: Path) -> None:
    """What does not fit on the terminal is cut off, and it is said how much that is."""
    for number in range(4):
        cache_at(directory, f"key-{number}").should_fetch_flag_definitions()
    seen = watched_on_a_terminal(directory, COLUMNS="60", LINES="12")
    frame = seen.split(b"\033[H")[1].partition(b"\033[J")[0].decode()
    lines = [re.sub("\033\\[[0-9]*[mK]", "", line) for line in frame.splitlines()]
    assert re.search(r"^… and \d+ more lines", lines[-1])
    assert "key-0  ok" in frame.replace("\033[1m", "").replace("\033[0m", "").replace("\033[32m", "")
    assert sum(max(1, -(-len(line) // 60)) for line in lines) <= 11


@pytest.mark.parametrize(
    ("rows", "shown"), [(9, 5), (8, 5), (7, 3), (6, 3), (5, 2), (4, 2), (3, 1), (2, 0), (1, 0)]
)
def test_what_fits_on_a_terminal(rows: int, shown: int) -> None:
    """A line takes as many rows as its visible characters need, and the cursor takes one."""
    lines = ["\033[32m" + "a" * 10 + "\033[0m", "", "b" * 11, "c" * 20, "d"]
    found = fitting(lines, 10, rows)
    assert found[:shown] == lines[:shown]
    assert found[shown:] == ([] if shown == 5 else [f"… and {5 - shown} more lines"[:10]])


# -- output that fails


@pytest.mark.parametrize("arguments", [["--help"], ["status", "test"], ["doctor"], ["export", "test"]])
def test_a_pipe_that_nobody_reads_is_no_error(
    directory: Path, leader: SharedMemoryFlagCache, arguments: list[str]
) -> None:
    """Whatever is printed into a pipe whose reader has gone, the command ends quietly, with 0."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {"SHMFLAGS_DIR": str(directory)}
    with started(*arguments, stdout=writer, environment=environment) as process:
        os.close(writer)
        ended = end_of(process)
    assert (ended.status, ended.err) == (0, "")


def test_a_full_disk_is_said(directory: Path, leader: SharedMemoryFlagCache) -> None:
    """If the output cannot be written, that is one line on stderr and status 1."""
    with (
        open("/dev/full", "w") as full,
        started("export", "test", "--directory", directory, stdout=full) as process,
    ):
        ended = end_of(process)
    assert ended.status == 1
    assert ended.err == "shmflags: [Errno 28] No space left on device\n"


def test_a_closed_output_is_no_bug(directory: Path, leader: SharedMemoryFlagCache) -> None:
    """With stdout closed by the caller a command does its work and says nothing odd."""
    command = f'"{sys.executable}" -m shmflags status test --directory "{directory}" >&-'
    ended = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_an_output_that_knows_no_unicode_is_no_bug(directory: Path) -> None:
    """Under a locale without Unicode a key is shown with escapes."""
    cache_at(directory, "schlüssel").should_fetch_flag_definitions()
    with started(
        "status", "--directory", directory, environment={"PYTHONIOENCODING": "ascii"}
    ) as process:
        ended = end_of(process)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("schl\\xfcssel  ok")


def test_ctrl_c_at_the_very_start_is_quiet() -> None:
    """A Ctrl-C that comes while the command is still being imported ends it without a traceback."""
    program = (
        "import runpy, sys\n"
        "class CtrlC:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'shmflags.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, CtrlC())\n"
        "runpy.run_module('shmflags', run_name='__main__')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(Path(shmflags.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


# -- export


def test_export_gives_what_is_served(run: Run, directory: Path) -> None:
    """What JSON can express comes out as it went in: huge integers, surrogates, key order."""
    odd = definitions(
        flag("one", payloads={"true": 1 << 70}), cohorts={"\ud800": {"z": 1.5, "a": None}}, more=["ü"]
    )
    cache = cache_at(directory)
    assert cache.should_fetch_flag_definitions()
    cache.on_flag_definitions_received(odd)
    ended = run("export", "test", "--directory", directory)
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(ended.out) == odd
    assert list(json.loads(ended.out)) == list(odd)
    assert list(json.loads(ended.out)["cohorts"]["\ud800"]) == ["z", "a"]


def test_export_of_nothing_or_of_damage_is_said(
    run: Run, directory: Path, leader: SharedMemoryFlagCache
) -> None:
    """With nothing to export, or nothing sound, stdout stays empty and the status is 1."""
    ended = run("export", "other", "--directory", directory)
    assert (ended.status, ended.out) == (1, "")
    assert "nothing is served" in ended.err
    snapshot = Path(leader.status().directory) / "snapshot"
    snapshot.write_bytes(snapshot.read_bytes()[:-1] + b"?")
    ended = run("export", "test", "--directory", directory)
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith(f"shmflags: {snapshot}: ")


# -- publish; the rest of it is in test_local_publish.py


def test_a_closed_input_is_no_bug(directory: Path) -> None:
    """With stdin closed by the caller, what was to be read from it is said to be missing."""
    command = f'"{sys.executable}" -m shmflags publish test - --directory "{directory}" <&-'
    ended = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert (ended.returncode, ended.stderr) == (1, "shmflags: stdin: is closed\n")


# -- clear


def test_clear_removes_all_there_is(run: Run, directory: Path, leader: SharedMemoryFlagCache) -> None:
    """Once nobody uses it, page, snapshot and litter are gone; a second time there is nothing."""
    place = Path(leader.status().directory)
    leader.shutdown()
    (place / "snapshot.1-1-1-1.tmp").write_bytes(b"x")
    ended = run("clear", "test", "--directory", directory)
    assert (ended.status, ended.out, ended.err) == (0, f"cleared {place}\n", "")
    assert not place.exists()
    ended = run("clear", "test", "--directory", directory)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("there is nothing to clear")


def test_clear_refuses_while_workers_live(run: Run, directory: Path, server: DefinitionsServer) -> None:
    """It names the processes and removes nothing; a worker that was killed does not count."""
    with workers(2) as group:
        call_all(group, "make_cache", directory=str(directory))
        call_all(group, "make_client", server.url)
        poll_in_turn(group)
        before = files_below(directory)
        ended = run("clear", "test", "--directory", directory)
        assert ended.status == 1
        assert "2 processes use it" in ended.err
        assert all(str(worker.pid) in ended.err for worker in group)
        assert files_below(directory) == before
        for worker in group:
            worker.kill()
        assert run("clear", "test", "--directory", directory).status == 0
        assert files_below(directory) == set()


def test_clear_by_force_is_survived_by_workers(
    run: Run, directory: Path, server: DefinitionsServer
) -> None:
    """Workers whose files were cleared go on, and bring them back without another request."""
    with workers(2) as group:
        call_all(group, "make_cache", directory=str(directory))
        call_all(group, "make_client", server.url)
        poll_in_turn(group)
        assert run("clear", "test", "--force", "--directory", directory).status == 0
        assert call_all(group, "poll") == [["one"], ["one"]]
        assert call_all(group, "poll") == [["one"], ["one"]]
        assert server.count == 1
        assert run("status", "test", "--directory", directory).status == 0


def test_clear_by_force_does_not_wait_for_a_lock(
    run: Run, directory: Path, leader: SharedMemoryFlagCache
) -> None:
    """If somebody keeps the page's lock, clear says so, and with --force removes it all the same."""
    page = shmflags.page_file.open_existing(
        shmflags.runtime_dir.locate(directory, "test", os.geteuid()), shmflags.processes.Host()
    )
    leader.shutdown()
    with page.locked():
        ended = run("clear", "test", "--directory", directory)
        assert ended.status == 1
        assert "its lock was busy" in ended.err
        assert run("clear", "test", "--force", "--directory", directory).status == 0
    assert files_below(directory) == set()


def test_clear_removes_garbage(run: Run, directory: Path, leader: SharedMemoryFlagCache) -> None:
    """A page that no worker could use is removed without force."""
    page = Path(leader.status().directory) / "page"
    page.write_bytes(b"garbage")
    assert run("clear", "test", "--directory", directory).status == 0
    assert files_below(directory) == set()


def test_clear_follows_no_link(run: Run, directory: Path) -> None:
    """A link planted in place of the directory is refused, and what it leads to stays."""
    cache = cache_at(directory)
    cache.should_fetch_flag_definitions()
    place = Path(cache.status().directory)
    elsewhere = directory / "elsewhere"
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    ended = run("clear", "test", "--force", "--directory", directory)
    assert ended.status == 1
    assert f"{place}: is not a directory" in ended.err
    assert (elsewhere / "page").exists()


# -- demo


def test_demo_is_reached(tmp_path: Path) -> None:
    """`shmflags demo` hands its arguments to the demo, and its exit status back."""
    with started("demo", "--host", "ftp://nowhere", "--directory", tmp_path) as process:
        ended = end_of(process)
    assert ended.status == 2
    assert "--host must begin with https://" in ended.err
