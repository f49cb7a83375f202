"""The benchmarks run, and print what the README quotes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import data, frame, report
from bench.contestants import TITLES
from bench.frame import OURS, Goal, Measurement, Row
from tests.support import require_program

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "results.json"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env={**os.environ, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("question", "contestants", "rows"),
    [
        pytest.param(
            "import_time", "shmflags", ["import shmflags", "import posthog"], marks=pytest.mark.thorough
        ),
        ("worker_startup", "shmflags,sdk", ["requests until 8 workers have flags", "p99"]),
        pytest.param(
            "memory",
            "shmflags",
            ["client loaded before the fork, gc.freeze()"],
            marks=pytest.mark.thorough,
        ),
        ("propagation", "shmflags", ["from a change at the API to all 8 workers"]),
        ("failover", "shmflags", ["from the leader's SIGKILL to new flags in all others"]),
        pytest.param(
            "watching",
            "shmflags",
            ["with a watcher, at rest", "from a publish to all of 16", "until one of 16"],
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "cluster",
            "shmflags,redis",
            ["2 hosts: full requests to the API until all have flags"],
            marks=pytest.mark.long,
        ),
        pytest.param(
            "growth",
            "shmflags",
            ["the SDK's whole poll, nothing changed, 10 flags", "poll among 4 workers"],
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_each_question_is_answered(
    tmp_path: Path, question: str, contestants: str, rows: list[str], thorough: bool
) -> None:
    """A quick run prints the question's rows and writes the same measurements as JSON."""
    if "redis" in contestants:
        require_program("redis-server")
    told = ["--quick", "--only", question, "--contestants", contestants, "--into", os.fspath(tmp_path)]
    done = bench(*told)
    assert frame.question(question).TITLE in done.stdout
    for row in rows:
        assert row in done.stdout
    assert "Measured on" in done.stdout
    assert f"{question}: " in done.stderr
    results, around = report.from_json((tmp_path / "results.json").read_text())
    assert around["quick"] is True
    assert around["versions"]["posthog"]
    assert {found.question for found in results} == {question}
    assert {found.contestant for found in results} >= set(contestants.split(","))
    assert all(found.samples for found in results)
    if thorough or question == "failover":
        again = bench("--only", question, "--from", os.fspath(tmp_path / "results.json"))
        assert again.stdout == done.stdout


@pytest.mark.long
def test_each_rival_takes_part(tmp_path: Path, thorough: bool) -> None:
    """The alternatives are real: each publishes, is read, and costs more than nothing.

    All of them take part in continuous integration, else one.
    """
    rivals = ("redis", "lmdb", "diskcache", "file") if thorough else ("lmdb",)
    if "redis" in rivals:
        require_program("redis-server")
    told = ["--contestants", ",".join((OURS, "sdk", *rivals)), "--into", os.fspath(tmp_path)]
    done = bench("--quick", "--only", "publish,poll", *told)
    for row in (
        "the SDK's whole poll, nothing changed, 100 flags, attached",
        "a process's first read, 100 flags",
        "publish, one flag of 1,000 changed",
        "json.dumps",
    ):
        assert row in done.stdout
    results, _ = report.from_json((tmp_path / "results.json").read_text())
    for question, case, flags in (
        ("poll", "client", 100),
        ("poll", "calls", 100),
        ("poll", "change", 100),
        ("poll", "first", 100),
        ("publish", "publish", 1000),
    ):
        medians = results.medians(question, case, flags=flags)
        assert {name for name, median in medians.items() if median > 0} >= {OURS, *rivals}
    printed = bench("--json", "--from", os.fspath(tmp_path / "results.json")).stdout
    assert json.loads(printed) == json.loads((tmp_path / "results.json").read_text())


