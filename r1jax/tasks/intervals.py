"""Figures with their bootstrap intervals as JSON, shared by the tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from r1jax.tasks import metrics as m


@dataclass(frozen=True)
class Draw:
    """How intervals are drawn.

    Attributes:
      resamples: Bootstrap resamples.
      seed: Seed of the resamples.
      groups: What is drawn as a whole: patient, exam or day of each case; None draws cases.
    """

    resamples: int
    seed: int
    groups: Shaped[np.ndarray, "n"] | None

    def of(self, chosen: Shaped[np.ndarray, "k"]) -> "Draw":
        """The same for a part of the cases (a mask), or for another order of them (indices)."""
        return self if self.groups is None else Draw(self.resamples, self.seed, self.groups[chosen])

    def figures(
        self, statistics: Callable[[Float[np.ndarray, "R n"]], dict[str, Float[np.ndarray, "R"]]], n: int
    ) -> dict[str, dict[str, float | None]]:
        """Figures as JSON: value, low, high, and None where undefined."""
        drawn = m.bootstrap(statistics, n, resamples=self.resamples, seed=self.seed, groups=self.groups)
        return {name: json_estimate(estimate) for name, estimate in drawn.items()}

    def units(self, members: Bool[np.ndarray, "n"]) -> int:
        """Independent cases among these: groups where there are groups."""
        return int(members.sum()) if self.groups is None else len(np.unique(self.groups[members]))


def json_estimate(estimate: m.Estimate) -> dict[str, float | None]:
    """An interval holds its value, also for figures such as the ECE that grow with the noise of resampling."""
    value, low, high = (finite(x) for x in estimate)
    if value is None or low is None or high is None:
        return {"value": value, "low": low, "high": high}
    return {"value": value, "low": min(low, value), "high": max(high, value)}


def finite(value: float) -> float | None:
    """The number, or None (JSON's null) for NaN and infinity."""
    return float(value) if np.isfinite(value) else None


def percent(share: float | None) -> str:
    """A share as the reader sees it."""
    return "undefined" if share is None else f"{100 * share:.2f} %"


def figure_text(figure: dict[str, Any], unit: str) -> tuple[str, str]:
    """A figure as the reader sees it: its value, and its interval (empty where undefined); a "rate" is a finer %."""
    scale, digits = {"%": (100, 1), "rate": (100, 2), "mm": (1, 2), "levels": (1, 2)}.get(unit, (1, 3))
    if figure["value"] is None:
        return "undefined", ""
    # adding 0 turns a rounded -0.0 into 0.0
    value, low, high = (
        "" if figure[key] is None else f"{round(figure[key] * scale, digits) + 0.0:.{digits}f}"
        for key in ("value", "low", "high")
    )
    suffix = {"1": "", "rate": " %"}.get(unit, f" {unit}")
    return value + suffix, f"{low} to {high}" if low else ""
