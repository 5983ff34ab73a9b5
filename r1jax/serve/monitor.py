"""`r1jax monitor`: how far a later period has moved from the one that a checkpoint was evaluated on."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float

from r1jax.cli import load_arguments
from r1jax.config import Positive
from r1jax.data.transactions import DAY
from r1jax.errors import UserError
from r1jax.tasks.drift import Drift, drifts, follow
from r1jax.tasks.finance.alerts import make_policy
from r1jax.tasks.finance.operating import stored_curve
from r1jax.train.checkpoints import find_checkpoint

HELP = """\
Compares a later period, scored by eval.py, with the one that it is held against: another that eval.py has scored, or
the validation of the run, of which the checkpoint has a snapshot. PSI and KS of every feature and of the score, and
what the frozen threshold and one that follows the scores do there. The data of the training is not needed.

Leaves with code 0 if nothing has drifted, 3 if something has, 2 for bad input.

Examples:
  r1jax monitor runs/finance later
  r1jax monitor runs/finance/eval later --psi 0.1 --output drift.json
"""
DRIFTED = 3
"""Exit code where something has drifted."""


@dataclass(frozen=True)
class MonitorArguments:
    """What `r1jax monitor` is told."""

    reference: str
    """Results of eval.py on the period that is held to be normal; or a run or checkpoint, for its validation."""
    later: str
    """Results of eval.py on a later period, by the same checkpoint."""
    psi: Positive = 0.2
    """Population stability index from which a column has drifted."""
    ks: Positive = 0.15
    """Kolmogorov-Smirnov distance from which a column has drifted."""
    output: str | None = None
    """File for the same as JSON."""


class Later(NamedTuple):
    """Scores of the later period, in order of time."""

    columns: dict[str, Float[np.ndarray, "N"]]
    fraud: Float[np.ndarray, "N"]
    days: int


def monitor(words: list[str]) -> int:
    """Compares two results of eval.py.

    Args:
      words: The command line after `monitor`.

    Returns:
      0, or `DRIFTED`.

    Raises:
      UserError: A folder holds no such results, or they are not comparable.
    """
    asked = load_arguments(MonitorArguments, words, "r1jax monitor", HELP, ("reference", "later"))
    reference, later = read_reference(Path(asked.reference)), read_later(Path(asked.later))
    _check_same_model(asked, reference)
    unknown = sorted(reference["columns"].keys() ^ later.columns.keys())
    if unknown:
        raise UserError(
            f"only one of {asked.reference} and {asked.later} has the column {unknown[0]}: score both periods with "
            "the same version of r1jax"
        )
    found = drifts(reference["columns"], later.columns)
    moved = [drift.name for drift in found if drift.psi >= asked.psi or drift.ks >= asked.ks]
    told = {
        "limits": {"psi": asked.psi, "ks": asked.ks},
        "drifted": moved,
        "columns": [{name: _finite(value) for name, value in drift._asdict().items()} for drift in found],
        "threshold": threshold_report(reference, later),
    }
    print("\n".join(_lines(found, told, reference, later)))
    if asked.output is not None:
        try:
            Path(asked.output).write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", "utf-8")
        except OSError as error:
            raise UserError(f"--output {asked.output} cannot be written: {error.strerror}") from None
    return DRIFTED if moved else 0


def read_reference(folder: Path) -> dict[str, Any]:
    """What a later period is held against.

    Args:
      folder: Results of eval.py, or what `find_checkpoint` takes.

    Returns:
      "period", "columns", "threshold", "alert_share", and "sha256" of the checkpoint.

    Raises:
      UserError: It is neither, or the checkpoint has no snapshot.
    """
    if (folder / "metrics.json").is_file():
        made = _json(folder, "metrics.json")["provenance"]["checkpoint"]
        return _json(folder, "snapshot.json") | {"sha256": made["sha256"]}
    try:
        checkpoint = find_checkpoint(folder)
    except UserError:
        raise UserError(_missing(folder, "snapshot.json")) from None
    checkpoint.verify("meta.json")
    config, validated = checkpoint.config(), checkpoint.meta()["validation"] or {}
    stored = validated.get("operating_points", {}).get("both", {})
    if config.task.name != "finance" or "reference" not in stored:
        raise UserError(
            f"{checkpoint.path} has no snapshot of a validation of payments: name the results of eval.py on the period "
            "that is held to be normal"
        )
    curve, period = stored_curve(stored["curve"]), stored["reference"]["period"]
    threshold = make_policy(curve, config.task.finance.alerts).review
    share = curve.alerts_at(threshold) * period["days"] / period["transactions"]
    return stored["reference"] | {"threshold": threshold, "alert_share": share, "sha256": checkpoint.digest()}


def read_later(folder: Path) -> Later:
    """The scores and features that eval.py left in a folder.

    Raises:
      UserError: There are none, or the file is damaged.
    """
    file = folder / "scores.parquet"
    try:
        table = pq.read_table(file)
    except FileNotFoundError:
        raise UserError(_missing(folder, file.name)) from None
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{file} cannot be read ({error}): score the period again") from None
    names = [name for name in table.column_names if name.startswith("feature.")]
    columns = {name.removeprefix("feature."): table[name].to_numpy().astype(np.float64) for name in names}
    day = table["time"].cast(pa.timestamp("s", "UTC")).cast(pa.int64()).to_numpy() // DAY
    fraud = table["fraud"].to_numpy(zero_copy_only=False).astype(np.float64)
    return Later(columns, fraud, int(np.ptp(day)) + 1)


def threshold_report(reference: dict[str, Any], later: Later) -> dict[str, Any]:
    """What two thresholds do later: the frozen one, and one that follows the scores to keep the share of alerts.

    Args:
      reference: From `read_reference`.
      later: From `read_later`.

    Returns:
      Share of alerts on the reference; and of each threshold where it ends, alerts a day, share of alerts, and the
      false positive rate of the transactions whose label is known (None without such).
    """
    score, start = later.columns["score"], reference["threshold"]
    follower = follow(start, reference["alert_share"])
    followed = np.array([follower(x) for x in score.tolist()], bool)
    return {
        "alert_share_before": reference["alert_share"],
        "frozen": _alerts(start, score >= start, later),
        "following": _alerts(follower.threshold, followed, later),
    }


def _alerts(threshold: float, alert: Bool[np.ndarray, "N"], later: Later) -> dict[str, Any]:
    genuine = later.fraud == 0
    return {
        "threshold": threshold,
        "alerts_per_day": float(alert.sum() / later.days),
        "alert_share": float(alert.mean()),
        "false_positive_rate": float(alert[genuine].mean()) if genuine.any() else None,
    }


def _check_same_model(asked: MonitorArguments, reference: dict[str, Any]) -> None:
    """Refuses scores of two checkpoints, whose difference says nothing of the data."""
    one, other = reference["sha256"], _json(Path(asked.later), "metrics.json")["provenance"]["checkpoint"]["sha256"]
    if one != other:
        raise UserError(
            f"{asked.reference} and {asked.later} are of different checkpoints ({one[:12]} and {other[:12]}): score "
            "both periods by one"
        )


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_missing(folder, name)) from None
    except ValueError as error:
        raise UserError(f"{folder / name} is damaged ({error}): score the period again") from None


def _missing(folder: Path, name: str) -> str:
    return (
        f"{folder} has no {name}: name a folder that `python eval.py --checkpoint RUN --output FOLDER` has written for "
        "the finance task"
    )


def _lines(found: list[Drift], told: dict[str, Any], reference: dict[str, Any], later: Later) -> list[str]:
    before = reference["period"]
    lines = [
        f"against {before['transactions']} transactions, {before['first_day']} to {before['last_day']}; now "
        f"{len(later.fraud)} of {later.days} days",
        f"{'':<26}{'PSI':>8}{'KS':>8}{'median':>12}{'now':>12}{'missing':>9}",
    ]
    for drift in found:
        mark = "  drifted" if drift.name in told["drifted"] else ""
        lines.append(
            f"{drift.name:<26}{drift.psi:>8.3f}{drift.ks:>8.3f}{drift.median_before:>12.4g}{drift.median_after:>12.4g}"
            f"{drift.missing_after:>9.1%}{mark}"
        )
    threshold = told["threshold"]
    lines.append(f"share of alerts before: {threshold['alert_share_before']:.2%}")
    for name in ("frozen", "following"):
        now = threshold[name]
        rate = now["false_positive_rate"]
        known = "" if rate is None else f", false positive rate {rate:.2%}"
        lines.append(
            f"{name} threshold: {now['alert_share']:.2%} of transactions, {now['alerts_per_day']:.1f} a day{known} "
            f"(at {now['threshold']:.4f})"
        )
    limits = told["limits"]
    moved = ", ".join(told["drifted"]) or "nothing"
    return [*lines, f"drifted (PSI from {limits['psi']:g} or KS from {limits['ks']:g}): {moved}"]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
