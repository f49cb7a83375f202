"""`shmflags publish`: definitions from a file instead of the API."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from shmflags import SharedMemoryFlagCache, local_publish
from shmflags.demo.server import DefinitionsServer, definitions, flag
from shmflags.local_publish import LOOK_S, follow, look, read_definitions
from tests.support import local_publisher, wait_until, workers
from tests.test_cli import (
    ONE,
    TWO,
    Run,
    cache_at,
    end_of,
    files_below,
    line_of,
    run,
    served,
    started,
)
from tests.test_status import ShiftedHost

__all__ = ["run"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with `ONE` as JSON."""
    path = tmp_path / "flags.json"
    path.write_text(json.dumps(ONE))
    return path


@contextmanager
def following(directory: Path, file: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """`publish --follow` that has published the file."""
    with started("publish", "test", file, "--follow", *more, "--directory", directory) as process:
        assert line_of(process).startswith("published generation ")
        yield process


def leader_of(directory: Path) -> int | None:
    leader = cache_at(directory).status().leader
    return None if leader is None else leader.pid


# -- what comes of it


def test_what_is_published_is_served(run: Run, directory: Path, file: Path) -> None:
    """The file's definitions are what a worker gets, and the publisher leaves without a trace."""
    ended = run("publish", "test", file, "--directory", directory)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith("published generation 1: 1 flag, 0 cohorts, ")
    assert served(directory) == ONE
    assert leader_of(directory) is None
    assert cache_at(directory).status().workers == ()
    again = run("publish", "test", file, "--directory", directory)
    assert again.out.startswith("unchanged: generation 1: 1 flag")
    file.write_text(json.dumps(TWO))
    changed = run("publish", "test", file, "--directory", directory)
    assert changed.out.startswith("published generation 2: 2 flags")


def test_what_was_exported_can_be_published(run: Run, directory: Path, tmp_path: Path) -> None:
    """Export and publish are each other's reverse, whatever JSON can express."""
    odd = definitions(
        flag("", payloads={"true": 1 << 70}),
        flag("\ud800ü"),
        cohorts={"\ud800": {"z": 1.5, "a": 1e300}},
        unknown={"kept": [None]},
    )
    cache = cache_at(directory)
    assert cache.should_fetch_flag_definitions()
    cache.on_flag_definitions_received(odd)
    exported = tmp_path / "exported.json"
    exported.write_text(run("export", "test", "--directory", directory).out)
    assert run("publish", "copy", exported, "--directory", directory).status == 0
    assert served(directory, "copy") == odd


def test_standard_input_will_do(directory: Path) -> None:
    """`-` reads the definitions from standard input."""
    with started("publish", "test", "-", "--directory", directory, stdin=subprocess.PIPE) as process:
        out, err = process.communicate(json.dumps(TWO), timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("published generation 1: 2 flags")
    assert served(directory) == TWO


def test_real_readers_need_no_api_and_no_key_that_works(
    run: Run, directory: Path, file: Path, server: DefinitionsServer
) -> None:
    """A real client with role "reader", a made-up key and no API evaluates the published flags."""
    assert run("publish", "test", file, "--directory", directory).status == 0
    with workers(1) as (worker,):
        worker.call("make_cache", directory=str(directory), role="reader")
        worker.call("make_client", server.url)
        assert worker.call("evaluate", "one") is True
        worker.call("attach")
        file.write_text(json.dumps(definitions(flag("one", on=False))))
        assert run("publish", "test", file, "--directory", directory).status == 0
        assert worker.call("until", "one", False, 60)
        assert run("status", "test", "--directory", directory).status == 0
    assert server.count == 0


def test_readers_that_were_there_first_get_what_is_published(
    run: Run, directory: Path, file: Path, server: DefinitionsServer
) -> None:
    """A reader that started with nothing to read has the flags as soon as they are published."""
    with workers(1) as (worker,):
        worker.call("make_cache", directory=str(directory), role="reader", cold_start_timeout=0.1)
        worker.call("make_client", server.url)
        worker.call("attach")
        assert worker.call("evaluate", "one") is None
        assert run("status", "test", "--directory", directory).status == 1
        assert run("publish", "test", file, "--directory", directory).status == 0
        assert worker.call("until", "one", True, 60)
    assert server.count == 0


# -- what is refused


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not JSON: Expecting value in line 1, column 1"),
        ('{"flags": [],\n "cohorts"', "is not JSON: Expecting ':' delimiter in line 2, column 11"),
        ("[]", "definitions are a dict with flags, group_type_mapping and cohorts, not a list"),
        ('{"flags": []}', "definitions lack 'group_type_mapping'"),
        ('{"flags": {}, "group_type_mapping": {}, "cohorts": {}}', "definitions['flags'] is a dict"),
        ('{"flags": [1], "group_type_mapping": {}, "cohorts": {}}', "flags[0] is a int, not a dict"),
        ('{"flags": [{"Key": "a"}], "group_type_mapping": {}, "cohorts": {}}', "flags[0] has no key"),
        (
            '{"flags": [{"key": "a"}, {"key": "a"}], "group_type_mapping": {}, "cohorts": {}}',
            "flags[1] has the key 'a', which flags[0] has already",
        ),
        ('{"flags": [], "group_type_mapping": {}, "cohorts": {"1": NaN}}', "JSON has no NaN"),
        ('{"flags": [], "group_type_mapping": {}, "cohorts": {"1": 1e999}}', "1e999 is too large"),
        ("[" * 100_000, "is not JSON that can be used"),
        ("\xff", "is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_served_is_refused(
    run: Run, directory: Path, tmp_path: Path, text: str, complaint: str
) -> None:
    """What is wrong with a file is said, with its name and the place, and nothing is touched."""
    path = tmp_path / "flags.json"
    path.write_bytes(text.encode("latin-1"))
    ended = run("publish", "test", path, "--directory", directory)
    assert ended.status == 1
    assert ended.out == ""
    assert ended.err.startswith(f"shmflags: {path}: ")
    assert complaint in ended.err
    assert ended.err.count("\n") == 1
    assert files_below(directory) == set()


def test_a_file_that_does_not_exist_is_said(run: Run, directory: Path) -> None:
    """A missing file is named, in one line."""
    ended = run("publish", "test", "/nowhere/flags.json", "--directory", directory)
    assert (ended.status, ended.err) == (
        1,
        "shmflags: /nowhere/flags.json: No such file or directory\n",
    )


def test_a_byte_order_mark_is_no_mistake(run: Run, directory: Path, tmp_path: Path) -> None:
    """A file that an editor began with a byte order mark is taken."""
    path = tmp_path / "flags.json"
    path.write_text(json.dumps(ONE), encoding="utf-8-sig")
    assert run("publish", "test", path, "--directory", directory).status == 0


def test_a_living_leader_is_not_pushed_aside(
    run: Run, directory: Path, file: Path, server: DefinitionsServer
) -> None:
    """While a worker leads, publish is refused and names it; when that is dead, it is not."""
    server.set_definitions(TWO)
    with workers(1) as (worker,):
        worker.call("make_cache", directory=str(directory))
        worker.call("make_client", server.url)
        worker.call("poll")
        ended = run("publish", "test", file, "--directory", directory)
        assert (ended.status, ended.out) == (1, "")
        assert f"process {worker.pid} leads" in ended.err
        assert "--force" in ended.err
        assert served(directory)["flags"] == TWO["flags"]
        assert leader_of(directory) == worker.pid
        worker.kill()
        assert run("publish", "test", file, "--directory", directory).status == 0
        assert served(directory) == ONE


def test_force_deposes_the_leader_and_its_fetch(
    run: Run, directory: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A leader deposed by force says so once, and what it was fetching meanwhile is dropped."""
    caplog.set_level("INFO", "shmflags")
    leader = cache_at(directory)
    assert leader.should_fetch_flag_definitions()
    assert run("publish", "test", file, "--force", "--directory", directory).status == 0
    leader.on_flag_definitions_received(TWO)
    assert served(directory) == ONE
    leader.should_fetch_flag_definitions()
    leader.should_fetch_flag_definitions()
    assert caplog.text.count("deposed: nobody leads now") == 1
    assert caplog.text.count("dropped: what was fetched") == 1
    assert leader.get_flag_definitions() == ONE
    assert leader_of(directory) == os.getpid()


def test_who_publishes_where_others_fetch_is_told(run: Run, directory: Path, file: Path) -> None:
    """After a publish by force, it is said that workers may publish over it."""
    leader = cache_at(directory)
    assert leader.should_fetch_flag_definitions()
    leader.on_flag_definitions_received(TWO)
    ended = run("publish", "test", file, "--force", "--directory", directory)
    assert ended.status == 0
    assert ended.err.startswith("shmflags: note: 1 worker may fetch, and publish over this")


# -- following


def test_a_followed_file_is_published_when_it_changes(directory: Path, file: Path) -> None:
    """Written in place, replaced, or behind a link that is moved: each change is published."""
    link = file.with_name("link.json")
    link.symlink_to(file)
    with following(directory, link) as process:
        file.write_text(json.dumps(TWO))
        assert line_of(process).startswith("published generation 2: 2 flags")
        other = file.with_name("other.json")
        other.write_text(json.dumps(ONE))
        other.replace(file)
        assert line_of(process).startswith("published generation 3: 1 flag,")
        (file.parent / "new").mkdir()
        target = file.parent / "new" / "flags.json"
        target.write_text(json.dumps(TWO))
        moved = file.with_name("moved.json")
        moved.symlink_to(target)
        moved.replace(link)
        assert line_of(process).startswith("published generation 4: 2 flags")
        assert served(directory) == TWO


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_following_ends_quietly(directory: Path, file: Path, number: signal.Signals) -> None:
    """By Ctrl-C or from outside it ends with 0 and without a word, and gives the lease back."""
    with following(directory, file) as process:
        assert leader_of(directory) == process.pid
        process.send_signal(number)
        ended = end_of(process)
        assert (ended.status, ended.out, ended.err) == (0, "", "")
    assert leader_of(directory) is None
    assert served(directory) == ONE


def test_while_a_file_is_followed_nobody_fetches(
    directory: Path, file: Path, server: DefinitionsServer
) -> None:
    """A follower keeps the lease: workers that could fetch take its flags, until it has ended."""
    with following(directory, file) as process, workers(1) as (worker,):
        server.set_definitions(TWO)
        worker.call("make_cache", directory=str(directory))
        worker.call("make_client", server.url)
        assert worker.call("poll") == ["one"]
        assert server.count == 0
        process.kill()
        process.wait(60)
        assert worker.call("poll") == ["one", "two"]
        assert server.count == 1


def test_what_cannot_be_published_is_said_once_and_the_last_stays(directory: Path, file: Path) -> None:
    """A broken file, and then none, leave what was published; the next good one is published."""
    with following(directory, file) as process:
        assert process.stderr is not None
        file.write_text("{")
        assert process.stderr.readline().startswith(f"shmflags: {file}: is not JSON: ")
        file.unlink()
        assert (
            process.stderr.readline() == f"shmflags: {file} is gone: what was published before stays\n"
        )
        assert served(directory) == ONE
        file.write_text(json.dumps(TWO))
        assert line_of(process).startswith("published generation 2: 2 flags")
        process.send_signal(signal.SIGINT)
        assert end_of(process).err == ""


class Script(list[Callable[[], object]]):
    """In place of sleep: does the next thing at each look, and ends the following after the last."""

    def __call__(self, _: float) -> None:
        if not self:
            raise KeyboardInterrupt
        self.pop(0)()


def followed(directory: Path, file: Path, script: Script) -> tuple[list[int], list[str]]:
    """The numbers of flags that were published, and what was said, while `script` ran."""
    publisher = local_publisher(directory)
    published: list[int] = []
    said: list[str] = []
    seen = look(str(file))
    publisher.publish(read_definitions(str(file)))
    with pytest.raises(KeyboardInterrupt):
        follow(publisher, str(file), seen, said.append, lambda one: published.append(one.flags), script)
    publisher.leave()
    return published, said


def test_a_file_that_is_being_written_is_left_alone(directory: Path, file: Path) -> None:
    """Half a file is neither published nor complained of; the whole one is, once it is at rest."""
    text = json.dumps(TWO)
    halves = Script([lambda: file.write_text(text[:50]), lambda: file.write_text(text), idle, idle])
    assert followed(directory, file, halves) == ([2], [])


def test_a_trouble_that_lasts_is_said_once(
    directory: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be read is tried again and said once; what is wrong is not even read again."""
    reads: list[str] = []

    def counted(path: str) -> dict[str, Any]:
        reads.append(path)
        return read_definitions(path)

    monkeypatch.setattr(local_publish, "read_definitions", counted)

    def replace_by_directory() -> None:
        file.unlink()
        file.mkdir()

    def repair() -> None:
        file.rmdir()
        file.write_text(json.dumps(TWO))

    broken = Script([replace_by_directory, *[idle] * 5, repair, *[idle] * 3])
    published, said = followed(directory, file, broken)
    assert published == [2]
    assert said == [f"[Errno 21] Is a directory: '{file}': what was published before stays"]
    reads.clear()
    wrong = Script([lambda: file.write_text("{"), *[idle] * 5])
    published, said = followed(directory, file, wrong)
    assert len(said) == len(reads) == 1


def idle() -> None:
    """Nothing happens between two looks."""


def test_a_follower_restores_what_is_removed(directory: Path, file: Path) -> None:
    """If page and snapshot are removed behind its back, it publishes the file again."""
    with following(directory, file) as process:
        for path in files_below(directory):
            os.unlink(path)
        wait_until(lambda: leader_of(directory) == process.pid, "it leads again")
        wait_until(lambda: cache_at(directory).status().flags == 1, "the flags are back")
        assert served(directory) == ONE


def test_a_follower_leads_again_on_a_new_page(directory: Path, file: Path) -> None:
    """If only the page is removed, it takes the lease of the new one at its next look."""
    publisher = local_publisher(directory)
    publisher.publish(read_definitions(str(file)))
    (page,) = directory.glob("shmflags-*/v1/*/page")
    page.unlink()
    assert leader_of(directory) is None
    publisher.keep()
    assert leader_of(directory) == os.getpid()
    assert served(directory) == ONE
    publisher.leave()


def test_a_follower_that_is_deposed_ends(run: Run, directory: Path, file: Path, tmp_path: Path) -> None:
    """If another process takes the lease by force, the follower says so and ends with 1."""
    other = tmp_path / "other.json"
    other.write_text(json.dumps(TWO))
    with (
        following(directory, file, "--force") as process,
        following(directory, other, "--force") as second,
    ):
        ended = end_of(process)
        assert ended.status == 1
        assert f"process {second.pid} leads" in ended.err
        assert leader_of(directory) == second.pid
        assert served(directory) == TWO


def test_a_follower_does_not_undo_a_publish_by_force(
    run: Run, directory: Path, file: Path, tmp_path: Path
) -> None:
    """What was published over it by force stays: the follower says so and ends with 1."""
    other = tmp_path / "other.json"
    other.write_text(json.dumps(TWO))
    with following(directory, file) as process:
        assert run("publish", "test", other, "--force", "--directory", directory).status == 0
        ended = end_of(process)
    assert ended.status == 1
    assert re.search(r"process \d+ leads|another process has led meanwhile", ended.err)
    assert served(directory) == TWO


def test_a_follower_that_nobody_reads_ends_quietly(directory: Path, file: Path) -> None:
    """`publish --follow | head -1` ends at the next change, with 0, and gives the lease back."""
    with following(directory, file) as process:
        assert process.stdout is not None
        process.stdout.close()
        file.write_text(json.dumps(TWO))
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert leader_of(directory) is None
    assert served(directory) == TWO


def test_following_is_no_busy_loop(directory: Path, file: Path) -> None:
    """Between changes a follower sleeps: ten looks at the file take little of the processor's time."""
    with following(directory, file) as process:
        seen = psutil.Process(process.pid)
        before = seen.cpu_times()
        switches = seen.num_ctx_switches().voluntary
        wait_until(lambda: seen.num_ctx_switches().voluntary > switches + 10, "it has looked ten times")
        after = seen.cpu_times()
        assert after.user + after.system - before.user - before.system < 10 * LOOK_S / 4


def test_its_lease_is_renewed_for_as_long_as_it_follows(directory: Path, file: Path) -> None:
    """A publisher that is called now and then keeps its lease beyond its length."""
    publisher = local_publisher(directory)
    host = ShiftedHost()
    publisher._host = publisher._member.host = publisher._member.election.host = host
    publisher.publish(read_definitions(str(file)))
    for _ in range(10):
        host.shift_s += 20
        publisher.keep()
    worker = SharedMemoryFlagCache("test", directory=directory)
    worker._host = host
    assert not worker.should_fetch_flag_definitions()
    publisher.leave()
    assert worker.should_fetch_flag_definitions()
