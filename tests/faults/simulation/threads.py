"""`threading`, for threads that are greenlets (world.py)."""

from __future__ import annotations

import functools
from typing import Any

from .world import SECOND_NS, Lock, Shared, World


class TaskLocal:
    """`threading.local` for simulated threads, with the defaults of the class it stands for."""

    def __init__(self, world: World, defaults: type) -> None:
        self.__dict__["_world"] = world
        self.__dict__["_defaults"] = defaults

    def __deepcopy__(self, memo: dict[int, object]) -> TaskLocal:
        return TaskLocal(self._world, self._defaults)

    def __getattr__(self, name: str) -> Any:
        self._world.step(0.5)
        mine = self._world.running().local.get(self, {})
        return mine[name] if name in mine else getattr(self._defaults, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._world.step(0.5)
        self._world.running().local.setdefault(self, {})[name] = value


class _Event:
    def __init__(self, world: World) -> None:
        self._world = world
        self._flag = False
        self._waiting: list[Any] = []

    def __deepcopy__(self, memo: dict[int, object]) -> _Event:
        copied = _Event(self._world)
        copied._flag = self._flag
        return copied

    def is_set(self) -> bool:
        return self._flag

    def set(self) -> None:
        self._flag = True
        for task in self._waiting:
            task.wake_ns = 0

    def wait(self, timeout: float) -> bool:
        if not self._flag:
            self._waiting.append(self._world.running())
            self._world.sleep(timeout)
            self._waiting.remove(self._world.running())
        return self._flag


class _Thread(Shared):
    def __init__(self, world: World, *, target: Any, args: Any, name: str, daemon: bool) -> None:
        self._world = world
        self._run = functools.partial(target, *args)
        self._name = name
        self._task: Any = None

    def start(self) -> None:
        self._task = self._world.spawn(self._world.process(), self._name, self._run)
        self._task.python_thread = self

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.greenlet.dead

    def join(self, timeout: float) -> None:
        end_ns = self._world.now_ns + int(timeout * SECOND_NS)
        while self.is_alive() and self._world.now_ns < end_ns:
            self._world.sleep(0.1)


class SimulatedThreading:
    """`threading`, for threads that are greenlets."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.Lock = functools.partial(Lock, world, reentrant=False)
        self.RLock = functools.partial(Lock, world, reentrant=True)
        self.Event = functools.partial(_Event, world)
        self.Thread = functools.partial(_Thread, world)

    def get_ident(self) -> int:
        return self._world.running().number

    def current_thread(self) -> object:
        return self._world.running().python_thread