@pytest.mark.parametrize("preload", ["--preload", "--no-preload"])
def test_worker_startup_takes_your_definitions(tmp_path: Path, preload: str) -> None:
    """`python -m bench worker_startup` starts so many workers with a file of definitions."""
    path = tmp_path / "definitions.json"
    path.write_text(json.dumps({"flags": data.make(20)["flags"]}))
    told = ["--definitions", os.fspath(path), "--workers", "3", "--latency", "0.05", "--rounds", "1"]
    done = bench("worker_startup", *told, preload)
    assert "3 workers, 20 flags" in done.stdout
    lines = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()[2:]}
    assert list(lines) == ["shmflags", "SDK alone"]
    assert lines["shmflags"][1] == "1"
    assert lines["SDK alone"][2] == ("1" if preload == "--preload" else "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "no such question: speed; there are poll"),
        (["--contestants", "memcached"], "no such contestant: memcached; there are shmflags"),
        (["worker_startup", "--contestants", "x"], "no such contestant: x; there are shmflags"),
    ],
    ids=["question", "contestant", "startup"],
)
def test_what_there_is_not_is_named(arguments: list[str], message: str) -> None:
    """A question or contestant that does not exist is refused, with those that do."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_the_definitions_are_the_same_everywhere() -> None:
    """1.2 KB of JSON a flag, a fifth as many cohorts, and the same for the same number and seed."""
    made = data.make(1000)
    assert made == data.make(1000)
    assert made != data.make(1000, seed=2)
    assert 1150 < len(json.dumps(made)) / 1000 < 1250
    assert len(made["cohorts"]) == 200
    assert len({flag["key"] for flag in made["flags"]}) == 1000
    changed = data.change_one_flag(data.make(1000), 3)
    differing = [old for old, new in zip(made["flags"], changed["flags"], strict=True) if old != new]
    assert len(differing) == 1
    assert changed["cohorts"] == made["cohorts"]


def test_definitions_are_made_once_for_all_processes_of_a_run() -> None:
    """Those who make them later, in other processes too, read a file, and each has its own objects."""
    with data.made_once():
        first, again = data.make(10), data.make(10)
        assert first == again and first["flags"][0] is not again["flags"][0]
        (kept,) = Path(os.environ[data._KEPT_IN]).iterdir()
        kept.write_text(json.dumps({"flags": [], "from": "the file"}))
        told = "from bench import data; print(data.make(10)['from'])"
        done = subprocess.run(
            [sys.executable, "-c", told], capture_output=True, text=True, cwd=ROOT, timeout=60
        )
        assert done.stdout == "the file\n"
    assert not kept.exists()
    assert data.make(10) == first


def test_goals_and_ratios() -> None:
    """A goal is met, missed or not measured; a ratio says how many times ours the other takes."""
    row = Row("a poll", "s", {OURS: 0.0625, "lmdb": 125.0}, {"json.dumps": 0.125})
    assert Goal(limit=0.0625).is_met(row) is True
    assert Goal(limit=0.0624).is_met(row) is False
    assert Goal(times=2000, than="lmdb").is_met(row) is True
    assert Goal(times=2001, than="lmdb").is_met(row) is False
    assert Goal(times=2, than="json.dumps").is_met(row) is True
    assert Goal(times=2, than="redis").is_met(row) is None
    assert report._cell(row, OURS) == "62 ms"
    assert report._cell(row, "lmdb") == "125 s (2,000x)"
    measured = Measurement("poll", "client", OURS, "s", tuple(float(n) for n in range(1, 101)))
    assert (measured.median(), measured.percentile(50), measured.percentile(99)) == (50.5, 50, 99)


def test_the_readme_quotes_the_results() -> None:
    """What stands in the README is what the bench prints from the results that lie beside it."""
    readme = (ROOT / "README.md").read_text()
    printed = bench("--markdown", "--from", os.fspath(RESULTS)).stdout
    assert printed in readme
    results, around = report.from_json(RESULTS.read_text())
    assert around["quick"] is False
    assert {found.contestant for found in results} >= set(TITLES)
    for line in printed.splitlines():
        if line.startswith("!["):
            assert (ROOT / line.partition("](")[2].rstrip(")")).is_file()
