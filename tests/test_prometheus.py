"""The Prometheus collector, scraped through the real prometheus_client."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families

import shmflags
from shmflags import SharedMemoryFlagCache
from shmflags.demo.server import DefinitionsServer, definitions, flag
from shmflags.prometheus import StatusCollector
from tests.support import call_all, poll_in_turn, workers
from tests.test_status import ShiftedHost

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    """Every sample of an exposition, by name and labels; none may come twice."""
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples, key
            samples[key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"shmflags_{name}", frozenset({"service_key": "test", **labels}.items())))


def registry_of(*caches: SharedMemoryFlagCache) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(StatusCollector(*caches))
    return registry


def scraped(registry: CollectorRegistry) -> Samples:
    return parsed(generate_latest(registry).decode())


def test_a_scrape_tells_what_status_tells(directory: Path, server: DefinitionsServer) -> None:
    """With two real workers every number of the status is there, under the service key."""
    cache = SharedMemoryFlagCache("test", directory=directory, role="reader")
    with workers(2) as group:
        call_all(group, "make_cache", directory=str(directory))
        call_all(group, "make_client", server.url)
        poll_in_turn(group)
        samples = scraped(registry_of(cache))
        status = cache.status()
    assert status.age_s is not None
    assert status.unchanged_s is not None
    assert status.since_grant_s is not None
    assert status.leader is not None
    assert value(samples, "problems") == 0
    assert value(samples, "leader") == 1
    assert value(samples, "term") == status.term == 1
    assert value(samples, "generation") == status.generation == 1
    assert value(samples, "flags") == status.flags == 1
    assert value(samples, "cohorts") == 0
    assert value(samples, "snapshot_bytes") == status.size
    left_s = value(samples, "lease_left_seconds")
    assert left_s is not None
    assert status.leader.lease_left_s <= left_s <= 90
    for name, ago_s in (
        ("definitions_fetched", status.age_s),
        ("definitions_changed", status.unchanged_s),
        ("last_grant", status.since_grant_s),
    ):
        when = value(samples, f"{name}_timestamp_seconds")
        assert when == pytest.approx(status.at - ago_s, abs=0.1)
    assert value(samples, "workers", state="current") == 2
    assert value(samples, "workers", state="behind") == 0
    assert value(samples, "workers", state="silent") == 0
    assert value(samples, "fetches_granted_total") == 1
    assert value(samples, "publishes_total") == 1
    for name in ("unchanged_publishes", "takeovers", "dropped_writes", "damaged_reads", "repairs"):
        assert value(samples, f"{name}_total") == 0


def test_each_scrape_reads_anew(directory: Path) -> None:
    """What happened between two scrapes is in the second one; nothing is kept."""
    cache = SharedMemoryFlagCache("test", directory=directory)
    registry = registry_of(cache)
    assert value(scraped(registry), "leader") == 0
    assert os.listdir(directory) == []
    assert cache.should_fetch_flag_definitions()
    cache.on_flag_definitions_received(definitions(flag("one"), flag("two")))
    samples = scraped(registry)
    assert (value(samples, "leader"), value(samples, "flags")) == (1, 2)
    (Path(cache.status().directory) / "snapshot").unlink()
    samples = scraped(registry)
    assert value(samples, "problems") == 1
    assert value(samples, "flags") is None


def test_ages_are_given_as_times(directory: Path) -> None:
    """Prometheus gets the times at which something happened, which do not change while nothing does."""
    cache = SharedMemoryFlagCache("test", directory=directory)
    cache._host = host = ShiftedHost()
    names = [f"{name}_timestamp_seconds" for name in ("definitions_fetched", "definitions_changed")]
    began = host.wall_ns() / 1e9
    assert cache.should_fetch_flag_definitions()
    cache.on_flag_definitions_received(definitions(flag("one")))
    host.shift_s = 1000
    assert cache.should_fetch_flag_definitions()
    samples = scraped(registry_of(cache))
    assert [value(samples, name) for name in names] == pytest.approx([began, began], abs=60)
    assert value(samples, "last_grant_timestamp_seconds") == pytest.approx(began + 1000, abs=60)
    host.shift_s = 2000
    later = scraped(registry_of(cache))
    assert [value(later, name) for name in names] == pytest.approx(
        [value(samples, name) for name in names], abs=0.01
    )


def test_several_keys_share_a_registry(directory: Path) -> None:
    """Each cache is told apart by its service key."""
    caches = [SharedMemoryFlagCache(key, directory=directory) for key in ("one", "two")]
    caches[0].should_fetch_flag_definitions()
    text = generate_latest(registry_of(*caches)).decode()
    assert 'shmflags_leader{service_key="one"} 1.0' in text
    assert 'shmflags_leader{service_key="two"} 0.0' in text
    assert text.count("# HELP shmflags_leader ") == 1


def test_it_is_served_over_http(directory: Path) -> None:
    """Registered in the registry that is served, it is in what Prometheus fetches."""
    cache = SharedMemoryFlagCache("test", directory=directory)
    cache.should_fetch_flag_definitions()
    server, thread = start_http_server(0, "127.0.0.1", registry_of(cache))
    try:
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=30) as answer:
            assert value(parsed(answer.read().decode()), "leader") == 1
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)


_WORKER = """
import sys
from prometheus_client import Counter
from shmflags import SharedMemoryFlagCache
requests = Counter("app_requests", "Requests.")
cache = SharedMemoryFlagCache("test", directory=sys.argv[1])
cache.should_fetch_flag_definitions()
requests.inc()
print("ready", flush=True)
sys.stdin.read()
"""

_SCRAPED = """
import sys
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from shmflags import SharedMemoryFlagCache
from shmflags.prometheus import StatusCollector
cache = SharedMemoryFlagCache("test", directory=sys.argv[1])
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
registry.register(StatusCollector(cache))
sys.stdout.write(generate_latest(registry).decode())
"""


def test_in_multiprocess_mode_it_needs_no_files(directory: Path, tmp_path: Path) -> None:
    """Beside the workers' added-up counters it reports the host once, and writes no file of its own."""
    environment = {
        **os.environ,
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(shmflags.__file__).parents[1]),
    }
    running: list[subprocess.Popen[str]] = []
    try:
        for _ in range(2):
            worker = subprocess.Popen(
                [sys.executable, "-c", _WORKER, str(directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            running.append(worker)
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        files = set(os.listdir(tmp_path))
        text = subprocess.run(
            [sys.executable, "-c", _SCRAPED, str(directory)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
            check=True,
        ).stdout
    finally:
        for worker in running:
            worker.communicate(timeout=60)
    samples = parsed(text)
    assert samples["app_requests_total", frozenset()] == 2
    assert value(samples, "workers", state="current") == 2
    assert files == set(os.listdir(tmp_path)) == {f"counter_{each.pid}.db" for each in running}
    for name in files:
        assert b"shmflags" not in (tmp_path / name).read_bytes()


def test_without_prometheus_client_the_extra_is_named() -> None:
    """Importing the collector without its library says what to install."""
    program = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "try:\n    import shmflags.prometheus\n"
        "except ImportError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(shmflags.__file__).parents[1])}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=True,
    )
    assert ended.stdout == (
        "shmflags.prometheus needs prometheus_client: pip install 'shmflags[prometheus]'\n"
    )
