"""A report to test with, and what is asked of it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from r1jax.tasks.envelope import OperatingPoint, Provenance
from r1jax.tasks.medical.canonical import Report
from r1jax.tasks.medical.report import build_report
from r1jax.tasks.medical.schema import FINDING, FINDINGS

POINT = OperatingPoint(threshold=0.5, sensitivity=0.9, specificity=0.97, n_positive=120, n_negative=600)
POINTS = {"nodule_present": POINT, "malignancy": POINT}
PROVENANCE = Provenance(
    model="r1jax medical",
    r1jax_version="0.1.0",
    checkpoint_sha256="a" * 64,
    data_name="synthetic chest CT (generated, not patients), seed 0",
    data_fingerprint="b" * 64,
    created="2025-01-31T12:00:00Z",
)
RATINGS = [finding for finding in FINDINGS if finding.kind == "rating"]
TABLE = np.array([63.2, 1, 40, np.nan, np.nan, 0, np.nan, np.nan, np.nan], np.float32)
"""Age, sex, smoking and emphysema are known."""
DESCRIPTORS = [finding.name for finding in FINDINGS if finding.name != "nodule_present"]


def one_hot(name: str, level: str) -> np.ndarray:
    return np.array([word == level for word in FINDING[name].levels], np.float32)


def full_prediction() -> dict[str, Any]:
    """A solid nodule of 8.7 mm, called and suspected malignant."""
    ratings = {f.name: np.linspace(1, 2, len(f.levels), dtype=np.float32) / (1.5 * len(f.levels)) for f in RATINGS}
    return ratings | {
        "nodule_present": np.float32(0.93),
        "malignancy": 0.71,
        "center_mm": np.array([1.26, -0.04, 3.0], np.float32),
        "long_axis_mm": np.float32(8.66),
        "texture": one_hot("texture", "solid"),
    }


def report_of(prediction: dict[str, Any], case_id: str = "case-1", **changes: Any) -> Report:
    arguments = {"operating_points": POINTS, "provenance": PROVENANCE, "missing": (), "synthetic": True} | changes
    return build_report(case_id, prediction, **arguments)


def parse_by_peer(text: str) -> Any:
    """Validates a bundle with fhir.resources, which reads the published FHIR R4B definitions; XML or JSON."""
    reason = "the schema is in the extra r1jax[medical]"
    pytest.importorskip("fhir.resources", reason=reason)
    from fhir.resources.R4B.bundle import Bundle

    if not text.startswith("<?xml"):
        return Bundle.model_validate_json(text)
    pytest.importorskip("lxml", reason=reason)
    return Bundle.model_validate_xml(text.encode())


def dicts(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []:
        yield from dicts(value)


def observation(tree: dict[str, Any], text: str) -> dict[str, Any]:
    found = [entry["resource"] for entry in tree["entry"] if entry["resource"].get("code", {}).get("text") == text]
    assert len(found) == 1, text
    return found[0]
