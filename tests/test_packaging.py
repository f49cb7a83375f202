"""What is installed, what it needs, and what importing it loads."""

from __future__ import annotations

import importlib.metadata
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from shmflags import ShmFlagsError, UnsafePathError, __version__

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def test_three_packages_are_needed() -> None:
    """Without extras the distribution requires filelock, msgpack and psutil, and nothing else."""
    required = importlib.metadata.requires("shmflags") or []
    plain = sorted(line.split(">")[0] for line in required if "extra ==" not in line)
    assert plain == ["filelock", "msgpack", "psutil"]


def test_the_version_stands_in_one_place() -> None:
    """The package and its metadata name the same version."""
    assert importlib.metadata.version("shmflags") == __version__


def test_importing_loads_what_is_needed_then() -> None:
    """Importing the package needs no posthog, and loads neither psutil nor filelock nor a server."""
    loaded = run(
        "import sys; sys.modules['posthog'] = None; import shmflags; "
        "print([name for name in ('psutil', 'filelock', 'redis', 'asyncio', 'gunicorn', "
        "'prometheus_client', 'http.server') if name in sys.modules])"
    )
    assert loaded == "[]"


def test_it_works_without_posthog() -> None:
    """A program that speaks the protocol itself can use the cache where posthog is not installed."""
    printed = run(
        "import sys, tempfile; sys.modules['posthog'] = None; import shmflags\n"
        "with tempfile.TemporaryDirectory() as place:\n"
        "    cache = shmflags.SharedMemoryFlagCache('k', directory=place)\n"
        "    assert cache.should_fetch_flag_definitions()\n"
        "    data = {'flags': [{'key': 'a'}], 'group_type_mapping': {}, 'cohorts': {}}\n"
        "    cache.on_flag_definitions_received(data)\n"
        "    other = shmflags.SharedMemoryFlagCache('k', directory=place)\n"
        "    print(other.should_fetch_flag_definitions(), other.get_flag_definitions() == data)\n"
    )
    assert printed == "False True"


def test_errors_survive_pickling() -> None:
    """An error that crosses a process boundary keeps its kind, path, reason and remedy."""
    error = UnsafePathError("is open to others", path="/run/x", remedy="chmod 700 it")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, UnsafePathError)
    assert isinstance(copy, ShmFlagsError)
    assert (copy.path, copy.reason, copy.remedy) == ("/run/x", "is open to others", "chmod 700 it")
    assert str(copy) == str(error) == "/run/x: is open to others (chmod 700 it)"
    assert str(ShmFlagsError("alone")) == "alone"


def test_what_is_distributed(tmp_path: Path) -> None:
    """The wheel holds the package and nothing else, typed and licensed; the sdist makes the same wheel."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "shmflags", tree / "shmflags", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", "../dist"],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    sdist, wheel = sorted((tmp_path / "dist").iterdir(), key=lambda path: path.suffix)
    package = {
        path.relative_to(tree).as_posix() for path in (tree / "shmflags").rglob("*") if path.is_file()
    }
    assert "shmflags/py.typed" in package
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert inside == package
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_workers_share_what_their_master_imports() -> None:
    """A process that forks imports filelock once, after the first fork, for all further children."""
    printed = run(
        "import os, sys, warnings; warnings.simplefilter('ignore'); import shmflags\n"
        "def has_it():\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        os._exit('filelock' in sys.modules)\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        "print(has_it(), has_it(), has_it())"
    )
    assert printed == "0 1 1"


def test_a_fork_with_no_descriptors_to_spare_is_quiet() -> None:
    """If filelock cannot be imported after a fork, the process that forked hears nothing of it."""
    program = (
        "import os, resource, warnings; warnings.simplefilter('ignore'); import shmflags\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    os._exit(0)\n"
        "print(os.waitpid(pid, 0)[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("0\n", "")
