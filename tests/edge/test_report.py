"""The device's reports are those of eval.py, byte for byte, whatever the numbers."""

import json

import numpy as np
import pytest

from r1jax.edge import spelling
from r1jax.edge.artefact import InputError
from r1jax.edge.report import ReportWriter
from r1jax.serve.case_reports import file_name
from r1jax.serve.export_texts import report_texts
from r1jax.serve.structured import to_json, to_xml
from r1jax.tasks.envelope import Provenance
from r1jax.tasks.medical.fhir import to_fhir
from r1jax.tasks.medical.report import build_report
from r1jax.tasks.medical.schema import FINDINGS, RECORD_FIELDS
from tests.tasks.reports import POINT

TEXTS = json.loads(json.dumps(report_texts()))
PROVENANCE = Provenance(
    model="r1jax medical, step 3 (edge)",
    r1jax_version="0.1.0",
    checkpoint_sha256="a" * 64,
    data_name="cases.npz: 3 cases",
    data_fingerprint="b" * 64,
    created="2025-01-31T12:00:00Z",
)
READS = ("volume", "table", "text")
CARD = {
    "checkpoint": {"sha256": "a" * 64},
    "model": PROVENANCE.model,
    "versions": {"r1jax": PROVENANCE.r1jax_version},
    "modalities": list(READS),
    "operating_points": {
        "both": {"nodule_present": POINT.model_dump(), "malignancy": POINT.model_dump() | {"threshold": 0.9996}},
        "image_only": {"nodule_present": POINT.model_dump()},
        "record_only": {},
    },
}


def writer(**changes) -> ReportWriter:
    shared = {"language": "en", "created": PROVENANCE.created, "data": ("cases.npz: 3 cases", "b" * 64)}
    return ReportWriter(CARD, TEXTS, **shared | {"synthetic": False} | changes)


def drawn_prediction(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Findings as a model gives them; some are left out."""
    found = {}
    for finding in FINDINGS:
        if finding.kind == "rating":
            sharp = rng.exponential(1, len(finding.levels)) ** rng.choice([0.1, 1, 4])
            found[finding.name] = (sharp / sharp.sum()).astype(np.float32)
        elif finding.kind == "binary":
            found[finding.name] = np.float32(rng.choice([rng.uniform(), rng.uniform(0.4, 0.6), 1e-4, 0.9999, 1.0]))
        elif finding.kind == "vector":
            found[finding.name] = rng.normal(0, 5, 3).astype(np.float32)
        else:
            found[finding.name] = np.float32(rng.choice([rng.uniform(0, 40), 5.95, 6.0, 7.96, 14.99, 29.97, 30.0]))
    left_out = rng.choice([finding.name for finding in FINDINGS], rng.integers(0, 3), replace=False)
    return {name: np.asarray(value) for name, value in found.items() if name not in left_out}


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("synthetic", [False, True])
def test_reports_equal_those_of_the_evaluation(language, synthetic):
    rng = np.random.default_rng(0)
    device = writer(language=language, synthetic=synthetic)
    for case in range(30):
        found = drawn_prediction(rng)
        hidden = [(), ("text",), ("volume",), ("table", "text")][rng.integers(4)]
        mode = {(): "both", ("text",): "both", ("volume",): "record_only"}.get(hidden, "image_only")
        points = {name: POINT.model_copy(update=point) for name, point in CARD["operating_points"][mode].items()}
        table = np.where(rng.uniform(size=9) < 0.3, np.nan, rng.uniform(0, 90, 9)).astype(np.float32)
        table[[1, 3, 4, 5]] = np.round(table[[1, 3, 4, 5]] / 90)
        text = rng.choice(["", "咳嗽 <3 周 & fever", "a\x0bb", "cough"])
        expected = to_fhir(
            build_report(
                f"case {case} <&>",
                found,
                operating_points={name: point for name, point in points.items() if name in found},
                provenance=PROVENANCE,
                missing=hidden,
                synthetic=synthetic,
                language=language,
                table=table,
                text=text,
            )
        )
        calls = {f"call.{n}": np.asarray(found[n] >= points[n].threshold, np.int32) for n in points if n in found}
        bundle = device.bundle(f"case {case} <&>", found | calls, list(hidden), table, text)
        assert spelling.to_json(bundle) == to_json(expected)
        assert spelling.to_xml(bundle) == to_xml(expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.1])
def test_a_number_that_is_no_probability_is_not_reported(value):
    with pytest.raises(InputError, match="case 'a': malignancy is .* cannot be reported"):
        writer().bundle("a", {"malignancy": np.asarray(value), "call.malignancy": np.asarray(0)}, [], None, "")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\x00"])
def test_an_id_that_a_report_cannot_carry_is_refused(name):
    with pytest.raises(InputError, match="control characters"):
        writer().bundle(name, {"long_axis_mm": np.asarray(3.0)}, [], None, "")


@pytest.mark.parametrize("name", ["plain-1.2", "患者 7", "../up", ".hidden", "x" * 200, "a b ", "a?b"])
def test_files_have_the_names_of_the_evaluation(name):
    assert spelling.file_name(name) == file_name(name)


def test_the_record_has_its_names_and_limits():
    assert [field["name"] for field in TEXTS["record"]] == [field.name for field in RECORD_FIELDS]
    assert TEXTS["lung_rads"]["sizes"]["solid"][-1] == {
        "from_mm": 15.0,
        "categories": ["4B"],
        "basis": "solid texture and size",
    }
