"""Whether an exported model says what its checkpoint says: nothing leaves that was not compared."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool

from r1jax.serve.export_graph import Exported, Limits

ENOUGH, SAME = 1000, 0.999
"""From so many decisions on, this share of them must be the same; of fewer, all."""


FP32 = Limits(probability=1e-5, level=1e-5, mm=1e-3, near=1e-5)
HALF = Limits(probability=1e-2, level=1e-2, mm=0.1, near=1e-3)
"""Of bf16 and fp16: a program that is compiled otherwise rounds its activations otherwise, in the third digit."""
FP16 = Limits(probability=0.02, level=0.02, mm=0.5, near=1e-3)
"""Of weights that are stored as fp16: a token that lies between two experts may be routed to the other."""
ROUNDED = Limits(probability=0.1, level=0.2, mm=2.0, near=1e-3)
"""Of rounded activations that are computed in another order: at their edges they fall to other codes, as those of the
checkpoint itself do in batches of another size."""
INT8 = Limits(probability=0.1, level=0.2, mm=2.0)
"""Wide, for the decisions are what counts; a converter whose output collapses misses it by far. In 4,800 decisions
a level's probability moved by .12 at most, and that of a call by .0075."""


class Subset:
    """Some cases of a source."""

    def __init__(self, source: Any, rows: np.ndarray) -> None:
        """Takes some cases.

        Args:
          source: Where from.
          rows: Which.
        """
        self.source, self.rows = source, rows
        self.name, self.fingerprint, self.schema = source.name, source.fingerprint, source.schema

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.rows)

    def read_batch(self, indices: np.ndarray) -> dict[str, Any]:
        """Reads cases, see `Source.read_batch`."""
        return self.source.read_batch(self.rows[indices])


def compare(
    run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], exported: Exported, limits: Limits
) -> dict[str, Any]:
    """Runs the artefact on all cases in every way to show them and holds it to the checkpoint's predictions.

    Args:
      run: Inputs to outputs, cases first.
      exported: What the checkpoint says.
      limits: What may differ.

    Returns:
      Differences and decisions of each finding, limits, and "agrees"; JSON as it stands.
    """
    count, shown = len(exported.source), exported.shown
    rows, same = {}, np.ones((len(shown), count), bool)
    for first in range(0, count, exported.batch):
        # Whole batches: of another size a program is compiled otherwise, and rounded activations fall to other sides.
        chunk = np.minimum(np.arange(first, first + exported.batch), count - 1)
        real = min(exported.batch, count - first)
        raw = exported.source.read_batch(chunk)
        inputs = exported.inputs(raw)
        for index, way in enumerate(shown):
            found = run(exported.hidden(inputs, way))
            for name, held in exported.held(way, raw, chunk, found, limits).items():
                empty = {"kind": held.kind, "largest_difference": 0.0, "limit": held.limit, "same": 0}
                row = rows.setdefault(name, empty)
                row["largest_difference"] = max(row["largest_difference"], float(held.difference.max()))
                row["same"] += int(held.same[:real].sum())
                if held.decides:
                    same[index, chunk[:real]] &= held.same[:real]
    return _verdict(rows, same, exported)


def _verdict(rows: dict[str, Any], same: Bool[np.ndarray, "modes n"], exported: Exported) -> dict[str, Any]:
    """Counts the decisions, and says whether all of it is within its limits."""
    equal, of, source = int(same.sum()), same.size, exported.source
    required = math.ceil(SAME * of) if of >= ENOUGH else of
    within = all(row["largest_difference"] <= row["limit"] for row in rows.values())
    return {
        "data": {"name": source.name, "fingerprint": source.fingerprint, "cases": len(source)},
        "shown": list(exported.shown),
        "decisions": {"same": equal, "required": required, "of": of},
        "findings": rows,
        "agrees": within and equal >= required,
    }


def agreement_lines(agreement: dict[str, Any]) -> list[str]:
    """The comparison as a table.

    Args:
      agreement: From `compare`.

    Returns:
      Lines of text.
    """
    data, decisions = agreement["data"], agreement["decisions"]
    same = {"binary": "same call", "rating": "same level", "band": "same band"}
    lines = [
        f"against the checkpoint, {data['cases']} cases of {data['name']}, shown as {', '.join(agreement['shown'])}:",
        f"{'':20}{'largest difference':>20}{'limit':>10}  decisions",
    ]
    for name, row in agreement["findings"].items():
        unit = " mm" if row["kind"] in ("length", "vector") else ""
        told = f"{row['same']} of {decisions['of']} {same.get(row['kind'], 'within limit')}"
        difference, limit = f"{row['largest_difference']:.2g}{unit}", f"{row['limit']:.2g}{unit}"
        lines.append(f"{name:20}{difference:>20}{limit:>10}  {told}")
    lines.append(
        f"all calls of a case the same: {decisions['same']} of {decisions['of']}, {decisions['required']} needed"
    )
    return lines
