"""Hostile words in the control page: whatever stands in one, somebody leads, and only one."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from shmflags.page import PAGE_BYTES
from shmflags.processes import Host
from tests.faults.fuzz_target import check_page
from tests.faults.harness import Ear, control_page, page_words
from tests.faults.scene import RealLiveness, Scene

HOUR_NS = 3600 * 10**9
USED_WORDS = range(47)
TABLE = 128
SLOT_WORDS, SLOT_FIELDS = 16, 11
WORDS = PAGE_BYTES // 8

# Bounds of the integers that a word passes through: of C, of pids, of a word, of our own checks.
BOUNDS = [2**n + d for n in (16, 31, 32, 48, 63) for d in (-1, 0)]
VALUES = [0, 1, 2, *BOUNDS, 2**64 - 2, 2**64 - 1]


@pytest.fixture
def scene(directory: Path, ear: Ear) -> Scene:
    return Scene(directory, RealLiveness)


def telling_values(scene: Scene) -> list[int]:
    """Values that mean something here: times, our own pid and another one, what other words hold."""
    now = scene.machine.now
    words = page_words(scene.base)
    own = Host().identity()
    return [
        *((now + d) % 2**64 for d in (-HOUR_NS, -1, 0, 1, HOUR_NS, 24 * 365 * HOUR_NS)),
        *(own.pid, own.start_ticks, own.pid_namespace, os.getppid()),
        *(words[word] for word in (1, 5, 13, 17, TABLE, TABLE + SLOT_WORDS)),
    ]


def some(values: list[int], word: int, thorough: bool) -> list[int]:
    """In continuous integration each word has each of the values, else every third one."""
    return values if thorough else values[word % 3 :: 3]


@pytest.mark.parametrize("how", ["in place", "at rest"])
@pytest.mark.parametrize("part", range(4))
def test_any_value_in_any_word_of_the_header(scene: Scene, how: str, part: int, thorough: bool) -> None:
    """No value of any single word stops the workers, misleads them, or makes one of them raise."""
    for word in USED_WORDS[part::4]:
        for value in some(VALUES + telling_values(scene), word, thorough):
            scene.survive(scene.poke(word, value), running=how == "in place", newcomers=0)


def test_any_value_in_any_word_of_a_workers_slot(scene: Scene, thorough: bool) -> None:
    """No value of any single word of the worker table does harm, be the slot taken or free."""
    for slot in (0, 255):
        for field in range(SLOT_FIELDS):
            for value in some(VALUES + telling_values(scene), field, thorough):
                word = TABLE + slot * SLOT_WORDS + field
                scene.survive(scene.poke(word, value), running=True, newcomers=0)


@pytest.mark.parametrize("how", ["in place", "at rest"])
@pytest.mark.parametrize("seed", range(4))
def test_any_values_in_many_words(scene: Scene, how: str, seed: int) -> None:
    """Hostile values in a dozen words at once do no harm: one worker leads, with right data."""
    pick = random.Random(seed)
    for _ in range(150):
        values = VALUES + telling_values(scene)
        words = [pick.choice(USED_WORDS) for _ in range(12)]
        words += [pick.randrange(TABLE, WORDS) for _ in range(4)]

        check_page(scene, [(word, pick.choice(values)) for word in words], in_place=how == "in place")


@pytest.mark.parametrize("value", [1, 2**63, 2**64 - 1])
def test_a_worker_table_full_of_garbage(scene: Scene, value: int) -> None:
    """A table without a free slot, full of workers that never were, costs nobody the leadership."""

    def damage() -> None:
        words = page_words(scene.base)
        for word in range(TABLE, WORDS):
            words[word] = value

    for newcomers in (0, 2):
        scene.survive(damage, running=True, newcomers=newcomers)
    scene.survive(damage, running=False)
    listed = {worker.token for worker in control_page(scene.base).workers.rows()}
    assert {poller.cache._me().token for poller in scene.group} <= listed
