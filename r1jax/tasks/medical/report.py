"""From one case's predictions to its canonical report: checks every value, makes the calls, renders the conclusion.

The report is plain data (`canonical.py`); `fhir.py` turns it into a FHIR bundle, and `r1jax/serve/structured.py` writes
that as JSON or XML. Its status is "preliminary", whatever the model says.
"""

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float

from r1jax.errors import UserError, nearest
from r1jax.tasks.envelope import NOT_TEXT, Language, OperatingPoint, Provenance
from r1jax.tasks.medical.canonical import (
    COVERAGE,
    BinaryResult,
    Call,
    FindingResult,
    LengthResult,
    LungRads,
    RatingResult,
    RecordValue,
    Report,
    VectorResult,
)
from r1jax.tasks.medical.conclusion import render
from r1jax.tasks.medical.lung_rads import BENIGN_CALCIFICATION, lung_rads
from r1jax.tasks.medical.schema import FINDING, FINDINGS, RECORD_FIELDS, Finding

MODALITIES = ("volume", "image", "table", "text")
NO_CT = "CT input was missing"


def build_report(
    case_id: str,
    prediction: Mapping[str, float | np.floating | np.ndarray],
    *,
    operating_points: Mapping[str, OperatingPoint],
    provenance: Provenance,
    missing: tuple[str, ...],
    synthetic: bool,
    language: Language = "en",
    table: Float[np.ndarray, "F"] | None = None,
    text: str = "",
) -> Report:
    """Turns one case's predictions into its report.

    Malignancy, position, size and ratings describe a nodule: they are left out where presence was predicted and no
    nodule is called. Without a presence prediction the sub-volume is taken to hold a nodule.

    Args:
      case_id: Pseudonymous name of the case.
      prediction: Finding name to value; any subset. Probabilities for binary findings, [levels] probabilities for
        ratings, mm for long_axis_mm, [3] mm (z, y, x) for center_mm.
      operating_points: For each binary finding that is to be called.
      provenance: What made the prediction.
      missing: Modalities that the model reads and this case lacks.
      synthetic: Whether the case was generated.
      language: Of the conclusion.
      table: [F] record values in the order of `RECORD_FIELDS`, NaN = missing; not listed if "table" is missing.
      text: Record text that was read; not quoted if "text" is missing.

    Returns:
      The report; a pure function of the arguments.

    Raises:
      UserError: A value cannot be reported (NaN, infinite, no probability); names case, field and value.
    """
    where = f"case {case_id!r}"
    if re.search(f"[\t\n\r{NOT_TEXT}\ud800-\udfff]", case_id) or not case_id.strip():
        raise UserError(f"{where}: the case id is empty or holds control characters: rename the case in the data")
    _check_names(where, "finding", prediction, FINDING)
    if not prediction:
        raise UserError(f"{where}: nothing was predicted: evaluate a checkpoint whose model has finding heads")
    _check_names(where, "operating point", operating_points, [f.name for f in FINDINGS if f.kind == "binary"])
    _check_names(where, "missing modality", missing, MODALITIES)
    every = {
        finding.name: _result(where, finding, prediction[finding.name], operating_points.get(finding.name))
        for finding in FINDINGS
        if finding.name in prediction
    }
    presence = every.get("nodule_present")
    described = presence is None or (isinstance(presence, BinaryResult) and presence.call == "present")
    findings = tuple(result for name, result in every.items() if described or name == "nodule_present")
    assessment = _assess(findings, missing)
    record = () if table is None or "table" in missing else _record(where, table)
    record_text = "" if "text" in missing else re.sub(f"[{NOT_TEXT}\ud800-\udfff]", "\ufffd", text)
    conclusion = render(
        findings,
        assessment,
        missing=missing,
        record=record,
        record_text=record_text,
        synthetic=synthetic,
        language=language,
    )
    return Report(
        case_id=case_id,
        synthetic=synthetic,
        language=language,
        findings=findings,
        lung_rads=assessment,
        missing=missing,
        record=record,
        record_text=record_text,
        conclusion=conclusion,
        provenance=provenance,
    )


def _check_names(where: str, what: str, names: Iterable[str], allowed: Iterable[str]) -> None:
    for name in names:
        if name not in allowed:
            raise UserError(
                f"{where}: unknown {what} {name!r}{nearest(name, allowed)}: use one of {', '.join(allowed)}"
            )


