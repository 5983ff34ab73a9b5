"""Redis as a tier, with fakeredis and with a real server: values, time to live, leases, refusals, URLs, clusters."""

import pickle
import subprocess

import fakeredis
import pytest
import redis

from r1jax.data import cache_redis
from r1jax.data.cache_redis import RedisTier, counters_key, jittered
from r1jax.data.cache_values import NotStored
from r1jax.errors import UserError
from tests.data.services import free_port, start_redis

VALUES = {f"key {i}".encode(): bytes([i]) * i * 100 for i in range(1, 151)}


@pytest.fixture(params=["fake", "real", "socket"])
def tier(patient, request):
    """A tier on an empty server."""
    if request.param == "fake":
        tier = RedisTier("redis://nobody:1", ttl_s=100.0)
        tier._connected = fakeredis.FakeRedis()
    else:
        server = request.getfixturevalue("redis_server")
        tier = RedisTier(server.url if request.param == "real" else server.unix_url, ttl_s=100.0)
    tier.client().flushall()
    yield tier
    tier.client().close()


def test_values_come_back_in_the_order_of_the_keys(tier):
    tier.put_many(VALUES)
    keys = [*reversed(VALUES), b"unknown", *VALUES]
    assert tier.get_many(keys) == [VALUES.get(key) for key in keys]
    assert tier.get_many([]) == []


def test_values_expire_at_spread_times(tier):
    tier.put_many(VALUES)
    left = [tier.client().pttl(key) / 1000 for key in VALUES]
    assert all(30.0 < seconds <= 110.0 for seconds in left)
    assert max(left) - min(left) > 15.0


def test_the_spread_is_no_chance():
    spread = [jittered(key, 10.0) for key in VALUES]
    assert spread == [jittered(key, 10.0) for key in VALUES]
    assert all(9.0 <= seconds <= 11.0 for seconds in spread)


def test_a_lease_is_granted_once_until_it_ends(tier):
    assert tier.lease([b"a", b"b"]) == [True, True]
    assert tier.lease([b"b", b"c"]) == [False, True]
    assert tier.leased([b"a", b"x"]) == [True, False]
    tier.release([b"b"])
    assert tier.lease([b"b"]) == [True]
    assert all(0 < tier.client().pttl(key + b":lease") <= cache_redis.LEASE_MS for key in (b"a", b"b", b"c"))


def test_counters_add_up(tier):
    tier.add_counts("set", {"rows": 3.0, "misses": 1.0})
    tier.add_counts("set", {"rows": 4.0})
    assert tier.client().hgetall(counters_key("set")) == {b"rows": b"7", b"misses": b"1"}


def test_large_values_are_left_out_and_told(tier, monkeypatch):
    monkeypatch.setattr(cache_redis, "LARGEST", 1000)
    with pytest.raises(NotStored, match="smaller row groups"):
        tier.put_many(VALUES)
    stored = tier.get_many(list(VALUES))
    assert stored == [value if len(value) <= 1000 else None for value in VALUES.values()]


def test_it_travels_without_its_connection(tier):
    copy = pickle.loads(pickle.dumps(tier))
    assert (copy.url, copy.ttl_s, copy.name, copy._connected) == (tier.url, tier.ttl_s, tier.name, None)


def test_a_full_server_and_a_reader_without_rights_are_refusals(tmp_path, monkeypatch):
    with start_redis(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as server:
        tier = RedisTier(server.url, ttl_s=100.0)
        with pytest.raises(NotStored, match="OOM|maxmemory"):
            for number in range(40):
                tier.put_many({b"%d" % number: bytes(100_000)})
        assert tier.get_many([b"0"]) == [bytes(100_000)]
        with redis.Redis.from_url(server.url) as client:
            client.flushall()
            client.execute_command("ACL", "SETUSER", "reader", "on", ">s3cret/@", "~*", "+@read", "+@connection")
        monkeypatch.setenv("R1JAX_TEST_SECRET", "s3cret/@")
        reader = RedisTier(server.url.replace("://", "://reader:$R1JAX_TEST_SECRET@"), ttl_s=100.0)
        assert reader.get_many([b"0"]) == [None]
        with pytest.raises(NotStored, match="permission"):
            reader.put_many({b"0": b"1"})
        tier.client().close()
        reader.client().close()


def test_tls_with_its_own_authority(tmp_path):
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    port = free_port()
    files = {"cert": "cert.pem", "key": "key.pem", "ca-cert": "cert.pem"}
    options = [word for name, file in files.items() for word in (f"--tls-{name}-file", str(tmp_path / file))]
    options += ["--tls-port", str(port), "--tls-auth-clients", "no"]
    with start_redis(tmp_path, *options):
        tier = RedisTier(f"rediss://127.0.0.1:{port}?ssl_ca_certs={tmp_path / 'cert.pem'}", ttl_s=100.0)
        tier.put_many(VALUES)
        assert tier.get_many(list(VALUES)) == list(VALUES.values())
        stranger = RedisTier(f"rediss://127.0.0.1:{port}", ttl_s=100.0)
        with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            stranger.get_many([b"a"])
        tier.client().close()


def test_a_cluster(tmp_path):
    port = free_port()
    while port > 55_535:  # the servers of a cluster talk to each other 10,000 ports higher
        port = free_port()
    with start_redis(tmp_path, "--cluster-enabled", "yes", port=port) as server:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            client.execute_command("CONFIG", "SET", "cluster-require-full-coverage", "no")
            while client.cluster("info")["cluster_state"] != "ok":
                pass
        tier = RedisTier(server.url.replace("redis:", "redis+cluster:"), ttl_s=100.0)
        tier.put_many(VALUES)
        assert tier.get_many([*VALUES, b"unknown"]) == [*VALUES.values(), None]
        assert tier.lease([b"a", b"b"]) == [True, True]
        assert tier.lease([b"b", b"c"]) == [False, True]
        assert tier.leased([b"a", b"x"]) == [True, False]
        tier.release([b"a", b"b", b"c"])
        assert tier.leased([b"a", b"b", b"c"]) == [False] * 3
        tier.add_counts("set", {"rows": 3.0})
        tier.client().close()


def test_urls_that_redis_cannot_take_are_refused():
    with pytest.raises(UserError, match="cache redis://h:1: .*socket_timeout"):
        RedisTier("redis://h:1?socket_timeout=soon", ttl_s=1.0)
