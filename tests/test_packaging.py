"""What is installed, what it needs, and what importing it loads."""

from __future__ import annotations

import importlib.metadata
import pickle
import subprocess
import sys

from shmflags import ShmFlagsError, UnsafePathError, __version__


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
