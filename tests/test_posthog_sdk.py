"""The real client of PostHog against a loopback server of definitions, in real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shmflags.demo.server import DefinitionsServer, definitions, flag
from tests.support import EMPTY, WAIT_S, Worker, call_all, wait_until, workers

D0 = definitions(flag("zero"))
D1 = definitions(flag("one"))
# Half of it is how long a first answer may take before it is asked for again; 32 processes that start
# together on two busy cores may need more than half a second.
INTERVAL_S = 2.0


def set_up(
    group: list[Worker],
    server: DefinitionsServer,
    directory: Path,
    *,
    attach: bool = False,
    watch: bool = True,
    poll_interval: float = 30.0,
    **cache: Any,
) -> None:
    """Give every worker a cache and a client of its own."""
    call_all(group, "make_cache", directory=str(directory), poll_interval=poll_interval, **cache)
    call_all(group, "make_client", server.url, poll_interval=poll_interval)
    if attach:
        call_all(group, "attach", watch=watch)


def requests_within(server: DefinitionsServer, seconds: float) -> int:
    first = server.requests[0].time_s
    return sum(request.time_s - first <= seconds for request in server.requests)


# -- one fetch


@pytest.mark.parametrize(
    ("count", "attach"),
    [
        pytest.param(8, False, id="8-plain"),
        pytest.param(8, True, id="8-attached", marks=pytest.mark.thorough),
        pytest.param(32, False, id="32-plain", marks=pytest.mark.thorough),
        pytest.param(32, True, id="32-attached"),
    ],
)
def test_many_workers_make_the_requests_of_one(
    server: DefinitionsServer, directory: Path, count: int, attach: bool
) -> None:
    """Workers make 4 requests in 3.5 intervals, one of them full, however many they are."""
    server.set_latency(0.2)
    interval_s = INTERVAL_S * (2 if count > 8 else 1)
    with workers(count) as group:
        set_up(
            group, server, directory, attach=attach, poll_interval=interval_s, cold_start_timeout=WAIT_S
        )
        assert call_all(group, "evaluate", "one") == [True] * count
        assert server.wait_for(lambda s: s.answered >= 4, WAIT_S)
        assert call_all(group, "evaluate", "one") == [True] * count
    assert server.full == 1
    assert requests_within(server, 3.5 * interval_s) <= 4
    assert server.remote_evaluations == 0


@pytest.mark.parametrize("loaded", [False, True], ids=["created", "loaded"])
@pytest.mark.parametrize("attach", [False, True], ids=["plain", "attached"])
def test_a_client_made_before_the_fork_serves_its_children(
    server: DefinitionsServer, directory: Path, loaded: bool, attach: bool
) -> None:
    """8 children of a process that made its client, or loaded it, cause no further full request."""
    server.set_latency(0.2)
    with workers(1) as (parent,):
        set_up(
            [parent],
            server,
            directory,
            attach=attach,
            poll_interval=INTERVAL_S,
            cold_start_timeout=WAIT_S,
        )
        if loaded:
            assert parent.call("evaluate", "one") is True
        parent.start(
            "fork", [("evaluate", ("one",)), ("evaluate_for", ("one", 2.5 * INTERVAL_S, 10))], 8
        )
        assert server.wait_for(lambda s: s.answered >= 3, WAIT_S)
        # Before the leader ends and a worker takes over that never asked the server itself.
        full = server.full
        results = parent.result()
    assert len({pid for pid, _ in results}) == 8
    assert [values[0] for _, values in results] == [True] * 8
    assert full == 1
    assert requests_within(server, 3.5 * INTERVAL_S) <= 4
    assert server.remote_evaluations == 0


# -- the contract


def test_a_follower_gets_everything_without_http(server: DefinitionsServer, directory: Path) -> None:
    """All keys of an answer, unknown ones too, reach a second process, which makes no request."""
    cohort = {"type": "AND", "values": [{"key": "plan", "type": "person", "value": "pro"}]}
    server.set_definitions(
        definitions(
            flag("one"),
            group_type_mapping={"0": "organisation"},
            cohorts={"7": cohort},
            minimal_flag_called_events=True,
            property_matching_version=2,
        )
    )
    with workers(2) as (first, second):
        set_up([first, second], server, directory)
        first.call("poll")
        assert second.call("poll") == ["one"]
        data = second.call("get")
    assert server.count == 1
    assert data["group_type_mapping"] == {"0": "organisation"}
    assert data["cohorts"] == {"7": cohort}
    assert data["minimal_flag_called_events"] is True
    assert data["property_matching_version"] == 2


def test_a_304_changes_nothing(server: DefinitionsServer, directory: Path) -> None:
    """A leader that is told "not modified" goes on leading, and everybody goes on with the same flags."""
    with workers(2) as (leader, follower):
        set_up([leader, follower], server, directory, poll_interval=0.2)
        assert leader.call("poll") == ["one"]
        assert server.wait_for(lambda s: s.answered >= 1, WAIT_S)
        assert follower.call("poll") == ["one"]
        wait_until(lambda: leader.call("poll") == ["one"] and server.not_modified >= 2, "two 304s")
        assert follower.call("poll") == ["one"]
    assert server.full == 1


def test_a_new_leader_asks_with_the_etag_of_the_last(
    server: DefinitionsServer, directory: Path
) -> None:
    """A leader that has never asked the API is told "not modified", or what is new, as the last one would be."""
    with workers(2) as (leader, successor):
        set_up([leader, successor], server, directory, attach=True, watch=False, poll_interval=0.2)
        assert leader.call("poll") == successor.call("poll") == ["one"]
        leader.kill()
        asked = server.count
        wait_until(lambda: successor.call("poll") == ["one"] and server.answered > asked, "it asks")
        assert (server.full, server.not_modified) == (1, server.count - 1)
        server.set_definitions(D0)
        wait_until(lambda: successor.call("poll") == ["zero"], "it learns of a change")
    assert server.full == 2


def test_an_api_that_refuses_the_key_leaves_the_snapshot(
    server: DefinitionsServer, directory: Path
) -> None:
    """After a 401 the leader's own flags are emptied by the SDK; followers go on with the snapshot."""
    with workers(2) as (leader, follower):
        set_up([leader, follower], server, directory, poll_interval=0.2)
        leader.call("poll")
        server.fail(401)
        wait_until(lambda: leader.call("poll") == [], "the leader is refused")
        assert follower.call("poll") == ["one"]


