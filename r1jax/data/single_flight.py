"""Work that several threads ask for at once is done by the first of them."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, NamedTuple, TypeVar

V = TypeVar("V")


class Landed(NamedTuple):
    """What was asked for, and where it came from."""

    values: dict[int, Any]
    """By number."""
    ready: int
    """How many were there."""
    waited: int
    """How many another thread was loading."""


class SingleFlight(Generic[V]):
    """Loads values by number, each at most once at a time.

    A thread loads what it claimed before it waits for others, so two threads never wait for each other.
    """

    def __init__(self, keep: Callable[[int, V], None]) -> None:
        """Takes what holds the values afterwards.

        Args:
          keep: Is given each loaded value; called under the lock.
        """
        self._keep = keep
        self.lock = threading.Lock()
        """Also for what else concerns the place where values are kept."""
        self._flights: dict[int, Future[V]] = {}

    def fetch(
        self, numbers: Sequence[int], ready: Callable[[int], V | None], load: Callable[[list[int]], dict[int, V]]
    ) -> Landed:
        """Gets values.

        Args:
          numbers: Which, each once.
          ready: Finds a value that is there; called under the lock.
          load: Gets those that neither are there nor under way.

        Returns:
          All of them.

        Raises:
          Exception: What `load` raised, here or in the thread that was waited for.
        """
        values: dict[int, V] = {}
        mine: list[int] = []
        others: dict[int, Future[V]] = {}
        with self.lock:
            for number in numbers:
                value = ready(number)
                flight = self._flights.get(number)
                if value is not None:
                    values[number] = value
                elif flight is not None:
                    others[number] = flight
                else:
                    mine.append(number)
                    self._flights[number] = Future()
        ready = len(values)
        if mine:
            values |= self._fly(mine, load)
        for number, flight in others.items():
            values[number] = flight.result()
        return Landed(values, ready, len(others))

    def _fly(self, mine: list[int], load: Callable[[list[int]], dict[int, V]]) -> dict[int, V]:
        try:
            loaded = load(mine)
        except BaseException as error:
            with self.lock:
                flights = [self._flights.pop(number) for number in mine]
            for flight in flights:
                flight.set_exception(error)
            raise
        with self.lock:
            flights = [self._flights.pop(number) for number in mine]
            for number in mine:
                self._keep(number, loaded[number])
        for number, flight in zip(mine, flights, strict=True):
            flight.set_result(loaded[number])
        return loaded
