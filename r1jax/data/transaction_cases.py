"""Payments of one period as cases: what was known at each, and the label to predict."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from r1jax.data.schema import Field, Schema
from r1jax.data.transaction_history import CHANNELS, FEATURES, History
from r1jax.data.transactions import DAY, Transactions


class TransactionCases:
    """Case i is the i-th of the chosen payments (a `Source`); everything before it in the table is its history.

    Attributes:
      table: All payments.
      history: Their features and streams.
      rows: Of the table, in the order of time: case i is row `rows[i]`.
      kept: Share of genuine payments that were kept; the odds of fraud are 1 / kept times too high in these cases.
    """

    def __init__(self, name: str, table: Transactions, history: History, rows: np.ndarray, kept: float = 1.0) -> None:
        """Chooses the payments; nothing is copied.

        Args:
          name: For people.
          table: All payments.
          history: Of the table.
          rows: Which are cases, ascending.
          kept: Share of the genuine ones that is among them.
        """
        self.name, self.table, self.history, self.rows, self.kept = name, table, history, rows, kept
        shape = (2, history.events)
        fields = [
            Field("case_id", "category"),
            Field("series", "series", "float32", (*shape, len(CHANNELS))),
            Field("series_state", "number", "int8", shape),
            Field("series_valid", "number", "bool", shape),
            Field("table", "table", "float32", (len(FEATURES),)),
            Field("target.fraud", "number", "float32"),
            Field("target.day", "number", "int32"),
        ]
        fields += [] if table.text is None else [Field("text", "text")]
        self.schema = Schema(tuple(fields))
        made = hashlib.sha256(f"{table.digest()} {history.delay} {history.events}".encode())
        made.update(rows.astype("<i8").tobytes())
        self.fingerprint = made.hexdigest()

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.rows)

    def read_batch(self, indices: Int[np.ndarray, " B"]) -> dict[str, Any]:
        """Reads cases as `Source.read_batch` says.

        Args:
          indices: Which cases, in any order.

        Returns:
          "case_id", "series" with its "series_state" and "series_valid" (`Streams`), "table" (`FEATURES`), "text"
          where the payments have notes, "target.fraud", and "target.day" since the epoch.
        """
        rows = self.rows[indices]
        streams = self.history.streams(rows)
        batch = {
            "case_id": self.table.ids.take(pa.array(rows)).to_pylist(),
            "series": streams.numbers,
            "series_state": streams.states,
            "series_valid": streams.valid,
            "table": self.history.features[rows],
            "target.fraud": self.table.fraud[rows],
            "target.day": (self.table.seconds[rows] // DAY).astype(np.int32),
        }
        if self.table.text is not None:
            batch["text"] = self.table.text.take(pa.array(rows)).to_pylist()
        return batch


def training_rows(table: Transactions, rows: np.ndarray, kept: float, seed: int) -> np.ndarray:
    """Every fraud of some rows, and a fixed share of the genuine payments.

    Args:
      table: All payments.
      rows: To choose from, ascending.
      kept: Share of the genuine ones.
      seed: Of the choice; a row is kept or not whatever other rows there are.

    Returns:
      The rows, ascending, without those whose label nobody knows.
    """
    drawn = np.random.default_rng((seed, 20180401)).random(len(table))[rows]
    fraud = table.fraud[rows]
    return rows[(fraud == 1) | ((fraud == 0) & (drawn < kept))]
