"""The rules of the election, as tables."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from shmflags import page_file
from shmflags.election import (
    ClientState,
    Election,
    Outcome,
    is_due,
    may_publish,
    may_wait,
    why_takeable,
)
from shmflags.page import Fence, Grant, Lease
from shmflags.processes import NOBODY, Identity
from shmflags.publication import is_successor
from shmflags.runtime_dir import RuntimeDir
from shmflags.snapshot import NOTHING, Header, Position
from tests.manual_host import Machine, ManualHost
from tests.support import WAIT_S

S = 1_000_000_000
HOLDER = Identity(10, 20, 30)


def lease(token: int = 1, deadline: int = 110 * S, length: int = 45 * S) -> Lease:
    return Lease(3, token, HOLDER, length, deadline, 90 * S, 0)


MONTH = 30 * 24 * 3600 * S


@pytest.mark.parametrize(
    ("held", "dead", "reason"),
    [
        (lease(), False, None),
        (lease(token=0), False, "it was vacant"),
        (lease(deadline=0), False, "it was vacant"),
        (lease(deadline=100 * S), False, "it had run out"),
        (lease(deadline=100 * S + 1), False, None),
        (lease(deadline=145 * S), False, None),
        (lease(deadline=145 * S + 1), False, "its deadline was further ahead than it is long"),
        (lease(length=MONTH), False, None),
        (lease(length=MONTH + 1), False, "it was longer than any lease can be"),
        (lease(), True, "its holder is dead"),
    ],
)
def test_when_a_lease_may_be_taken(held: Lease, dead: bool, reason: str | None) -> None:
    """A lease may be taken when it is vacant, over, implausibly long, or its holder is provably dead."""
    assert why_takeable(held, 100 * S, lambda identity: dead and identity == HOLDER) == reason


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


# -- the rules applied to a real page, under a clock that the test moves


class Contender:
    """An election of one simulated process."""

    def __init__(
        self, page_home: RuntimeDir, machine: Machine, pid: int, max_term_s: int = 1800
    ) -> None:
        self.host = ManualHost(machine, pid)
        self.page = page_file.attach(page_home, self.host, f"{pid}-0-0-0", 1 << 20)
        self.election = Election(
            self.host,
            pid,
            self.host.identity(),
            interval_ns=30 * S,
            lease_ns=90 * S,
            max_term_ns=max_term_s * S,
        )
        self.client = ClientState(None, NOTHING, attached=False)
        with self.page.locked():
            self.page.workers.register(pid, self.host.identity(), 30 * S, electable=True)

    def poll(self) -> Outcome:
        for worker in self.page.workers.rows():
            self.page.workers.note_poll(worker.slot, self.election.token, NOTHING)
        return self.election.poll(self.page, self.client)

    def take_over(self) -> Outcome:
        return self.election.take_over(self.page, self.client)

    def publish(self, digest: bytes = b"d" * 16) -> None:
        """What an accepted publish of new content does to the page."""
        self.election.note_received()
        position = Position(self.page.incarnation, self.page.last_position().generation + 1)
        count = self.page.fence().publications + 1
        with self.page.locked():
            self.page.accept_snapshot(Header(position, count, 7, 200, 1, 1, 0, digest))


class Rivals:
    def __init__(self, home: RuntimeDir) -> None:
        self.home = home
        self.machine = Machine()
        self.last = 0

    def join(self, max_term_s: int = 1800) -> Contender:
        self.last += 1
        return Contender(self.home, self.machine, self.last, max_term_s)

    def one_leads(self) -> tuple[Contender, Contender]:
        """Two: the first leads and has published, the second has not polled yet."""
        first, second = self.join(), self.join()
        first.poll()
        first.publish()
        return first, second


@pytest.fixture
def rivals(home: RuntimeDir) -> Rivals:
    return Rivals(home)


def test_the_first_is_elected_and_granted(rivals: Rivals) -> None:
    """A vacant lease is taken in term 1 for its length, with a grant in the taker's name."""
    first = rivals.join()
    assert first.election.may_lead(first.page)
    outcome = first.poll()
    lease, grant = first.page.lease(), first.page.grant()
    now = rivals.machine.now
    assert outcome == Outcome(
        leads=True,
        fence=Fence(first.page.incarnation, 0, 1),
        events=("elected: to lead, as it was vacant",),
    )
    assert (lease.term, lease.token, lease.holder) == (1, 1, first.host.identity())
    assert (lease.length_ns, lease.deadline_ns, lease.elected_ns) == (90 * S, now + 90 * S, now)
    assert (grant.at_ns, grant.token, grant.holder, grant.attempts) == (
        now,
        1,
        first.host.identity(),
        1,
    )
    assert first.page.counters()["granted"] == 1
    assert first.page.counters()["takeovers"] == 0


