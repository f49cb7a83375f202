"""What a worker of the demo says of itself over HTTP; both sides of that conversation use it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

FLAG = "new-checkout"  # the flag that the demo flips


@dataclass(frozen=True)
class ApiRequest:
    """An answered request for definitions that the reporting process made."""

    time_s: float  # CLOCK_MONOTONIC, seconds, when the answer came
    status: int


@dataclass(frozen=True)
class Report:
    """One worker process, at one moment."""

    pid: int
    parent_pid: int
    flag_count: int | None  # None: nothing loaded
    digest: str  # equal in two workers if their definitions are
    flag_value: bool | str | None  # of FLAG, evaluated locally
    requests: tuple[ApiRequest, ...]  # since the process began

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Report:
        fields = json.loads(text)
        requests = tuple(ApiRequest(**request) for request in fields.pop("requests"))
        return cls(**fields, requests=requests)
