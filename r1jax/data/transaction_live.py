"""What is known at a payment, kept up to date payment by payment; equal to `History` bit for bit.

The state of a customer or terminal is its last K events (64 where K is less) and those that the longest window still
needs, 30 days and the label delay before them (37 days by default). As events are dropped when they are half of what is
held, that is at most twice as many, and it does not grow with the age of the stream. Fewer would not do: windows end at
the second, so two pasts that differ in the time of one event of the window give different counts at some later second.
A payment takes time in proportion to the events of its customer and terminal within that time, so it is dearer at a
busy terminal.

Who has been silent for longer than `HORIZON` and the longest window is forgotten, as `History` shows nothing of them
either. So memory is bounded by the names of that time and the events of the window, not by all names that ever came.
"""

import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from r1jax.data.transaction_history import (
    CHANNELS,
    FEATURES,
    FRAUD,
    GENUINE,
    HANDBOOK,
    NO_GAP,
    UNKNOWN,
    WINDOWS,
    Streams,
    check_delay,
)
from r1jax.data.transaction_summaries import HABIT, LOOK, Held, customer_now, terminal_now
from r1jax.data.transactions import DAY, HORIZON, LONGEST, SPAN, UNITS
from r1jax.errors import UserError

OWN = len(CHANNELS) - 1
"""Numbers of an event that never change: all but its age."""
COLUMNS = ("seconds", "money", "state", "own", "large")
"""Of an event, as `Ring` holds them."""


class Payment(NamedTuple):
    """One payment, as it comes in."""

    id: str
    seconds: int
    customer: str
    terminal: str
    amount: float


