"""Figures of merit of a chest-CT model: every finding, with intervals, for each set of modalities that it may see."""

from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from r1jax.errors import UserError, nearest
from r1jax.tasks import metrics as m
from r1jax.tasks.intervals import Draw
from r1jax.tasks.medical.figures import measure
from r1jax.tasks.medical.schema import FINDING, FINDINGS

MODES = {"both": "image + record", "image_only": "image only", "record_only": "record only"}
"""What the model may see of a case, and how that is printed."""


def evaluate(
    predictions: dict[str, np.ndarray],
    targets: dict[str, np.ndarray],
    *,
    operating_points: dict[str, float] | None = None,
    ceilings: dict[str, float] | None = None,
    groups: Shaped[np.ndarray, "n"] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures the predictions of all cases.

    Args:
      predictions: By finding: probability [n] of a binary finding, probabilities [n, levels] of a rating, long axis [n]
        in mm, centre [n, 3] in mm. Findings that are absent are left out of the result.
      targets: By finding: 0/1 [n], rating [n], mm [n] or [n, 3]; NaN is unknown and leaves the case out.
      operating_points: Threshold of each binary finding, set on other cases; where absent it is set on these cases for
        a specificity of `OPERATING_SPECIFICITY`, and the result says so.
      ceilings: Best attainable AUC of a binary finding, where it is known.
      groups: Patient or exam of each case; intervals then resample whole groups.
      resamples: Bootstrap resamples.
      seed: Seed of the resamples.

    Returns:
      Settings, and under "findings" for each finding: n, excluded and its figures as {"value", "low", "high"}
      (95 % intervals; None where undefined). It is JSON as it stands.

    Raises:
      UserError: A finding is unknown or has no target, a prediction is NaN or no probability, or lengths differ.
    """
    cases = _check(predictions, targets)
    draw = Draw(resamples, seed, groups)
    findings = {}
    for finding in FINDINGS:
        if finding.name not in predictions:
            continue
        truth = targets[finding.name].astype(np.float64)
        known = ~_any_axis(np.isnan(truth))
        n = int(known.sum())
        findings[finding.name] = {"kind": finding.kind, "text": finding.text, "n": n, "excluded": cases - n}
        if n:
            predicted = predictions[finding.name].astype(np.float64)
            _refuse_nan(finding.name, known & _any_axis(~np.isfinite(predicted)))
            findings[finding.name] |= measure(
                finding, truth[known], predicted[known], draw.of(known), operating_points or {}, ceilings or {}
            )
    return {
        "cases": cases,
        "unit": "case",
        "interval": f"95 % percentile bootstrap over {'cases' if groups is None else 'groups'}",
        "resamples": resamples,
        "seed": seed,
        "findings": findings,
    }


def evaluate_modalities(
    predictions: dict[str, dict[str, np.ndarray]],
    targets: dict[str, np.ndarray],
    *,
    operating_points: dict[str, dict[str, float]] | None = None,
    ceilings: dict[str, dict[str, float]] | None = None,
    groups: Shaped[np.ndarray, "n"] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures the same cases seen with both modalities and with each alone.

    Args:
      predictions: By mode (keys of `MODES`, any of them), then as `evaluate` takes them.
      targets: As `evaluate` takes them.
      operating_points: By mode, then as `evaluate` takes them.
      ceilings: By mode, then as `evaluate` takes them.
      groups: Patient or exam of each case.
      resamples: Bootstrap resamples.
      seed: Seed of the resamples.

    Returns:
      `evaluate`'s result by mode, and under "differences" by mode and finding the AUC of both minus that of the mode
      alone, on the same resamples.
    """
    for mode in predictions:
        if mode not in MODES:
            raise UserError(f"modality mode {mode!r} is unknown{nearest(mode, MODES)}: use one of {', '.join(MODES)}")
    result: dict[str, Any] = {
        mode: evaluate(
            predictions[mode],
            targets,
            operating_points=(operating_points or {}).get(mode),
            ceilings=(ceilings or {}).get(mode),
            groups=groups,
            resamples=resamples,
            seed=seed,
        )
        for mode in MODES
        if mode in predictions
    }
    draw = Draw(resamples, seed, groups)
    alone = [mode for mode in result if mode != "both"] if "both" in result else []
    result["differences"] = {
        mode: _differences(predictions["both"], predictions[mode], targets, draw) for mode in alone
    }
    return result


def pick_cases(
    labels: Float[np.ndarray, "n"], probabilities: Float[np.ndarray, "n"], threshold: float, each: int = 3
) -> list[tuple[int, str]]:
    """Chooses cases to look at: the worst mistakes of both kinds, and as many right calls.

    Args:
      labels: 0, 1, or NaN for unknown (never chosen).
      probabilities: Of the finding.
      threshold: At or above it the finding is called present.
      each: Cases of each kind at most.

    Returns:
      Indices with "false negative", "false positive", "true positive" or "true negative": mistakes first, the most
      confident first among them; right calls are spread evenly from the most to the least confident.
    """
    called, picked = probabilities >= threshold, []
    for kind, members, sign in (
        ("false negative", (labels == 1) & ~called, 1),
        ("false positive", (labels == 0) & called, -1),
        ("true positive", (labels == 1) & called, -1),
        ("true negative", (labels == 0) & ~called, 1),
    ):
        index = np.flatnonzero(members)
        index = index[np.argsort(sign * probabilities[index], kind="stable")]
        if kind.startswith("true") and len(index) > each:
            index = index[np.linspace(0, len(index) - 1, each).round().astype(int)]
        picked += [(int(i), kind) for i in index[:each]]
    return picked


def _check(predictions: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> int:
    """Refuses what cannot be compared, and returns the number of cases."""
    lengths = {len(values) for values in predictions.values()}
    for name, values in predictions.items():
        if name not in FINDING:
            raise UserError(f"prediction {name!r} is no finding of the schema{nearest(name, FINDING)}")
        if name not in targets:
            raise UserError(f"finding {name!r} is predicted but has no target: give NaN where it is unknown")
        finding, width = FINDING[name], {"vector": (3,), "rating": (FINDING[name].width,)}.get(FINDING[name].kind, ())
        if len(lengths) > 1 or len(targets[name]) != len(values) or values.shape[1:] != width:
            raise UserError(
                f"finding {name!r} ({finding.kind}): predictions {values.shape} and targets {targets[name].shape} do "
                f"not fit together: both need one row a case, and predictions {width or 'one number'} a row"
            )
    return lengths.pop() if lengths else 0


def _refuse_nan(name: str, bad: Bool[np.ndarray, "n"]) -> None:
    if bad.any():
        raise UserError(
            f"finding {name!r}: the predictions of {int(bad.sum())} of {len(bad)} cases are not finite (the first is "
            f"case {int(bad.argmax())}): the model's output cannot be evaluated"
        )


def _differences(
    both: dict[str, np.ndarray], alone: dict[str, np.ndarray], targets: dict[str, np.ndarray], draw: Draw
) -> dict[str, Any]:
    result = {}
    for finding in FINDINGS:
        if finding.kind != "binary" or finding.name not in both or finding.name not in alone:
            continue
        known = ~np.isnan(targets[finding.name])
        labels = targets[finding.name][known] == 1
        statistics = partial(_auc_difference, labels, both[finding.name][known], alone[finding.name][known])
        n = int(known.sum())
        result[finding.name] = {"n": n, **draw.of(known).figures(statistics, n)}
    return result


def _auc_difference(
    labels: Bool[np.ndarray, "n"],
    first: Float[np.ndarray, "n"],
    second: Float[np.ndarray, "n"],
    weights: Float[np.ndarray, "R n"],
) -> dict[str, Float[np.ndarray, "R"]]:
    return {"auc": m.rank(labels, first, weights).auc() - m.rank(labels, second, weights).auc()}


def _any_axis(bad: Bool[np.ndarray, "n ..."]) -> Bool[np.ndarray, "n"]:
    return bad.any(axis=tuple(range(1, bad.ndim)))