# -- election


def test_a_killed_leader_is_replaced_at_the_next_poll(
    server: DefinitionsServer, directory: Path
) -> None:
    """The first poll of another worker after the leader's death takes the lease, and fetches when due."""
    with workers(2) as (leader, other):
        set_up([leader, other], server, directory, poll_interval=0.2)
        leader.call("poll")
        other.call("poll")
        leader.kill()
        server.set_definitions(D1)
        other.call("poll")
        assert any("took over" in line for line in other.call("logged"))
        wait_until(lambda: other.call("poll") == ["one"] and server.count >= 2, "the other fetches")


def stop_in_a_fetch(leader: Worker, other: Worker, server: DefinitionsServer) -> None:
    """Stop a leader that was told to fetch; the other one deposes it, and publishes D1."""
    leader.call("poll")
    wait_until(lambda: leader.call("should_fetch"), "a fetch is due")
    leader.stop()
    server.set_definitions(D1)
    wait_until(lambda: other.call("poll") == ["one"] and server.count >= 2, "the other leads")


def test_a_stopped_leader_is_deposed_and_what_it_fetched_is_dropped(
    server: DefinitionsServer, directory: Path
) -> None:
    """A leader stopped during its fetch loses the lease when it ends, and its late answer is dropped."""
    with workers(2) as (leader, other):
        set_up([leader, other], server, directory, poll_interval=0.3, lease_ttl=0.6)
        stop_in_a_fetch(leader, other, server)
        leader.resume()
        leader.call("receive", D0)
        assert any("dropped" in line for line in leader.call("logged"))
        assert other.call("poll") == ["one"]


