"""Building processes: fresh ones, and forks."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

from shmflags import provider
from shmflags.provider import SharedMemoryFlagCache

from .client import Client, Server
from .ledger import Ledger
from .plan import INTERVAL_S, Plan
from .world import Process, World

MOST = 6
"""So many processes, and no more are started or forked by a fault."""


class Workers:
    """Starts and forks the processes of one schedule, each with a cache and a client."""

    def __init__(
        self, world: World, ledger: Ledger, server: Server, plan: Plan, directory: Path
    ) -> None:
        self._world = world
        self._random = world.random
        self._ledger = ledger
        self._server = server
        self._plan = plan
        self._directory = directory

    @property
    def is_full(self) -> bool:
        return len(self._world.processes) >= MOST

    def start(self, *, leads: bool = False, reads: bool = False) -> Process:
        """A new process with a cache and a client of its own; it may lead if `leads`, not if `reads`."""
        world, plan = self._world, self._plan
        reads |= plan.readers and not leads and self._random.random() < 0.3
        namespace = 1 + (plan.two_namespaces and self._random.random() < 0.5)
        process = world.make_process(namespace)
        attached = plan.attached == "all" or (plan.attached == "some" and self._random.random() < 0.5)
        watched = attached and self._random.random() < 0.5
        cache = SharedMemoryFlagCache(
            "simulation",
            directory=self._directory,
            poll_interval=INTERVAL_S,
            max_term=plan.max_term_s,
            role="reader" if reads else "auto",
        )
        process.cache = cache
        process.client = Client(world, self._ledger, self._server, process, INTERVAL_S)
        world.note(
            f"{process.name} starts: pid {process.pid}, namespace {namespace}, {attached=}, {reads=}"
        )

        def main() -> None:
            if attached:
                cache.attach(process.client, watch=watched, interval=2.0)
            self._evaluate(process)

        world.spawn(process, "main", main)
        if self._random.random() < 0.3:
            world.spawn(process, "second", lambda: self._evaluate(process))
        return process

    def _evaluate(self, process: Process) -> None:
        """The life of a thread that serves requests, as far as it concerns the flags."""
        self._world.sleep(self._random.random() * (0.002 if self._plan.together else INTERVAL_S))
        while process.client.content is None:
            process.client.evaluate()
            self._world.sleep(self._random.random() * INTERVAL_S / 4)

    def fork(self, parent: Process) -> Process:
        """What a fork hands on: memory as it is at this moment, descriptors, and no threads."""
        world = self._world
        child = world.make_process(parent.namespace, parent)
        child.inherit_files(parent)
        child.handed_stamp = parent.handed_stamp
        child.pages = set(parent.pages)
        memo: dict[int, object] = {id(parent): child}
        child.cache, child.client = copy.deepcopy((parent.cache, parent.client), memo)
        self._ledger.note_fork(memo)
        cache, client = child.cache, child.client
        if cache._holding.attachment is not None:
            cache._holding.attachment._client = weakref.ref(client)
        runs_hooks = self._random.random() < 0.8
        world.note(f"{parent.name} forks {child.name}: pid {child.pid}, {runs_hooks=}")

        def main() -> None:
            if runs_hooks:
                provider._after_fork(weakref.ref(cache))
            client.after_fork(child)
            self._evaluate(child)

        world.spawn(child, "main", main)
        return child