def test_a_follower_takes_no_lock_while_the_leader_lives(rivals: Rivals) -> None:
    """While the deadline is ahead and nothing proves death, there is nothing to poll for."""
    first, second = rivals.join(), rivals.join()
    first.poll()
    assert not second.election.may_lead(second.page)
    assert second.poll() == Outcome(leads=False)
    rivals.machine.dead.add(1)
    assert second.election.may_lead(second.page)


def test_a_dead_leader_is_succeeded_in_a_new_term(rivals: Rivals) -> None:
    """Taking over raises the term, says from whom and why, and is counted."""
    _, second = rivals.one_leads()
    rivals.machine.dead.add(1)
    rivals.machine.pass_time(20)
    second.client = ClientState(None, NOTHING, attached=False)
    outcome = second.poll()
    assert outcome.events == ("took over: from process 1, as its holder is dead",)
    assert outcome.leads
    assert outcome.fence == Fence(second.page.incarnation, 1, 2)
    assert second.page.lease().term == 2
    assert second.page.counters()["takeovers"] == 1


def test_a_deposed_leader_says_so_once(rivals: Rivals) -> None:
    """A leader that finds another in its place logs it once, and follows."""
    first, second = rivals.one_leads()
    rivals.machine.pass_time(91)
    assert second.poll().leads
    assert first.election.may_lead(first.page)
    assert first.poll() == Outcome(leads=False, events=("deposed: process 2 leads",))
    assert not first.election.may_lead(first.page)
    assert first.poll() == Outcome(leads=False)


def test_a_deposed_leader_that_finds_nobody_says_so(rivals: Rivals) -> None:
    """A leader whose successor has resigned meanwhile logs that, and is elected again."""
    first, second = rivals.one_leads()
    rivals.machine.pass_time(91)
    second.poll()
    second.election.resign(second.page)
    outcome = first.poll()
    assert outcome.events == ("deposed: nobody leads now", "elected: to lead, as it was vacant")
    assert (outcome.leads, first.page.lease().term) == (True, 3)


def test_a_lease_half_written_is_nobodys(rivals: Rivals) -> None:
    """Whoever finds a lease without deadline, as a killed writer leaves it, is elected; it takes over nothing."""
    first, second = rivals.join(), rivals.join()
    first.poll()
    first.page.write_lease(first.page.lease()._replace(deadline_ns=0))
    assert second.poll().events == ("elected: to lead, as it was vacant",)
    assert second.page.counters()["takeovers"] == 0


def test_a_dead_fetchers_successor_awaits_its_turn_while_something_is_served(rivals: Rivals) -> None:
    """With something to serve a grant follows half an interval after the last, whoever has died."""
    _, second = rivals.one_leads()
    rivals.machine.dead.add(1)
    rivals.machine.pass_time(14)
    outcome = second.poll()
    assert (outcome.leads, outcome.fence) == (True, None)
    rivals.machine.pass_time(1)
    assert second.poll().fence is not None


def test_a_poll_renews_the_lease_in_the_same_term(rivals: Rivals) -> None:
    """A renewal moves the deadline, and neither term nor time of election, and is no event."""
    first = rivals.join()
    first.poll()
    first.publish()
    elected = first.page.lease().elected_ns
    rivals.machine.pass_time(10)
    assert first.poll() == Outcome(leads=True)
    lease = first.page.lease()
    assert (lease.term, lease.elected_ns) == (1, elected)
    assert lease.deadline_ns == rivals.machine.now + 90 * S


