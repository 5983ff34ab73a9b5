"""Sources made of sources: joined by a key, or mixed in exact proportions."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from r1jax.data.schema import WORDS, Field, Schema
from r1jax.data.source import Source
from r1jax.errors import UserError

CHUNK = 256
"""Cases that are read at once to learn their keys."""


class Joined:
    """Cases of two sources by a key, such as images and records of patients (a `Source`).

    Every key of either source is a case: those of the left one in its order, then those that only the right one has.
    What a case lacks is what `Schema.decode` gives for nulls, except that arrays of kind "table" are NaN; arrays that
    cannot say so themselves get a field `has_<name>`.
    """

    def __init__(self, left: Source, right: Source, key: str) -> None:
        """Matches the keys.

        Args:
          left: Cases with the key.
          right: The same, of other fields.
          key: Name of a field of words or whole numbers in both.

        Raises:
          UserError: A key occurs twice in a source, is missing or no word or number; or a field is in both.
        """
        self.left, self.right, self.key = left, right, key
        here, there = _keys(left, key), _keys(right, key)
        if here and there and type(here[0]) is not type(there[0]):
            raise UserError(f"{key!r} is words in one of {left.name!r} and {right.name!r} and numbers in the other")
        place, known = {value: row for row, value in enumerate(there)}, set(here)
        rows = [(row, place.get(value, -1)) for row, value in enumerate(here)]
        rows += [(-1, row) for row, value in enumerate(there) if value not in known]
        self.rows = np.array(rows, np.int64).reshape(-1, 2)
        both = [field for field in right.schema.fields if field.name != key]
        given = {field.name for field in (*left.schema.fields, *both)}
        flags = [
            Field(f"has_{field.name}", "number", "bool")
            for field in (*left.schema.fields, *both)
            if _needs_flag(field) and f"has_{field.name}" not in given
        ]
        self.schema = Schema((*left.schema.fields, *both, *flags))
        alone = int((self.rows < 0).any(axis=1).sum())
        self.name = f"{left.name} with {right.name} by {key!r} ({alone} of {len(self.rows)} cases in one alone)"
        made = f"joined {key!r} {left.fingerprint} {right.fingerprint}"
        self.fingerprint = hashlib.sha256(made.encode()).hexdigest()

    def __len__(self) -> int:
        """Number of keys."""
        return len(self.rows)

    def read_batch(self, indices: Int[np.ndarray, " B"]) -> dict[str, Any]:
        """Reads cases, those of each source at once; see `Source.read_batch`."""
        batch: dict[str, Any] = {}
        for column, source in enumerate((self.left, self.right)):
            rows = self.rows[indices, column]
            present = rows >= 0
            raw = source.read_batch(rows[present]) if present.any() else {}
            for field in source.schema.fields:
                spread = _spread(field, raw.get(field.name), present)
                if field.name != self.key or column == 0:
                    batch[field.name] = spread
                else:  # the key of a case that only the right source has
                    batch[field.name] = _merge(batch[field.name], spread, self.rows[indices, 0] >= 0)
                flag = f"has_{field.name}"
                if _needs_flag(field) and flag in self.schema.names and flag not in source.schema.names:
                    has = present.copy()
                    if flag in raw:  # the source has gaps of its own
                        has[present] = raw[flag]
                    batch[flag] = has
        return batch

    def prefetch(self, indices: Int[np.ndarray, " B"]) -> None:
        """Tells both sources what will be read."""
        for column, source in enumerate((self.left, self.right)):
            rows = self.rows[indices, column]
            getattr(source, "prefetch", lambda _: None)(rows[rows >= 0])

    def counters(self) -> dict[str, float]:
        """What the sources have counted, summed by name."""
        return _counted((self.left, self.right))


class Mixed:
    """Cases of several sources of one schema (a `Source`), which training reads in exact proportions.

    By index, it is the sources one after the other; `r1jax.data.order.open_order` mixes them.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[int]) -> None:
        """Puts sources together.

        Args:
          sources: At least one.
          weights: Cases of each of them in a turn, at least 1.

        Raises:
          UserError: The schemas differ, a source is empty, or the weights do not fit.
        """
        if len(sources) != len(weights) or not sources or min(weights) < 1:
            raise UserError(f"{len(sources)} sources are mixed by weights {list(weights)}: give each one of at least 1")
        for source in sources:
            if source.schema != sources[0].schema:
                raise UserError(f"{source.name!r} has other fields than {sources[0].name!r}: sources to mix must agree")
            if not len(source):
                raise UserError(f"{source.name!r} has no cases: leave it out")
        self.sources, self.weights = tuple(sources), tuple(weights)
        self.schema = sources[0].schema
        self.offsets = np.cumsum([0, *(len(source) for source in sources)])
        self.name = " + ".join(f"{weight} x {source.name}" for source, weight in zip(sources, weights, strict=True))
        made = f"mixed {self.weights} {[source.fingerprint for source in sources]}"
        self.fingerprint = hashlib.sha256(made.encode()).hexdigest()

    def __len__(self) -> int:
        """Cases of all sources."""
        return int(self.offsets[-1])

    def read_batch(self, indices: Int[np.ndarray, " B"]) -> dict[str, Any]:
        """Reads cases, those of each source at once; see `Source.read_batch`."""
        parts = [(source.read_batch(own), mine) for source, own, mine in self._split(indices)]
        batch: dict[str, Any] = {}
        for name in parts[0][0]:
            if any(isinstance(part[name], list) for part, _ in parts):
                values: list[Any] = [None] * len(indices)
                for part, mine in parts:
                    for at, value in zip(mine, part[name], strict=True):
                        values[at] = value
                batch[name] = values
            else:
                joined = np.concatenate([part[name] for part, _ in parts])
                batch[name] = joined[np.argsort(np.concatenate([mine for _, mine in parts]), kind="stable")]
        return batch

    def prefetch(self, indices: Int[np.ndarray, " B"]) -> None:
        """Tells the sources what will be read."""
        for source, own, _ in self._split(indices):
            getattr(source, "prefetch", lambda _: None)(own)

    def counters(self) -> dict[str, float]:
        """What the sources have counted, summed by name."""
        return _counted(self.sources)

    def _split(self, indices: Int[np.ndarray, " B"]) -> list[tuple[Source, np.ndarray, np.ndarray]]:
        """Sources that a batch touches, their own indices, and the places in the batch."""
        owners = np.searchsorted(self.offsets, indices, side="right") - 1
        places = [(i, np.flatnonzero(owners == i)) for i in np.unique(owners)]
        return [(self.sources[i], indices[mine] - self.offsets[i], mine) for i, mine in places]


