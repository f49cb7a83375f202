"""`python -m bench`: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench import contestants, data, frame, plots, report
from bench.frame import Measurement, Options, Results, Step

_RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["worker_startup"]:
        from bench import worker_startup

        return worker_startup.main(arguments[1:])
    if arguments and arguments[0] in frame.known_questions():
        arguments = ["--only", *arguments]
    told = _parse(arguments)
    questions = told.only.split(",") if told.only else list(frame.known_questions())
    unknown = sorted(set(questions) - set(frame.known_questions()))
    if unknown:
        print(f"no such question: {', '.join(unknown)}; there are {', '.join(frame.known_questions())}",
              file=sys.stderr)  # fmt: skip
        return 2
    try:
        if told.contestants:
            contestants.choose(told.contestants.split(","))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if told.source:
        results, around = report.from_json(Path(told.source).read_text())
    else:
        results, around = _measure(questions, Options(quick=told.quick)), report.surroundings()
        told.into.mkdir(parents=True, exist_ok=True)
        text = report.to_json(results, around, quick=told.quick)
        results, around = report.from_json(text)  # What is printed is what `--from` would print.
        (told.into / "results.json").write_text(text)
        for path in plots.draw(results, questions, told.into):
            print(f"written: {path}", file=sys.stderr)
    if told.json:
        print(report.to_json(results, around, quick=told.quick), end="")
    elif told.markdown:
        print(report.markdown(results, questions, around), end="")
    else:
        print(report.table(results, questions, around))
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only", metavar="QUESTIONS", help="some of " + ",".join(frame.known_questions())
    )
    parser.add_argument(
        "--contestants", metavar="NAMES", help="some of " + ",".join(contestants.TITLES)
    )
    parser.add_argument(
        "--quick", action="store_true", help="to see that it works; no numbers to quote"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the measurements instead of the table"
    )
    parser.add_argument("--markdown", action="store_true", help="print the README's table instead")
    parser.add_argument("--from", dest="source", metavar="FILE", help="measure nothing, take this JSON")
    parser.add_argument(
        "--into", type=Path, default=_RESULTS, metavar="DIRECTORY",
        help="where results.json and the plots go; default bench/results",
    )  # fmt: skip
    return parser.parse_args(arguments)


def _measure(questions: list[str], options: Options) -> Results:
    steps = [(name, step) for name in questions for step in frame.question(name).steps(options)]
    bar = _ProgressBar(len(steps))
    found: list[Measurement] = []
    with data.made_once():
        for number, (name, step) in enumerate(steps):
            bar.show(number, name, step)
            found.extend(step.run())
    bar.end()
    return Results(found)


class _ProgressBar:
    """On stderr; a line per step where that is no terminal."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._start_s = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def show(self, done: int, question: str, step: Step) -> None:
        passed_s = time.monotonic() - self._start_s
        clock = f"{passed_s // 60:.0f}:{passed_s % 60:02.0f}"
        label = f"{question}: {step.label}"
        if self._is_terminal:
            filled = 30 * done // self._total
            bar = "#" * filled + "." * (30 - filled)
            print(
                f"\r\033[K[{bar}] {done}/{self._total} {clock} {label}"[:120], end="", file=sys.stderr
            )
        else:
            print(f"{done + 1}/{self._total} {clock} {label}", file=sys.stderr)
        sys.stderr.flush()

    def end(self) -> None:
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
