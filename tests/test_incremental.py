"""A reader decodes only what changed, an unchanged poll costs nothing, and neither is ever wrong."""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import select
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from posthog import Posthog

from shmflags import SharedMemoryFlagCache, codec, item_index, snapshot
from shmflags.demo.server import DefinitionsServer, definitions, flag
from tests import manual_host
from tests.manual_host import INTERVAL_S
from tests.support import WAIT_S, wait_until
from tests.test_codec import any_text, from_bytes, json_values, same
from tests.test_codec import definitions as any_definitions

EDITS = (
    "change", "retype", "insert", "delete", "duplicate", "shuffle", "rename", "turn",
    "cohort", "no cohort", "rename cohort", "shuffle cohorts", "cohort as flag",
    "envelope", "no envelope", "groups", "nothing",
)  # fmt: skip
edits = st.tuples(st.sampled_from(EDITS), st.integers(0, 99), any_text, json_values)


def edited(data: dict[str, Any], edit: tuple[str, int, str, Any]) -> dict[str, Any]:
    """Other definitions, made of other objects, as if they came with another answer of the API."""
    kind, number, key, value = edit
    new = copy.deepcopy(data)
    flags, cohorts = new["flags"], new["cohorts"]
    chance = random.Random(number)
    flag = flags[number % len(flags)] if flags else {}
    cohort = list(cohorts)[number % len(cohorts)] if cohorts else key
    if kind == "change":
        flag[key] = value
    elif kind == "retype":  # Equal to Python, and not the same in JSON.
        flag["number"] = {int: 1.0, float: True, bool: 1}.get(type(flag.get("number")), 1)
    elif kind == "insert":
        flags.insert(number % (len(flags) + 1), {"key": key, "value": value})
    elif kind == "delete" and flags:
        del flags[number % len(flags)]
    elif kind == "duplicate":
        flags.insert(chance.randint(0, len(flags)), copy.deepcopy(flag))
    elif kind == "shuffle":
        chance.shuffle(flags)
    elif kind == "rename" and flag:
        old = chance.choice(list(flag))
        flags[number % len(flags)] = {
            (key if name == old else name): part for name, part in flag.items()
        }
    elif kind == "turn" and flags:
        flags[number % len(flags)] = dict(reversed(flag.items()))
    elif kind == "cohort":
        cohorts[cohort if number % 2 else key] = value
    elif kind == "no cohort":
        cohorts.pop(cohort, None)
    elif kind == "rename cohort":
        new["cohorts"] = {(key if name == cohort else name): part for name, part in cohorts.items()}
    elif kind == "shuffle cohorts":
        new["cohorts"] = dict(chance.sample(list(cohorts.items()), len(cohorts)))
    elif kind == "cohort as flag":
        flags.append({cohort: cohorts.get(cohort)})
    elif kind == "envelope" and key not in {"flags", "cohorts", "group_type_mapping"}:
        new[key] = value
    elif kind == "no envelope":
        for name in set(new) - {"flags", "cohorts", "group_type_mapping"}:
            del new[name]
    elif kind == "groups":
        new["group_type_mapping"][key] = value
    return new


# -- what is decoded


@given(any_definitions, st.lists(edits, max_size=8), st.sampled_from([1, 2, 64]))
@settings(deadline=None, max_examples=120)
def test_a_chain_of_changes_decodes_to_what_was_published(
    first: dict[str, Any], changes: list[tuple[str, int, str, Any]], run: int
) -> None:
    """After any edits, what was decoded on top of the last is what is decoded from nothing.

    Whatever the length of the runs in which two indexes are compared: a few flags make several of them.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(item_index, "_RUN", run)
        _check_chain(first, changes)


def _check_chain(first: dict[str, Any], changes: list[tuple[str, int, str, Any]]) -> None:
    encoded, published = codec.encode(first)
    prompt = lagging = from_bytes(encoded)
    data = first
    for number, change in enumerate(changes):
        data = edited(data, change)
        encoded, adopted = codec.encode(data, published)
        assert encoded == codec.encode(data)[0]
        before, prompt = prompt, from_bytes(encoded, prompt)
        assert same(prompt.definitions, data)
        assert same(from_bytes(encoded).definitions, data)
        _check_reuse(before.definitions, prompt.definitions)
        # A reader that missed some, and a publisher that is deposed and reads.
        if number % 3 == 2:
            lagging = from_bytes(encoded, lagging)
            assert same(lagging.definitions, data)
        assert same(from_bytes(encoded, published).definitions, data)
        published = adopted


def _check_reuse(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Each flag and cohort that was there before is the same object; the list itself is a new one.

    If a flag is there twice for the first time, its double may be another object.
    """
    assert after["flags"] is not before["flags"]
    for one in after["flags"]:
        olds = [old for old in before["flags"] if same(old, one)]
        news = [new for new in after["flags"] if same(new, one)]
        assert sum(any(new is old for old in olds) for new in news) >= min(len(olds), len(news))
    for key, one in after["cohorts"].items():
        if key in before["cohorts"] and same(before["cohorts"][key], one):
            assert one is before["cohorts"][key]


