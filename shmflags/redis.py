"""`RedisFlagCache`: PostHog's provider on Redis or Valkey, for the tier above `SharedMemoryFlagCache`.

How it is kept in Redis stands in redis_server.py; the rules are those of election.py:

1.  The leader renews its lease by polling. It may be taken when it is vacant, has run out, or ends
    further ahead than it is long (after a failover to a clock that is behind). Taking it raises the
    term.
2.  The leader is told to fetch when the last grant is half an interval old, by Redis's clock.
3.  A fetch is accepted in the term of its grant, from the process that was granted it; or if it was
    made alone, while Redis could not be used; or if there is nothing yet. But not if another one that
    was begun later has come to its end.
4.  What the client last received is what its ETag stands for. If Redis has something else, the fetch
    must bring a publish before the next poll, or the leader makes way for an interval. So it is while
    Redis has nothing.
5.  Nor does anybody lead for longer than `max_term`, as a 304 and a failure look alike.

What differs: no death can be proved from here, so a dead leader is replaced when its lease ends. But
the processes of one host that ask on its behalf (`exchange_for_host`) share a name in the cluster:
when the host's leader changes, the new one has the lease at once, in a new term.

If Redis cannot be used, a worker is on its own: it is told to fetch, once in half an interval.
"""

from __future__ import annotations

import base64
import os
import secrets
import threading
import time
from typing import Any, NamedTuple

from shmflags import codec, redis_server, settings
from shmflags.contract import NO_DIGEST, Exchange
from shmflags.errors import DamagedSnapshotError, InvalidDefinitionsError
from shmflags.journal import Journal
from shmflags.redis_server import GROUP_LENGTH, OWN_LENGTH, Answer, Publish, RedisServer, Timing
from shmflags.snapshot import DEFAULT_MAX_BYTES

_LOOK_AGAIN_S = 0.05
_UNKNOWN_DIGEST = b"not to be compared"


class _Owed(NamedTuple):
    """A grant that must bring a publish, and the thread that fetches. CLOCK_MONOTONIC, seconds."""

    thread: int
    at_s: float


class _ThreadState(threading.local):
    """Per thread: the term in which it fetches, since when (`redis_server.now_s`), whether alone and
    whether told to, whether its last fetch brought nothing, and the digest that its last poll found."""

    term: int = 0
    begun_s: float = 0.0
    alone: bool = False
    told: bool = False
    failed: bool = False
    digest: bytes | None = None


