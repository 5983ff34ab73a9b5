"""Labelled cases that fit into memory: numbers, a history and a text of each, and the class to predict."""

import hashlib
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError

UNKNOWN = -1
"""Label of a case whose class nobody knows."""


@dataclass(frozen=True, eq=False)
class Records:
    """What a file holds; a case's numbers are of order one, NaN where missing.

    Attributes:
      ids: Names of the cases.
      label: Number of the class, `UNKNOWN` where it is not known.
      table: Numbers of each case; None where there are none.
      series: Streams of events, the latest last, of which all exist; None where there are none.
      text: "" where missing; None where no case has any.
      day: Day since the epoch for which the class is predicted; None where cases have no time.
      agreed: Share of the annotators that chose the label; None where nobody counted.
      beside: Cases of other files, to learn from and never to judge on; None where there are none.
      outcome: Number of what happened, told more finely than by the class, which it decides; None where that is all.
    """

    ids: list[str]
    label: Int32[np.ndarray, " N"]
    table: Float32[np.ndarray, "N F"] | None = None
    series: Float32[np.ndarray, "N S K C"] | None = None
    text: list[str] | None = None
    day: Int32[np.ndarray, " N"] | None = None
    agreed: Float32[np.ndarray, " N"] | None = None
    beside: Bool[np.ndarray, " N"] | None = None
    outcome: Int32[np.ndarray, " N"] | None = None

    def digest(self) -> bytes:
        """sha256 of all that the cases are."""
        made = hashlib.sha256()
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in ("agreed", "beside", "outcome"):
                continue  # files that were read before there was such a thing keep their digest
            made.update(field.name.encode())
            if isinstance(value, np.ndarray):
                made.update(str(value.shape).encode() + np.ascontiguousarray(value).tobytes())
            elif value is not None:
                for word in value:
                    raw = word.encode()
                    made.update(len(raw).to_bytes(8, "little") + raw)
        return made.digest()


class RecordCases:
    """Case i is record `rows[i]` (a `Source`)."""

    def __init__(self, name: str, records: Records, rows: Int[np.ndarray, " n"]) -> None:
        """Chooses records; nothing is copied.

        Args:
          name: For people.
          records: All of the file.
          rows: Which are cases.
        """
        self.name, self.records, self.rows = name, records, rows
        found = [Field("case_id", "category"), Field("target.class", "number", "int32")]
        if records.agreed is not None:
            found.append(Field("target.agreed", "number", "float32"))
        if records.outcome is not None:
            found.append(Field("target.outcome", "number", "int32"))
        if records.table is not None:
            found.append(Field("table", "table", "float32", records.table.shape[1:]))
        if records.series is not None:
            found.append(Field("series", "series", "float32", records.series.shape[1:]))
        if records.text is not None:
            found.append(Field("text", "text"))
        self.schema = Schema(tuple(found))
        made = hashlib.sha256(records.digest())
        made.update(rows.astype("<i8").tobytes())
        self.fingerprint = made.hexdigest()

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.rows)

    def identities(self) -> list[Hashable]:
        """What tells each case from others, in whatever file: its stock and day, or else all that is read of it.

        A text is told by its `letters`.
        """
        records = self.records
        if records.day is not None:
            return [records.ids[row] for row in self.rows]
        arrays = [x for x in (records.table, records.series) if x is not None]
        text = [""] * len(records.ids) if records.text is None else [letters(one) for one in records.text]
        return [(text[row], *(x[row].tobytes() for x in arrays)) for row in self.rows]

    def read_batch(self, indices: Int[np.ndarray, " B"]) -> dict[str, Any]:
        """Reads cases as `Source.read_batch` says.

        Args:
          indices: Which cases, in any order.

        Returns:
          "case_id", "target.class" (int32, `UNKNOWN` where not known), and "target.agreed", "target.outcome", "table",
          "series" and "text" as far as the records have them.
        """
        rows, records = self.rows[indices], self.records
        batch: dict[str, Any] = {"case_id": [records.ids[row] for row in rows], "target.class": records.label[rows]}
        if records.agreed is not None:
            batch["target.agreed"] = records.agreed[rows]
        if records.outcome is not None:
            batch["target.outcome"] = records.outcome[rows]
        if records.table is not None:
            batch["table"] = records.table[rows]
        if records.series is not None:
            batch["series"] = records.series[rows]
        if records.text is not None:
            batch["text"] = [records.text[row] for row in rows]
        return batch


def letters(text: str) -> str:
    """What is equal for one sentence in files that broke other letters of it.

    Args:
      text: A sentence.

    Returns:
      Its ASCII letters, in lower case, and digits; the text itself where these are the lesser part of it.
    """
    found = re.sub("[^a-z0-9]+", "", text.lower())
    return found if 2 * len(found) >= len(text) else text


def held_out(label: Int32[np.ndarray, " N"], folds: int, fold: int, seed: int) -> np.ndarray:
    """Which cases a fold holds; every class is dealt out evenly.

    Args:
      label: Class of each case.
      folds: How many folds there are.
      fold: Which one.
      seed: Of the shuffle.

    Returns:
      bool [N].
    """
    shuffled = np.random.default_rng((seed, 20050930)).permutation(len(label))
    dealt = shuffled[np.argsort(label[shuffled], kind="stable")]
    member = np.empty(len(label), np.int64)
    member[dealt] = np.arange(len(label)) % folds  # one deal over all classes: folds differ by one case at most
    return member == fold


def in_periods(day: Int32[np.ndarray, " N"], split: str, ends: Sequence[str]) -> np.ndarray:
    """Which cases a period holds.

    Args:
      day: Of each case, since the epoch.
      split: train, val or test.
      ends: First day of the validation and of the test, such as 2015-08-01.

    Returns:
      bool [N].
    """
    val, test = (int(np.datetime64(end, "D").astype(np.int64)) for end in ends)
    return {"train": day < val, "val": (day >= val) & (day < test), "test": day >= test}[split]


def known(rows: Int[np.ndarray, " n"], records: Records, name: str) -> Int[np.ndarray, " n"]:
    """The rows whose class is known.

    Args:
      rows: Of the records.
      records: All of them.
      name: Of the part, for the message.

    Returns:
      Rows to learn from.

    Raises:
      UserError: Fewer than two classes occur among them.
    """
    kept = rows[records.label[rows] != UNKNOWN]
    if len(np.unique(records.label[kept])) < 2:
        raise UserError(f"{name} has {len(kept)} cases with a known label, of fewer than two classes: nothing to learn")
    return kept
