"""Whether an exported model says what its checkpoint says: nothing leaves that was not compared."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from r1jax.serve.export_graph import CALL, Port, raw_inputs
from r1jax.serve.scored import Scored
from r1jax.tasks.medical.batch import PICTURES
from r1jax.tasks.medical.modes import MODES, shown_modes
from r1jax.tasks.medical.schema import FINDING

CHUNK = 64
"""Cases that are run at once."""
ENOUGH, SAME = 1000, 0.999
"""From so many decisions on, this share of them must be the same; of fewer, all."""


@dataclass(frozen=True)
class Limits:
    """Largest differences that are let through.

    Attributes:
      probability: Of any probability.
      mm: Of lengths and positions.
      near: A decision may differ where the checkpoint's probability is this close to the threshold.
    """

    probability: float
    mm: float
    near: float = 0.0


FP32 = Limits(probability=1e-5, mm=1e-3, near=1e-5)
HALF = Limits(probability=1e-2, mm=0.1, near=1e-3)
"""Of bf16 and fp16: a program that is compiled otherwise rounds its activations otherwise, in the third digit."""
INT8 = Limits(probability=0.1, mm=2.0)
"""Wide, for the decisions are what counts; a converter whose output collapses misses it by far."""


class Subset:
    """The first cases of a source."""

    def __init__(self, source: Any, count: int) -> None:
        """Takes some cases.

        Args:
          source: Where from.
          count: At most so many.
        """
        self.source, self.count = source, min(count, len(source))
        self.name, self.fingerprint, self.schema = source.name, source.fingerprint, source.schema

    def __len__(self) -> int:
        """Number of cases."""
        return self.count

    def read_batch(self, indices: np.ndarray) -> dict[str, Any]:
        """Reads cases, see `Source.read_batch`."""
        return self.source.read_batch(indices)


def compare(
    run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    wanted: dict[str, Port],
    scored: Scored,
    limits: Limits,
) -> dict[str, Any]:
    """Runs the artefact on all cases in every mode and holds it to the checkpoint's predictions.

    Args:
      run: Inputs to outputs, cases first.
      wanted: What the artefact reads.
      scored: What the checkpoint says, with the points that are in the artefact as `frozen`.
      limits: What may differ.

    Returns:
      Differences and decisions of each finding, limits, and "agrees"; JSON as it stands.
    """
    modes = shown_modes(scored.reads, scored.source.schema.modalities)
    found: dict[str, list[dict[str, np.ndarray]]] = {shown: [] for shown in modes.values()}
    thresholds: dict[str, list[dict[str, float]]] = {shown: [] for shown in modes.values()}
    for first in range(0, len(scored.ids), CHUNK):
        raw = scored.source.read_batch(np.arange(first, min(first + CHUNK, len(scored.ids))))
        inputs = raw_inputs(raw, wanted)
        for mode, shown in modes.items():
            found[shown].append(run(_hidden(inputs, MODES[mode])))
            thresholds[shown] += [_thresholds(scored, raw, row, MODES[mode]) for row in range(len(raw["case_id"]))]
    rows, same = {}, np.ones((len(modes), len(scored.ids)), bool)
    for name in scored.predicted[scored.main]:
        kind = FINDING[name].kind
        allowed = limits.probability if kind in ("binary", "rating") else limits.mm
        rows[name] = {"kind": kind, "largest_difference": 0.0, "limit": allowed, "same": 0}
        for index, (shown, parts) in enumerate(found.items()):
            theirs = scored.predicted[shown][name].astype(np.float64)
            ours = np.concatenate([part[name] for part in parts]).astype(np.float64)
            difference = np.nan_to_num(np.abs(ours - theirs), nan=np.inf)
            if kind == "binary":
                threshold = np.array([point.get(name, np.nan) for point in thresholds[shown]])
                calls = np.concatenate([part[CALL + name] for part in parts]) == 1
                equal = (calls == (theirs >= threshold)) | (np.abs(theirs - threshold) <= limits.near)
                same[index] &= equal
            elif kind == "rating":
                equal = ours.argmax(axis=1) == theirs.argmax(axis=1)
            else:
                equal = difference.reshape(len(difference), -1).max(axis=1) <= limits.mm
            rows[name]["largest_difference"] = max(rows[name]["largest_difference"], float(difference.max()))
            rows[name]["same"] += int(equal.sum())
    return _verdict(rows, same, scored)


def _verdict(rows: dict[str, Any], same: Bool[np.ndarray, "modes n"], scored: Scored) -> dict[str, Any]:
    """Counts the decisions, and says whether all of it is within its limits."""
    equal, of = int(same.sum()), same.size
    required = math.ceil(SAME * of) if of >= ENOUGH else of
    within = all(row["largest_difference"] <= row["limit"] for row in rows.values())
    return {
        "data": {"name": scored.source.name, "fingerprint": scored.source.fingerprint, "cases": len(scored.ids)},
        "shown": list(scored.predicted),
        "thresholds": sum(len(points) for points in scored.frozen.values()),
        "decisions": {"same": equal, "required": required, "of": of},
        "findings": rows,
        "agrees": within and equal >= required,
    }


def _hidden(inputs: dict[str, np.ndarray], mode: dict[str, bool]) -> dict[str, np.ndarray]:
    """The inputs of the same cases without their pictures or their record."""
    changed = dict(inputs)
    for name, values in inputs.items():
        if mode["hide_images"] and name.startswith("has_"):
            changed[name] = np.zeros_like(values)
        elif mode["hide_record"] and name in ("table", "text", "text_bytes"):
            changed[name] = np.full_like(values, np.nan if name == "table" else 0)
    return changed


def _thresholds(scored: Scored, raw: dict[str, Any], row: int, mode: dict[str, bool]) -> dict[str, float]:
    """The operating thresholds of a case that is shown in a mode, as its report takes them."""
    missing = set(scored.missing(raw, row))
    missing |= {name for name in scored.reads if mode["hide_images" if name in PICTURES else "hide_record"]}
    return {name: point.threshold for name, point in scored.frozen[scored.mode_of(tuple(missing))].items()}


def agreement_lines(agreement: dict[str, Any]) -> list[str]:
    """The comparison as a table.

    Args:
      agreement: From `compare`.

    Returns:
      Lines of text.
    """
    data, decisions = agreement["data"], agreement["decisions"]
    same = {"binary": "same call", "rating": "same level", "length": "within limit", "vector": "within limit"}
    lines = [
        f"against the checkpoint, {data['cases']} cases of {data['name']}, shown as {', '.join(agreement['shown'])}:",
        f"{'':20}{'largest difference':>20}{'limit':>10}  decisions",
    ]
    for name, row in agreement["findings"].items():
        unit = "" if row["kind"] in ("binary", "rating") else " mm"
        told = f"{row['same']} of {decisions['of']} {same[row['kind']]}"
        difference, limit = f"{row['largest_difference']:.2g}{unit}", f"{row['limit']:.2g}{unit}"
        lines.append(f"{name:20}{difference:>20}{limit:>10}  {told}")
    lines.append(
        f"all calls of a case the same: {decisions['same']} of {decisions['of']}, {decisions['required']} needed"
    )
    return lines
