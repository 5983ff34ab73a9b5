"""What a checkpoint says of every case of a source, and the thresholds that turn it into calls."""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np

from r1jax.data.folder import FolderCases
from r1jax.data.pipeline import original
from r1jax.data.source import Source
from r1jax.errors import UserError
from r1jax.serve.progress import Steps, progress
from r1jax.tasks.envelope import OperatingPoint
from r1jax.tasks.medical.batch import PICTURES
from r1jax.tasks.medical.modes import shown_modes
from r1jax.tasks.medical.task import Medical
from r1jax.train.evaluation import Evaluator

Points = dict[str, dict[str, OperatingPoint]]
"""By reported mode, then by finding."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Predictions of all cases; modes have the names of `shown_modes`.

    Attributes:
      source: The cases.
      reads: Modalities of the model.
      ids: Names of the cases.
      targets: Findings, NaN where unknown.
      predicted: By mode, then by finding.
      points: Operating points of every mode, set on validation or else on these cases.
      frozen: Those of them that were set on validation.
    """

    source: Source
    reads: tuple[str, ...]
    ids: list[str]
    targets: dict[str, np.ndarray]
    predicted: dict[str, dict[str, np.ndarray]]
    points: Points
    frozen: Points

    @property
    def main(self) -> str:
        """The mode that shows all there is."""
        return next(iter(self.predicted))

    @property
    def groups(self) -> np.ndarray | None:
        """Patient or scan of each case (a case of its own where unknown); None where the source knows none."""
        source = original(self.source)
        if not isinstance(source, FolderCases):
            return None
        known = [source.cases.groups[row] for row in source.rows]
        named = [group or f"case {case}" for group, case in zip(known, self.ids, strict=True)]
        return np.array(named) if any(known) else None

    def threshold(self, mode: str, finding: str) -> float | None:
        """Threshold of a binary finding; None where the cases cannot set one and validation could not either."""
        point = self.points[mode].get(finding)
        return None if point is None else point.threshold

    def missing(self, raw: dict[str, Any], row: int) -> tuple[str, ...]:
        """Modalities that the model reads and a case of a raw batch lacks."""
        return tuple(name for name in self.reads if not _has(raw, name, row))

    def mode_of(self, missing: tuple[str, ...]) -> str:
        """The mode that a case amounts to, whose operating points hold for it."""
        has = [name for name in self.reads if name not in missing]
        mode = next(iter(shown_modes(self.reads, has).values()))
        return mode if mode in self.points else self.main


def score(
    evaluator: Evaluator, task: Medical, params: Any, source: Source, validation: dict[str, Any] | None, batch_size: int
) -> Scored:
    """Predicts every case in every mode.

    Args:
      evaluator: Compiled forward pass.
      task: The task.
      params: Weights to serve.
      source: The cases.
      validation: What the checkpoint says of its validation (None where it was not scored).
      batch_size: Cases a forward pass.

    Returns:
      Predictions, and the operating points to use.

    Raises:
      UserError: A prediction is not finite; names the case.
    """
    modes = shown_modes(task.config.model.modalities, source.schema.modalities)
    with progress("cases", len(source)) as steps:
        predicted, targets, ids = evaluator.predict(
            params, Watched(source, steps), batch_size=batch_size, modes=tuple(modes)
        )
    for mode, found in predicted.items():
        refuse_not_finite(found, ids, modes[mode])
    frozen = frozen_points(validation, task, modes)
    points: Points = {}
    for mode, shown in modes.items():
        here = _points(task.operating_points(predicted[mode], targets), "set on the cases of this evaluation", task)
        points[shown] = here | frozen[shown]
    return Scored(
        source=source,
        reads=task.config.model.modalities,
        ids=ids,
        targets=targets,
        predicted={shown: predicted[mode] for mode, shown in modes.items()},
        points=points,
        frozen=frozen,
    )


def frozen_points(validation: dict[str, Any] | None, task: Medical, modes: dict[str, str]) -> Points:
    """Operating points that validation set.

    Args:
      validation: What the checkpoint says of its validation (None where it was not scored).
      task: The task.
      modes: From `shown_modes`.

    Returns:
      Those of each reported mode.
    """
    stored = (validation or {}).get("operating_points", {})
    # A model that reads one kind of modality has its validation under `both`.
    return {
        shown: _points(stored.get(shown) or stored.get(mode) or {}, "validation split", task)
        for mode, shown in modes.items()
    }


class Watched:
    """A source that says how much of it was read."""

    def __init__(self, source: Source, steps: Steps) -> None:
        """Watches a source.

        Args:
          source: The cases.
          steps: Is told of every batch.
        """
        self.source, self.steps = source, steps
        self.name, self.fingerprint, self.schema = source.name, source.fingerprint, source.schema

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.source)

    def read_batch(self, indices: np.ndarray) -> dict[str, np.ndarray | list[str]]:
        """Reads cases and counts them."""
        raw = self.source.read_batch(indices)
        self.steps.advance(len(indices))
        return raw


def _points(stored: dict[str, dict[str, float]], origin: str, task: Medical) -> dict[str, OperatingPoint]:
    """Operating points of the task's findings from plain numbers; a threshold above 1 calls nothing, as 1 does."""
    return {
        name: OperatingPoint(**{**point, "threshold": min(point["threshold"], 1.0)}, origin=origin)
        for name, point in stored.items()
        if name in task.fields
    }


def refuse_not_finite(predicted: dict[str, np.ndarray], ids: list[str], mode: str) -> None:
    """Refuses predictions that cannot be evaluated.

    Args:
      predicted: By what is predicted, cases first.
      ids: Names of the cases.
      mode: What the model was shown, for the message.

    Raises:
      UserError: A prediction is not finite; names the first case.
    """
    for name, values in predicted.items():
        bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if bad.any():
            raise UserError(
                f"case {ids[int(bad.argmax())]!r}: the prediction of {name} ({mode}) is not finite, as in "
                f"{int(bad.sum())} of {len(ids)} cases: check the input of the case and whether the training diverged"
            )


def _has(raw: dict[str, Any], name: str, row: int) -> bool:
    if name not in raw:
        return False
    if name in PICTURES:
        return bool(raw[f"has_{name}"][row]) if f"has_{name}" in raw else True
    return bool(raw["text"][row]) if name == "text" else not np.isnan(raw["table"][row]).all()


def seen_in_training(source: Source, task: Medical, trained_on: Container[str]) -> int:
    """How many of the cases the checkpoint was trained on.

    Args:
      source: The cases that are scored.
      task: Opens the training cases as the checkpoint's config says.
      trained_on: Fingerprints of the training data, see `trained_fingerprints`.

    Returns:
      0 where the data is other data.
    """
    source = original(source)
    if source.fingerprint not in trained_on:
        return 0
    if not isinstance(source, FolderCases):
        return len(source)
    data = task.config.data
    trained = source.part("train", data.fold, data.folds, data.seed)
    return int(np.isin(source.rows, trained.rows).sum())
