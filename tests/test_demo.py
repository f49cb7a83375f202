"""`shmflags demo` shows what it claims, says so when it cannot, and leaves nothing behind."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import psutil
import pytest

import shmflags
from shmflags import demo
from shmflags.demo.screen import Screen
from shmflags.demo.server import DefinitionsServer, definitions, flag
from shmflags.demo.workers import WORKERS

LIMIT_S = 30.0  # what the demo may take
MARK = "SHMFLAGS_TEST_MARK"  # a variable that all processes of one run inherit, and nobody else has


class Run:
    """A demo in a process of its own; its output is read as it comes, or only its first `lines`."""

    def __init__(
        self, directory: Path, *arguments: str, lines: int | None = None, **environment: str
    ) -> None:
        self.directory = directory
        self.mark = uuid.uuid4().hex
        package_parent = str(Path(shmflags.__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shmflags.demo", *arguments],
            env={
                **os.environ,
                "PYTHONPATH": package_parent,
                "TMPDIR": str(directory),
                MARK: self.mark,
                "SPT_NOENV": "1",  # else setproctitle, where it is installed, writes over the mark
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: list[str] = []
        self._more = threading.Condition()
        self._ended = False
        self._errors = ""
        self._threads = [
            threading.Thread(target=self._read, args=(lines,)),
            threading.Thread(target=self._read_errors),
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, lines: int | None) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in islice(output, lines):
                with self._more:
                    self._lines.append(line)
                    self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as errors:
            self._errors = errors.read()

    def wait_for_line(self, pattern: str) -> re.Match[str]:
        def found() -> re.Match[str] | None:
            return re.search(pattern, "".join(self._lines))

        with self._more:
            self._more.wait_for(lambda: found() or self._ended, LIMIT_S)
            match = found()
        assert match is not None, f"no {pattern!r} in {''.join(self._lines)}"
        return match

    def finish(self) -> tuple[int, str, str]:
        """Its exit code and what it wrote to stdout and stderr."""
        code = self.process.wait(LIMIT_S)
        for thread in self._threads:
            thread.join(LIMIT_S)
        return code, "".join(self._lines), self._errors

    def processes(self) -> list[psutil.Process]:
        """The living processes that this run started, itself included."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark
        except psutil.Error:
            return False

    def assert_nothing_left(self) -> None:
        assert self.processes() == []
        assert list(self.directory.iterdir()) == []

    def end(self) -> None:
        for process in self.processes():
            process.kill()
        self.finish()


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def run(*arguments: str, lines: int | None = None, **environment: str) -> Run:
        runs.append(Run(tmp_path, *arguments, lines=lines, **environment))
        return runs[-1]

    yield run
    for one in runs:
        one.end()


def test_everything_claimed_is_observed(start: Start) -> None:
    """The demo exits 0, shows each step, counts few requests for many, and leaves nothing behind."""
    nowhere = "http://127.0.0.1:9"  # a proxy in the environment does not come between
    run = start(http_proxy=nowhere, HTTP_PROXY=nowhere, GUNICORN_CMD_ARGS="--workers 1")
    code, output, errors = run.finish()
    assert (code, errors) == (0, ""), output
    run.assert_nothing_left()
    steps, summary = output.split("\nSummary\n")
    assert summary.count("PASS") == len(re.findall("^  => ", steps, re.MULTILINE)) >= 9
    assert "FAIL" not in output and "NOT OBSERVED" not in output
    workers = set(re.findall(r"worker (\d+) is up and has 3 flags", steps))
    killed = re.findall(r"worker (\d+) gets SIGKILL", steps)
    assert len(workers) == WORKERS + 1 and len(killed) == 1 and killed[0] in workers
    assert set(re.findall(r"worker (\d+) evaluates it as True", steps)) < workers
    assert set(re.findall(r"worker (\d+) evaluates it as False", steps)) == workers - set(killed)
    made, full, would_be = map(
        int,
        re.findall(r"API +(\d+)  (\d+) of them full.*\n  without the cache +(\d+)", summary)[0],
    )
    assert full == 3  # the start, a flip, a flip
    assert full < made <= would_be / 3


def test_against_an_api_that_is_not_ours(start: Start) -> None:
    """With `--host` it uses that API and those keys, flips nothing, says so, and can succeed."""
    with DefinitionsServer(definitions(flag("theirs")), latency_s=0.05) as server:
        run = start("--host", server.url, POSTHOG_PROJECT_API_KEY="phc_x", POSTHOG_SECRET_KEY="phx_x")
        run.wait_for_line(r"worker \d+ is up and has 1 flags")
        workers = [process for process in run.processes() if process.pid != run.process.pid]
        assert {process.environ()["POSTHOG_SECRET_KEY"] for process in workers} == {"phx_x"}
        code, output, errors = run.finish()
        assert (code, errors) == (0, ""), output
        run.assert_nothing_left()
        assert "skipped: this is your project" in output
        assert "evaluates it as" not in output
        made = int(re.findall(r"requests to the API +(\d+)", output)[0])
        assert made <= server.count <= made + 1  # one more may come while gunicorn stops
        assert (server.full, server.remote_evaluations, server.other_requests) == (1, 0, 0)


