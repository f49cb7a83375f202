"""The provider above this host's: asked by the host's leader, before the API, when a fetch is due.

Whoever wrote it, it may be sync or async, raise, hang, or answer nonsense. So it is called on a helper
thread (helper_thread.py), outside all locks, and for `PATIENCE_S` at most; whatever goes wrong is
logged and means: fetch. Its answers mean:

1.  Do not fetch, and here are definitions: they are published on this host, under the fence of the
    grant like any fetch, and the API is not asked.
2.  Do not fetch, and there is nothing: if this host serves something, it goes on doing so. If not,
    somebody is fetching elsewhere: it is looked for again, once per process, for most of the time for
    which this host's workers wait for their first definitions; then it is fetched here.
3.  Fetch: the API is asked, and what it answers is published to both.

In the third case the ETag rule (election.py, rule 6) is applied to the upstream too. A 304 leaves the
upstream as it is; so the client's ETag can be trusted only if what the upstream has is what the client
last received. If it has something else, or nothing, the ETag is cleared where it can be, and else the
fetch must bring a publish, or this worker makes way.

A provider may offer more than PostHog's four methods: `exchange_for_host(host, known, *, again)`, one
call instead of two, which returns an `Exchange` and may raise. `host` is the same number for all
processes that share a page, so that a cluster's lease can stay with a host whose leader changes;
`known` is what this process holds, to be given back where it is still current; `again` says that it
was asked already, and only whether there is something by now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from shmflags import codec
from shmflags.contract import NO_DIGEST, Exchange
from shmflags.errors import InvalidDefinitionsError
from shmflags.helper_thread import HelperThread
from shmflags.holding import Holding
from shmflags.member import Member
from shmflags.page import ControlPage, Fence
from shmflags.processes import Host
from shmflags.publisher import Publisher
from shmflags.settings import Settings

PATIENCE_S = 2.0
"""Seconds for which a poll waits for an answer of the upstream, at most."""
_LOOK_AGAIN_S = 0.1
_TROUBLE = "the upstream failed, so this host asks the API"


class _Found(NamedTuple):
    """Definitions that the upstream has. `encoded` is None if they are the object that we hold."""

    decoded: codec.Decoded
    encoded: codec.Encoded | None


class _Process:
    """The upstream as one process has used it."""

    def __init__(self) -> None:
        self.helper = HelperThread("shmflags-upstream")
        self.asked = False
        self.closed = False
        self.cold_deadline_ns: int | None = None


class Upstream:
    """One provider's upstream. `complain(what, error)` logs trouble that may repeat."""

    def __init__(
        self,
        provider: Any,
        settings: Settings,
        holding: Holding,
        publisher: Publisher,
        complain: Callable[[str, object], None],
    ) -> None:
        self._provider = provider
        # Not all of it: what is fetched here in the end is to come in time for the other workers.
        self._cold_wait_ns = settings.cold_start_ns * 4 // 5
        self._holding = holding
        self._publisher = publisher
        self._complain = complain
        # By pid: a forked child has neither the parent's thread nor its reasons to shut down.
        self._processes: dict[int, _Process] = {}

    def settles(self, member: Member, page: ControlPage, fence: Fence) -> bool:
        """Ask, as a fetch was granted under `fence`; False if the API is still to be asked.

        Never raises. Holds no lock while it waits.
        """
        process = self._process(member)
        if process.closed:
            return False
        known = self._holding.decoded
        process.asked = True
        try:
            exchange = self._ask(process, page, known, again=False)
            while exchange.is_empty and not page.is_serving() and self._may_wait(process, member.host):
                member.host.sleep(_LOOK_AGAIN_S)
                exchange = self._ask(process, page, known, again=True)
        except Exception as error:
            self._complain(_TROUBLE, error)
            return False
        if exchange.fetch:
            self._doubt_etag(member, exchange, known)
            return False
        return self._take(member, page, fence, exchange, known)

    def publish(self, member: Member, data: object) -> None:
        """Hand on what this process fetched. Never raises."""
        process = self._process(member)
        if process.closed:
            return
        process.asked = True
        helper, give = process.helper, self._provider.on_flag_definitions_received
        try:
            helper.call(lambda: helper.settle(give(data), PATIENCE_S), PATIENCE_S)
        except Exception as error:
            self._complain("the upstream did not take what was fetched", error)

    def shutdown(self, member: Member) -> None:
        """Shut it down, if this process has asked it: once. Never raises."""
        process = self._process(member)
        with member.lock:
            if process.closed or not process.asked:
                return
            process.closed = True
        helper = process.helper
        try:
            helper.finish(lambda: helper.settle(self._provider.shutdown(), PATIENCE_S), PATIENCE_S)
        except Exception as error:
            self._complain("the upstream could not be shut down", error)

    def _process(self, member: Member) -> _Process:
        process = self._processes.get(member.pid)
        if process is None:
            process = self._processes.setdefault(member.pid, _Process())  # One, of two threads' two.
        return process

    def _may_wait(self, process: _Process, host: Host) -> bool:
        now_ns = host.now_ns()
        if process.cold_deadline_ns is None:
            process.cold_deadline_ns = now_ns + self._cold_wait_ns
        return now_ns < process.cold_deadline_ns

    def _ask(
        self, process: _Process, page: ControlPage, known: codec.Decoded | None, *, again: bool
    ) -> Exchange:
        helper, host, provider = process.helper, page.incarnation, self._provider
        exchange = getattr(provider, "exchange_for_host", None)
        if exchange is not None:
            return helper.call(lambda: exchange(host, known, again=again), PATIENCE_S)  # type: ignore[no-any-return]
        return helper.call(lambda: _exchange(helper, provider, again=again), PATIENCE_S)

    # -- what the answers mean

    def _take(
        self,
        member: Member,
        page: ControlPage,
        fence: Fence,
        exchange: Exchange,
        known: codec.Decoded | None,
    ) -> bool:
        """Publish what the upstream has; False if it has nothing, or nothing of use."""
        found = None
        if exchange.definitions is not None:
            try:
                found = self._examine(exchange.definitions, known)
            except InvalidDefinitionsError as error:
                self._complain(_TROUBLE, error)
                return False
        elif not page.is_serving():
            return False
        with member.lock:
            member.election.note_received()  # The API is not asked, so nothing is owed.
            if found is None:
                return True
            return self._publisher.copy(member, page, fence, found.decoded, found.encoded)

    def _doubt_etag(self, member: Member, exchange: Exchange, known: codec.Decoded | None) -> None:
        received = self._holding.received
        if received is None:
            return  # There is no ETag.
        digest = exchange.digest
        if digest is None and exchange.definitions is not None:
            try:
                digest = self._examine(exchange.definitions, known).decoded.digest
            except InvalidDefinitionsError:
                digest = NO_DIGEST  # Nothing of use, and to be replaced.
        if digest in (None, received):
            return
        attachment = self._holding.attachment
        if attachment is not None and attachment.is_live:
            attachment.clear_etag()
        else:
            with member.lock:
                member.election.note_doubt()

    def _examine(self, definitions: object, known: codec.Decoded | None) -> _Found:
        """Raises `InvalidDefinitionsError`."""
        if known is not None and definitions is known.definitions:
            return _Found(known, None)
        encoded, decoded = codec.encode(definitions, known)
        if known is not None and known.digest == decoded.digest:
            decoded = known  # Equal content: whoever has our objects is not to get new ones.
        return _Found(decoded, encoded)


def _exchange(helper: HelperThread, provider: Any, *, again: bool) -> Exchange:
    """On the helper thread: ask by PostHog's methods, all in all for `PATIENCE_S`."""
    end_s = time.monotonic() + PATIENCE_S

    def settle(result: Any) -> Any:
        return helper.settle(result, max(0.0, end_s - time.monotonic()))

    fetch = False if again else settle(provider.should_fetch_flag_definitions())
    if not isinstance(fetch, (bool, int)):
        raise TypeError(f"should_fetch_flag_definitions() answered {fetch!r}, which is no bool")
    try:
        definitions = settle(provider.get_flag_definitions()) or None
    except Exception:
        if not fetch:
            raise
        return Exchange(True)  # It is fetched anyway; only less is known.
    return Exchange(bool(fetch), definitions, NO_DIGEST if definitions is None else None)
