"""The other side of `processes.Process`: calls what it is told to, and answers on its stdout."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import BinaryIO


def serve(calls: BinaryIO, answers: BinaryIO) -> None:
    """Answer one call a line, until there are no more; then end the process."""
    for line in calls:
        name, arguments = json.loads(line)
        try:
            module, _, function = name.partition(":")
            answer = ["ok", getattr(importlib.import_module(module), function)(**arguments)]
        except Exception:
            answer = ["error", traceback.format_exc()]
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
    os._exit(0)  # Pollers and watchers are daemons of a process that is done.


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What a library prints must not end up among the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
