"""The rows of each customer or terminal in the order of time, and windows over them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64


class Index(NamedTuple):
    """The rows of each entity, one entity after another."""

    order: Int64[np.ndarray, " N"]
    """Rows by entity, then in their order."""
    place: Int64[np.ndarray, " N"]
    """Of each row in `order`."""
    first: Int64[np.ndarray, " N"]
    """Place of the first row of each row's entity."""


def index_by(entity: Int32[np.ndarray, " N"]) -> Index:
    """Sorts rows by entity.

    Args:
      entity: Of each row, from 0.

    Returns:
      The index.
    """
    order = np.argsort(entity, kind="stable")
    rows = np.arange(len(entity))
    place = np.empty_like(rows)
    place[order] = rows
    new = np.append(True, np.diff(entity[order]) != 0)[: len(entity)]
    return Index(order, place, np.maximum.accumulate(np.where(new, rows, 0))[place])


def last_rows(
    index: Index, rows: Int64[np.ndarray, " B"], count: int
) -> tuple[Int64[np.ndarray, "B K"], Bool[np.ndarray, "B K"]]:
    """The last rows of each row's entity, up to itself.

    Args:
      index: Of the entities.
      rows: Which.
      count: K.

    Returns:
      Rows in their order, the row itself last; and which of them exist (the others repeat the row).
    """
    places = index.place[rows][:, None] + np.arange(1 - count, 1)[None]
    valid = places >= index.first[rows][:, None]
    return index.order[np.where(valid, places, index.place[rows][:, None])], valid


def ends(
    index: Index, entity: Int32[np.ndarray, " N"], seconds: Int64[np.ndarray, " N"], back: int
) -> Int64[np.ndarray, " N"]:
    """Where each window ends that closes a while before its row.

    Args:
      index: Of the entities.
      entity: Of each row.
      seconds: Of each row, ascending.
      back: How long before, in seconds.

    Returns:
      For each place, the place after the last row of its entity that lies at least `back` seconds before it.
    """
    first = index.first[index.order]
    since = seconds[index.order] - seconds[0]
    keys = entity[index.order] * (since.max(initial=0) + 1) + since
    start = keys - since  # of the entity at the first second
    found = np.searchsorted(keys, np.where(since >= back, keys - back, start - 1), side="right")
    return np.maximum(found, first)