def test_a_leader_elected_again_may_not_publish_its_old_fetch(
    server: DefinitionsServer, directory: Path
) -> None:
    """Holding the lease is no argument: what was fetched before somebody else published is dropped."""
    with workers(2) as (first, other):
        set_up([first, other], server, directory, poll_interval=0.3, lease_ttl=0.6)
        stop_in_a_fetch(first, other, server)
        other.kill()
        first.resume()
        # In a thread of its own: the main one still has the old fetch in its hands.
        first.call("lead_in_another_thread")
        first.call("receive", D0)
        assert any("dropped" in line for line in first.call("logged"))
        assert [f["key"] for f in first.call("get")["flags"]] == ["one"]


def test_a_process_whose_poller_died_loses_the_lease(
    server: DefinitionsServer, directory: Path
) -> None:
    """A live process that does not poll is no leader: another takes the lease when it has run out."""
    with workers(2) as (silent, other):
        set_up([silent, other], server, directory, poll_interval=0.2, lease_ttl=0.5)
        silent.call("poll")
        wait_until(
            lambda: (
                bool(other.call("poll")) and any("run out" in line for line in other.call("logged"))
            ),
            "the other takes the lease",
        )


@pytest.mark.parametrize("raw", [False, True], ids=["hooks", "no-hooks"])
def test_a_fork_makes_no_second_leader(server: DefinitionsServer, directory: Path, raw: bool) -> None:
    """Children of a leader follow it, and their shutdown does not free its lease, hooks or no hooks."""
    with workers(2) as (leader, other):
        call_all(
            [leader, other], "make_cache", directory=str(directory), poll_interval=0.2, lease_ttl=600
        )
        assert leader.call("should_fetch") is True
        leader.call("receive", D0)
        children = leader.call(
            "fork", [("should_fetch", ()), ("get", ()), ("shutdown", ())], 3, raw=raw
        )
        for _, (should, data, _) in children:
            assert should is False
            assert data == D0
        assert other.call("should_fetch") is False
        wait_until(lambda: leader.call("should_fetch"), "the leader still leads")


@pytest.mark.parametrize("attach", [False, True], ids=["plain", "attached"])
def test_flags_that_go_back_reach_everybody(
    server: DefinitionsServer, directory: Path, attach: bool
) -> None:
    """A worker with the ETag of D0, the leader dead, flags gone D0, D1, D0: all end with D0, soon."""
    server.set_definitions(D0)
    interval = 0.4
    with workers(4) as group:
        set_up(group, server, directory, attach=attach, watch=False, poll_interval=interval)
        former, leader, *others = group
        assert former.call("poll") == ["zero"]
        former.call("shutdown_lease_only")
        assert leader.call("poll") == ["zero"]
        assert call_all(others, "poll") == [["zero"]] * 2
        server.set_definitions(D1)
        wait_until(lambda: leader.call("poll") == ["one"], "the leader fetches D1")
        wait_until(lambda: former.call("poll") == ["one"], "the former leader has D1 from the cache")
        assert call_all(others, "poll") == [["one"]] * 2
        leader.kill()
        server.set_definitions(D0)
        rest = [former, *others]
        wait_until(lambda: call_all(rest, "poll") == [["zero"]] * 3, "all have D0")


# -- cold start and outage


def test_eight_threads_wait_once_and_fetch_once(server: DefinitionsServer, directory: Path) -> None:
    """The first evaluations of 8 threads share one fetch, and all are answered rightly."""
    server.set_latency(0.3)
    with workers(1) as (worker,):
        set_up([worker], server, directory)
        assert worker.call("evaluate_in_threads", "one", 8) == [True] * 8
    assert server.count == 1


def test_when_the_fetcher_dies_one_of_those_who_wait_fetches(
    server: DefinitionsServer, directory: Path
) -> None:
    """Of 7 processes that wait for a fetcher that is killed, exactly one fetches, and all get flags."""
    server.hang()
    with workers(8) as group:
        set_up(group, server, directory, cold_start_timeout=WAIT_S)
        fetcher, *waiting = group
        fetcher.start("evaluate", "one")
        assert server.wait_for(lambda s: s.count == 1, WAIT_S)
        for worker in waiting:
            worker.start("evaluate", "one")
        fetcher.kill()
        assert server.wait_for(lambda s: s.count == 2, WAIT_S)
        server.recover()
        assert [worker.result() for worker in waiting] == [True] * 7
    assert server.count == 2


