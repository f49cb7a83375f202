"""Redis, or Valkey, as one process talks to it: two keys, four scripts, bounded waits.

Both keys lie in one hash slot (`{…}`); the 1 is the version of the format:

    shmflags:1:{my-service}               a hash of small fields, read first and at every poll
        token         who leads: 6 characters that the processes of a host may share, and 10 of
                      the process's own; empty if nobody leads
        until         when the lease ends
        since         since when those 6 characters have led
        term          the fencing epoch: raised whenever the token changes, never below the clock
        grant         when somebody was last told to fetch
        fetched       when the newest fetch was begun that has come to its end: it was published, or
                      who was told to make it has polled since
        barred        the 6 characters of who made way, and may not lead before
        barred_until
        digest        content digest of the definitions; absent if there are none
        generation    raised with every change; for people
    shmflags:1:{my-service}:definitions   the definitions: header, then index and items (codec.py)

    offset  size  field of the header, little-endian
    0       8     magic, b"shmflags"
    8       4     number of flags
    12      4     number of cohorts
    16      16    content digest

Times are milliseconds of Redis's own clock; those of the hosts are not compared. A counter could come
round again in a Redis that lost its data, a digest cannot mean two things: so what is compared is the
digest. Every change is one Lua script, so it is made whole or not at all. Settings stand in the text of
the scripts and not among their arguments, to keep an unchanged poll small.

The keys never expire: a Redis that evicts only keys with a time to live leaves them alone.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import struct
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from shmflags import codec, item_index
from shmflags.errors import DamagedSnapshotError, RedisUnavailableError
from shmflags.runtime_dir import directory_name

_T = TypeVar("_T")
_MAGIC = b"shmflags"
_HEADER = struct.Struct("<8sII16s")
GROUP_LENGTH, OWN_LENGTH = 6, 10
_WANTED = 3

# KEYS: state. ARGV: token, "y" to make way. Reply: {0, digest} to who follows, {1, digest, term} to
# who leads, {2, digest, term} to who leads and is told to fetch.
_POLL = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local is = redis.call('HMGET', KEYS[1],
    'token', 'until', 'since', 'term', 'grant', 'barred', 'barred_until', 'digest', 'fetched')
local function number(i) return tonumber(is[i] or 0) or 0 end
local function ahead(i, most) return number(i) > now and number(i) - now <= most end
local me, token, digest = ARGV[1], is[1] or '', is[8] or ''
local group = string.sub(me, 1, 6)
local ours = string.sub(token, 1, 6) == group
local held = token ~= '' and ahead(2, LEASE)
if held and not ours then return {0, digest} end
local function past(i) return number(i) <= now and number(i) or 0 end
local fetched = math.max(past(9), token == me and past(5) or 0)
if held and ((ARGV[2] and token == me) or now - number(3) > MAX_TERM) then
    redis.call('HSET', KEYS[1], 'token', '', 'barred', group, 'barred_until', now + INTERVAL,
        'fetched', fetched)
    return {0, digest}
end
if is[6] == group and ahead(7, INTERVAL) then return {0, digest} end
local term, since = number(4), number(3)
if token ~= me then term = math.max(term + 1, now) end
if not ours then since = now end
redis.call('HSET', KEYS[1], 'token', me, 'until', now + LEASE, 'since', since, 'term', term,
    'fetched', fetched)
local pause = now - number(5)
if is[5] and pause >= 0 and pause < INTERVAL / 2 then return {1, digest, term} end
redis.call('HSET', KEYS[1], 'grant', now)
return {2, digest, term}
"""

# KEYS: state, definitions. ARGV: token, term, digest, definitions, and for a fetch made alone when it was
# begun. Reply: {0 if dropped, 1 if unchanged, 2 if published, 3 if it would be, were the definitions
# not empty; generation}.
_PUBLISH = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local is = redis.call('HMGET', KEYS[1], 'token', 'term', 'digest', 'generation', 'grant', 'fetched')
local function number(value) return tonumber(value or 0) or 0 end
local serving = is[3] and redis.call('EXISTS', KEYS[2]) == 1
local generation, fetched, begun = number(is[4]), number(is[6]), number(ARGV[5])
local told = is[1] == ARGV[1] and is[2] == ARGV[2]
if told then begun = math.max(begun, number(is[5])) end
local late = begun < fetched and fetched <= now
if serving and (late or not told and not ARGV[5]) then return {0, generation} end
if serving and is[3] == ARGV[3] then
    redis.call('HSET', KEYS[1], 'fetched', begun)
    return {1, generation}
