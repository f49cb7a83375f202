"""The rules of the election, as tables."""

from __future__ import annotations

import pytest

from shmflags.election import is_due, may_publish, why_takeable
from shmflags.page import Fence, Grant, Lease
from shmflags.processes import Identity
from shmflags.publication import is_successor
from shmflags.snapshot import NOTHING, Position

S = 1_000_000_000
HOLDER = Identity(10, 20, 30)


def lease(token: int = 1, deadline: int = 110 * S, length: int = 45 * S) -> Lease:
    return Lease(3, token, HOLDER, length, deadline, 90 * S, 0)


@pytest.mark.parametrize(
    ("held", "dead", "reason"),
    [
        (lease(), False, None),
        (lease(token=0), False, "vacant"),
        (lease(deadline=0), False, "vacant"),
        (lease(deadline=100 * S), False, "run out"),
        (lease(deadline=100 * S + 1), False, None),
        (lease(deadline=145 * S), False, None),
        (lease(deadline=145 * S + 1), False, "further ahead"),
        (lease(), True, "dead"),
    ],
)
def test_when_a_lease_may_be_taken(held: Lease, dead: bool, reason: str | None) -> None:
    """A lease may be taken when it is vacant, over, implausibly long, or its holder is provably dead."""
    found = why_takeable(held, 100 * S, lambda identity: dead and identity == HOLDER)
    assert (reason is None and found is None) or (reason is not None and reason in str(found))


@pytest.mark.parametrize(
    ("at", "attempts", "serving", "dead", "due"),
    [
        (0, 0, True, False, True),
        (100 * S - 15 * S, 0, True, False, True),
        (100 * S - 15 * S + 1, 0, True, False, False),
        (100 * S + 1, 0, True, False, True),
        (99 * S, 1, True, True, False),
        (99 * S, 1, False, False, False),
        (99 * S, 1, False, True, True),
        (99 * S + 1, 1, False, True, False),
        (98 * S, 2, False, True, True),
        (98 * S + 1, 2, False, True, False),
        (93 * S, 4, False, True, False),
        (92 * S, 4, False, True, True),
        (85 * S, 60, False, True, True),
        (86 * S, 2**63, False, True, False),
        (99 * S, 0, False, True, True),
    ],
)
def test_when_a_fetch_is_due(at: int, attempts: int, serving: bool, dead: bool, due: bool) -> None:
    """A fetch is due half an interval after the last grant; sooner only for a dead grantee, at first."""
    grant = Grant(at, 5, HOLDER, attempts, 0)
    assert is_due(grant, 100 * S, 30 * S, serving=serving, is_dead=lambda _: dead) is due


@pytest.mark.parametrize(
    ("current", "serving", "accepted"),
    [
        (Fence(1, 5, 9), True, True),
        (Fence(1, 5, 9), False, True),
        (Fence(1, 5, 10), True, False),
        (Fence(1, 5, 10), False, True),
        (Fence(1, 6, 9), True, False),
        (Fence(1, 6, 9), False, False),
        (Fence(2, 5, 9), True, False),
        (Fence(2, 5, 9), False, False),
    ],
)
def test_when_a_fetch_may_be_published(current: Fence, serving: bool, accepted: bool) -> None:
    """Incarnation and count must be as noted, and the term too unless nothing can be served."""
    assert may_publish(Fence(1, 5, 9), current, serving=serving) is accepted


@pytest.mark.parametrize(
    ("found", "last", "incarnation", "newer"),
    [
        (Position(1, 5), Position(1, 4), 1, True),
        (Position(1, 4), Position(1, 4), 1, False),
        (Position(1, 3), Position(1, 4), 1, False),
        (Position(2, 1), Position(1, 4), 2, True),
        (Position(1, 5), Position(1, 4), 2, True),
        (Position(3, 9), Position(1, 4), 2, False),
        (Position(1, 9), Position(2, 4), 2, False),
        (Position(1, 1), NOTHING, 1, True),
        (Position(2, 1), NOTHING, 1, False),
    ],
)
def test_which_snapshot_follows_which(
    found: Position, last: Position, incarnation: int, newer: bool
) -> None:
    """Within an incarnation generations count; otherwise only the page's own incarnation is newer."""
    assert is_successor(found, last, incarnation) is newer
