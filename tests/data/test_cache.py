"""The circuit breaker before a shared tier: when it asks, what it says, and that no failure passes it."""

import pytest

from r1jax.config import CacheConfig, Config, DataConfig, TaskConfig
from r1jax.data.cache import Breaker, GuardedTier, SharedTier, cache_remarks, open_tier
from r1jax.data.cache_lmdb import LmdbTier
from r1jax.data.cache_redis import RedisTier
from r1jax.data.cache_values import NotStored
from r1jax.errors import UserError


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Broken:
    """Raises what it is told to."""

    name = "broken"

    def __init__(self):
        self.error: Exception | None = ValueError("no\nanswer")
        self.calls = 0

    def _call(self, answer):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return answer

    def get_many(self, keys):
        return self._call([b"value"] * len(keys))

    def put_many(self, values):
        return self._call(None)

    def lease(self, keys):
        return self._call([False] * len(keys))

    def leased(self, keys):
        return self._call([True] * len(keys))

    def release(self, keys):
        return self._call(None)

    def add_counts(self, dataset, counts):
        return self._call(None)


def test_it_opens_after_three_failures_in_a_row_and_asks_once_a_pause(capsys):
    clock = Clock()
    breaker = Breaker("r", failures=3, pause_s=10.0, clock=clock)
    for _ in range(2):
        breaker.failed(OSError("a"))
    breaker.succeeded()
    for _ in range(3):
        assert breaker.allows()
        breaker.failed(OSError("b"))
    assert breaker.open and not breaker.allows()
    assert capsys.readouterr().err.count("\n") == 1
    for _ in range(3):
        clock.now += 10.0
        assert [breaker.allows() for _ in range(3)] == [True, False, False]
        breaker.failed(OSError("c"))
    assert capsys.readouterr().err == ""
    clock.now += 10.0
    assert breaker.allows()
    breaker.succeeded()
    assert [breaker.allows() for _ in range(3)] == [True] * 3
    assert capsys.readouterr().err == "cache r answers again\n"


def test_failures_are_misses_and_are_told_once(capsys):
    tier = Broken()
    guarded = GuardedTier(tier, Breaker("here", clock=Clock()))
    for _ in range(5):
        assert guarded.get_many([b"a", b"b"]) == [None, None]
        assert not guarded.put_many({b"a": b"1"})
        assert guarded.lease([b"a"]) == [True]
        assert guarded.leased([b"a"]) == [False]
        guarded.release([b"a"])
        assert not guarded.add_counts("d", {"rows": 1.0})
    assert tier.calls == 3
    told = capsys.readouterr().err
    assert told.startswith("cache here does not answer (ValueError: no answer): ") and told.count("\n") == 1


def test_a_full_tier_is_read_and_not_written_for_a_while(capsys):
    tier = Broken()
    guarded = GuardedTier(tier, Breaker("here", clock=Clock()), full_pause_s=3600.0)
    tier.error = NotStored("OOM")
    assert not guarded.put_many({b"a": b"1"})
    tier.error = None
    assert guarded.get_many([b"a"]) == [b"value"]
    calls = tier.calls
    assert not guarded.put_many({b"a": b"1"})
    assert guarded.lease([b"a"]) == [True]  # nobody could store what others would wait for
    assert tier.calls == calls
    assert "takes no more values (NotStored: OOM)" in capsys.readouterr().err
    again = GuardedTier(tier, Breaker("here"), full_pause_s=0.0)
    tier.error = NotStored("OOM")
    assert not again.put_many({b"a": b"1"})
    tier.error = None
    assert again.put_many({b"a": b"1"})


def test_the_url_chooses_the_tier(tmp_path):
    for url, kind in ((f"lmdb:{tmp_path}", LmdbTier), ("redis://h:1", RedisTier), ("redis+cluster://h:1", RedisTier)):
        tier = open_tier(CacheConfig(url=url))._tier
        assert isinstance(tier, kind) and isinstance(tier, SharedTier)
    assert open_tier(CacheConfig()) is None
    assert open_tier(CacheConfig(url=None)) is None


def test_the_password_comes_from_the_environment_and_is_never_told(monkeypatch):
    url = "redis://me:$R1JAX_TEST_SECRET@host:7/2"
    monkeypatch.delenv("R1JAX_TEST_SECRET", raising=False)
    with pytest.raises(UserError, match="set R1JAX_TEST_SECRET"):
        open_tier(CacheConfig(url=url))
    monkeypatch.setenv("R1JAX_TEST_SECRET", "a/b@c:d%")
    tier = RedisTier(url, 1.0)
    assert tier.name == "redis://host:7/2"
    asked = tier.client().connection_pool.connection_kwargs
    assert (asked["username"], asked["password"], asked["host"], asked["db"]) == ("me", "a/b@c:d%", "host", 2)


@pytest.mark.parametrize(
    ("task", "path", "url", "told"),
    [
        ("medical", None, "lmdb:x", "generated cases go through no cache: leave it out"),
        ("finance", "x.csv", "redis://host", "what the finance task reads goes through no cache"),
        ("medical", "cases", "lmdb:x", None),
        ("medical", None, "memory", None),
        ("medical", None, None, None),
    ],
)
def test_a_cache_that_is_named_in_vain_is_said(task, path, url, told):
    data = DataConfig(path=path, cache=CacheConfig(url=url))
    found = cache_remarks(Config(task=TaskConfig(name=task), data=data))
    assert (found == []) if told is None else (len(found) == 1 and told in found[0] and repr(url) in found[0])