def test_taking_over_a_cold_start_renews_nothing(rivals: Rivals) -> None:
    """With nothing to serve, whoever waits fetches when a grant is due, and a lease is not prolonged."""
    first = rivals.join()
    outcome = first.take_over()
    assert outcome.leads
    assert outcome.fence == Fence(first.page.incarnation, 0, 1)
    deadline = first.page.lease().deadline_ns
    rivals.machine.pass_time(14)
    assert first.take_over() == Outcome(leads=False)
    rivals.machine.pass_time(1)
    assert first.take_over().fence == Fence(first.page.incarnation, 0, 1)
    assert first.page.lease().deadline_ns == deadline


def test_who_waits_for_a_living_fetcher_takes_no_lock(rivals: Rivals) -> None:
    """While the leader lives, others that wait for its first publish do not even ask for the lock."""
    first, second = rivals.join(), rivals.join()
    first.poll()
    rivals.machine.pass_time(15)
    with first.page.locked():
        assert second.take_over() == Outcome(leads=False)


def test_a_cold_start_waits_for_the_living_fetcher(rivals: Rivals) -> None:
    """Nobody takes over from a fetcher that lives; from a dead one, when its second has passed."""
    first, second = rivals.join(), rivals.join()
    first.poll()
    assert second.take_over() == Outcome(leads=False)
    rivals.machine.dead.add(1)
    assert second.take_over() == Outcome(leads=False)
    assert second.page.lease().token == 1, "without a grant to be had, the lease is left alone"
    rivals.machine.pass_time(1)
    outcome = second.take_over()
    assert outcome.fence == Fence(second.page.incarnation, 0, 2)
    assert second.page.grant().attempts == 2


def test_nothing_is_taken_over_once_there_is_something_to_serve(rivals: Rivals) -> None:
    """A publish that comes while somebody is about to take over ends the cold start."""
    _, second = rivals.one_leads()
    rivals.machine.dead.add(1)
    rivals.machine.pass_time(20)
    assert second.take_over() == Outcome(leads=False)
    assert second.page.lease().token == 1


def test_resigning_frees_only_what_is_ours(rivals: Rivals) -> None:
    """The leader's resignation vacates the lease; a follower's changes nothing."""
    first, second = rivals.join(), rivals.join()
    first.poll()
    assert second.election.resign(second.page) is False
    assert first.page.lease().token == 1
    assert first.election.resign(first.page) is True
    assert first.page.lease().token == 0
    assert first.election.resign(first.page) is False
    assert second.poll().events == ("elected: to lead, as it was vacant",)
    assert first.poll() == Outcome(leads=False), "resigning is no deposition"


def test_resigning_too_late_frees_nothing(rivals: Rivals) -> None:
    """A leader that is deposed while its resignation waits for the lock has resigned nothing."""
    first, second = rivals.join(), rivals.join()
    first.poll()
    theirs = first.page.lease()._replace(token=2, term=2)

    with ExitStack() as lock:
        lock.enter_context(second.page.locked())

        def sleep(_: float) -> None:
            second.page.write_lease(theirs)
            lock.close()

        first.host.sleep = sleep  # type: ignore[method-assign]
        assert first.election.resign(first.page) is False
    assert first.page.lease() == theirs