@given(any_definitions, st.lists(st.tuples(edits, st.booleans(), st.booleans()), max_size=6))
@settings(deadline=None, max_examples=40)
def test_get_is_what_was_published_last(
    first: dict[str, Any], rounds: list[tuple[tuple[str, int, str, Any], bool, bool]]
) -> None:
    """Through the files: readers that read always, now and then, and for the first time all get the same."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        os.chmod(path, 0o700)
        group = Group(Path(path))
        leader, follower, lazy = group.worker(), group.worker(), group.worker()
        data = first
        for change, lazy_reads, leader_changes in [((EDITS[-1], 0, "", 0), True, False), *rounds]:
            data = edited(data, change)
            group.machine.pass_time(INTERVAL_S)
            if leader_changes:
                leader.shutdown()
                leader, follower = follower, group.worker()
            assert leader.should_fetch_flag_definitions() is True
            leader.on_flag_definitions_received(copy.deepcopy(data))
            for cache in [leader, follower, group.worker(), *([lazy] if lazy_reads else [])]:
                assert cache.should_fetch_flag_definitions() is False
                assert same(cache.get_flag_definitions(), data)


def test_one_changed_flag_is_one_new_object(directory: Path) -> None:
    """Of a thousand flags one changes: the reader makes that one anew, and keeps all other objects."""
    group = Group(directory)
    leader, follower = group.worker(), group.worker()
    keys = [f"flag {number}" for number in range(1000)]
    group.publish(leader, definitions(*(flag(key) for key in keys), cohorts={"1": {"type": "OR"}}))
    before = follower.get_flag_definitions()
    changed = definitions(
        *(flag(key, on=key != "flag 500") for key in keys), cohorts={"1": {"type": "OR"}}
    )
    group.publish(leader, changed)
    after = follower.get_flag_definitions()
    assert same(after, changed)
    anew = [
        new["key"] for old, new in zip(before["flags"], after["flags"], strict=True) if old is not new
    ]
    assert anew == ["flag 500"]
    assert after["cohorts"]["1"] is before["cohorts"]["1"]
    assert follower.get_flag_definitions() is after


def test_no_collection_interrupts_a_first_read(directory: Path) -> None:
    """While thousands of objects are made the cyclic collector stands still; it looks at them once, after."""
    group = Group(directory)
    leader, follower = group.worker(), group.worker()
    group.publish(leader, definitions(*(flag(f"flag {number}") for number in range(2000))))
    collections: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        collections.append(phase)

    follower.should_fetch_flag_definitions()
    assert gc.isenabled()
    gc.collect()
    gc.callbacks.append(note)
    try:
        follower.get_flag_definitions()
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled()
    # One, put off until the pause was over; without the pause some fifty.
    assert collections.count("start") <= 1


# -- the traps of "nothing changed"


class Group(manual_host.Group):
    """Workers of one service key on one machine, each publish half an interval after the last."""

    def publish(self, cache: SharedMemoryFlagCache, data: dict[str, Any]) -> None:
        self.machine.pass_time(INTERVAL_S / 2)
        assert cache.should_fetch_flag_definitions() is True
        cache.on_flag_definitions_received(data)


@pytest.fixture
def group(directory: Path) -> Group:
    return Group(directory)


MakeClient = Callable[[SharedMemoryFlagCache], Posthog]


@pytest.fixture
def make_client(server: DefinitionsServer) -> Iterator[MakeClient]:
    """Makes real clients of the server, which nobody else polls with; not attached."""
    made: list[Posthog] = []

    def make(cache: SharedMemoryFlagCache) -> Posthog:
        client = Posthog(
            "phc_test",
            host=server.url,
            secret_key="phx_test",
            poll_interval=int(INTERVAL_S),
            flag_definition_cache_provider=cache,
            sync_mode=True,
        )
        made.append(client)
        return client

    yield make
    while made:
        made.pop().shutdown()


def test_an_empty_list_is_no_reason_to_fetch(
    server: DefinitionsServer, group: Group, make_client: MakeClient
) -> None:
    """A project without flags: attached clients are handed the empty list at each poll, and never fetch."""
    server.set_definitions(definitions())
    for cache in (group.worker(), group.worker()):
        client = make_client(cache)
        cache.attach(client, watch=False)
        for _ in range(3):
            client._load_feature_flags()
            assert client.feature_flags == []
        assert cache.get_flag_definitions() == definitions(
            minimal_flag_called_events=False, property_matching_version=1
        )
    assert server.count == 1


def attached(make_client: MakeClient, *caches: SharedMemoryFlagCache) -> list[Posthog]:
    """A client of each cache, attached to it and loaded, one after the other."""
    clients = [make_client(cache) for cache in caches]
    for cache, client in zip(caches, clients, strict=True):
        cache.attach(client, watch=False)
        client._load_feature_flags()
    return clients


@pytest.mark.parametrize("status", [401, 402])
def test_a_client_whose_flags_were_cleared_gets_them_back(
    server: DefinitionsServer, group: Group, make_client: MakeClient, status: int
) -> None:
    """A 401 or 402 empties the leader's client; its next poll hands it the snapshot, without a request."""
    leader, follower = group.worker(), group.worker()
    clients = attached(make_client, leader, follower)
    assert leader.get_flag_definitions() is None
    server.fail(status)
    group.machine.pass_time(INTERVAL_S / 2)
    clients[0]._load_feature_flags()
    assert clients[0].feature_flags == []
    for client in clients:
        client._load_feature_flags()
        assert [one["key"] for one in client.feature_flags] == ["one"]
    assert server.count == 2
    assert leader.get_flag_definitions() is None


