"""What the demo prints: steps, events with their time, and at the end what was observed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TextIO

_BOLD, _DIM, _GREEN, _RED, _PLAIN = "\033[1m", "\033[2m", "\033[32m", "\033[31m", "\033[0m"


@dataclass(frozen=True)
class Result:
    """A claim, and whether it was observed."""

    held: bool
    claim: str


class Screen:
    """Writes lines to a terminal or a file, each at once; in colour only on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._colours = stream.isatty() and "NO_COLOR" not in os.environ
        self._started_s = time.monotonic()
        self._steps = 0
        self.results: list[Result] = []

    def say(self, text: str = "") -> None:
        self._line(text)

    def step(self, title: str) -> None:
        """Head a numbered step."""
        self._steps += 1
        self._line()
        self._line(f"{self._steps}. {title}", _BOLD)

    def event(self, text: str) -> None:
        """Something that happened just now."""
        self._line(f"  {time.monotonic() - self._started_s:5.2f} s  {text}")

    def result(self, held: bool, claim: str) -> bool:
        """Keep a claim with its outcome for the summary; gives `held`."""
        self.results.append(Result(held, claim))
        self._line(f"  => {claim}" if held else f"  => NOT OBSERVED: {claim}", _BOLD)
        return held

    def summary(self) -> bool:
        """A line per claim; True iff there were claims and all of them held."""
        for result in self.results:
            colour, word = (_GREEN, "PASS") if result.held else (_RED, "FAIL")
            self._line(f"  {self._painted(word, colour)}  {result.claim}")
        return bool(self.results) and all(result.held for result in self.results)

    def quote(self, text: str) -> None:
        """Somebody else's words, such as a log."""
        for line in text.splitlines():
            self._line(f"    {line}", _DIM)

    def _painted(self, text: str, colour: str) -> str:
        return f"{colour}{text}{_PLAIN}" if self._colours and text else text

    def _line(self, text: str = "", colour: str = "") -> None:
        self._stream.write(f"{self._painted(text, colour) if colour else text}\n")
        self._stream.flush()  # the demo is watched while it runs, also through a pipe