@pytest.mark.parametrize("attach", [False, True], ids=["plain", "attached"])
def test_an_outage_costs_one_request_per_half_interval(
    server: DefinitionsServer, directory: Path, attach: bool
) -> None:
    """With the API down 8 workers that evaluate all the time ask once per half interval; then they recover."""
    server.fail(503)
    interval = 1.0
    with workers(8) as group:
        set_up(group, server, directory, attach=attach, poll_interval=interval, cold_start_timeout=0.5)
        call_all(group, "evaluate_for", "one", 4.0, 20)
        times = [request.time_s for request in server.requests]
        server.recover()
        assert all(call_all(group, "until", "one", True, WAIT_S))
    assert len(times) >= 3
    # A grant is half an interval after the last; what lies between grant and arrival may vary.
    assert len(times) <= (times[-1] - times[0]) / (interval / 2) + 2


def test_nobody_waits_twice(server: DefinitionsServer, directory: Path) -> None:
    """After the one wait of a process the answer is empty definitions, at once, without a request."""
    server.hang()
    with workers(2) as (fetcher, follower):
        set_up([fetcher, follower], server, directory, cold_start_timeout=0.3)
        fetcher.start("evaluate", "one")
        assert server.wait_for(lambda s: s.count == 1, WAIT_S)
        assert follower.call("should_fetch") is False
        assert follower.call("get") == EMPTY
        waited = follower.call("slept")
        assert waited > 0
        for _ in range(5):
            assert follower.call("get") == EMPTY
        assert follower.call("slept") == waited
        assert server.count == 1
        server.recover()
        assert fetcher.result() is True


# -- attached


def test_an_attached_client_is_told_nothing_when_nothing_changed(
    server: DefinitionsServer, directory: Path
) -> None:
    """An unchanged poll of an attached client with flags answers None; a change answers definitions."""
    with workers(2) as (leader, follower):
        set_up([leader, follower], server, directory, poll_interval=0.2)
        leader.call("poll")
        follower.call("attach", watch=False)
        follower.call("poll")
        assert follower.call("should_fetch") is False
        assert follower.call("get") is None
        server.set_definitions(D0)
        wait_until(lambda: leader.call("poll") == ["zero"], "the leader fetches")
        assert follower.call("get")["flags"][0]["key"] == "zero"


def test_a_publish_reaches_attached_workers_between_polls(
    server: DefinitionsServer, directory: Path
) -> None:
    """Attached workers with an hour between polls have a change as soon as it is published."""
    with workers(5) as group:
        leader, *followers = group
        call_all(group, "make_cache", directory=str(directory), poll_interval=0.2, lease_ttl=600)
        call_all(group, "make_client", server.url, poll_interval=3600)
        leader.call("evaluate", "one")
        call_all(followers, "attach")
        call_all(followers, "evaluate", "one")
        server.set_definitions(D0)
        wait_until(lambda: leader.call("poll") == ["zero"], "the leader fetches")
        assert all(call_all(followers, "until", "zero", True, WAIT_S))


# -- crash loops


def test_a_crash_loop_costs_one_request(server: DefinitionsServer, directory: Path) -> None:
    """100 workers that start, load and are killed within half a poll interval make one request."""
    with workers(1) as (parent,):
        parent.call("make_cache", directory=str(directory), poll_interval=600)
        parent.call("make_client", server.url, poll_interval=600)
        results = parent.call("fork_and_kill", "one", 100)
    assert results == [True] * 100
    assert server.count == 1


def test_a_crash_loop_before_the_first_answer_costs_a_handful(
    server: DefinitionsServer, directory: Path
) -> None:
    """Workers killed before the API ever answered are followed by ever rarer requests."""
    server.hang()
    with workers(1) as (parent,):
        parent.call("make_cache", directory=str(directory), poll_interval=600, cold_start_timeout=0.05)
        parent.call("make_client", server.url, poll_interval=600)
        seconds = parent.call("fork_and_kill_unanswered", 100)
    # Pauses of 1, 2, 4, … seconds: as many requests as doublings fit in.
    assert server.count <= 2 + max(0, int(seconds)).bit_length()
    assert server.count >= 1
