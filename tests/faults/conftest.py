"""Fixtures and options of the fault tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.faults.harness import Ear


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--storm-seconds",
        type=float,
        default=25.0,
        help="how long the storm of kills and stops blows (name tests/faults on the command line)",
    )
    parser.addoption(
        "--simulations",
        type=int,
        default=3000,
        help="how many schedules the simulation runs (name tests/faults on the command line)",
    )
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        help="the first of them; with --simulations 1, the one to replay",
    )


@pytest.fixture
def ear() -> Iterator[Ear]:
    """What the package logs during the test; the test fails if anything came with a traceback."""
    ear = Ear()
    logger = logging.getLogger("shmflags")
    before = logger.level, logger.propagate
    logger.addHandler(ear)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # Thousands of faults make tens of thousands of lines.
    yield ear
    logger.removeHandler(ear)
    logger.setLevel(before[0])
    logger.propagate = before[1]
    ear.assert_no_surprise()
