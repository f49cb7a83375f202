"""The command `shmflags`: see what workers share, and steer it.

Exit status: 0 fine; 1 something is wrong, and said on stderr; 2 wrong usage. By Ctrl-C, what has no
other end (`status --watch`, `publish --follow`) ends with 0, and the rest with 130.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from shmflags import clear, doctor, export, local_publish, runtime_dir, settings, status
from shmflags._version import __version__
from shmflags.demo import command as demo
from shmflags.diagnosis import count
from shmflags.errors import ShmFlagsError
from shmflags.local_publish import LocalPublisher, Published
from shmflags.processes import Host
from shmflags.runtime_dir import RuntimeDir
from shmflags.settings import Settings
from shmflags.snapshot import DEFAULT_MAX_BYTES
from shmflags.status import SCHEMA_VERSION, Status
from shmflags.table import Table, fitting, has_colours, size

FINE, WRONG, INTERRUPTED = 0, 1, 130
_REFRESH_S = 1.0
_LINES_PER_KEY = 14
# The workers' own max_bytes is not known here, and is theirs to enforce.
_ANY_SIZE = 1 << 40

_VERDICT_COLOURS = {doctor.OK: "\033[32m", doctor.NOTE: "\033[33m", doctor.WRONG: "\033[31m"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    _prepare_streams()
    try:
        try:
            arguments = _parser().parse_args(argv)
            run: Callable[[argparse.Namespace], int] = arguments.run
            return run(arguments)
        finally:
            sys.stdout.flush()  # Here, where it may fail; not at exit, where Python would complain.
    except BrokenPipeError:
        return FINE  # Whoever read it has seen enough.
    except KeyboardInterrupt:
        return INTERRUPTED
    except ShmFlagsError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        # A bug, and its traceback would not help who is on call.
        text = " ".join(str(error).split())
        return _fail(f"unexpected {type(error).__name__}: {text}; please report it")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shmflags",
        description="PostHog flag definitions, shared by the workers of a host.",
        epilog="Exit status: 0 fine, 1 something is wrong (said on stderr), 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"shmflags {__version__}")
    _add_directory(parser, None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    one = _add_command(commands, "status", _status, "who leads, who has what, and what is wrong")
    one.add_argument(
        "key", metavar="KEY", nargs="?", help="a service key; without it, all of this user"
    )
    one.add_argument("--json", action="store_true", help="as JSON")
    one.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")

    one = _add_command(commands, "export", _export, "write the definitions that are served, as JSON")
    one.add_argument("key", metavar="KEY", help="the workers' service key")

    one = _add_command(commands, "publish", _publish, "share definitions from a file, without the API")
    one.add_argument("key", metavar="KEY", help="the workers' service key")
    one.add_argument("file", metavar="FILE", help="JSON as `export` writes it; - is standard input")
    one.add_argument("--follow", action="store_true", help="again when FILE changes, until Ctrl-C")
    one.add_argument("--force", action="store_true", help="even if another process leads")

    one = _add_command(commands, "clear", _clear, "remove what is shared for a service key")
    one.add_argument("key", metavar="KEY", help="the workers' service key")
    one.add_argument("--force", action="store_true", help="even if workers live; they make it anew")

    one = _add_command(commands, "doctor", _doctor, "check whether this host and this user can share")
    one.add_argument("--json", action="store_true", help="as JSON")

    one = _add_command(commands, "demo", _demo, "see it work on gunicorn, without an account")
    demo.add_arguments(one)
    return parser


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text}.")
    # Suppressed: else this default would overwrite what stands before the command.
    _add_directory(parser, argparse.SUPPRESS)
    parser.set_defaults(run=run, usage_error=parser.error)
    return parser


def _add_directory(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--directory",
        metavar="PATH",
        default=default,
        help="the workers' directory=; default $SHMFLAGS_DIR, else /dev/shm, else the temporary one",
    )


# -- the commands


def _status(arguments: argparse.Namespace) -> int:
    _settings(arguments)
    at = None if arguments.key is None else _located(arguments)
    if not arguments.watch:
        statuses = _read(arguments, at)
        return max(_show(arguments, statuses), FINE if statuses else _say_why_nothing(arguments))
    try:
        _watch(arguments, at)
    except KeyboardInterrupt:
        pass
    return FINE


def _read(arguments: argparse.Namespace, at: RuntimeDir | None) -> list[Status]:
    directories = runtime_dir.found(arguments.directory, os.geteuid()) if at is None else [at]
    host = Host()
    return [status.read(each, host, _ANY_SIZE) for each in directories]


def _show(arguments: argparse.Namespace, statuses: list[Status]) -> int:
    """Print once; what is wrong goes to stderr."""
    table = Table(colours=has_colours(sys.stdout), width=_width())
    wrong: list[str] = []
    blocks: list[str] = []
    for each in statuses:
        # Who names a key expects something to be there.
        missing = arguments.key is not None and not each.exists
        sentences = each.problems or (each.notes if missing else ())
        wrong.extend(f"{each.name}: {sentence}" for sentence in sentences)
        blocks.append("\n".join([*table.lines(each), *([] if missing else table.notes(each))]))
    if arguments.json:
        _print(_as_json(arguments, statuses, indent=2))
    else:
        _print("\n\n".join(blocks) or "\n".join(_nothing(arguments)))
    sys.stdout.flush()
    for sentence in wrong:
        _say(sentence)
    return WRONG if wrong else FINE


def _say_why_nothing(arguments: argparse.Namespace) -> int:
    """No keys are to be seen, maybe as the place is not one where workers could have any."""
    problems = _problems_of_place(arguments)
    for sentence in problems:
        _say(sentence)
    return WRONG if problems else FINE


def _problems_of_place(arguments: argparse.Namespace) -> tuple[str, ...]:
    at = runtime_dir.locate(arguments.directory, "any", os.geteuid())
    return status.read(at, Host(), _ANY_SIZE).problems


def _watch(arguments: argparse.Namespace, at: RuntimeDir | None) -> None:
    on_terminal = sys.stdout.isatty() and not arguments.json
    if on_terminal:
        sys.stdout.write("\033[2J")
    while True:
        statuses = _read(arguments, at)
        if arguments.json:
            _print(_as_json(arguments, statuses, indent=None))
        else:
            lines = _table_lines(arguments, statuses, limited=on_terminal)
            if on_terminal:
                lines = fitting(lines, *shutil.get_terminal_size())
                # Painted over, not cleared: clearing flickers.
                painted = "".join(f"{line}\033[K\n" for line in lines)
                sys.stdout.write(f"\033[H{painted}\033[J")
            else:
                _print("\n".join(lines) + "\n")
        sys.stdout.flush()
        time.sleep(_REFRESH_S)


def _table_lines(arguments: argparse.Namespace, statuses: list[Status], *, limited: bool) -> list[str]:
    lines = [time.strftime("%Y-%m-%d %H:%M:%S")]
    height = shutil.get_terminal_size().lines
    most = max(3, height // max(1, len(statuses)) - _LINES_PER_KEY) if limited else None
    table = Table(colours=has_colours(sys.stdout), width=_width(), most_workers=most)
    for each in statuses:
        lines.extend(["", *table.lines(each), *table.problems(each), *table.notes(each)])
    return lines if statuses else [*lines, *_nothing(arguments), *_problems_of_place(arguments)]


def _nothing(arguments: argparse.Namespace) -> list[str]:
    at = runtime_dir.locate(arguments.directory, "", os.geteuid())
    lines = [
        f"There is nothing here yet: no worker of {doctor.user_name(at.uid)} polled ({at.user_path})."
    ]
    others = [doctor.user_name(uid) for uid in runtime_dir.users_with_files(at.base) if uid != at.uid]
    if others:
        command = doctor.command_as(others[0], "status", at)
        lines.append(f"There is something of {', '.join(others)}: {command}")
    return lines


def _as_json(arguments: argparse.Namespace, statuses: list[Status], indent: int | None) -> str:
    found = [each.as_dict() for each in statuses]
    if arguments.key is not None:
        return json.dumps(found[0], indent=indent)
    return json.dumps({"schema_version": SCHEMA_VERSION, "keys": found}, indent=indent)


def _export(arguments: argparse.Namespace) -> int:
    _settings(arguments)
    at = _located(arguments)
    definitions = export.export(at, Host(), _ANY_SIZE)
    if definitions is None:
        return _fail(f"{arguments.key}: there is nothing to export: nothing is served in {at.path}")
    _print(json.dumps(definitions, indent=2))
    return FINE


def _publish(arguments: argparse.Namespace) -> int:
    told = _settings(arguments)
    path: str = arguments.file
    if arguments.follow and path == "-":
        arguments.usage_error("--follow needs a file; standard input is read once")
    publisher = LocalPublisher(told, force=arguments.force)
    try:
        if arguments.follow:
            # So that it leaves when it is stopped from outside, too.
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler)
        seen = local_publish.look(path)
        _report(publisher.publish(local_publish.read_definitions(path)))
        if arguments.follow:
            local_publish.follow(publisher, path, seen, _say, _report, time.sleep)
        _warn_of_fetchers(_located(arguments))
    except KeyboardInterrupt:
        return FINE if arguments.follow else INTERRUPTED
    finally:
        publisher.leave()
    return FINE


def _report(published: Published) -> None:
    event = "published" if published.changed else "unchanged:"
    flags, cohorts = count(published.flags, "flag"), count(published.cohorts, "cohort")
    _print(f"{event} generation {published.generation}: {flags}, {cohorts}, {size(published.size)}")
    sys.stdout.flush()


def _warn_of_fetchers(at: RuntimeDir) -> None:
    fetchers = sum(worker.role == "auto" for worker in status.read(at, Host(), _ANY_SIZE).workers)
    if fetchers:
        _say(
            f"note: {count(fetchers, 'worker')} may fetch, and publish over this; give them "
            "role='reader', or use --follow, which keeps them from it"
        )


def _clear(arguments: argparse.Namespace) -> int:
    _settings(arguments)
    at = _located(arguments)
    if clear.clear(at, Host(), force=arguments.force):
        _print(f"cleared {at.path}")
    else:
        _print(f"there is nothing to clear in {at.path}")
    return FINE


def _doctor(arguments: argparse.Namespace) -> int:
    _settings(arguments)
    checks = doctor.examine(arguments.directory, Host())
    if arguments.json:
        _print(json.dumps(doctor.as_dict(checks), indent=2))
    else:
        colours = has_colours(sys.stdout)
        for check in checks:
            verdict = f"{check.verdict:<6}"
            painted = f"{_VERDICT_COLOURS[check.verdict]}{verdict}\033[0m" if colours else verdict
            remedy = f" -> {check.remedy}" if check.remedy else ""
            _print(f"{painted}{check.name}: {check.found}{remedy}")
    sys.stdout.flush()
    wrong = [check for check in checks if check.verdict == doctor.WRONG]
    for check in wrong:
        _say(f"{check.name}: {check.found.rstrip('.')}: {check.remedy}")
    return WRONG if wrong else FINE


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.directory is not None:
        tempfile.tempdir = arguments.directory  # The demo makes a directory of its own in it.
    return demo.run(arguments)


# -- what they have in common


def _settings(arguments: argparse.Namespace) -> Settings:
    """Key and directory, checked as the cache checks them; wrong ones are wrong usage."""
    key = getattr(arguments, "key", None)
    try:
        # Ten seconds: nobody should have to wait long for the lease of a killed publisher.
        return settings.check(
            "any" if key is None else key,
            arguments.directory,
            DEFAULT_MAX_BYTES,
            poll_interval=10.0,
            cold_start_timeout=0.0,
        )
    except ValueError as error:
        arguments.usage_error(str(error))
        raise


def _located(arguments: argparse.Namespace) -> RuntimeDir:
    """Where the files of the key are; the name of a directory, as `status` shows it, will do."""
    at = runtime_dir.locate(arguments.directory, arguments.key, os.geteuid())
    if not os.path.lexists(at.path):
        for found in runtime_dir.found(arguments.directory, at.uid):
            if found.path.name == arguments.key:
                return found
    return at


def _width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _say(sentence: str) -> None:
    sys.stderr.write(f"shmflags: {sentence}\n")


def _fail(sentence: str) -> int:
    _say(sentence)
    return WRONG


def _prepare_streams() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # Closed by who started us.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # Whatever a key holds.
