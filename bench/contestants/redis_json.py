"""Redis: one JSON value, and a lock that a Lua script takes or renews.

As PostHog's example does it, but that a forked child is somebody else here, and does not believe that
it leads because its parent did.
"""

from __future__ import annotations

import json
from typing import Any

import redis

from bench.contestants import LEASE_INTERVALS, HolderName, Place

_TAKE_OR_RENEW = """
local holder = redis.call("GET", KEYS[1])
if holder == false or holder == ARGV[1] then
    redis.call("SET", KEYS[1], ARGV[1], "PX", ARGV[2])
    return 1
end
return 0
"""
_GIVE_BACK = """
if redis.call("GET", KEYS[1]) == ARGV[1] then
    return redis.call("DEL", KEYS[1])
end
return 0
"""
_LOCK, _VALUE = "bench:flags:lock", "bench:flags:definitions"


class RedisProvider:
    def __init__(self, url: str, poll_interval_s: float) -> None:
        self._redis = redis.Redis.from_url(url, decode_responses=True)
        self._name = HolderName()
        self._lease_ms = int(poll_interval_s * LEASE_INTERVALS * 1000)
        self._take_or_renew = self._redis.register_script(_TAKE_OR_RENEW)
        self._give_back = self._redis.register_script(_GIVE_BACK)

    def should_fetch_flag_definitions(self) -> bool:
        return bool(self._take_or_renew(keys=[_LOCK], args=[self._name(), self._lease_ms]))

    def get_flag_definitions(self) -> Any:
        text = self._redis.get(_VALUE)
        return None if text is None else json.loads(text)

    def on_flag_definitions_received(self, data: Any) -> None:
        self._redis.set(_VALUE, json.dumps(data))

    def shutdown(self) -> None:
        self._give_back(keys=[_LOCK], args=[self._name()])


def make(place: Place, poll_interval_s: float) -> RedisProvider:
    return RedisProvider(place.redis_url, poll_interval_s)
