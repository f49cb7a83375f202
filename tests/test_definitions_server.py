"""The definitions server behaves towards the real SDK as PostHog does, and counts truly."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from urllib.error import HTTPError

import pytest
from posthog import Posthog

from shmflags.demo.server import DROPPED, DefinitionsServer, definitions, flag

LONG_S = 10.0  # more than anything here takes; a wait that reaches it has failed


@pytest.fixture
def server() -> Iterator[DefinitionsServer]:
    with DefinitionsServer(definitions(flag("on"), flag("off", on=False))) as running:
        yield running


@pytest.fixture
def client(server: DefinitionsServer) -> Iterator[Posthog]:
    """A real SDK client whose own poller never comes to poll: `load_feature_flags` is a poll."""
    made = Posthog("phc_test", host=server.url, secret_key="phx_test", poll_interval=3600)
    yield made
    made.shutdown()


def locally(client: Posthog, key: str, user: str = "user", **person: str) -> object:
    flags = client.evaluate_flags(user, person_properties=person, only_evaluate_locally=True)
    return flags.get_flag(key, send_feature_flag_events=False)


def ask(server: DefinitionsServer, etag: str | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(f"{server.url}/flags/definitions?token=phc_test&send_cohorts")
    if etag is not None:
        request.add_header("If-None-Match", etag)
    try:
        with urllib.request.urlopen(request, timeout=LONG_S) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        with error:
            return error.code, error.read()


def test_the_sdk_evaluates_served_flags_locally(server: DefinitionsServer, client: Posthog) -> None:
    """The real client loads on its first evaluation and then evaluates without asking again."""
    assert locally(client, "on") is True
    assert locally(client, "off") is False
    assert locally(client, "unknown") is None
    assert (server.count, server.full, server.remote_evaluations) == (1, 1, 0)


def test_flag_helper_shapes_evaluate(server: DefinitionsServer, client: Posthog) -> None:
    """Percentages, variants, conditions and payloads made by `flag` mean what they say."""
    is_paying = {"key": "plan", "value": ["paid"], "operator": "exact", "type": "person"}
    server.set_definitions(
        definitions(
            flag("nobody", percentage=0),
            flag("some", percentage=50),
            flag("variant", variants={"blue": 100, "red": 0}, payloads={"blue": {"n": 1}}),
            flag("paying", properties=[is_paying]),
        )
    )
    assert locally(client, "nobody") is False
    assert {locally(client, "some", f"user-{number}") for number in range(40)} == {True, False}
    assert locally(client, "variant") == "blue"
    assert client.evaluate_flags("user").get_flag_payload("variant") == {"n": 1}
    assert locally(client, "paying", plan="paid") is True
    assert locally(client, "paying", plan="free") is False


def test_unchanged_definitions_are_not_sent_twice(server: DefinitionsServer, client: Posthog) -> None:
    """A poll carries the last ETag: 304 if nothing changed, 200 if so, also on a change back."""
    client.load_feature_flags()
    first_etag = server.etag
    client.load_feature_flags()
    server.set_definitions(definitions(flag("on", on=False)))
    client.load_feature_flags()
    assert locally(client, "on") is False
    server.set_definitions(definitions(flag("on"), flag("off", on=False)))
    assert server.etag == first_etag
    client.load_feature_flags()
    assert locally(client, "on") is True
    assert [request.status for request in server.requests] == [200, 304, 200, 200]
    assert [request.etag for request in server.requests][:2] == [None, first_etag]
    assert (server.full, server.not_modified, server.failed) == (3, 1, 0)


def test_records_say_when_and_who(server: DefinitionsServer, client: Posthog) -> None:
    """A record holds time of arrival, user agent and port; a process keeps its connection."""
    before = time.monotonic()
    client.load_feature_flags()
    client.load_feature_flags()
    first, second = server.requests
    assert before <= first.time_s <= second.time_s <= time.monotonic()
    assert first.peer_port == second.peer_port
    assert first.user_agent.startswith("posthog-python/")


def test_latency_delays_full_and_unmodified_answers(server: DefinitionsServer) -> None:
    """The latency passes before 200 and 304 alike, and requests wait side by side."""
    server.set_latency(0.3)
    for etag, status in ((None, 200), (server.etag, 304)):
        started = time.monotonic()
        assert ask(server, etag)[0] == status
        assert time.monotonic() - started >= 0.3
    threads = [threading.Thread(target=ask, args=(server,)) for _ in range(16)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    assert server.wait_for(lambda s: s.answered == 18, LONG_S)
    assert time.monotonic() - started < 16 * 0.3 / 2


def test_an_answer_is_settled_on_arrival(server: DefinitionsServer) -> None:
    """A request that was under way when the flags changed brings the flags of its arrival."""
    server.hang()
    answers: list[tuple[int, bytes]] = []
    thread = threading.Thread(target=lambda: answers.append(ask(server)))
    thread.start()
    assert server.wait_for(lambda s: s.count == 1, LONG_S)
    assert server.answered == 0
    server.set_definitions(definitions(flag("new")))
    server.recover()
    thread.join(LONG_S)
    assert [found["key"] for found in json.loads(answers[0][1])["flags"]] == ["on", "off"]
    assert [found["key"] for found in json.loads(ask(server)[1])["flags"]] == ["new"]


@pytest.mark.parametrize("status", [401, 402, 500, 503])
def test_failing_and_recovering(server: DefinitionsServer, client: Posthog, status: int) -> None:
    """While it fails the SDK gets the error and no flags, and after `recover` it gets them."""
    server.fail(status)
    client.load_feature_flags()
    assert locally(client, "on") is None
    assert {request.status for request in server.requests} == {status}
    assert server.failed == server.count
    server.recover()
    client.load_feature_flags()
    assert locally(client, "on") is True


def test_dropped_connections(server: DefinitionsServer, client: Posthog) -> None:
    """A dropped request is recorded as such, gives the SDK nothing, and harms no later one."""
    server.drop()
    client.load_feature_flags()
    assert [request.status for request in server.requests] == [DROPPED]
    server.recover()
    assert locally(client, "on") is True


def test_unknown_keys_and_odd_values_are_served_as_given() -> None:
    """Whatever JSON can express arrives as it was set, keys that no SDK knows included."""
    data = definitions(flag("lone \ud800 surrogate"), later={"": [1.5, 2**200, None, "é"]})
    with DefinitionsServer(data) as server:
        assert json.loads(ask(server)[1]) == data


def test_large_definitions_cost_nothing_per_request() -> None:
    """Six megabytes are encoded once: fifty requests take less time than two encodings."""
    data = definitions(*(flag(f"flag-{number}") for number in range(17_000)))
    started = time.perf_counter()
    encoded = json.dumps(data)
    encoding_s = time.perf_counter() - started
    assert len(encoded) > 6_000_000
    with DefinitionsServer(data) as server:
        etag = server.etag
        started = time.perf_counter()
        for _ in range(50):
            assert ask(server, etag) == (304, b"")
        assert time.perf_counter() - started < max(2 * encoding_s, 0.5)
        assert len(ask(server)[1]) == len(encoded)


def test_other_endpoints_are_counted_apart(server: DefinitionsServer, client: Posthog) -> None:
    """Remote evaluations and events get harmless answers and are no requests for definitions."""
    assert client.evaluate_flags("user", flag_keys=["unknown"]).get_flag("unknown") is None
    client.capture("something", distinct_id="user")
    client.flush()
    assert server.wait_for(lambda s: s.remote_evaluations == 1 and s.other_requests >= 1, LONG_S)
    assert server.count == 1


def test_wait_for_wakes_on_the_event_and_gives_up_in_time(server: DefinitionsServer) -> None:
    """`wait_for` is True as soon as the request arrives, and False when the time is over."""
    assert not server.wait_for(lambda s: s.count == 1, 0.01)
    thread = threading.Thread(target=ask, args=(server,))
    thread.start()
    assert server.wait_for(lambda s: s.answered == 1, LONG_S)
    thread.join(LONG_S)


def test_close_ends_connections_and_hung_requests() -> None:
    """After `close`, once or twice, the port refuses, and no connection or request lingers."""
    server = DefinitionsServer()
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    with (
        socket.create_connection(address, LONG_S) as idle,
        socket.create_connection(address, LONG_S) as hung,
    ):
        request = b"GET /flags/definitions HTTP/1.1\r\nHost: x\r\n\r\n"
        idle.sendall(request)
        assert idle.recv(65536).startswith(b"HTTP/1.1 200")
        server.hang()
        hung.sendall(request)
        assert server.wait_for(lambda s: s.count == 2, LONG_S)
        server.close()
        server.close()
        while idle.recv(65536):
            pass
        assert hung.recv(65536) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, LONG_S)


def test_close_refuses_also_when_a_forked_child_lives() -> None:
    """A child that inherited the listening socket does not keep a closed server accepting."""
    server = DefinitionsServer()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        os.close(reading)
        server.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), LONG_S)
    finally:
        os.close(writing)
        os.waitpid(child, 0)
