"""The embedded default data: synthetic chest-CT cases, generated on the fly (no patient, no scanner)."""

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int, Int16

from r1jax.data.canvas import Point, Shape
from r1jax.data.patients import FACTORS, INTERCEPT, MISSING, PRESENCE, Patient, attainable_probability, draw_patient
from r1jax.data.phantom import Scene, draw_scene, nodule_center_mm, render
from r1jax.errors import UserError, nearest
from r1jax.tasks.medical.schema import FINDINGS, case_schema

VERSION = 2
"""Raised whenever the same seed gives other cases."""
PARTS = ("train", "val", "test")
_RECORD, _SCENE, _PICTURE = range(3)
_POPULATION_SEED = 20130905
KEPT = 8192
"""Cases that stay in memory once drawn, half a GiB of 32 x 32 x 32 voxels; the others are drawn at each reading."""


@functools.lru_cache(maxsize=1)
def _population() -> Float64[np.ndarray, "K factors"]:
    """Outcome terms of reference patients, the same for every seed."""
    rng = np.random.default_rng(_POPULATION_SEED)
    return np.stack([draw_patient(rng).terms for _ in range(512)])


def _auc(score: Float64[np.ndarray, " B"], positive: Bool[np.ndarray, " B"]) -> float:
    """Area under the ROC curve as the share of ordered pairs (ties count half), NaN with one class only."""
    order = np.sort(score[~positive])
    if not len(order) or not positive.any():
        return float("nan")
    below = np.searchsorted(order, score[positive], "left")
    upto = np.searchsorted(order, score[positive], "right")
    return float((below + upto).mean() / (2 * len(order)))


@dataclass(frozen=True)
class _Case:
    """What is kept of a case once it was read."""

    patient: Patient
    spacing: Point
    center: Point
    volume: Int16[np.ndarray, "Z Y X"]