def _result(
    where: str, finding: Finding, value: float | np.floating | np.ndarray, operating_point: OperatingPoint | None
) -> FindingResult:
    """Checks one prediction and names what it says."""
    numbers = np.asarray(value, dtype=np.float64)
    shape = () if finding.width == 1 else (finding.width,)
    if numbers.shape != shape:
        raise UserError(
            f"{where}: field {finding.name!r} has shape {numbers.shape}, expected {shape}: check the model's head"
        )
    low, high = (-math.inf, math.inf) if finding.kind == "vector" else (0, math.inf if finding.kind == "length" else 1)
    # A softmax in float32 may pass 1 by one rounding.
    if not (np.isfinite(numbers).all() and (numbers >= low).all() and (numbers <= high + 1e-6).all()):
        expected = {"length": "a length in mm, 0 or more", "vector": "a position in mm"}.get(
            finding.kind, "a probability"
        )
        raise UserError(
            f"{where}: field {finding.name!r} is {numbers.tolist()}, expected {expected}: "
            "check the input of the case and whether the training diverged"
        )
    if finding.kind == "binary":
        return _binary_result(finding, min(float(numbers), 1.0), operating_point)
    if finding.kind == "length":
        return LengthResult(name=finding.name, value=_one_decimal(float(numbers)), unit=finding.unit)
    if finding.kind == "vector":
        z, y, x = (_one_decimal(number) for number in numbers.tolist())
        return VectorResult(name=finding.name, value=(z, y, x), unit=finding.unit)
    return _rating_result(where, finding, numbers)


def _binary_result(finding: Finding, probability: float, operating_point: OperatingPoint | None) -> BinaryResult:
    call: Call = "indeterminate"
    if operating_point is not None:
        call = "present" if probability >= operating_point.threshold else "absent"
    return BinaryResult(name=finding.name, probability=probability, call=call, operating_point=operating_point)


def _rating_result(where: str, finding: Finding, probabilities: Float[np.ndarray, "L"]) -> RatingResult:
    """The most likely level, and the smallest set of levels that holds `COVERAGE` (ties: lower level first)."""
    if abs(probabilities.sum() - 1) > 0.01:
        raise UserError(
            f"{where}: field {finding.name!r} is {probabilities.tolist()}, whose sum is {probabilities.sum():.3f} "
            "instead of 1: pass the probabilities of the levels, not logits"
        )
    order = np.argsort(-probabilities, kind="stable")
    # The total, not 1, is what the levels can hold at most: it may differ from 1 by rounding.
    held = np.cumsum(probabilities[order]) / probabilities.sum()
    likely = sorted(order[: int(np.argmax(held >= COVERAGE)) + 1].tolist())
    best = int(order[0])
    clipped = tuple(min(number, 1.0) for number in probabilities.tolist())
    return RatingResult(
        name=finding.name,
        rating=best + 1,
        level=finding.levels[best],
        probability=clipped[best],
        probabilities=clipped,
        likely_levels=tuple(finding.levels[level] for level in likely),
    )


def _one_decimal(number: float) -> float:
    return round(number, 1) + 0.0  # + 0.0 turns -0.0 into 0.0


def _assess(findings: tuple[FindingResult, ...], missing: tuple[str, ...]) -> LungRads | None:
    """Applies the Lung-RADS rule to the reported findings; None where nothing that it reads was predicted."""
    named = {result.name: result for result in findings}
    if not named.keys() & {"nodule_present", "texture", "long_axis_mm"}:
        return None
    if "volume" in missing or "image" in missing:
        return LungRads(categories=(), basis=NO_CT)
    presence, texture, size, calcification = (
        named.get(name) for name in ("nodule_present", "texture", "long_axis_mm", "calcification")
    )
    present: bool | None = True
    if isinstance(presence, BinaryResult):
        present = {"present": True, "absent": False, "indeterminate": None}[presence.call]
    # Category 1 for benign calcification is a strong statement: every level that is still likely must be benign.
    benign = isinstance(calcification, RatingResult) and BENIGN_CALCIFICATION.issuperset(calcification.likely_levels)
    assessment = lung_rads(
        texture.level if isinstance(texture, RatingResult) else None,
        size.value if isinstance(size, LengthResult) else None,
        present,
        calcification.level if benign and isinstance(calcification, RatingResult) else None,
    )
    return LungRads(categories=assessment.categories, basis=assessment.basis)


def _record(where: str, table: Float[np.ndarray, "F"]) -> tuple[RecordValue, ...]:
    if table.shape != (len(RECORD_FIELDS),) or np.isinf(table).any():
        raise UserError(
            f"{where}: the record is {table.tolist()}, expected {len(RECORD_FIELDS)} finite or missing (NaN) values"
        )
    # str() gives the shortest digits that are still the same number, in float32 as in float64.
    return tuple(
        RecordValue(name=f.name, text=f.text, unit=f.unit, value=None if np.isnan(value) else float(str(value)))
        for f, value in zip(RECORD_FIELDS, table, strict=True)
    )
