"""Small streams of payments for tests."""

import numpy as np
import pyarrow as pa

from r1jax.data.transactions import Transactions


def draw_table(seed=0, rows=60, entities=3, days=60, unknown=0.2):
    """Payments of few customers at few terminals, many in the same second, some labels unknown."""
    rng = np.random.default_rng(seed)
    half = 43200
    seconds = np.sort(rng.integers(0, 2 * days, rows)) * half + 1_514_764_800 + rng.integers(0, 2, rows)
    fraud = np.where(rng.random(rows) < unknown, np.nan, rng.random(rows) < 0.3).astype(np.float32)
    return Transactions(
        ids=pa.array([f"t{i}" for i in range(rows)]),
        seconds=np.sort(seconds),
        customer=rng.integers(0, entities, rows).astype(np.int32),
        terminal=rng.integers(0, entities, rows).astype(np.int32),
        amount=np.round(rng.uniform(0, 300, rows), 2).astype(np.float32),
        fraud=fraud,
        scenario=None,
        text=None,
        customers=pa.array([f"c{i}" for i in range(entities)]),
        terminals=pa.array([f"m{i}" for i in range(entities)]),
    )
