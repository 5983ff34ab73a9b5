"""The thread that reads ahead: what ends it, and what is known of one that does not end."""

import threading

from r1jax.data import prefetch
from r1jax.errors import IN_CLIENTS


class Owner:
    """What a prefetcher works for."""


def test_a_read_that_does_not_end_is_known_at_the_end_of_the_program(monkeypatch):
    monkeypatch.setattr(prefetch, "END_S", 0.01)
    owner, begun, go_on = Owner(), threading.Event(), threading.Event()

    def bring(_: Owner, request: bytes) -> None:
        begun.set()
        go_on.wait()

    reader = prefetch.Prefetcher(owner, bring)
    assert reader.ask(b"rows") and begun.wait(200)
    before = set(IN_CLIENTS)
    reader.stop()
    (stuck,) = set(IN_CLIENTS) - before
    assert stuck.is_alive() and stuck.name == "r1jax-prefetch"
    go_on.set()
    stuck.join(60)
    assert not stuck.is_alive()


def test_a_thread_that_has_ended_is_none_in_a_client():
    owner = Owner()
    reader = prefetch.Prefetcher(owner, lambda owner, request: None)
    assert reader.ask(b"rows")
    reader.drain()
    before = set(IN_CLIENTS)
    reader.stop()
    assert set(IN_CLIENTS) == before
