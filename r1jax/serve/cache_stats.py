"""What a shared cache holds and what it has been good for, data set by data set: `r1jax data stats`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1jax.cli import load_arguments
from r1jax.data.cache_lmdb import lmdb_library
from r1jax.data.cache_redis import RedisTier
from r1jax.data.cache_values import NAMESPACE
from r1jax.errors import UserError
from r1jax.validation import check_cache_url

HELP = """\
Prints what a cache (LMDB or Redis) holds of each data set, and how often readers found there what they asked for.

Counters are those of all readers since the cache was made or emptied; a reader adds its own about every ten seconds.

Examples:
  r1jax data stats --cache redis://localhost:6379
  r1jax data stats --cache lmdb:/var/cache/r1jax
"""
TTL_S = 1.0
"""Of the tier that is opened here, which writes nothing."""
HEAD = ("data set", "groups", "rows", "MiB", "lookups", "memory", "shared", "waited", "cold", "rejected", "cold MiB")
KEYS = 512
"""Keys of a round trip."""


@dataclass(frozen=True)
class StatsArguments:
    """What the command is told."""

    cache: str
    """lmdb:DIR, redis://, rediss://, unix:// or redis+cluster://; a password may stand there, or as $NAME."""


@dataclass
class Holding:
    """What is there of one data set.

    Attributes:
      groups: Row groups.
      rows: Single rows.
      size: Bytes of both.
      counters: Of its readers.
    """

    groups: int = 0
    rows: int = 0
    size: int = 0
    counters: dict[str, float] = field(default_factory=dict)

    def add(self, unit: str, size: int) -> None:
        """Counts a value.

        Args:
          unit: "group" or "row".
          size: Its bytes.
        """
        self.groups += unit == "group"
        self.rows += unit == "row"
        self.size += size


def stats_command(words: list[str]) -> int:
    """Runs `r1jax data stats`.

    Args:
      words: The command line after the subcommand's name.

    Returns:
      0.

    Raises:
      UserError: The cache's URL is wrong, or the cache cannot be read.
    """
    asked = load_arguments(StatsArguments, words, "r1jax data stats", HELP)
    check_cache_url("--cache", asked.cache, secrets=True)
    if asked.cache == "memory":
        raise UserError("--cache is 'memory', which ends with the process that reads: name an LMDB folder or a server")
    if asked.cache.startswith("lmdb:"):
        name, held, state = asked.cache, *_of_lmdb(asked.cache.removeprefix("lmdb:"))
    else:
        tier = RedisTier(asked.cache, TTL_S)
        try:
            name, held, state = tier.name, *_of_redis(tier)
        except Exception as error:  # redis-py, TLS and sockets raise many kinds
            raise UserError(
                f"cache {tier.name} cannot be read ({type(error).__name__}: {error}): check its URL"
            ) from error
    print(report(name, held, state))
    return 0


def report(name: str, held: dict[str, Holding], state: str) -> str:
    """Writes the table.

    Args:
      name: Of the cache.
      held: By data set, as `dataset_name` names it.
      state: One line about the cache as a whole.

    Returns:
      Lines for people.
    """
    lines = [f"{name}: {state}"]
    if not held:
        return "\n".join([*lines, "no data set is in it"])
    head = (
        "data set",
        "groups",
        "rows",
        "MiB",
        "lookups",
        "memory",
        "shared",
        "waited",
        "cold",
        "rejected",
        "cold MiB",
    )
    table = [head]
    for dataset, holding in sorted(held.items()):
        count = {name: holding.counters.get(name, 0.0) for name in ("lookups", "rejected", "cold_bytes")}
        shares = [
            f"{holding.counters.get(part, 0.0) / count['lookups']:.1%}" if count["lookups"] else "-"
            for part in ("memory_hits", "shared_hits", "waits", "misses")
        ]
        table.append(
            (dataset, f"{holding.groups:,}", f"{holding.rows:,}", f"{holding.size / 2**20:,.1f}",
             f"{count['lookups']:,.0f}", *shares, f"{count['rejected']:,.0f}", f"{count['cold_bytes'] / 2**20:,.1f}")
        )  # fmt: skip
    widths = [max(len(row[column]) for row in table) for column in range(len(HEAD))]
    for row in table:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"{row[0]:{widths[0]}}", *cells]))
    return "\n".join(lines)


def _of_redis(tier: RedisTier) -> tuple[dict[str, Holding], str]:
    client = tier.client()
    held: dict[str, Holding] = {}
    for keys in _portions(client.scan_iter(f"{NAMESPACE}:*", count=1000)):
        pipe = tier.pipeline()
        named = [(key, *_parts(key)) for key in keys if _parts(key)[0]]
        for key, _, unit in named:
            pipe.hgetall(key) if unit == "counters" else pipe.strlen(key)
        for (_, dataset, unit), answer in zip(named, pipe.execute(raise_on_error=False), strict=True):
            if isinstance(answer, Exception):  # a key of another type, which is not r1jax's
                continue
            holding = held.setdefault(dataset, Holding())
            if unit == "counters":
                holding.counters = {name.decode(): float(value) for name, value in answer.items()}
            else:
                holding.add(unit, answer)
    return held, "; ".join(_states(client))


def _states(client: Any) -> Iterator[str]:
    """One state a server."""
    told = client.info()
    for info in [told] if "used_memory" in told else told.values():
        most = int(info.get("maxmemory", 0))
        limit = f"of {most / 2**20:,.1f} MiB" if most else "without limit"
        yield (
            f"{int(info['used_memory']) / 2**20:,.1f} MiB in use {limit}, policy {info.get('maxmemory_policy', '?')}, "
            f"{int(info.get('evicted_keys', 0)):,} values evicted, {int(info.get('expired_keys', 0)):,} expired"
        )


def _of_lmdb(folder: str) -> tuple[dict[str, Holding], str]:
    if not (Path(folder) / "data.mdb").is_file():
        raise UserError(f"--cache: there is no LMDB file in {folder!r}: name the folder of data.cache.url")
    lmdb = lmdb_library()
    held: dict[str, Holding] = {}
    try:
        with lmdb.open(folder, readonly=True) as environment, environment.begin(buffers=True) as reader:
            for key, value in reader.cursor():
                dataset, unit = _parts(bytes(key))
                if not dataset:
                    continue
                holding = held.setdefault(dataset, Holding())
                if unit == "counters":
                    holding.counters = json.loads(bytes(value))
                else:
                    holding.add(unit, len(value))
            most = environment.info()["map_size"]
    except lmdb.Error as error:
        raise UserError(
            f"cache lmdb:{folder} cannot be read ({error}): delete the folder, it is only a cache"
        ) from error
    size = (Path(folder) / "data.mdb").stat().st_size
    return held, f"{size / 2**20:,.1f} MiB on disk of {most / 2**20:,.1f} MiB"


def _parts(key: bytes) -> tuple[str, str]:
    """Data set and unit (or "counters", "lease") of a key; both empty for a key of another kind."""
    words = key.decode("utf-8", "replace").split(":")
    return (words[1], "lease" if words[-1] == "lease" else words[2]) if len(words) > 2 else ("", "")


def _portions(keys: Iterator[bytes]) -> Iterator[list[bytes]]:
    some: list[bytes] = []
    for key in keys:
        some.append(key)
        if len(some) == KEYS:
            yield some
            some = []
    if some:
        yield some