end
if ARGV[4] == '' then return {3, generation} end
redis.call('SET', KEYS[2], ARGV[4])
redis.call('HSET', KEYS[1], 'digest', ARGV[3], 'fetched', begun)
return {2, redis.call('HINCRBY', KEYS[1], 'generation', 1)}
"""

# KEYS: state. ARGV: token.
_RESIGN = """
if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then redis.call('HSET', KEYS[1], 'token', '') end
"""

# KEYS: state. ARGV: digest, the definitions of which are gone or damaged.
_GIVE_UP = """
if redis.call('HGET', KEYS[1], 'digest') == ARGV[1] then redis.call('HDEL', KEYS[1], 'digest') end
"""

# What a pool adds to its connections' arguments for its own use, and what is set here.
_NOT_COPIED = re.compile(
    "maint_notifications|oss_cluster_maint|himport_registry|event_dispatcher|connection_pool$|"
    "retry_on_timeout|health_check_interval|protocol$|legacy_responses"
)


class Timing(NamedTuple):
    """Milliseconds."""

    interval_ms: int
    lease_ms: int
    max_term_ms: int

    def inserted_in(self, script: str) -> str:
        return (
            script.replace("INTERVAL", str(self.interval_ms))
            .replace("LEASE", str(self.lease_ms))
            .replace("MAX_TERM", str(self.max_term_ms))
        )


class Answer(NamedTuple):
    """To a poll. `digest` is that of what there is, b"" if nothing; `term` is 0 for who follows."""

    granted: bool
    digest: bytes
    term: int


class Publish(NamedTuple):
    """Definitions for Redis, with the token and the term in which they were fetched.

    `begun_s` is when the fetch was begun (`now_s`), `alone` whether nobody else knew of it: then what
    counts is not the term, but that no other fetch was begun later.
    """

    token: str
    term: int
    encoded: codec.Encoded
    begun_s: float
    alone: bool


def now_s() -> float:
    """Seconds, of a clock that goes on while the machine sleeps, and is the same for a forked child."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def state_key(service_key: str) -> str:
    """The name of the small key. Whatever the service key holds, it stays within the braces."""
    plain = re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", service_key)
    return f"shmflags:1:{{{service_key if plain else '#' + directory_name(service_key)}}}"