class SyntheticCases:
    """Synthetic cases by index (a `Source`); case i is a pure function of (seed, part, i) and the shape.

    The first `KEPT` cases stay in memory once drawn.
    """

    def __init__(self, seed: int, size: int, part: str, shape: Shape = (32, 32, 32)):
        """Defines the cases; nothing is drawn yet.

        Args:
          seed: Non-negative; other seeds give other cases.
          size: Number of cases.
          part: "train", "val" or "test"; the parts share no case.
          shape: Voxels (z, y, x).

        Raises:
          UserError: Unknown part, no cases, or a negative seed.
        """
        if part not in PARTS:
            raise UserError(f"synthetic cases: unknown part {part!r}{nearest(part, PARTS)}; use train, val or test")
        if size < 1 or seed < 0:
            raise UserError(
                f"synthetic cases: size {size} and seed {seed}; use a size of at least 1 and a seed from 0 on"
            )
        self.seed, self.size, self.part, self.shape = seed, size, part, shape
        self.schema = case_schema({"volume": ("int16", shape)}, table=True, text=True)
        self.name = f"synthetic chest CT (generated, not patients), seed {seed}, {part}"
        model = [(factor.name, factor.unit, factor.weight) for factor in FACTORS]
        definition = [VERSION, seed, size, part, shape, model, INTERCEPT, PRESENCE, MISSING]
        self.fingerprint = hashlib.sha256(json.dumps(definition).encode()).hexdigest()
        self._drawn: dict[int, _Case] = {}

    def __len__(self) -> int:
        """Number of cases."""
        return self.size

    def _rng(self, index: int, stream: int) -> np.random.Generator:
        """Randomness of one aspect of one case."""
        return np.random.default_rng((self.seed, PARTS.index(self.part), index, stream))

    def patient(self, index: int) -> Patient:
        """Draws the case without its picture, with the truth that a model does not see."""
        if not 0 <= index < self.size:
            raise IndexError(f"case {index} of {self.size}")
        return draw_patient(self._rng(index, _RECORD))

    def _scene(self, index: int) -> Scene:
        """Draws what is around the nodule."""
        return draw_scene(self._rng(index, _SCENE))

    def _picture(
        self, index: int, patient: Patient, scene: Scene
    ) -> tuple[Int16[np.ndarray, "Z Y X"], Bool[np.ndarray, "Z Y X"]]:
        """Renders volume and mask."""
        return render(scene, patient.nodule, self.shape, self._rng(index, _PICTURE), spare=patient.spare)

    def _case(self, index: int) -> _Case:
        """Draws the case, or remembers it."""
        if index in self._drawn:
            return self._drawn[index]
        patient = self.patient(index)
        scene = self._scene(index)
        nodule = patient.nodule
        center = nodule_center_mm(scene, nodule, self.shape) if nodule else (math.nan,) * 3
        case = _Case(patient, scene.spacing, center, self._picture(index, patient, scene)[0])
        if index < KEPT:
            # Two threads may draw the same case: both get the same numbers, so no lock is needed.
            self._drawn[index] = case
        return case

    def read_batch(self, indices: Int[np.ndarray, " B"]) -> dict[str, np.ndarray | list[str]]:
        """Reads cases as `Source.read_batch` says.

        Args:
          indices: Which cases, in any order.

        Returns:
          "case_id", "volume" (int16 HU), "volume_spacing", "table", "text" and "target.<finding>" of every finding.
        """
        rows = [int(index) for index in indices]
        cases = [self._case(row) for row in rows]
        batch: dict[str, np.ndarray | list[str]] = {
            "case_id": [f"synthetic-{self.part}-{row:06d}" for row in rows],
            "volume": np.stack([case.volume for case in cases]),
            "volume_spacing": np.array([case.spacing for case in cases], np.float32),
            "table": np.stack([case.patient.table for case in cases]).astype(np.float32),
            "text": [case.patient.text for case in cases],
            "target.center_mm": np.array([case.center for case in cases], np.float32),
        }
        for finding in FINDINGS:
            if finding.kind != "vector":
                values = [case.patient.findings[finding.name] for case in cases]
                batch[f"target.{finding.name}"] = np.array(values, np.float32)
        return batch

    def masks(self, indices: Int[np.ndarray, " B"]) -> Bool[np.ndarray, "B Z Y X"]:
        """Renders where the nodules are; all False in cases without one.

        Args:
          indices: Which cases.

        Returns:
          The nodules' bodies, without spikes and without what the chest wall hides.
        """
        rows = [int(index) for index in indices]
        return np.stack([self._picture(row, self.patient(row), self._scene(row))[1] for row in rows])

    def true_probability(self, indices: Int[np.ndarray, " B"]) -> Float64[np.ndarray, " B"]:
        """Gives the probability from which malignancy was drawn, missing numbers included.

        Args:
          indices: Which cases; where there is no nodule the number has no meaning.

        Returns:
          Probabilities of malignancy.
        """
        return np.array([self.patient(int(index)).probability for index in indices])

    def ceilings(self) -> dict[Literal["both", "image", "record"], float]:
        """Computes the best AUC of malignancy that any reader could reach on exactly these cases, on average.

        A reader of both knows every factor except missing numbers, and ranks by P(malignant | what is known). Because
        image and record factors are drawn independently, that is a rising function of the image terms alone for a
        reader of the picture only, and does not depend on the picture for a reader of the record only.
        Pictures are not rendered: a factor counts as known even where blur and noise make it hard to measure.

        Returns:
          AUC with "both", "image" only and "record" only, over the cases with a nodule.
        """
        patients = [patient for patient in map(self.patient, range(self.size)) if patient.nodule]
        if not patients:
            return {"both": float("nan"), "image": float("nan"), "record": float("nan")}
        terms = np.stack([patient.terms for patient in patients])
        known = np.array([patient.known for patient in patients])
        malignant = np.array([patient.findings["malignancy"] == 1 for patient in patients])
        seen = np.array([factor.side == "image" for factor in FACTORS])
        score = functools.partial(attainable_probability, population=_population())
        return {
            "both": _auc(score(terms, known), malignant),
            "image": _auc(score(terms, np.broadcast_to(seen, known.shape)), malignant),
            "record": _auc(score(terms, known & ~seen), malignant),
        }