def test_one_live_client_per_cache(
    server: DefinitionsServer, group: Group, make_client: MakeClient
) -> None:
    """A second live client is refused; when the first is gone, the next is handed the flags, not None."""
    cache = group.worker()
    first = Posthog("phc_test", host=server.url, secret_key="phx_test", flag_definition_cache_provider=cache,
                    sync_mode=True)  # fmt: skip
    cache.attach(first, watch=False)
    first._load_feature_flags()
    assert cache.get_flag_definitions() is None
    second = make_client(cache)
    with pytest.raises(ValueError, match="one cache per client"):
        cache.attach(second)
    first.shutdown = lambda: None  # Only the object goes; the cache lives on.
    del first
    gc.collect()
    cache.attach(second, watch=False)
    second._load_feature_flags()
    assert [one["key"] for one in second.feature_flags] == ["one"]
    assert server.count == 1


def test_two_caches_in_one_process_serve_their_own_clients(
    server: DefinitionsServer, group: Group, make_client: MakeClient
) -> None:
    """Each client evaluates from the list that its own cache handed out, and each is told "unchanged"."""
    caches = [group.worker(), group.worker()]
    clients = [make_client(cache) for cache in caches]
    for _ in range(2):
        for cache, client in zip(caches, clients, strict=True):
            cache.attach(client, watch=False)
            client._load_feature_flags()
            assert cache.get_flag_definitions() is None
    assert clients[0].feature_flags is not clients[1].feature_flags
    assert same(clients[0].feature_flags, clients[1].feature_flags)
    assert server.count == 1