class RedisServer:
    """Redis, through a client of this process's own. `pause_s`: left alone after a failure for so long.

    All methods raise `RedisUnavailableError`.
    """

    def __init__(self, client: Any, key: str, timing: Timing, timeout_s: float) -> None:
        self._client = private_client(client, timeout_s)
        self._state, self._definitions = key, f"{key}:definitions"
        self._poll = self._client.register_script(timing.inserted_in(_POLL))
        self._publish = self._client.register_script(_PUBLISH)
        self._resign = self._client.register_script(_RESIGN)
        self._give_up = self._client.register_script(_GIVE_UP)
        self._pause_s = min(timing.interval_ms / 2000, 5.0)
        self._quiet_until_s = 0.0
        self._error = ""

    def poll(self, token: str, *, make_way: bool) -> Answer:
        arguments = [token, "y"] if make_way else [token]
        reply = self._ask(lambda: self._poll(keys=[self._state], args=arguments))
        return Answer(reply[0] == 2, reply[1], reply[2] if reply[0] else 0)

    def digest(self) -> bytes:
        return self._ask(lambda: self._client.hget(self._state, "digest")) or b""

    def definitions(self) -> bytes:
        """b"" if they are gone."""
        return self._ask(lambda: self._client.get(self._definitions)) or b""

    def publish(self, what: Publish, blob: bytes) -> tuple[int, int]:
        """(0 if dropped, 1 if unchanged, 2 if published; the generation there is now)."""
        if what.alone:
            # First without them: many may come with the same.
            result, generation = self._offer(what, b"")
            if result != _WANTED:
                return result, generation
        return self._offer(what, blob)

    def lacks(self, what: Publish, digest: bytes) -> bool:
        """Whether it is newer than what there is, with this digest."""
        return digest != what.encoded.digest and self._offer(what, b"")[0] == _WANTED

    def _offer(self, what: Publish, blob: bytes) -> tuple[int, int]:
        arguments = [what.token, what.term, what.encoded.digest, blob]
        if what.alone:
            # Not its age: the script may be carried out long after it was sent.
            arguments.append(self._clock_ms(what.begun_s))
        keys = [self._state, self._definitions]
        reply = self._ask(lambda: self._publish(keys=keys, args=arguments))
        return reply[0], reply[1]

    def resign(self, token: str) -> None:
        self._ask(lambda: self._resign(keys=[self._state], args=[token]))

    def give_up(self, digest: bytes) -> None:
        self._ask(lambda: self._give_up(keys=[self._state], args=[digest]))

    def close(self) -> None:
        self._client.connection_pool.disconnect()

    def _clock_ms(self, moment_s: float) -> int:
        """A moment of this process's clock by Redis's, or some time before."""
        seconds, micros = self._ask(self._client.time)
        return int(seconds * 1000 + micros // 1000 - math.ceil((now_s() - moment_s) * 1000))

    def _ask(self, command: Callable[[], _T]) -> _T:
        if time.monotonic() < self._quiet_until_s:
            raise RedisUnavailableError(self._error)
        try:
            return command()
        except Exception as error:
            # Whatever it was (a failover's READONLY, half an answer): the next one is to connect anew.
            self._error = f"{type(error).__name__}: {error}"
            self._quiet_until_s = time.monotonic() + self._pause_s
            self.close()
            raise RedisUnavailableError(self._error) from None


def private_client(client: Any, timeout_s: float) -> Any:
    """A client like `client` with connections of its own, which wait for `timeout_s` and do not retry.

    Not shared: not with the application, whose pool may be exhausted or decode what it reads, and not
    with a parent process, a thread of which may have held the pool's lock at the fork. Connects to
    nothing. Raises `TypeError` if it is no such client.
    """
    pool = getattr(client, "connection_pool", None)
    connection_class = getattr(pool, "connection_class", None)
    if pool is None or connection_class is None or not callable(getattr(client, "register_script", 0)):
        raise TypeError(
            "redis_client must be a redis.Redis or valkey.Valkey client (of one server or of Sentinel, "
            f"not of a cluster), not a {type(client).__qualname__}"
        )
    if inspect.iscoroutinefunction(client.execute_command):
        raise TypeError(f"redis_client must be a synchronous client, not {type(client).__module__}'s")
    told = pool.connection_kwargs
    arguments = {name: value for name, value in told.items() if not _NOT_COPIED.match(name)}
    arguments.update(decode_responses=False, protocol=2, retry=None, retry_on_error=[])
    for name in ("socket_timeout", "socket_connect_timeout"):
        arguments[name] = min(timeout_s, told.get(name) or timeout_s)
    kinds = {kind.__name__: kind for kind in type(pool).__mro__}
    if "SentinelConnectionPool" not in kinds:
        # Not the pool's own class: a BlockingConnectionPool wants more arguments.
        own_pool = kinds["ConnectionPool"](connection_class=connection_class, **arguments)
    else:
        manager = copy.copy(pool.sentinel_manager)
        manager.sentinels = [private_client(each, timeout_s) for each in manager.sentinels]
        own_pool = kinds["SentinelConnectionPool"](
            pool.service_name,
            manager,
            is_master=pool.is_master,
            check_connection=pool.check_connection,
            connection_class=connection_class,
            **arguments,
        )
    return type(client)(connection_pool=own_pool)


def pack(encoded: codec.Encoded) -> bytes:
    """The value of the key that holds the definitions."""
    header = _HEADER.pack(_MAGIC, encoded.flag_count, encoded.cohort_count, encoded.digest)
    return b"".join([header, encoded.entries, encoded.body])


def unpack(blob: bytes, known: codec.Decoded | None) -> codec.Decoded:
    """The definitions in a value, with the objects of `known` where they are the same.

    Everything is checked before it is decoded. Raises `DamagedSnapshotError`.
    """
    if len(blob) < _HEADER.size:
        raise DamagedSnapshotError(f"it has {len(blob)} bytes")
    magic, flags, cohorts, digest = _HEADER.unpack_from(blob)
    end = _HEADER.size + item_index.ENTRY.size * (1 + flags + cohorts)
    if magic != _MAGIC or end > len(blob):
        raise DamagedSnapshotError("it is not what was written")
    view = memoryview(blob)
    index = view[_HEADER.size : end]
    if item_index.content_digest(index, flags, cohorts) != digest:
        raise DamagedSnapshotError("its index does not match its digest")
    return codec.decode(index, view[end:], flags, cohorts, digest, known)
