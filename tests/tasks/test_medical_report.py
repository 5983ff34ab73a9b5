"""The canonical report: what it may hold, and what is refused."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from r1jax.errors import UserError
from r1jax.serve.structured import to_json, to_xml
from r1jax.tasks.envelope import OperatingPoint, Provenance
from r1jax.tasks.medical.canonical import Report
from r1jax.tasks.medical.fhir import to_fhir
from r1jax.tasks.medical.schema import FINDING, FINDINGS
from tests.tasks.reports import (
    DESCRIPTORS,
    POINT,
    POINTS,
    PROVENANCE,
    RATINGS,
    full_prediction,
    parse_by_peer,
    report_of,
)


def test_status_and_notice_cannot_be_anything_else() -> None:
    report = report_of(full_prediction())
    for field, value in {"status": "final", "notice": "A medical device.", "colour": "red"}.items():
        with pytest.raises(ValidationError):
            Report.model_validate(report.model_dump() | {field: value})
    with pytest.raises(ValidationError):
        report.status = "final"  # type: ignore[misc,assignment]
    assert "Research software, not a medical device." in report.conclusion
    assert report.model_dump()["status"] == "preliminary"


@pytest.mark.parametrize("name", [finding.name for finding in FINDINGS])
def test_each_finding_may_come_alone(name: str) -> None:
    report = report_of({name: full_prediction()[name]})
    assert [result.name for result in report.findings] == [name]
    parse_by_peer(to_json(to_fhir(report)))
    assert ("taken to hold a nodule" in report.conclusion) == (name != "nodule_present")
    for other in RATINGS:
        assert (f"\n{other.text}: " in report.conclusion) == (other.name == name)


@pytest.mark.parametrize(
    ("probability", "points", "call"),
    [(0.5, POINTS, "present"), (0.4999, POINTS, "absent"), (0.93, {}, "indeterminate"), (1 + 1e-7, POINTS, "present")],
)
def test_nodule_is_described_only_where_one_is_called(
    probability: float, points: dict[str, OperatingPoint], call: str
) -> None:
    report = report_of(full_prediction() | {"nodule_present": probability}, operating_points=points)
    assert report.findings[0].model_dump()["call"] == call
    assert [result.name for result in report.findings[1:]] == (DESCRIPTORS if call == "present" else [])
    assert ("Malignancy of the nodule" in to_xml(to_fhir(report))) == (call == "present")
    codes = {"present": "POS", "absent": "NEG", "indeterminate": "IND"}
    tree = to_fhir(report)
    assert tree["entry"][1]["resource"]["interpretation"][0]["coding"][0]["code"] == codes[call]
    assert report.lung_rads is not None
    assert report.lung_rads.categories == {"present": ("4A",), "absent": ("1",), "indeterminate": ()}[call]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nodule_present", np.nan),
        ("nodule_present", np.inf),
        ("nodule_present", 1.01),
        ("malignancy", -0.01),
        ("malignancy", np.array([0.5])),
        ("long_axis_mm", np.float32(np.nan)),
        ("long_axis_mm", -1.0),
        ("center_mm", np.array([0.0, np.nan, 0.0])),
        ("center_mm", np.zeros(2)),
        ("texture", np.array([0.5, 0.5, np.nan, 0, 0])),
        ("texture", np.array([1.5, -0.5, 0, 0, 0])),
        ("texture", np.array([0.2, 0.2, 0.2, 0.2, 0.1])),
        ("texture", np.full(6, 1 / 6)),
    ],
)
def test_value_that_cannot_be_reported_is_named(name: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        report_of(full_prediction() | {name: value}, "scan 7")
    message = str(caught.value)
    assert "'scan 7'" in message
    assert repr(name) in message
    numbers = np.asarray(value)
    assert str(numbers.shape if numbers.shape not in ((), (3,), (5,)) else numbers.tolist())[:6] in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": {"textur": 0.5}}, "did you mean 'texture'"),
        ({"prediction": {}}, "nothing was predicted"),
        ({"operating_points": {"malignant": POINT}}, "did you mean 'malignancy'"),
        ({"missing": ("volumes",)}, "did you mean 'volume'"),
        ({"table": np.zeros(3, np.float32)}, "expected 9 finite"),
        ({"table": np.full(9, np.inf, np.float32)}, "expected 9 finite"),
        ({"case_id": ""}, "case id is empty"),
        ({"case_id": "  "}, "case id is empty"),
        ({"case_id": "a\nb"}, "control characters"),
        ({"case_id": "a\x00b"}, "control characters"),
        ({"case_id": "a\ud800"}, "control characters"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        report_of(**{"prediction": full_prediction()} | changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("created", ["2025-01-31", "2025-01-31T12:00:00", "2025-13-31T12:00:00Z", "now"])
def test_time_without_zone_or_outside_the_calendar_is_refused(created: str) -> None:
    with pytest.raises(ValidationError):
        Provenance.model_validate(PROVENANCE.model_dump() | {"created": created})


@settings(max_examples=60)
@given(weights=st.lists(st.floats(0.001, 1), min_size=5, max_size=5))
def test_listed_levels_are_the_smallest_set_that_holds_nine_tenths(weights: list[float]) -> None:
    probabilities = np.array(weights) / np.sum(weights)
    result = report_of({"texture": probabilities}).findings[0].model_dump()
    levels = FINDING["texture"].levels
    chosen = [levels.index(level) for level in result["likely_levels"]]
    assert probabilities[chosen].sum() >= 0.9 - 1e-9
    for smaller in itertools.combinations(range(5), len(chosen) - 1):
        assert probabilities[list(smaller)].sum() < 0.9 + 1e-9
    assert chosen == sorted(chosen)
    assert probabilities[levels.index(result["level"])] == probabilities.max() == result["probability"]
    assert result["rating"] == levels.index(result["level"]) + 1
