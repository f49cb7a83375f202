"""Many hosts: what do the API and Redis have to bear, and how long until all workers agree?

PostHog's way has every worker talk to Redis. Ours has one worker per host do so, for all of them. Redis
counts its commands and bytes itself; those within scripts count as commands too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from bench import contestants, data, fleet, roles
from bench.contestants import Place
from bench.frame import OURS, Goal, Measurement, Options, Plot, Results, Row, Step
from bench.processes import Process, scratch_directory
from bench.redis_server import redis_server
from shmflags.demo.server import DefinitionsServer
from shmflags.diagnosis import count

TITLE = "Hosts of 8 workers, one Redis, API at 200 ms, poll interval 2 s"
WORKERS = 8
_FLAGS = 100
_POLL_INTERVAL_S = 2.0
_LATENCY_S = 0.2
_PATIENCE_S = 60.0
_CASES = (
    ("start", "full requests to the API until all have flags"),
    ("requests", "requests to the API per poll interval"),
    ("commands", "commands to Redis per poll interval"),
    ("kilobytes", "kB to and from Redis per poll interval"),
    ("agree", "from a change at the API until all workers agree"),
)


def steps(options: Options) -> list[Step]:
    if not {"redis", OURS} <= set(contestants.available()):
        return []
    sizes = (2,) if options.quick else (1, 4, 16)
    rounds, intervals = (1, 1) if options.quick else (2, 3)
    return [
        Step(f"{hosts} hosts, {name}", partial(runs, name, hosts, rounds, intervals))
        for hosts in sizes
        for name in (OURS, "redis")
    ]


def runs(name: str, hosts: int, rounds: int, intervals: int) -> Iterator[Measurement]:
    """Start so many hosts at once, let them poll, and change a flag, at any time within an interval."""
    definitions = data.make(_FLAGS)
    key = definitions["flags"][0]["key"]
    with ExitStack() as stack:
        server = stack.enter_context(DefinitionsServer(definitions, latency_s=_LATENCY_S))
        url = stack.enter_context(redis_server())
        base = Path(stack.enter_context(scratch_directory()))
        master = stack.enter_context(Process())
        master.call("bench.cluster:prepare")
        master.fork(hosts * WORKERS)
        for host in range(hosts):
            (base / str(host)).mkdir()
        places = [Place(str(base / str(host)), url).to_json() for host in range(hosts)]
        master.call("bench.cluster:place_workers", places=places)
        master.call_workers("bench.cluster:start", name=name, url=server.url, key=key)
        # On a slow machine the start takes many intervals, in each of which a poll is due: of the
        # herd there is or is not, the full requests tell.
        found: dict[str, list[float]] = {"start": [server.full], "agree": []}
        time.sleep(_POLL_INTERVAL_S)  # The start is over for whoever came last.
        before, asked = master.call("bench.cluster:redis_counters", url=url), server.count
        time.sleep(intervals * _POLL_INTERVAL_S)
        after = master.call("bench.cluster:redis_counters", url=url)
        found["requests"] = [(server.count - asked) / intervals]
        for case in ("commands", "kilobytes"):
            found[case] = [(after[case] - before[case]) / intervals]
        for number in range(rounds):
            time.sleep(_POLL_INTERVAL_S * number / rounds)
            definitions["flags"][0]["name"] = f"round {number}"
            changed_s = time.monotonic()
            server.set_definitions(definitions)
            seen_s = master.call_workers(
                "bench.roles:see", key=key, name=f"round {number}", timeout_s=_PATIENCE_S
            )
            found["agree"].append(max(seen_s) - changed_s)
    for case, samples in found.items():
        unit = "s" if case == "agree" else ""
        yield Measurement("cluster", case, name, unit, tuple(samples), _FLAGS, hosts * WORKERS)


def rows(results: Results) -> list[Row]:
    found = []
    for workers in results.worker_counts("cluster", "start"):
        hosts = workers // WORKERS
        for case, what in _CASES:
            values = results.medians("cluster", case, workers=workers)
            rounded = {name: float(f"{value:.3g}") for name, value in values.items()}
            goals = (Goal(limit=1),) if case == "start" else ()
            unit = "s" if case == "agree" else ""
            in_readme = hosts == max(results.worker_counts("cluster", "start")) // WORKERS
            where = count(hosts, "host")
            found.append(Row(f"{where}: {what}", unit, rounded, goals=goals, in_readme=in_readme))
    return found


def plots(results: Results) -> list[Plot]:
    counts = results.worker_counts("cluster", "commands")
    if len(counts) < 2:
        return []
    lines = {
        contestants.TITLES[name]: tuple(
            (float(workers), results.medians("cluster", "commands", workers=workers)[name])
            for workers in counts
        )
        for name in (OURS, "redis")
    }
    title = "Commands to Redis per poll interval, hosts of 8 workers"
    return [Plot("cluster", title, "workers", "commands", lines)]


# -- called in the master and in its workers

_place: dict[str, str] = {}


def prepare() -> None:
    """Import what the workers need."""
    import posthog
    import redis

    import shmflags.redis
    from bench.contestants import redis_json

    assert all((posthog, redis, shmflags, redis_json))
    fleet.freeze()


def place_workers(places: list[dict[str, str]]) -> None:
    """Tell each worker on which host it is."""
    for number in range(len(places) * WORKERS):
        fleet.call(number, "bench.cluster:be_at", place=places[number // WORKERS])


def be_at(place: dict[str, str]) -> None:
    _place.update(place)


def start(name: str, url: str, key: str) -> None:
    """Make provider and client, as a worker that starts, and evaluate."""
    roles.use_provider(_provider(name))
    roles.open_client(url, _FLAGS, poll_interval_s=_POLL_INTERVAL_S)
    roles.evaluate(key)


def _provider(name: str) -> Any:
    if name != OURS:
        return contestants.make(name, _place, _POLL_INTERVAL_S)
    import redis

    from shmflags import SharedMemoryFlagCache
    from shmflags.redis import RedisFlagCache

    client = redis.Redis.from_url(_place["redis_url"])
    return SharedMemoryFlagCache(
        "bench",
        directory=_place["directory"],
        poll_interval=_POLL_INTERVAL_S,
        # A hundred interpreters that start on a few cores are slower than any API.
        cold_start_timeout=_PATIENCE_S,
        upstream=RedisFlagCache(client, "bench", poll_interval=_POLL_INTERVAL_S),
    )


def redis_counters(url: str) -> dict[str, float]:
    import redis

    with redis.Redis.from_url(url) as client:
        told: Any = client.info("stats")
    moved = told["total_net_input_bytes"] + told["total_net_output_bytes"]
    return {"commands": told["total_commands_processed"], "kilobytes": moved / 1000}
