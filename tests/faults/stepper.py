"""Runs code of the package step by step, and kills this process at one of the steps.

A step is what can leave a trace: before and after each system call that changes something, and before
each store into a word of the page. The product has no fault points for this; the interpreter's tracing
tells.
"""

from __future__ import annotations

import dis
import gc
import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType, FunctionType
from typing import Any

import shmflags

CHANGING_CALLS = {
    *("open", "close", "write", "pwrite", "ftruncate", "fchmod", "chmod", "flock"),
    *("mkdir", "rmdir", "link", "unlink", "rename", "replace"),
}
_PACKAGE = os.path.dirname(shmflags.__file__) + os.sep
_TOOL = 0


class Stepper:
    """Counts the steps of an action, and kills this process at one of them.

    That is step `last`, or the return from the system call `after`.
    """

    def __init__(self, last: int | None = None, *, after: str = "") -> None:
        self.steps = 0
        self._last = last
        self._after = after

    def run(self, action: Callable[[], object]) -> None:
        """Run `action` in this thread."""
        if sys.version_info >= (3, 12):
            # Opcodes are told to a trace function only from some later call on.
            sys.monitoring.use_tool_id(_TOOL, "stepper")
            sys.monitoring.register_callback(
                _TOOL, sys.monitoring.events.INSTRUCTION, self._instruction
            )
            for code in package_code():
                sys.monitoring.set_local_events(_TOOL, code, sys.monitoring.events.INSTRUCTION)
        else:
            sys.settrace(self._enter)
        sys.setprofile(self._profile)
        try:
            action()
        finally:
            sys.setprofile(None)
            sys.settrace(None)
            if sys.version_info >= (3, 12):
                sys.monitoring.free_tool_id(_TOOL)

    def _instruction(self, code: CodeType, offset: int) -> None:
        if offset in _stores(code):
            self._step()

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(_PACKAGE) or not _stores(frame.f_code):
            return None
        frame.f_trace_opcodes = True
        return self._opcode

    def _opcode(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            self._instruction(frame.f_code, frame.f_lasti)
        return self._opcode

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("c_call", "c_return") and argument.__name__ in CHANGING_CALLS:
            self._step()
            if event == "c_return" and argument.__name__ == self._after:
                os.kill(os.getpid(), signal.SIGKILL)

    def _step(self) -> None:
        self.steps += 1
        if self.steps == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


@cache
def package_code() -> tuple[CodeType, ...]:
    """The code of all functions of the package that store into something by index."""
    codes = {one.__code__ for one in gc.get_objects() if isinstance(one, FunctionType)}
    return tuple(code for code in codes if code.co_filename.startswith(_PACKAGE) and _stores(code))


@cache
def _stores(code: CodeType) -> frozenset[int]:
    return frozenset(
        instruction.offset
        for instruction in dis.get_instructions(code)
        if instruction.opname == "STORE_SUBSCR"
    )
