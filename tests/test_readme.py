"""The documents: every command and code block is run, every relative link leads somewhere."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from shmflags.demo.server import DefinitionsServer, definitions, flag
from tests.redis_program import RedisProgram

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "tests" / "servers" / "recipes"
DOCUMENTS = sorted(ROOT.glob("*.md"))
HEADING = re.compile(r"^## (.*)$", re.MULTILINE)
SHOWN_ONLY = ("text", "console")
"""Blocks of these kinds are pictures, or what a command prints; they are not to be run."""


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(document.name, text.count("\n", 0, match.start()) + 1, match[1], match[2])


ALL_BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
RECIPE_TEXTS = {
    path.read_text(encoding="utf-8").strip() for path in RECIPES.iterdir() if path.is_file()
}


def is_set_up(block: Block) -> bool:
    """The two commands at the top, each of which makes an environment of its own, and a checkout's others."""
    return "-m venv" in block.text or ".venv/bin" in block.text


def is_to_be_run(block: Block) -> bool:
    return (
        block.language in ("python", "bash")
        and block.text.strip() not in RECIPE_TEXTS
        and not is_set_up(block)
    )


def sections() -> Iterator[tuple[str, list[Block]]]:
    """The blocks that are to be run, by section of their document: one may go on where another ended."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        starts, titles = [0], ["top"]
        for heading in HEADING.finditer(text):
            starts.append(text.count("\n", 0, heading.start()) + 1)
            titles.append(heading[1])
        for title, start, end in zip(titles, starts, [*starts[1:], 1 << 30], strict=True):
            found = [block for block in blocks(document) if start <= block.line < end]
            wanted = [block for block in found if is_to_be_run(block)]
            if wanted:
                yield f"{document.name}: {title}", wanted


@pytest.fixture
def environment(directory: Path) -> Iterator[dict[str, str]]:
    """What a user's shell has: the keys, a directory of its own, this interpreter's programs."""
    with DefinitionsServer(definitions(flag("my-flag"), flag("cheaper"))) as server:
        yield {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "error",
            "SHMFLAGS_DIR": str(directory),
            "POSTHOG_HOST": server.url,
            "POSTHOG_PROJECT_API_KEY": "phc_test",
            "POSTHOG_SECRET_KEY": "phx_test",
            "NO_PROXY": "*",
        }


def run(command: list[str], environment: dict[str, str], at: Path) -> str:
    done = subprocess.run(
        command,
        env=environment,
        cwd=at,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_block_says_what_it_is() -> None:
    """Each block names a language for which there is a way to check it."""
    known = {"python", "bash", "ini", "yaml", *SHOWN_ONLY}
    assert [block.name for block in ALL_BLOCKS if block.language not in known] == []
    assert len([block for block in ALL_BLOCKS if block.document == "README.md"]) >= 10


@pytest.mark.parametrize(("title", "story"), list(sections()), ids=lambda value: str(value)[:40])
def test_the_blocks_of_a_section_run(
    title: str, story: list[Block], environment: dict[str, str], tmp_path: Path
) -> None:
    """The commands and programs of a section run as they stand, one after the other, in an empty directory."""
    if title.endswith("On call"):
        (start,) = [found for name, found in sections() if "Local development" in name]
        story = [start[0], *story]
    if any("REDIS_URL" in block.text for block in story):
        with RedisProgram() as program:
            url = f"redis://127.0.0.1:{program.port}/0"
            run_all(story, {**environment, "REDIS_URL": url, "FLAGS_DIR": str(tmp_path)}, tmp_path)
    else:
        run_all(story, environment, tmp_path)


def run_all(story: list[Block], environment: dict[str, str], at: Path) -> None:
    for block in story:
        if block.language == "python":
            run([sys.executable, "-c", block.text], environment, at)
        else:
            run(["bash", "-euo", "pipefail", "-c", block.text], environment, at)


def test_configuration_blocks_say_what_is_meant() -> None:
    """A block for uWSGI is a recipe; one for Kubernetes mounts the directory that it names, in memory."""
    for block in ALL_BLOCKS:
        if block.language == "ini":
            assert block.text.strip() in RECIPE_TEXTS, block.name
        elif block.language == "yaml":
            pod = yaml.safe_load(block.text)["spec"]
            (volume,) = pod["volumes"]
            assert volume["emptyDir"]["medium"] == "Memory"
            for container in pod["containers"]:
                (mount,) = container["volumeMounts"]
                assert mount["name"] == volume["name"]
                assert {"name": "SHMFLAGS_DIR", "value": mount["mountPath"]} in container["env"]


def test_every_recipe_is_shown() -> None:
    """What the tests of the servers run is what the README tells users to write."""
    shown = {block.text.strip() for block in ALL_BLOCKS}
    missing = [path.name for path in RECIPES.glob("*.*") if path.read_text().strip() not in shown]
    assert missing == []


@pytest.mark.long
def test_the_first_command_sets_up_and_runs_the_demo(
    environment: dict[str, str], tmp_path: Path, thorough: bool
) -> None:
    """The first command of the README works from a fresh checkout, and leaves a working environment.

    Its set-up is done in continuous integration; else the demo runs in the environment of the tests.
    """
    command = next(b.text for b in blocks(ROOT / "README.md") if b.language == "bash")
    assert "shmflags demo" in command
    assert command.count("\n") == 1, "it is one line to paste"
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(ROOT / "shmflags", checkout / "shmflags")
    del environment["PYTHONPATH"], environment["PYTHONWARNINGS"], environment["SHMFLAGS_DIR"]
    if not thorough:
        assert re.match(r"python3 -m venv \.venv && \.venv/bin/pip install .* && ", command)
        (checkout / ".venv").symlink_to(sys.prefix)
        command = command.split(" && ")[-1]
    shown = run(["bash", "-euo", "pipefail", "-c", command], environment, checkout)
    assert "PASS" in shown
    assert "FAIL" not in shown


def test_the_second_command_is_what_is_checked() -> None:
    """The second command of the README sets up and runs the tests; continuous integration runs that line."""
    second = [b for b in blocks(ROOT / "README.md") if b.language == "bash"][1]
    assert second.text.count("\n") == 1, "it is one line to paste"
    assert re.fullmatch(r"python3 -m venv .*-m pytest .*\n", second.text)
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in ci
    assert 'bash -euo pipefail -c "$(test_command)"' in ci


SET_UP = [
    command
    for block in ALL_BLOCKS
    if block.language == "bash" and is_set_up(block)
    for line in block.text.splitlines()
    for command in line.split(" && ")
]


COVERAGE = [command for command in SET_UP if " -m coverage " in command]


@pytest.mark.long
def test_the_commands_that_measure_coverage(environment: dict[str, str], tmp_path: Path) -> None:
    """Run, combine and report work as they stand; here they measure one file of tests, far below what is asked for."""
    environment["COVERAGE_FILE"] = os.fspath(tmp_path / ".coverage")
    for command, more in zip(
        COVERAGE, (["-n0", "tests/test_journal.py"], [], ["--fail-under=5"]), strict=True
    ):
        _, *arguments = shlex.split(command)
        shown = run([sys.executable, *arguments, *more], environment, ROOT)
    assert "shmflags/journal.py" in shown or "skipped due to complete coverage" in shown
    assert float(re.findall(r"TOTAL .* (\d+)%", shown)[0]) < 95


@pytest.mark.parametrize("command", sorted(set(SET_UP) - set(COVERAGE)))
def test_the_commands_of_a_checkout(command: str, environment: dict[str, str]) -> None:
    """What is to be typed in a checkout works: installing what there is, and running what was installed.

    The environment is the one that these tests run in; tests are only collected, and of the benchmarks
    one question is answered. What checks the style is run by continuous integration, word for word.
    """
    program, *arguments = shlex.split(command)
    if program == "python3":
        assert arguments == ["-m", "venv", ".venv"]
    elif program == ".venv/bin/pip":
        extras = re.search(r"\.\[(.*)\]", command)
        assert extras is not None
        told = importlib.metadata.metadata("shmflags").get_all("Provides-Extra") or []
        assert set(extras[1].split(",")) <= set(told)
    elif arguments[:2] == ["-m", "pytest"]:
        some = [] if any(each.startswith("tests") for each in arguments) else ["tests/test_journal.py"]
        run([sys.executable, *arguments, *some, "--collect-only", "-q", "-n0"], environment, ROOT)
    elif arguments[:2] == ["-m", "bench"]:
        few = ["--quick", "--only", "failover", "--contestants", "shmflags"]
        few += ["--into", environment["SHMFLAGS_DIR"]]
        told = arguments if len(arguments) > 2 else [*arguments, *few]
        del environment["PYTHONWARNINGS"]  # It also measures what the SDK has deprecated.
        assert "shmflags" in run([sys.executable, *told], environment, ROOT)
    elif program == ".venv/bin/shmflags":
        assert arguments == ["demo"], "which is run above"
    else:
        ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
        assert command.replace(".venv/", ".ci/venv/") in ci


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    """Each relative link names a file that is there, and a heading of it if it says so."""
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = document if not path else (document.parent / path)
        if not file.exists() or (heading and heading not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_each_fault_is_linked_to_its_test() -> None:
    """Each line of "What it survives" names tests, and each of them is in the file that it links to."""
    _, _, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## What it survives\n")
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    assert len(lines) > 30
    for line in lines[1:]:
        proof = line.split(" | ")[-1]
        named = re.findall(r"\[`(test_\w+)`\]\((tests/[\w/]+\.py)\)", proof)
        assert len(named) == max(proof.count("]("), 1), line
        for test, path in named:
            text = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"^def {test}\(", text, re.MULTILINE), f"{path} has no {test}"


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