class Ring:
    """The last events of one customer or terminal, in the order of time."""

    def __init__(self) -> None:
        self.count, self.dropped = 0, 0
        self.seconds, self.money = np.zeros(8, np.int64), np.zeros(8, np.int64)
        self.state, self.own = np.zeros(8, np.int8), np.zeros((8, OWN), np.float32)
        self.large = np.zeros(8, bool)
        self.ids: list[str] = []

    def add(self, payment: Payment, money: int, own: Float32[np.ndarray, " C"], large: bool) -> int:
        """Appends an event; returns its number since the beginning."""
        if self.count == len(self.seconds):
            for name in COLUMNS:
                held = getattr(self, name)
                setattr(self, name, np.concatenate([held, np.zeros_like(held)]))
        i = self.count
        self.seconds[i], self.money[i], self.state[i], self.own[i] = payment.seconds, money, UNKNOWN, own
        self.large[i] = large
        self.ids.append(payment.id)
        self.count += 1
        return self.dropped + i

    def held(self) -> Held:
        """Its events."""
        n = self.count
        state = self.state[:n]
        return Held(self.seconds[:n], self.own[:n, 0], self.large[:n], state == FRAUD, state == GENUINE)

    def forget(self, before: int, events: int) -> list[str]:
        """Drops what is neither among the last events nor late enough, where that is half of it; returns the ids."""
        old = min(int(np.searchsorted(self.seconds[: self.count], before)), self.count - events)
        return self.drop(old) if old >= max(8, self.count // 2) else []

    def drop(self, old: int) -> list[str]:
        """Drops so many of the oldest events; returns their ids."""
        for name in COLUMNS:
            held = getattr(self, name)
            held[: self.count - old] = held[old : self.count].copy()
        gone, self.ids = self.ids[:old], self.ids[old:]
        self.count, self.dropped = self.count - old, self.dropped + old
        return gone


def _touched(rings: OrderedDict[str, Ring], name: str) -> Ring:
    """The ring of a name, a new one where there is none; it is now the last to have been silent."""
    ring = rings.get(name)
    if ring is None:
        ring = rings[name] = Ring()
    rings.move_to_end(name)
    return ring


class LiveHistory:
    """Streams and features of payments as they come in."""

    def __init__(self, delay: int, events: int) -> None:
        """Starts without any history.

        Args:
          delay: Seconds until a label counts as known, even if it comes earlier.
          events: K, of each stream.

        Raises:
          UserError: The delay is less than a second.
        """
        check_delay(delay)
        self.delay, self.events = delay, events
        self.last = -math.inf
        # By name; who has been silent for longest comes first.
        self.customers: OrderedDict[str, Ring] = OrderedDict()
        self.terminals: OrderedDict[str, Ring] = OrderedDict()
        self._places: dict[str, list[tuple[Ring, int]]] = {}

    def label(self, payment: str, fraud: bool) -> bool:
        """Takes the outcome of an earlier payment; one that nothing depends on any more is passed over.

        Args:
          payment: Its id.
          fraud: What it was.

        Returns:
          Whether the payment is still held.
        """
        held = [(ring, number) for ring, number in self._places.get(payment, ()) if number >= ring.dropped]
        for ring, number in held:
            ring.state[number - ring.dropped] = FRAUD if fraud else GENUINE
        return bool(held)

    def observe(self, payment: Payment) -> tuple[Float32[np.ndarray, "1 F"], Streams]:
        """Takes the next payment.

        Args:
          payment: Not before the one that came last.

        Returns:
          `FEATURES` of it, and its streams.

        Raises:
          UserError: The payment cannot be one.
        """
        self._refuse(payment)
        self.last = payment.seconds
        self._forget_silent(payment.seconds)
        amount = np.float32(payment.amount)
        money = int(np.rint(np.float64(amount) * UNITS))
        rings = _touched(self.customers, payment.customer), _touched(self.terminals, payment.terminal)
        features, large = self._features(payment.seconds, amount, money, *rings)
        day, second = divmod(payment.seconds, DAY)
        usual, risk = (features[0, FEATURES.index(name)] for name in ("customer_usual", "terminal_risk_30d"))
        own = [amount, usual, risk, second, (day + 3) % 7]
        places = []
        for ring in rings:
            gap = payment.seconds - ring.seconds[ring.count - 1] if ring.count else NO_GAP
            gap = NO_GAP if gap > HORIZON else gap
            places.append((ring, ring.add(payment, money, np.array([*own, gap], np.float32), large)))
        self._places[payment.id] = places
        streams = self._streams(payment.seconds, rings)
        before = payment.seconds - self.delay - max(*WINDOWS, LOOK) * DAY
        for ring in rings:
            self._release(ring.forget(before, max(self.events, HABIT)))
        return features, streams

    def _forget_silent(self, now: int) -> None:
        """Drops customers and terminals none of whose events can be seen any more."""
        before = now - max(HORIZON, self.delay + max(*WINDOWS, LOOK) * DAY)
        for rings in (self.customers, self.terminals):
            while rings and (ring := next(iter(rings.values()))).seconds[ring.count - 1] < before:
                rings.popitem(last=False)
                self._release(ring.drop(ring.count))

    def _release(self, gone: list[str]) -> None:
        """Forgets where payments lie that a ring has dropped."""
        for name in gone:
            left = [(ring, number) for ring, number in self._places.get(name, ()) if number >= ring.dropped]
            if left:
                self._places[name] = left
            else:
                self._places.pop(name, None)

    def index(self) -> None:
        """Notes anew where every payment lies, after the rings were filled by somebody else."""
        self._places = {}
        for rings in (self.customers, self.terminals):
            for ring in rings.values():
                for number, name in enumerate(ring.ids, ring.dropped):
                    self._places.setdefault(name, []).append((ring, number))

    def _refuse(self, payment: Payment) -> None:
        """Raises UserError where the payment cannot be one."""
        told = f"transaction {payment.id!r}"
        for name in ("id", "customer", "terminal"):
            if not any(letter.isprintable() for letter in "".join(getattr(payment, name).split())):
                raise UserError(f"{told}: the {name} is empty, but it must be a name")
        if payment.id in self._places:
            raise UserError(f"{told} came before: each transaction needs a name of its own")
        if not 0 <= payment.amount < LONGEST:
            raise UserError(
                f"{told}: the amount is {payment.amount!r}, but it must be a number, not negative, below {LONGEST}"
            )
        if not SPAN[0] <= payment.seconds < SPAN[1]:
            raise UserError(f"{told}: the time is {payment.seconds!r}: give seconds since 1970, from 1900 to 2199")
        if payment.seconds < self.last:
            late, last = (np.datetime64(int(x), "s") for x in (payment.seconds, self.last))
            raise UserError(f"{told} is at {late}, before {last} of the one that came last: the clock goes backwards")

    def _features(
        self, now: int, amount: np.float32, money: int, customer: Ring, terminal: Ring
    ) -> tuple[Float32[np.ndarray, "1 F"], bool]:
        """`FEATURES`, and whether the amount is large; the payment itself is not in the rings yet."""
        found = np.zeros((1, len(FEATURES)), np.float32)
        day, second = divmod(now, DAY)
        found[0, :3] = amount, (day + 3) % 7 >= 5, second < 7 * 3600
        n = customer.count
        begins = np.searchsorted(customer.seconds[:n], [now - days * DAY for days in WINDOWS], side="right")
        for i, begin in enumerate(begins):
            count = n - begin + 1
            found[0, 3 + 2 * i] = count
            found[0, 4 + 2 * i] = (customer.money[begin:n].sum() + money) / (count * UNITS)
        ends = [now - self.delay, *(now - self.delay - days * DAY for days in WINDOWS)]
        until, *begins = np.searchsorted(terminal.seconds[: terminal.count], ends, side="right")
        for i, begin in enumerate(begins):
            state = terminal.state[begin:until]
            found[0, 9 + 2 * i] = until - begin
            found[0, 10 + 2 * i] = (state == FRAUD).sum() / max((state != UNKNOWN).sum(), 1)
        summed, large = customer_now(customer.held(), now, amount, self.delay)
        found[0, len(HANDBOOK) :] = [*summed, *terminal_now(terminal.held(), now, self.delay)]
        return found, large

    def _streams(self, now: int, rings: tuple[Ring, Ring]) -> Streams:
        """Streams of the payment that was added last."""
        shape = (1, 2, self.events)
        found = Streams(np.zeros((*shape, len(CHANNELS)), np.float32), np.zeros(shape, np.int8), np.zeros(shape, bool))
        for i, ring in enumerate(rings):
            oldest = int(np.searchsorted(ring.seconds[: ring.count], now - HORIZON))
            held = slice(max(oldest, ring.count - self.events), ring.count)
            age = now - ring.seconds[held]
            at = slice(self.events - len(age), None)
            found.numbers[0, i, at, :OWN] = ring.own[held]
            found.numbers[0, i, at, OWN] = age
            found.states[0, i, at] = np.where(age >= self.delay, ring.state[held], UNKNOWN)
            found.valid[0, i, at] = True
        return found