@pytest.mark.parametrize(
    ("leader", "force", "events"),
    [
        ("nobody", False, ("elected: to lead, as it was vacant",)),
        ("nobody", True, ("elected: to lead, as it was vacant",)),
        ("another", False, None),
        ("another", True, ("took over: from process 1, as it was told to",)),
        ("a dead one", False, ("took over: from process 1, as its holder is dead",)),
        ("one whose time is up", False, ("took over: from process 1, as it had run out",)),
    ],
)
def test_who_may_claim_the_lease(
    rivals: Rivals, leader: str, force: bool, events: tuple[str, ...] | None
) -> None:
    """A claim takes what a poll could take, and by force what another holds; it is told to fetch nothing."""
    first, second = rivals.join(), rivals.join()
    if leader != "nobody":
        first.poll()
        first.publish()
    if leader == "a dead one":
        rivals.machine.dead.add(1)
    if leader == "one whose time is up":
        rivals.machine.pass_time(90)
    before = second.page.lease(), second.page.grant()
    outcome = second.election.claim(second.page, force=force)
    assert second.page.grant() == before[1], "nobody is told to fetch"
    if events is None:
        assert outcome == Outcome(leads=False)
        assert second.page.lease() == before[0]
        return
    assert outcome == Outcome(leads=True, fence=second.page.fence(), events=events)
    lease = second.page.lease()
    assert (lease.token, lease.term) == (2, before[0].term + 1)
    assert lease.deadline_ns == rivals.machine.now + 90 * S
    assert second.poll().events == (), "each event is told once"


def test_claiming_by_default_deposes_nobody(rivals: Rivals) -> None:
    """Force has to be asked for."""
    first, second = rivals.join(), rivals.join()
    first.poll()
    assert second.election.claim(second.page) == Outcome(leads=False)


def test_a_claim_of_what_is_ours_renews_it(rivals: Rivals) -> None:
    """Whoever leads already goes on in its term, with its lease prolonged."""
    first = rivals.join()
    first.poll()
    first.publish()
    before = first.page.lease()
    rivals.machine.pass_time(20)
    assert first.election.claim(first.page) == Outcome(leads=True, fence=first.page.fence())
    assert first.page.lease() == before._replace(deadline_ns=rivals.machine.now + 90 * S)


@pytest.mark.parametrize(
    ("received", "position", "trusted"),
    [
        (None, Position(9, 9), True),
        (b"d" * 16, Position(0, 1), True),
        (b"d" * 16, Position(0, 0), False),
        (b"x" * 16, Position(0, 1), False),
    ],
)
@pytest.mark.parametrize("attached", [False, True])
def test_a_doubtful_etag_is_mended_or_makes_others_go_first(
    rivals: Rivals, received: bytes | None, position: Position, trusted: bool, attached: bool
) -> None:
    """Received and held must be what is published; else the ETag is mended, or another goes first.

    A client that has none asks for a full answer; an attached one is given one if there is one to be had.
    """
    first, second, third = rivals.join(), rivals.join(), rivals.join()
    first.poll()
    first.publish()
    incarnation = first.page.incarnation
    third.poll()
    rivals.machine.dead.add(1)
    rivals.machine.pass_time(20)
    held = position if position.incarnation else Position(incarnation, position.generation)
    second.client = ClientState(received, held, attached)
    outcome = second.poll()
    assert outcome.mend_etag == (attached and (received is None or not trusted))
    assert (outcome.fence is not None) == (attached or trusted)
    if attached or trusted:
        return
    assert not second.election.may_lead(second.page), "it abstains for an interval"
    assert second.poll() == Outcome(leads=False)
    rivals.machine.pass_time(29)
    assert second.poll() == Outcome(leads=False)
    rivals.machine.pass_time(1)
    assert second.election.may_lead(second.page)
    assert second.poll().fence is not None, "nobody came: then it leads all the same"


@pytest.mark.parametrize(
    ("since_s", "waits"), [(-1, False), (0, True), (15, True), (44, True), (45, False), (900, False)]
)
def test_a_fetch_may_wait_for_a_moment(since_s: int, waits: bool) -> None:
    """Until the host's last grant is one and a half intervals old; one in the future is nobody's."""
    grant = Grant(1000 * S, 1, NOBODY, 0, 0)
    assert may_wait(grant, (1000 + since_s) * S, 30 * S) is waits