def test_eight_threads_share_one_first_load(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads that read at once get one set of objects, decoded once."""
    leader, follower = group.worker(), group.worker()
    group.publish(leader, definitions(*(flag(f"flag {number}") for number in range(200))))
    all_ready = threading.Barrier(8)
    about_to_read: list[int] = []
    reads: list[int] = []
    read = snapshot.read

    def counted(*arguments: Any) -> snapshot.Snapshot:
        reads.append(threading.get_ident())
        wait_until(lambda: len(about_to_read) == 8, "all threads want to read")
        return read(*arguments)

    monkeypatch.setattr(snapshot, "read", counted)
    assert follower.should_fetch_flag_definitions() is False
    found: list[Any] = []

    def get() -> None:
        all_ready.wait(WAIT_S)
        about_to_read.append(threading.get_ident())
        found.append(follower.get_flag_definitions())

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(found) == 8
    assert all(one is found[0] for one in found)
    assert len(reads) == 1


def test_a_grant_in_between_changes_nothing_that_did_not_change(
    server: DefinitionsServer, group: Group, make_client: MakeClient
) -> None:
    """A fetch that is answered with 304 leaves list and "unchanged" as they were; a 200 replaces both."""
    leader, follower = group.worker(), group.worker()
    clients = attached(make_client, leader, follower)
    lists = [client.feature_flags for client in clients]
    group.machine.pass_time(INTERVAL_S / 2)
    for client in clients:
        client._load_feature_flags()
    assert server.not_modified == 1
    assert [client.feature_flags for client in clients] == lists
    assert all(client.feature_flags is one for client, one in zip(clients, lists, strict=True))
    assert leader.get_flag_definitions() is follower.get_flag_definitions() is None
    server.set_definitions(definitions(flag("one"), flag("two")))
    group.machine.pass_time(INTERVAL_S / 2)
    for client in clients:
        client._load_feature_flags()
        assert [one["key"] for one in client.feature_flags] == ["one", "two"]
    assert leader.get_flag_definitions() is follower.get_flag_definitions() is None
    assert clients[1].feature_flags[0] is lists[1][0]
    assert server.full == 2


# -- forks, with real processes


def test_a_fork_between_two_polls(
    server: DefinitionsServer, directory: Path, make_client: MakeClient
) -> None:
    """A child is told "unchanged" like its parent, and decodes a later change on top of its parent's objects."""
    leader = SharedMemoryFlagCache("test", directory=directory, poll_interval=0.1)
    cache = SharedMemoryFlagCache("test", directory=directory, poll_interval=INTERVAL_S)
    wait_until(leader.should_fetch_flag_definitions, "the leader is told to fetch")
    leader.on_flag_definitions_received(definitions(flag("same"), flag("other")))
    client = make_client(cache)
    cache.attach(client, watch=False)
    client._load_feature_flags()
    held = client.feature_flags

    def child(go: Callable[[], None]) -> dict[str, bool]:
        client._load_feature_flags()
        unchanged = client.feature_flags is held
        go()
        client._load_feature_flags()
        return {
            "unchanged": unchanged,
            "changed": [one["active"] for one in client.feature_flags] == [True, False],
            "kept": client.feature_flags[0] is held[0],
            "free again": cache.get_flag_definitions() is None,
        }

    def change() -> None:
        wait_until(leader.should_fetch_flag_definitions, "the leader is told to fetch")
        leader.on_flag_definitions_received(definitions(flag("same"), flag("other", on=False)))

    assert set(forked(child, change).values()) == {True}
    assert client.feature_flags is held
    assert server.count == 0


def test_children_keep_what_the_master_fetched(
    server: DefinitionsServer, directory: Path, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded in the master, which fetched: its children poll without reading, from the master's very objects."""
    cache = SharedMemoryFlagCache("test", directory=directory, poll_interval=INTERVAL_S)
    client = make_client(cache)
    cache.attach(client, watch=False)
    client._load_feature_flags()
    held = client.feature_flags
    reads: list[bool] = []
    read = snapshot.read

    def counted(*arguments: Any) -> snapshot.Snapshot:
        reads.append(True)
        return read(*arguments)

    monkeypatch.setattr(snapshot, "read", counted)

    def child(go: Callable[[], None]) -> dict[str, bool]:
        for _ in range(3):
            client._load_feature_flags()
        return {"same list": client.feature_flags is held, "no reads": not reads}

    for _ in range(2):
        assert set(forked(child, lambda: None).values()) == {True}
    assert server.count == 1


def forked(child: Callable[[Callable[[], None]], dict[str, bool]], between: Callable[[], None]) -> Any:
    """What `child` returns in a forked process; when it calls `go()`, `between` is run here first."""
    ready_here, ready_there = os.pipe()
    go_there, go_here = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # The server is a thread of this process.
        pid = os.fork()
    if not pid:
        status = 1
        try:

            def go() -> None:
                os.write(ready_there, b"\n")
                os.read(go_there, 1)

            os.write(ready_there, json.dumps(child(go)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(ready_there)
    os.close(go_there)
    text = b""
    try:
        while select.select([ready_here], [], [], WAIT_S)[0] and (part := os.read(ready_here, 4096)):
            text += part
            if part == b"\n":
                between()
                os.write(go_here, b"\n")
    finally:
        os.close(ready_here)
        os.close(go_here)
        try:
            os.kill(pid, 9)  # It has ended, or it hangs.
        finally:
            _, status = os.waitpid(pid, 0)
    assert text, f"the child said nothing and ended with status {status}"
    return json.loads(text)
