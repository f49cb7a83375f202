"""Workers as a server has them: forked from one process, which calls them one by one or all at once.

These functions are called in a measuring process, the master; through it, others in its workers.
"""

from __future__ import annotations

import gc
import json
import os
import signal
from dataclasses import dataclass
from typing import Any, BinaryIO

from bench import child


@dataclass(frozen=True)
class _Worker:
    pid: int
    calls: BinaryIO
    answers: BinaryIO


_workers: list[_Worker] = []


def prepare(contestant: str) -> None:
    """Import what a worker needs, as a master that preloads nothing else."""
    import posthog

    from bench import contestants, roles

    assert all((posthog, roles))
    contestants.module(contestant)


def freeze() -> None:
    """`gc.freeze()`, as before a fork that is to share memory."""
    gc.collect()
    gc.freeze()


def fork(count: int) -> None:
    """Fork workers, which wait to be called."""
    for _ in range(count):
        _workers.append(_fork_one())  # each closes those that are in the list


def _fork_one() -> _Worker:
    call_reader, call_writer = os.pipe()
    answer_reader, answer_writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(call_writer)
        os.close(answer_reader)
        for other in _workers:  # Else they would not see the end of their calls.
            other.calls.close()
            other.answers.close()
        _workers.clear()
        child.serve(os.fdopen(call_reader, "rb"), os.fdopen(answer_writer, "wb"))
    os.close(call_reader)
    os.close(answer_writer)
    return _Worker(pid, os.fdopen(call_writer, "wb"), os.fdopen(answer_reader, "rb"))


def call(number: int, function: str, **arguments: Any) -> Any:
    """Call a function in one of the workers."""
    _send(_workers[number], function, arguments)
    return _answer(_workers[number])


def call_all(function: str, **arguments: Any) -> list[Any]:
    """Call a function in all workers at the same time; their results, in order."""
    for worker in _workers:
        _send(worker, function, arguments)
    return [_answer(worker) for worker in _workers]


def pids() -> list[int]:
    """The process ids of the workers, in order."""
    return [worker.pid for worker in _workers]


def kill(number: int) -> None:
    """SIGKILL to a worker, which is reaped, and is one of us no more."""
    worker = _workers.pop(number)
    os.kill(worker.pid, signal.SIGKILL)
    _reap(worker)


def end() -> None:
    """End all workers."""
    while _workers:
        worker = _workers.pop()
        worker.calls.close()
        os.kill(worker.pid, signal.SIGKILL)
        _reap(worker)


def _reap(worker: _Worker) -> None:
    os.waitpid(worker.pid, 0)
    worker.calls.close()
    worker.answers.close()


def _send(worker: _Worker, function: str, arguments: dict[str, Any]) -> None:
    worker.calls.write(json.dumps([function, arguments]).encode() + b"\n")
    worker.calls.flush()


def _answer(worker: _Worker) -> Any:
    line = worker.answers.readline()
    if not line:
        raise RuntimeError(f"worker {worker.pid} ended")
    kind, value = json.loads(line)
    if kind == "error":
        raise RuntimeError(f"in worker {worker.pid}:\n{value}")
    return value