def test_a_client_that_is_starting_is_served_first(rivals: Rivals) -> None:
    """Its fetch waits for its next poll, while it leads; what is served must be there."""
    first, second = rivals.join(), rivals.join()
    assert not second.election.puts_off
    first.client = second.client = ClientState(None, NOTHING, attached=True, is_starting=True)
    assert first.poll().fence is not None, "there is nothing to be served"
    first.publish()
    rivals.machine.dead.add(1)
    rivals.machine.pass_time(20)
    assert second.poll() == Outcome(
        leads=True, events=("took over: from process 1, as its holder is dead",)
    )
    assert second.election.puts_off
    assert second.page.grant().token == 1
    second.client = ClientState(None, second.page.position(), attached=True)
    assert second.poll().fence is not None
    assert not second.election.puts_off
    assert second.page.grant().attempts == 1
    second.election.note_answered(second.page)
    assert second.page.grant().attempts == 0
    with first.page.locked():
        second.election.note_answered(second.page)  # That was noted, and nothing waits for the lock.


def test_an_answer_settles_no_other_grant(rivals: Rivals) -> None:
    """Whoever is deposed while it fetches has no say in what its successor has put off."""
    contenders = [rivals.join() for _ in range(3)]
    contenders[0].poll()
    contenders[0].publish()
    for last, contender in itertools.pairwise(contenders):
        rivals.machine.dead.add(last.election.token)
        rivals.machine.pass_time(20)
        contender.client = ClientState(
            None, NOTHING, attached=True, is_starting=not last.page.grant().attempts
        )
        contender.poll()
        contender.client = ClientState(None, contender.page.position(), attached=True)
        contender.poll()
        if contender is contenders[2]:
            contender.page.write_grant(contender.page.grant()._replace(attempts=1))
        assert contender.page.grant().attempts == 1
    contenders[1].election.note_answered(contenders[1].page)
    assert contenders[1].page.grant().attempts == 1


def test_who_leaves_puts_off_nothing(rivals: Rivals) -> None:
    """Whoever resigns while a fetch waits owes it no more."""
    first, second = rivals.one_leads()
    first.election.resign(first.page)
    rivals.machine.pass_time(20)
    second.client = ClientState(None, NOTHING, attached=True, is_starting=True)
    second.poll()
    assert second.election.puts_off
    second.election.resign(second.page)
    assert not second.election.puts_off


def test_a_doubtful_etag_alone_leads_at_once(rivals: Rivals) -> None:
    """With nobody else alive there is nobody to wait for."""
    _, second = rivals.one_leads()
    rivals.machine.dead.add(1)
    rivals.machine.pass_time(20)
    second.client = ClientState(b"x" * 16, NOTHING, attached=False)
    assert second.poll().fence is not None


@pytest.mark.parametrize("silent_s", [75, 76])
def test_who_has_not_polled_for_long_is_nobody_to_wait_for(rivals: Rivals, silent_s: int) -> None:
    """A worker whose last poll is more than two and a half of its intervals ago does not count."""
    first, second = rivals.join(max_term_s=10), rivals.join()
    first.poll()
    first.publish()
    second.poll()
    rivals.machine.pass_time(silent_s)
    assert first.poll().leads == (silent_s > 75)


def test_a_fruitless_fetch_makes_way_and_abstains(rivals: Rivals) -> None:
    """A grant that had to bring a publish and did not is the last one until others had their turn."""
    first, second = rivals.join(), rivals.join()
    first.poll()
    second.poll()
    rivals.machine.pass_time(1)
    assert first.poll() == Outcome(leads=False, events=("yielded: its fetch brought nothing",))
    assert first.page.lease().token == 0
    assert first.page.lease().term == 1
    assert not first.election.may_lead(first.page)
    assert first.take_over() == Outcome(leads=False)
    assert second.poll().leads


@pytest.mark.parametrize(("passed_s", "fruitless"), [(29, False), (30, True)])
def test_a_fetch_under_way_in_another_thread_is_not_fruitless(
    rivals: Rivals, passed_s: int, fruitless: bool
) -> None:
    """Another thread's poll does not end a fetch, until an interval has passed."""
    first, second = rivals.join(), rivals.join()
    in_a_thread(first.poll)
    rivals.machine.pass_time(passed_s)
    second.poll()
    yielded = ("yielded: its fetch brought nothing",) if fruitless else ()
    outcome = first.poll()
    assert (outcome.leads, outcome.events) == (not fruitless, yielded)


