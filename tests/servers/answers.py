"""What a worker of a tested server says of itself; both sides of that conversation use it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shmflags.demo.server import definitions, flag

KEYS = ("cheaper", "faster")  # the flags that the applications evaluate
_LONGEST_S = 100.0  # a worker that nobody stops


def switched(on: str) -> dict[str, Any]:
    """Definitions with one of the flags on."""
    return definitions(*(flag(key, on=key == on) for key in KEYS))


def values(on: str) -> dict[str, bool]:
    """The right answers to `switched(on)`."""
    return {key: key == on for key in KEYS}


@dataclass(frozen=True)
class Answer:
    """One worker process, at one moment; None stands for a flag that it does not know."""

    pid: int
    parent_pid: int
    uid: int
    values: Mapping[str, bool | str | None]

    @classmethod
    def of(cls, client: Any) -> Answer:
        """What this process has to say, evaluating with `client`."""
        found = client.evaluate_flags("somebody", flag_keys=list(KEYS), only_evaluate_locally=True)
        return cls(
            pid=os.getpid(),
            parent_pid=os.getppid(),
            uid=os.geteuid(),
            values={key: found.get_flag(key, send_feature_flag_events=False) for key in KEYS},
        )

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes | str) -> Answer:
        return cls(**json.loads(text))


def respond(
    client: Any, start_response: Callable[[str, list[tuple[str, str]]], object]
) -> Iterable[bytes]:
    """An answer over WSGI."""
    body = Answer.of(client).to_json()
    # A busy worker accepts nothing, so that the other requests go to the other workers.
    time.sleep(0.01)
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def keep_answering(client: Any, directory: Path) -> None:
    """Evaluate until there is a file `stop` in `directory`; each change adds a line to `<pid>`."""
    end = time.monotonic() + _LONGEST_S
    last: Answer | None = None
    with (directory / str(os.getpid())).open("ab", buffering=0) as file:
        while not (directory / "stop").exists() and time.monotonic() < end:
            answer = Answer.of(client)
            if answer != last:
                file.write(answer.to_json() + b"\n")
                last = answer
            time.sleep(0.02)


def kept_answers(directory: Path) -> list[list[Answer]]:
    """What each process of `keep_answering` has said so far, in order."""
    if not directory.exists():
        return []
    lines = [path.read_text().splitlines() for path in directory.iterdir() if path.name.isdigit()]
    return [[Answer.from_json(line) for line in process] for process in lines]
