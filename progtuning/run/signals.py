"""SIGINT and SIGTERM, held back while a step is taken."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from progtuning.base.errors import Interrupted
from progtuning.step.processes import World


class StopSignals:
    """SIGINT and SIGTERM, in a `with` block of the main thread, as the exception Interrupted.

    It is raised where the signal hits, except inside `with signals.held()`: there it is noted, and `check` raises.
    Further signals while one is noted change nothing. In another thread than the main one signals do what they did.
    Where `world` has several processes, `check` raises in all of them what one has received.
    """

    def __init__(self, world: World = World()):
        self._world = world
        self._received: int | None = None
        self._is_held = False
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        self._received = number
        if not self._is_held:
            self._raise(number)

    def check(self) -> None:
        """Raise Interrupted where a signal has come."""
        received = self._world.max(self._received or 0)
        if received:
            self._raise(received)

    @staticmethod
    def _raise(number: int) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}", number)

    @contextmanager
    def held(self, held: bool = True) -> Iterator[None]:
        """Hold the signals back inside the block; with `held` False, let them through inside one that holds them."""
        before, self._is_held = self._is_held, held
        try:
            if not held:
                self.check()
            yield
        finally:
            self._is_held = before