def in_a_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_a_doubt_that_comes_up_later_counts_like_one_known_before(rivals: Rivals) -> None:
    """A grant whose ETag turns out to be doubtful must bring a publish, in the thread that fetches."""
    first, second = rivals.one_leads()
    sound = ClientState(b"d" * 16, first.page.position(), attached=False)
    first.client = second.client = sound
    rivals.machine.pass_time(15)
    second.poll()
    assert first.poll().fence is not None
    first.election.note_doubt()
    rivals.machine.pass_time(1)
    in_a_thread(lambda: first.poll())
    assert first.page.lease().token == 1, "the fetch goes on in this thread"
    assert first.poll().events == ("yielded: its fetch brought nothing",)


@pytest.mark.parametrize(("passed_s", "fruitless"), [(29, False), (30, True)])
def test_a_late_doubt_is_as_old_as_when_it_came_up(
    rivals: Rivals, passed_s: int, fruitless: bool
) -> None:
    """Another thread's poll ends a doubtful fetch when an interval has passed since the doubt."""
    first, second = rivals.one_leads()
    first.client = ClientState(b"d" * 16, first.page.position(), attached=False)
    in_a_thread(first.election.note_doubt)
    rivals.machine.pass_time(passed_s)
    second.poll()
    assert first.poll().leads is not fruitless


def test_alone_a_fruitless_fetch_is_forgiven_once_and_again(rivals: Rivals) -> None:
    """With nobody to make way for the leader stays: it takes what is published, and tries again when due."""
    first = rivals.join()
    first.poll()
    first.publish()
    first.client = ClientState(b"x" * 16, NOTHING, attached=False)
    rivals.machine.pass_time(15)
    assert first.poll().fence is not None
    for _ in range(2):
        rivals.machine.pass_time(15)
        assert first.poll() == Outcome(leads=True), "it takes what is published"
        rivals.machine.pass_time(1)
        assert first.poll().fence is not None
    second = rivals.join()
    first.election.note_received()
    second.poll()
    assert first.poll() == Outcome(leads=True), "what was forgiven is forgotten"


def test_who_made_way_in_vain_leads_again_in_spite_of_its_doubt(rivals: Rivals) -> None:
    """A leader that yielded abstains once for the term: if nobody came meanwhile, it takes the lease."""
    first, second = rivals.one_leads()
    first.client = ClientState(b"x" * 16, NOTHING, attached=False)
    rivals.machine.pass_time(15)
    assert first.poll().fence is not None
    rivals.machine.pass_time(15)
    assert first.poll().events == ("yielded: its fetch brought nothing",)
    rivals.machine.pass_time(30)
    outcome = first.poll()
    assert outcome.events == ("elected: to lead, as it was vacant",)
    assert outcome.fence is not None
    assert second.election.may_lead(second.page) is False


def test_a_grant_that_need_bring_nothing_is_never_fruitless(rivals: Rivals) -> None:
    """Once something is served and the ETag is sound, a 304 is as good as an answer."""
    first, second = rivals.one_leads()
    first.client = ClientState(b"d" * 16, first.page.position(), attached=False)
    for _ in range(3):
        rivals.machine.pass_time(30)
        second.poll()
        outcome = first.poll()
        assert outcome.leads
        assert outcome.fence is not None
        assert outcome.events == ()
    assert first.page.grant().attempts == 0


def test_rotation_is_told_as_such(rivals: Rivals) -> None:
    """Past max_term the leader yields, says why, and another may take the lease at once."""
    first, second = rivals.join(max_term_s=50), rivals.join()
    first.poll()
    first.publish()
    first.client = ClientState(b"d" * 16, first.page.position(), attached=False)
    second.client = first.client
    rivals.machine.pass_time(50)
    second.poll()
    assert first.poll().leads
    rivals.machine.pass_time(1)
    second.poll()
    assert first.poll() == Outcome(leads=False, events=("yielded: it led for max_term",))
    outcome = second.poll()
    assert outcome.leads
    assert second.page.lease().term == 2
    assert second.page.counters()["takeovers"] == 0
