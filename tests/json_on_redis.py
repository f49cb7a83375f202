"""Two upstreams as PostHog's documentation suggests them: JSON on Redis with a lock, sync and async."""

from __future__ import annotations

import json
import uuid
from typing import Any

_TAKE_OR_PROLONG = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_FREE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class JsonOnRedis:
    """The lock is held for as long as its holder polls; whoever holds it always fetches."""

    def __init__(self, client: Any, service_key: str, *, lock_s: float = 60.0) -> None:
        self._client = client
        self._lock_ms = int(lock_s * 1000)
        self._value, self._lock = f"flags:{service_key}", f"flags:{service_key}:lock"
        self._name = str(uuid.uuid4())

    def should_fetch_flag_definitions(self) -> bool:
        return bool(self._client.eval(_TAKE_OR_PROLONG, 1, self._lock, self._name, self._lock_ms) == 1)

    def get_flag_definitions(self) -> Any:
        found = self._client.get(self._value)
        return json.loads(found) if found else None

    def on_flag_definitions_received(self, data: Any) -> None:
        self._client.set(self._value, json.dumps(data), ex=86_400)

    def shutdown(self) -> None:
        self._client.eval(_FREE, 1, self._lock, self._name)


class AsyncJsonOnRedis(JsonOnRedis):
    """The same with coroutine functions; the client is a `redis.asyncio.Redis`."""

    async def should_fetch_flag_definitions(self) -> bool:  # type: ignore[override]
        taken = await self._client.eval(_TAKE_OR_PROLONG, 1, self._lock, self._name, self._lock_ms)
        return bool(taken == 1)

    async def get_flag_definitions(self) -> Any:
        found = await self._client.get(self._value)
        return json.loads(found) if found else None

    async def on_flag_definitions_received(self, data: Any) -> None:  # type: ignore[override]
        await self._client.set(self._value, json.dumps(data), ex=86_400)

    async def shutdown(self) -> None:  # type: ignore[override]
        await self._client.eval(_FREE, 1, self._lock, self._name)
