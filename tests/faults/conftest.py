"""Fixtures of the fault tests; their options stand in tests/conftest.py, where pytest finds them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.faults.harness import Ear


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
