"""The server with its ETags, and the SDK's client, which treats a provider as the real one does.

Of the real client this has what a provider can notice: who is asked, in which order; the fetch when
the cache has nothing and there are no flags; an ETag that changes with the server's answers alone
and is inherited by a fork; a 304 that calls nothing; an answer that a later one has overtaken; flags
emptied by 401 and 402; and its two locks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .ledger import Ledger
from .world import Lock, Process, Shared, World


@dataclass(frozen=True)
class Answer:
    """`status` 200 has `data`, 304 has none; `etag` may be None."""

    status: int
    stamp: int
    etag: str | None
    data: dict[str, Any] | None = None


class FailedError(Exception):
    """No answer; or 401 and 402, which have a `status`."""

    def __init__(self, status: int = 0) -> None:
        super().__init__(f"status {status}")
        self.status = status


class Server(Shared):
    """PostHog's definitions: contents by number (0: no flags), and a stamp for each change."""

    def __init__(self, world: World, ledger: Ledger, etags: str, contents: int) -> None:
        self._world = world
        self._ledger = ledger
        self._etags = etags
        self._most = contents - 1
        self._contents = [1]
        self.status = 200
        self.slowest_s = 0.5

    @property
    def stamp(self) -> int:
        return len(self._contents) - 1

    @property
    def content(self) -> int:
        return self._contents[-1]

    def change(self) -> None:
        """New definitions, or a revert to earlier ones."""
        most = min(max(self._contents) + 1, self._most)
        others = [content for content in range(most + 1) if content != self.content]
        # Few contents make reverts, many make each change a new one.
        content = self._world.random.choice(others[-3:])
        self._contents.append(content)
        self._world.note(f"the server has content {content} now, stamp {self.stamp}")

    def etag(self) -> str | None:
        if self._etags == "none":
            return None
        return str(self.content if self._etags == "content" else (self.content, self.stamp))

    def request(self, etag: str | None) -> Answer:
        """One request of the running thread. Raises `FailedError`."""
        world = self._world
        patience_s = world.random.random() * self.slowest_s
        when = world.random.random()
        world.sleep(patience_s * when)
        status, stamp, now, content = self.status, self.stamp, self.etag(), self.content
        world.sleep(patience_s * (1 - when))
        world.note(f"answer {status}: stamp {stamp}, content {content}; etag sent {etag}, now {now}")
        if status != 200:
            raise FailedError(status)
        if etag is not None and etag == now:
            return Answer(304, stamp, now)
        return Answer(200, stamp, now, definitions(content))


def definitions(content: int) -> dict[str, Any]:
    """Definitions whose one flag tells the content."""
    flags = [{"key": "constant", "active": True}, {"key": "flag", "id": content}] if content else []
    return {"flags": flags, "group_type_mapping": {}, "cohorts": {}}


class Client:
    """What a provider can notice of `posthog.Posthog`."""

    def __init__(
        self, world: World, ledger: Ledger, server: Server, process: Process, interval_s: float
    ) -> None:
        self.poll_interval = interval_s
        self.feature_flags: list[Any] | None = None
        self._flags_etag: str | None = None
        self._flag_definition_cache_provider = process.cache
        self._world = world
        self._ledger = ledger
        self._server = server
        self._process = process
        self._has_poller = False
        # Two threads loaded at once, and the older load was installed last. Nobody but an attached
        # cache can know.
        self.was_overtaken = False
        self._installed = 0
        self._begun = 0
        self._published = 0
        self._stored = 0
        self._make_locks()

    def _make_locks(self) -> None:
        self._flag_definition_publication_lock = Lock(self._world, reentrant=True)
        self._write_lock = Lock(self._world, reentrant=True)

    @property
    def content(self) -> int | None:
        """The content that is evaluated; None before the first load."""
        if self.feature_flags is None:
            return None
        return int(self.feature_flags[1]["id"]) if self.feature_flags else 0

    @property
    def etag(self) -> str | None:
        return self._flags_etag

    def after_fork(self, process: Process) -> None:
        """In the child: new locks, and a poller.

        The real client starts none if it was forked from another thread during its first load; such
        a child never polls, whatever its provider does.
        """
        self._make_locks()
        if self.feature_flags is not None:
            self._has_poller = True
        if self._has_poller:
            self._world.spawn(process, "poller", self._poll_for_ever)

    def evaluate(self) -> None:
        """An evaluation: the first loads the flags, as the next ones do until there are any."""
        if self.feature_flags is None:
            self._load_feature_flags()
            if not self._has_poller:
                self._has_poller = True
                self._world.spawn(self._process, "poller", self._poll_for_ever)

    def _poll_for_ever(self) -> None:
        while True:
            self._world.sleep(self.poll_interval)
            self._load_feature_flags()

    def _load_feature_flags(self) -> None:
        world, ledger, task = self._world, self._ledger, self._world.running()
        provider = self._flag_definition_cache_provider
        task.granted, task.troubled = None, False
        office = ledger.before_poll(self._process)
        try:
            should_fetch = provider.should_fetch_flag_definitions()
            ledger.check_office(task, office)
            if should_fetch and task.granted is None and not task.troubled:
                world.fail("granted: told to fetch without a grant")
            if not should_fetch:
                handed_stamp = self._process.handed_stamp
                cached = provider.get_flag_definitions()
                ledger.check_handed_out(self._process, cached, handed_stamp)
                before = self._installed
                world.step(2)
                if cached:
                    with self._flag_definition_publication_lock:
                        self._install(cached["flags"], overtaken=before != self._installed)
                    return
                should_fetch = not self.feature_flags
                # Another thread has emptied them since the cache said that we have them.
                task.troubled |= before != self._installed
        except Exception as error:
            world.fail(f"silent: the provider raised {error!r}")
            return
        if should_fetch:
            self._fetch()

    def _install(self, flags: list[Any], *, overtaken: bool = False) -> None:
        self.feature_flags = flags
        self._installed += 1
        self.was_overtaken = overtaken

    def _fetch(self) -> None:
        task = self._world.running()
        fetch = self._ledger.note_request(task)
        with self._flag_definition_publication_lock:
            self._begun += 1
            number, etag = self._begun, self._flags_etag
        try:
            answer = self._server.request(etag)
        except FailedError as error:
            if error.status in (401, 402):
                self._clear(number)
            return
        fetch.stamp = answer.stamp
        if answer.data is not None:
            self._ledger.note_answer(answer.data["flags"], fetch)
        with self._flag_definition_publication_lock:
            if number <= self._published:
                return
            if answer.data is None:
                if self._flags_etag == etag:
                    self._published = self._stored = number
                return
            self._install(answer.data["flags"])
            self._world.step()
            data = {**answer.data, "minimal_flag_called_events": None, "property_matching_version": 1}
            self._flags_etag = answer.etag
            self._published = self._stored = number
        self._world.step(5)
        with self._write_lock:
            with self._flag_definition_publication_lock:
                should_store = number == self._stored
            if should_store:
                self._store(fetch, data)

    def _store(self, fetch: Any, data: dict[str, Any]) -> None:
        task = self._world.running()
        data["flags"] = data["flags"] or []
        self._ledger.deliver(task, fetch, data)
        try:
            self._flag_definition_cache_provider.on_flag_definitions_received(data)
        except Exception as error:
            self._world.fail(f"silent: the provider raised {error!r}")
        finally:
            task.delivering = None

    def _clear(self, number: int) -> None:
        with self._flag_definition_publication_lock:
            if number > self._published:
                self._install([])
                self._flags_etag = None
                self._published = self._stored = number
