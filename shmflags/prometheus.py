"""A Prometheus collector that reads the control page when it is scraped (extra `prometheus`).

    from prometheus_client import REGISTRY
    from shmflags.prometheus import StatusCollector

    REGISTRY.register(StatusCollector(cache))

What it reports is the host's, not the process's, and the same from every worker. So it needs no files
of its own in prometheus_client's multiprocess mode. There the registry that is served is not REGISTRY,
but one made for the scrape; register it in that one, beside what adds up the workers' files:

    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    registry.register(StatusCollector(cache))

Any process of the same user on the host can serve it, for example one that has no client.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Protocol

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "shmflags.prometheus needs prometheus_client: pip install 'shmflags[prometheus]'"
    ) from error

from shmflags.diagnosis import BEHIND, CURRENT, SILENT
from shmflags.status import Status

_COUNTERS = {
    "granted": ("shmflags_fetches_granted", "Fetches from the API that a worker was told to make."),
    "published": ("shmflags_publishes", "Publishes of changed definitions."),
    "unchanged": (
        "shmflags_unchanged_publishes",
        "Publishes of the definitions that were served already.",
    ),
    "takeovers": ("shmflags_takeovers", "Leaders replaced because they died or no longer polled."),
    "dropped": ("shmflags_dropped_writes", "Fetches not published because something newer was."),
    "damaged": ("shmflags_damaged_reads", "Snapshots that a worker found damaged or missing."),
    "repaired": ("shmflags_repairs", "Snapshots or pages that were mended."),
}
_LABEL = "service_key"


class HasStatus(Protocol):
    """What is collected from: a `SharedMemoryFlagCache`, say."""

    def status(self) -> Status: ...


class StatusCollector(Collector):
    """Reports the status of one or more caches, each with its own service key."""

    def __init__(self, *caches: HasStatus) -> None:
        self._caches = caches

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering reads nothing and no name can be taken twice by mistake."""
        return []

    def collect(self) -> Iterator[Metric]:
        statuses = [cache.status() for cache in self._caches]
        yield from _gauges(statuses)
        for field, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=[_LABEL])
            for status in statuses:
                counter.add_metric([status.name], asdict(status.counters)[field])
            yield counter
        yield _workers(statuses)


def _gauges(statuses: list[Status]) -> Iterator[Metric]:
    for name, text, value_of in (
        ("shmflags_problems", "Problems that `shmflags status` tells of.", lambda s: len(s.problems)),
        ("shmflags_leader", "1 if a worker leads, else 0.", lambda s: s.leader is not None),
        ("shmflags_term", "How often there was a new leader.", lambda s: s.term),
        (
            "shmflags_lease_left_seconds",
            "How long the leader may go without a poll.",
            lambda s: s.leader and s.leader.lease_left_s,
        ),
        ("shmflags_generation", "Number of the snapshot that is served.", lambda s: s.generation),
        ("shmflags_flags", "Flags that are served.", lambda s: s.flags),
        ("shmflags_cohorts", "Cohorts that are served.", lambda s: s.cohorts),
        ("shmflags_snapshot_bytes", "Size of the snapshot.", lambda s: s.size),
        (
            "shmflags_definitions_fetched_timestamp_seconds",
            "When definitions were last fetched whole; an answer of 304 leaves no trace.",
            lambda s: _when(s, s.age_s),
        ),
        (
            "shmflags_definitions_changed_timestamp_seconds",
            "When the definitions last changed.",
            lambda s: _when(s, s.unchanged_s),
        ),
        (
            "shmflags_last_grant_timestamp_seconds",
            "When a worker was last told to fetch.",
            lambda s: _when(s, s.since_grant_s),
        ),
    ):
        gauge = GaugeMetricFamily(name, text, labels=[_LABEL])
        for status in statuses:
            value = value_of(status)
            if value is not None:
                gauge.add_metric([status.name], float(value))
        yield gauge


def _workers(statuses: list[Status]) -> Metric:
    gauge = GaugeMetricFamily("shmflags_workers", "Workers by state.", labels=[_LABEL, "state"])
    for status in statuses:
        states = [worker.state for worker in status.workers]
        for state in (CURRENT, BEHIND, SILENT):
            gauge.add_metric([status.name, state], states.count(state))
    return gauge


def _when(status: Status, ago_s: float | None) -> float | None:
    return None if ago_s is None else round(status.at - ago_s, 3)