def test_an_api_that_refuses_is_a_failure(start: Start) -> None:
    """Without flags nothing is observed: exit 1, with the SDK's own words on the reason."""
    with DefinitionsServer() as server:
        server.fail(401)
        run = start("--host", server.url, POSTHOG_PROJECT_API_KEY="phc_x", POSTHOG_SECRET_KEY="phx_x")
        code, output, errors = run.finish()
        assert (code, errors) == (1, "")
        assert re.search("FAIL  .*0 full requests", output)
        assert "Please verify both your project_api_key and secret_key" in output
        run.assert_nothing_left()


def test_gunicorn_dying_is_a_failure(start: Start) -> None:
    """When gunicorn's master is killed the demo says so, exits 1, and ends the orphaned workers."""
    run = start(POSTHOG_PROJECT_API_KEY="phc_real", POSTHOG_SECRET_KEY="phx_real")
    worker = psutil.Process(int(run.wait_for_line(r"worker (\d+) asked the API").group(1)))
    assert worker.environ()["POSTHOG_SECRET_KEY"] == "demo"  # the user's keys stay out of this
    master = worker.parent()
    assert master is not None and master.parent() == psutil.Process(run.process.pid)
    master.kill()
    code, output, errors = run.finish()
    assert (code, errors) == (1, "")
    assert "FAIL  gunicorn runs to the end: gunicorn ended with status -9" in output
    assert "FAIL  gunicorn has ended, and each of its processes" in output
    run.assert_nothing_left()


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "shmflags demo:"),
        (signal.SIGINT, "worker .* is up"),
        pytest.param(signal.SIGINT, "gets SIGKILL", marks=pytest.mark.thorough),
        (signal.SIGTERM, "worker .* is up"),
        (signal.SIGHUP, "worker .* is up"),
    ],
)
def test_interrupted_at_any_moment(start: Start, number: signal.Signals, moment: str) -> None:
    """A signal, and a second one at once, end the demo soon, with everything cleaned up."""
    if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("run under nohup, where the demo keeps ignoring SIGHUP")
    run = start()
    run.wait_for_line(moment)
    run.process.send_signal(number)
    run.process.send_signal(number)
    code, _, errors = run.finish()
    assert (code, errors) == (128 + number, "shmflags demo: interrupted, and cleaned up\n")
    run.assert_nothing_left()


def test_a_reader_that_goes_away(start: Start) -> None:
    """Piped into `head`, it ends soon after its reader, without a traceback or anything left."""
    run = start(lines=3)
    code, _, errors = run.finish()
    assert (code, errors) == (1, "")
    run.assert_nothing_left()


@pytest.mark.parametrize("missing", ["gunicorn", "posthog"])
def test_missing_packages_are_named(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without gunicorn or posthog: one line that says what to install, and exit 2."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != missing and find_spec(name))
    assert demo.run(Namespace(host=None)) == 2
    assert capsys.readouterr().err == f"shmflags demo: needs {missing}: pip install 'shmflags[demo]'\n"


@pytest.mark.parametrize(
    ("host", "keys", "complaint"),
    [
        (
            "us.i.posthog.com",
            ["POSTHOG_PROJECT_API_KEY", "POSTHOG_SECRET_KEY"],
            "must begin with https://",
        ),
        ("https://us.i.posthog.com", ["POSTHOG_PROJECT_API_KEY"], "needs POSTHOG_SECRET_KEY in"),
        ("https://us.i.posthog.com", [], "needs POSTHOG_PROJECT_API_KEY and POSTHOG_SECRET_KEY in"),
    ],
)
def test_a_host_that_cannot_be_used(
    host: str,
    keys: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A host without a scheme, or without its keys, is one line of complaint and exit 2."""
    for name in ("POSTHOG_PROJECT_API_KEY", "POSTHOG_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in keys:
        monkeypatch.setenv(name, "key")
    assert demo.main(["--host", host]) == 2
    written = capsys.readouterr()
    assert complaint in written.err and written.err.count("\n") == 1 and written.out == ""


def test_arguments_can_be_added_to_another_parser() -> None:
    """`add_arguments` gives a subcommand's parser the options that `run` reads."""
    parser = ArgumentParser()
    demo.add_arguments(parser)
    assert parser.parse_args([]).host is None
    assert parser.parse_args(["--host", "https://x"]).host == "https://x"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal gets colours unless NO_COLOR is set; a pipe or a file gets plain text."""
    for stream, no_color, coloured in (
        (Terminal(), False, True),
        (Terminal(), True, False),
        (io.StringIO(), False, False),
    ):
        monkeypatch.delenv("NO_COLOR", raising=False)
        if no_color:
            monkeypatch.setenv("NO_COLOR", "1")
        screen = Screen(stream)
        screen.step("a step")
        screen.result(True, "a claim")
        screen.summary()
        assert ("\033[" in stream.getvalue()) is coloured


def test_a_summary_holds_only_if_every_claim_did() -> None:
    """One claim that was not observed, or no claim at all, is no success."""
    screen = Screen(io.StringIO())
    assert not screen.summary()
    screen.result(True, "one")
    assert screen.summary()
    screen.result(False, "two")
    assert not screen.summary()