class _Process:
    """What one process is to the cluster. Not handed on by a fork, but for what was fetched alone."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.lock = threading.Lock()
        self.thread = _ThreadState()
        self.group = secrets.token_urlsafe(GROUP_LENGTH)[:GROUP_LENGTH]
        self.own = secrets.token_urlsafe(OWN_LENGTH)[:OWN_LENGTH]
        self.for_host = False
        self.term = 0  # The one in which it leads; 0 if it does not.
        self.owed: _Owed | None = None
        self.pending: Publish | None = None
        # For `pending` and what is held, which change together; never held while Redis is asked.
        self.brief = threading.Lock()
        self.received = 0  # So often.
        # What was loaded for the host, until the host has it: it may have given up waiting.
        self.loaded: codec.Decoded | None = None
        self.told_s = float("-inf")
        self.is_asking = False  # A thread was told to fetch, and nothing has come back.
        self.first_deadline_s: float | None = None
        self.closed = False

    @property
    def token(self) -> str:
        return self.group + self.own

    def act_for(self, host: int) -> None:
        self.for_host = True
        self.group = base64.urlsafe_b64encode(host.to_bytes(8, "big"))[:GROUP_LENGTH].decode()


class RedisFlagCache:
    """A flag definition cache provider on Redis or Valkey; alone, or as `upstream` of a host's cache.

    `redis_client`        a `redis.Redis` or `valkey.Valkey` client, of one server or of Sentinel; its
                          settings are used, its connections are not
    `service_key`         names the group of workers: one per PostHog project and environment
    `poll_interval`       seconds; the client's own `poll_interval`
    `lease_ttl`           seconds without a poll after which a leader is deposed; default
                          max(2 * poll_interval, 45)
    `max_term`            seconds that one host may lead before it makes way; default
                          60 * poll_interval
    `cold_start_timeout`  seconds that a process waits, once, for somebody else's first publish
    `socket_timeout`      seconds that any one wait for Redis may take; less if the client has less
    `max_bytes`           the largest definitions that are written or read

    May be made before a fork: each process connects by itself, and is a contender by itself. Raises
    `TypeError` or `ValueError` for wrong arguments, and connects to nothing. The methods never raise.
    """

    def __init__(
        self,
        redis_client: Any,
        service_key: str,
        *,
        poll_interval: float = 30.0,
        lease_ttl: float | None = None,
        max_term: float | None = None,
        cold_start_timeout: float = 5.0,
        socket_timeout: float = 1.0,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        interval_s = settings.seconds("poll_interval", poll_interval, above=0.0)
        if lease_ttl is None:
            lease_ttl = max(2 * interval_s, 45.0)
        told = settings.check(
            service_key,
            directory=None,
            max_bytes=max_bytes,
            poll_interval=poll_interval,
            cold_start_timeout=cold_start_timeout,
            lease_ttl=lease_ttl,
            max_term=max_term,
        )
        self._timing = Timing(
            told.interval_ns // 1_000_000, told.lease_ns // 1_000_000, told.max_term_ns // 1_000_000
        )
        self._interval_s = interval_s
        self._cold_start_s = told.cold_start_ns / 1e9
        self._timeout_s = settings.seconds("socket_timeout", socket_timeout, above=0.0)
        self._max_bytes = max_bytes
        self._key = redis_server.state_key(service_key)
        self._client = redis_client
        redis_server.private_client(redis_client, self._timeout_s)  # A wrong one is to be refused now.
        self._journal = Journal(service_key)
        self._processes: dict[int, _Process] = {}
        # What a fork hands on, as the SDK's client does its flags and its ETag:
        self._held: codec.Decoded | None = None
        self._received: bytes | None = None

    # -- PostHog's protocol

    def should_fetch_flag_definitions(self) -> bool:
        """True if this process is to fetch from the API now."""
        process = None
        try:
            process = self._here()
            return not process.closed and self._poll(process).granted
        except Exception as error:
            self._complain("Redis cannot be used, so this worker fetches for itself", error)
            return process is None or self._may_fetch_alone(process)

    def get_flag_definitions(self) -> Any:
        """The definitions; empty ones if there are none to be had.

        Waits at most once per process, for `cold_start_timeout`, for the first publish.
        """
        try:
            process = self._here()
            if not process.closed:
                self._look(process)
        except InvalidDefinitionsError as error:
            self._complain("what is in Redis is not loaded, and what was served stays", error)
        except Exception as error:
            self._complain("definitions cannot be had from Redis", error)
        if self._held is not None:
            return self._held.definitions
        return codec.nothing().definitions

    def on_flag_definitions_received(self, data: Any) -> None:
        """Publish what this process fetched, unless another one leads, or has fetched later, by now."""
        try:
            self._receive(self._here(), data)
        except InvalidDefinitionsError as error:
            self._complain("what was fetched cannot be shared, and what was served stays", error)
        except Exception as error:
            self._complain("a publish waits for the next poll", error)

    def shutdown(self) -> None:
        """Hand leadership over at once, and close the connection. Idempotent."""
        try:
            process = self._here()
            if not process.closed:
                process.closed = True
                if process.term:
                    process.server.resign(process.token)
                process.server.close()
        except Exception as error:
            self._complain("shutdown could not hand over", error)

    # -- for the cache of a host (upstream.py)

    def exchange_for_host(self, host: int, known: codec.Decoded | None, *, again: bool) -> Exchange:
        """Ask for all processes that share `host`. Raises whatever went wrong."""
        process = self._here()
        process.act_for(host)
        if again:
            digest = process.server.digest()
        else:
            answer = self._poll(process)
            digest = answer.digest
            if answer.granted:
                return Exchange(True, digest=digest)
        if not digest:
            return Exchange(False, digest=NO_DIGEST)
        if known is not None and known.digest == digest:
            process.loaded = None
            return Exchange(False, known.definitions, digest)
        process.loaded = self._load(process, digest, process.loaded or known)
        return Exchange(False, process.loaded.definitions, process.loaded.digest)

    # -- one poll

    def _here(self) -> _Process:
        """The process that this is; a new one after a fork."""
        pid = os.getpid()
        process = self._processes.get(pid)
        if process is None:
            server = RedisServer(self._client, self._key, self._timing, self._timeout_s)
            process = _Process(server)
            for parent in list(self._processes.values()):
                self._journal.after_fork()
                if parent.is_asking:
                    # The answer went to the parent, but its client, and so ours, may have the ETag.
                    self._received = _UNKNOWN_DIGEST
                if parent.pending is not None and parent.pending.alone:
                    # The parent may not live to publish it. (Nobody else is to publish in its term.)
                    process.pending = parent.pending
            # Of two threads that come here at once, one's is taken by both.
            process = self._processes.setdefault(pid, process)
            for other in [other for other in list(self._processes) if other != pid]:
                self._processes.pop(other, None)  # Closes our copies of the parent's sockets.
        return process

    def _poll(self, process: _Process) -> Answer:
        """Renew the lease or try to take it. Raises `RedisUnavailableError`."""
        thread, now_s = process.thread, time.monotonic()
        thread.failed, thread.told = thread.told, False
        process.is_asking &= not thread.failed
        # For the fetch that follows, which is made alone if Redis fails.
        thread.term, thread.digest = process.term, None
        thread.begun_s, thread.alone = redis_server.now_s(), True
        self._publish_pending(process)
        fruitless = self._is_fruitless(process, now_s)
        answer = process.server.poll(process.token, make_way=fruitless)
        if fruitless:
            process.owed = None
        self._note_term(process, answer.term, made_way=fruitless)
        thread.term, thread.digest, thread.alone = answer.term, answer.digest, False
        if answer.granted:
            thread.told = process.is_asking = True
            process.told_s = now_s
            must_publish = not answer.digest or self._received not in (None, answer.digest)
            process.owed = _Owed(threading.get_ident(), now_s) if must_publish else None
        return answer

    def _is_fruitless(self, process: _Process, now_s: float) -> bool:
        """Whether a fetch that had to bring a publish has ended without one."""
        owed = process.owed
        if owed is None:
            return False
        return owed.thread == threading.get_ident() or now_s - owed.at_s >= self._interval_s

    def _note_term(self, process: _Process, term: int, *, made_way: bool) -> None:
        before, process.term = process.term, term
        if term and not before:
            self._journal.event("elected: to lead the cluster", os.getpid(), term, 0)
        elif before and not term:
            reason = (
                "yielded: its fetch brought nothing" if made_way else "deposed, or led for max_term"
            )
            self._journal.event(reason, os.getpid(), before, 0)

    def _may_fetch_alone(self, process: _Process) -> bool:
        now_s = time.monotonic()
        if process.closed or now_s - process.told_s < self._interval_s / 2:
            return False
        process.told_s = now_s
        process.thread.told = process.is_asking = True
        return True

    # -- definitions in

    def _receive(self, process: _Process, data: object) -> None:
        thread = process.thread
        term, thread.term, thread.told = thread.term, 0, False
        alone, thread.alone = thread.alone, False
        process.owed, process.is_asking = None, False
        self._received = _UNKNOWN_DIGEST
        encoded, decoded = codec.encode(data, self._held)
        self._received = decoded.digest
        with process.brief:
            process.received += 1
            if not process.for_host:  # Else the host's cache has them, and keeps them.
                self._held = decoded
            if process.closed:
                return
            process.pending = Publish(process.token, term, encoded, thread.begun_s, alone)
        self._publish_pending(process)

    def _publish_pending(self, process: _Process) -> None:
        """Publish what is waiting for it, if there is such a thing. Raises `RedisUnavailableError`."""
        pending = process.pending
        if pending is None:
            return
        blob = redis_server.pack(pending.encoded)
        if len(blob) > self._max_bytes:
            self._settle(process, pending)
            self._complain(
                "what was fetched is not shared, and what was served stays",
                f"it takes {len(blob)} bytes; max_bytes is {self._max_bytes}",
            )
            return
        result, generation = process.server.publish(pending, blob)
        self._settle(process, pending)
        if result != 1:
            flags = pending.encoded.flag_count
            said = (
                f"published: {flags} flags, {len(blob)} bytes"
                if result
                else "dropped: another one leads, or has fetched since"
            )
            self._journal.event(f"{said}, in Redis", os.getpid(), pending.term, generation)

    @staticmethod
    def _settle(process: _Process, pending: Publish) -> None:
        with process.brief:
            if process.pending is pending:  # And not what another thread has received meanwhile.
                process.pending = None

    # -- definitions out

    def _look(self, process: _Process) -> None:
        """Load what is in Redis, if it is not what is held."""
        digest, process.thread.digest = process.thread.digest, None
        if digest is None:
            digest = process.server.digest()
        if not digest and self._held is None:
            with process.lock:
                if process.first_deadline_s is None:
                    process.first_deadline_s = time.monotonic() + self._cold_start_s
            digest = self._first(process, process.first_deadline_s)
        if digest:
            with process.lock:
                self._take(process, digest)

    def _take(self, process: _Process, digest: bytes) -> None:
        """Hold what is in Redis, unless what this process fetched is newer, and Redis could not take it yet."""
        with process.brief:
            pending, received = process.pending, process.received
        if pending is not None and process.server.lacks(pending, digest):
            return
        found = self._load(process, digest, self._held)
        with process.brief:
            if process.received == received:
                self._held = found

    def _first(self, process: _Process, until_s: float) -> bytes:
        """Wait for the first publish; its digest, or b"" if it did not come."""
        # Whoever comes back without having published will not find anything by waiting.
        while not process.thread.failed and time.monotonic() < until_s:
            time.sleep(_LOOK_AGAIN_S)
            digest = process.server.digest()
            if digest:
                return digest
        return NO_DIGEST

    def _load(self, process: _Process, digest: bytes, known: codec.Decoded | None) -> codec.Decoded:
        """Raises `RedisUnavailableError`, `DamagedSnapshotError` or `InvalidDefinitionsError`."""
        if known is not None and known.digest == digest:
            return known
        blob = process.server.definitions()
        if len(blob) > self._max_bytes:
            raise InvalidDefinitionsError(
                f"they take {len(blob)} bytes; max_bytes is {self._max_bytes}"
            )
        try:
            return redis_server.unpack(blob, known)
        except DamagedSnapshotError:
            process.server.give_up(digest)  # Then the next fetch has to bring them.
            raise

    def _complain(self, what: str, error: object) -> None:
        try:
            self._journal.trouble(what, error, os.getpid())
        except Exception:
            pass  # A broken log handler must not become a stampede on the API.
