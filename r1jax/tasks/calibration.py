"""From scores to probabilities: a monotone map that is fitted on validation cases and kept with the checkpoint.

It does not change the order of the cases, but isotonic regression gives neighbours one probability.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from r1jax.errors import UserError
from r1jax.tasks.metrics import checked

_LEAST = 1e-12
"""Scores are kept this far from 0 and 1 where their logarithm is needed."""


class Isotonic(NamedTuple):
    """Piecewise linear and rising, constant beyond its ends."""

    scores: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __call__(self, score: Shaped[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """Probabilities of scores."""
        return np.interp(score.astype(np.float64), self.scores, self.probabilities)


class Platt(NamedTuple):
    """A sigmoid of the score's log-odds; the slope is never negative."""

    slope: float
    intercept: float

    def __call__(self, score: Shaped[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """Probabilities of scores."""
        return _sigmoid(self.slope * _log_odds(score) + self.intercept)


Calibration = Isotonic | Platt


def fit_isotonic(labels: Shaped[np.ndarray, "n"], scores: Shaped[np.ndarray, "n"]) -> Isotonic:
    """Least squares among all rising maps, by pooling adjacent violators (Barlow et al. 1972).

    Blocks of one class would say 0 or 1; they say what Laplace's rule of succession gives for their size, as far as
    that keeps the map rising.

    Args:
      labels: 1 for a positive case, 0 for a negative one; at least one case.
      scores: Of the same cases.

    Returns:
      The map; between two blocks it is linear.
    """
    labels, scores = _known(labels, scores)
    distinct, member = np.unique(scores, return_inverse=True)
    count = np.bincount(member).astype(np.float64)
    positive = np.bincount(member, weights=labels)
    blocks: list[list[float]] = []  # positives, cases, first and last score
    for score, found, size in zip(distinct.tolist(), positive.tolist(), count.tolist(), strict=True):
        blocks.append([found, size, score, score])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            found, size, _, last = blocks.pop()
            blocks[-1][0], blocks[-1][1], blocks[-1][3] = blocks[-1][0] + found, blocks[-1][1] + size, last
    values = [found / size for found, size, _, _ in blocks]
    floor, ceiling = ((blocks[end][0] + 1) / (blocks[end][1] + 2) for end in (0, -1))
    if values[0] == 0.0:
        values[0] = min(floor, *values[1:2], 0.5)
    if values[-1] == 1.0:
        values[-1] = max(ceiling, *values[-2:-1], 0.5)
    knots = [(x, value) for (_, _, *ends), value in zip(blocks, values, strict=True) for x in dict.fromkeys(ends)]
    return Isotonic(tuple(x for x, _ in knots), tuple(value for _, value in knots))


def fit_platt(labels: Shaped[np.ndarray, "n"], scores: Shaped[np.ndarray, "n"], steps: int = 50) -> Platt:
    """Likeliest sigmoid of the log-odds, towards targets that are not quite 0 and 1 (Platt 1999), by Newton's method.

    Args:
      labels: 1 for a positive case, 0 for a negative one; at least one case.
      scores: Probabilities of the same cases.
      steps: Newton steps at most.

    Returns:
      The map; a constant where the scores rank the wrong way round.
    """
    labels, scores = _known(labels, scores)
    positives, n = int(labels.sum()), len(labels)
    target = np.where(labels, (positives + 1) / (positives + 2), 1 / (n - positives + 2))
    x = np.stack([_log_odds(scores), np.ones(n)], axis=1)
    flat = Platt(0.0, math.log(target.mean() / (1 - target.mean())))
    if np.ptp(x[:, 0]) == 0:
        return flat
    weights = np.array(flat)
    for _ in range(steps):
        step = _newton(x, target, weights)
        weights = weights + step
        if np.abs(step).max() < 1e-10:
            break
    return Platt(float(weights[0]), float(weights[1])) if weights[0] > 0 else flat


def _newton(
    x: Float[np.ndarray, "n 2"], target: Float[np.ndarray, "n"], weights: Float[np.ndarray, "2"]
) -> Float[np.ndarray, "2"]:
    """A Newton step, halved until the loss does not rise."""
    p = _sigmoid(x @ weights)
    hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-12 * np.eye(2)
    step, loss = np.linalg.solve(hessian, x.T @ (target - p)), _loss(x @ weights, target)
    while _loss(x @ (weights + step), target) > loss and np.abs(step).max() > 1e-12:
        step = step / 2
    return step


def to_json(calibration: Calibration) -> dict[str, Any]:
    """The map as JSON, to be stored with a checkpoint."""
    if isinstance(calibration, Platt):
        return {"kind": "platt", **calibration._asdict()}
    return {"kind": "isotonic", **{name: list(values) for name, values in calibration._asdict().items()}}


def from_json(stored: dict[str, Any]) -> Calibration:
    """The map that `to_json` stored."""
    if stored["kind"] == "platt":
        return Platt(stored["slope"], stored["intercept"])
    return Isotonic(tuple(stored["scores"]), tuple(stored["probabilities"]))


def _known(
    labels: Shaped[np.ndarray, "n"], scores: Shaped[np.ndarray, "n"]
) -> tuple[Shaped[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    if not len(labels):
        raise UserError("no case with a known label can calibrate the scores: validate on labelled cases")
    return checked(labels, scores, probability=True)


def _log_odds(score: Shaped[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    kept = np.clip(score.astype(np.float64), _LEAST, 1 - _LEAST)
    return np.log(kept) - np.log1p(-kept)


def _sigmoid(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    return 0.5 * (1 + np.tanh(x / 2))


def _loss(x: Float[np.ndarray, "n"], target: Float[np.ndarray, "n"]) -> float:
    return math.fsum(np.logaddexp(0, x) - target * x)