def _keys(source: Source, key: str) -> list[Any]:
    """The key of every case, each once."""
    field = source.schema.select([key]).fields[0]
    if field.kind not in (*WORDS, "number") or field.shape or np.dtype(field.dtype or "S").kind not in "iuS":
        raise UserError(f"{source.name!r} has {key!r} as {field.kind} {field.dtype}: a key is words or whole numbers")
    found: list[Any] = []
    for first in range(0, len(source), CHUNK):
        values = source.read_batch(np.arange(first, min(first + CHUNK, len(source))))[key]
        found += values.tolist() if isinstance(values, np.ndarray) else values
    missing = [row for row, value in enumerate(found) if value == "" or value != value]
    if missing:
        raise UserError(f"{source.name!r} has no {key!r} in case {missing[0]} ({len(missing)} in all): fill it in")
    if len(set(found)) < len(found):
        seen: set[Any] = set()
        twice = sorted({value for value in found if value in seen or seen.add(value)})
        some = ", ".join(map(repr, twice[:5])) + (f" and {len(twice) - 5} more" if len(twice) > 5 else "")
        raise UserError(f"{source.name!r} has {key!r} {some} more than once: keys must be unique to join by them")
    return found


def _needs_flag(field: Field) -> bool:
    """Whether a missing value looks like a real one: an array of zeros."""
    return bool(field.shape) and None not in field.shape and not _nan(field)


def _nan(field: Field) -> bool:
    return field.kind == "table" and np.dtype(field.dtype).kind == "f"


def _spread(field: Field, values: Any, present: Bool[np.ndarray, " B"]) -> Any:
    """Puts the values of the cases that a source has at their places, and what stands for nothing at the others."""
    places, count = np.flatnonzero(present), len(present)
    if not field.dtype or None in field.shape:
        spread: list[Any] = [("" if field.kind in WORDS and not field.dtype else None)] * count
        for at, value in zip(places, [] if values is None else values, strict=True):
            spread[at] = value
        return spread
    if field.shape:
        array = np.full((count, *field.shape), np.nan if _nan(field) else 0, field.dtype)
    elif present.all():
        return values
    else:
        array = np.full(count, np.nan, field.dtype if np.dtype(field.dtype).kind == "f" else np.float64)
    if len(places):
        array[places] = values
    return array


def _merge(left: Any, right: Any, has_left: Bool[np.ndarray, " B"]) -> Any:
    if isinstance(left, list):
        return [a if has else b for a, b, has in zip(left, right, has_left, strict=True)]
    return np.where(has_left, left, right).astype(np.int64)


def _counted(sources: Sequence[Source]) -> dict[str, float]:
    total: dict[str, float] = {}
    for source in sources:
        for name, value in getattr(source, "counters", dict)().items():
            total[name] = total.get(name, 0.0) + float(value)
    return total
