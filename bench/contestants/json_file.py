"""A plain JSON file, replaced as a whole, and a lock file with a holder and a time limit."""

from __future__ import annotations

import fcntl
import json
import os
import time
from typing import Any

from bench.contestants import LEASE_INTERVALS, HolderName, Place


class FileProvider:
    def __init__(self, directory: str, poll_interval_s: float) -> None:
        self._path = os.path.join(directory, "definitions.json")
        self._lock_path = os.path.join(directory, "definitions.lock")
        self._name = HolderName()
        self._lease_s = poll_interval_s * LEASE_INTERVALS

    def should_fetch_flag_definitions(self) -> bool:
        me, now_s = self._name(), time.monotonic()
        with open(self._lock_path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            holder, _, until = file.read().partition(" ")
            if holder not in ("", me) and float(until) > now_s:
                return False
            file.truncate(0)
            file.write(f"{me} {now_s + self._lease_s}")
            return True

    def get_flag_definitions(self) -> Any:
        try:
            with open(self._path) as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    def on_flag_definitions_received(self, data: Any) -> None:
        temporary = f"{self._path}.{self._name()}"
        with open(temporary, "w") as file:
            file.write(json.dumps(data))
        os.replace(temporary, self._path)

    def shutdown(self) -> None:
        with open(self._lock_path, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if file.read().startswith(self._name()):
                file.truncate(0)


def make(place: Place, poll_interval_s: float) -> FileProvider:
    return FileProvider(place.directory, poll_interval_s)
