import itertools
import json
import os
import re
import string
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import canonicalize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from r1jax.errors import UserError
from r1jax.serve.structured import from_xml, to_json, to_xml
from r1jax.tasks.medical.canonical import OperatingPoint, Provenance, Report
from r1jax.tasks.medical.fhir import to_fhir
from r1jax.tasks.medical.lung_rads import LIMITS, lung_rads
from r1jax.tasks.medical.report import NO_CT, build_report
from r1jax.tasks.medical.schema import FINDING, FINDINGS, RECORD_FIELDS
from r1jax.tasks.medical.wording import SENTENCES, TERMS_ZH

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


def plain(bundle: Any) -> dict[str, Any]:
    """What the peer read, with the narrative spelled in one way."""
    tree = json.loads(bundle.model_dump_json())
    narrative = tree["entry"][0]["resource"]["text"]
    narrative["div"] = canonicalize(narrative["div"].strip())
    return tree


def dicts(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []:
        yield from dicts(value)


def observation(tree: dict[str, Any], text: str) -> dict[str, Any]:
    found = [entry["resource"] for entry in tree["entry"] if entry["resource"].get("code", {}).get("text") == text]
    assert len(found) == 1, text
    return found[0]


# What a case may hold: any subset of findings, any text.
PROBABILITY = st.floats(0, 1, width=32)
VALUES = {
    "binary": lambda finding: PROBABILITY,
    "length": lambda finding: st.floats(0, 500, width=32),
    "vector": lambda finding: st.lists(st.floats(-300, 300, width=32), min_size=3, max_size=3).map(np.array),
    "rating": lambda finding: st.lists(st.floats(0, 1), min_size=len(finding.levels), max_size=len(finding.levels)).map(
        lambda weights: (np.array(weights) + 1e-9) / (np.array(weights) + 1e-9).sum()
    ),
}
PREDICTIONS = st.fixed_dictionaries(
    {}, optional={finding.name: VALUES[finding.kind](finding) for finding in FINDINGS}
).filter(bool)
CASE_IDS = st.one_of(
    st.text("<>&'\" ]肺结节-1\x85\u3000\U0001f600", min_size=1),
    st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\ufffe\uffff"), min_size=1),
).filter(str.strip)
RECORDS = st.lists(
    st.one_of(st.just(np.nan), st.floats(0, 1e4)), min_size=len(RECORD_FIELDS), max_size=len(RECORD_FIELDS)
)


@settings(max_examples=40)
@given(
    case_id=CASE_IDS,
    prediction=PREDICTIONS,
    points=st.sampled_from([{}, POINTS]),
    table=RECORDS.map(lambda values: np.array(values, np.float32)),
    text=st.one_of(st.text(), st.text("<>&'\" \r\n\t\x00\ufffe咳嗽]", max_size=20)),
    missing=st.sets(st.sampled_from(["volume", "image", "table", "text"])).map(lambda names: tuple(sorted(names))),
    synthetic=st.booleans(),
    language=st.sampled_from(["en", "zh"]),
)
def test_every_report_is_valid_fhir_and_the_same_in_json_and_xml(
    case_id: str, prediction: dict[str, Any], points: dict[str, OperatingPoint], **inputs: Any
) -> None:
    report = report_of(prediction, case_id, operating_points=points, **inputs)
    assert Report.model_validate_json(report.model_dump_json()) == report
    tree = to_fhir(report)
    assert from_xml(to_xml(tree)) == tree == json.loads(to_json(tree))
    from_json, by_xml = parse_by_peer(to_json(tree)), parse_by_peer(to_xml(tree))
    expected = json.loads(to_json(tree))
    narrative = expected["entry"][0]["resource"]["text"]
    narrative["div"] = canonicalize(narrative["div"])
    assert plain(from_json) == plain(by_xml) == expected
    assert {
        node["status"] for node in dicts(tree) if node.get("resourceType") in ("DiagnosticReport", "Observation")
    } == {"preliminary"}
    subjects = [node["subject"]["identifier"]["value"] for node in dicts(tree) if "subject" in node]
    assert set(subjects) == {case_id}


def test_elements_are_in_the_order_of_fhir() -> None:
    table = np.full(len(RECORD_FIELDS), np.nan, np.float32)
    tree = to_fhir(report_of(full_prediction(), missing=("image",), table=table, text="cough"))
    bundle = parse_by_peer(to_json(tree))
    compared = 0

    def check(node: Any, model: Any) -> None:
        nonlocal compared
        if isinstance(node, dict):
            keys = [key for key in node if key != "resourceType"]
            order = [name for name in type(model).elements_sequence() if name in keys]
            assert keys == order, type(model)
            compared += 1
            for key in keys:
                # Fields that are words of Python have another name in the model.
                fields = type(model).model_fields
                check(node[key], getattr(model, key if key in fields else f"{key}_fhir"))
        elif isinstance(node, list):
            for part, inner in zip(node, model, strict=True):
                check(part, inner)

    check(tree, bundle)
    assert compared > 100


def test_references_of_the_bundle_resolve() -> None:
    tree = to_fhir(report_of(full_prediction(), missing=("image",)))
    names = [entry["fullUrl"] for entry in tree["entry"]]
    assert len(set(names)) == len(names)
    assert names == [f"urn:uuid:{entry['resource']['id']}" for entry in tree["entry"]]
    references = {node["reference"] for node in dicts(tree) if "reference" in node}
    provenance = tree["entry"][-1]["resource"]
    assert references == set(names) - {f"urn:uuid:{provenance['id']}"}
    kinds = [entry["resource"]["resourceType"] for entry in tree["entry"]]
    # Twelve findings, Lung-RADS, and what the model read.
    assert kinds == ["DiagnosticReport", *["Observation"] * (len(FINDINGS) + 2), "Device", "Provenance"]
    assert tree["entry"][0]["resource"]["result"] == [{"reference": name} for name in names[1:-2]]


def test_bundle_says_what_the_model_said() -> None:
    tree = to_fhir(report_of(full_prediction()))
    presence = observation(tree, "A nodule is present in the sub-volume: probability")
    assert presence["valueQuantity"] == {
        "value": float(np.float32(0.93)),
        "unit": "1",
        "system": "http://unitsofmeasure.org",
        "code": "1",
    }
    assert presence["interpretation"][0]["coding"][0]["code"] == "POS"
    values = {part["code"]["text"]: part for part in presence["component"]}
    assert values["Operating threshold"]["valueQuantity"]["value"] == 0.5
    assert values["Sensitivity at the threshold (per case, validation split)"]["valueQuantity"]["value"] == 0.9
    assert values["Specificity at the threshold (per case, validation split)"]["valueQuantity"]["value"] == 0.97
    assert values["Positive cases (per case, validation split)"]["valueInteger"] == 120
    assert values["Negative cases (per case, validation split)"]["valueInteger"] == 600
    size = observation(tree, "Long axis of the nodule")["valueQuantity"]
    assert (size["value"], size["code"]) == (8.7, "mm")
    center = observation(tree, FINDING["center_mm"].text)["component"]
    assert [(part["code"]["text"], part["valueQuantity"]["value"]) for part in center] == [
        ("z", 1.3),
        ("y", 0),
        ("x", 3),
    ]
    texture = observation(tree, "Texture")
    assert texture["valueCodeableConcept"]["text"] == "solid"
    assert [part.get("valueInteger") for part in texture["component"][:1]] == [5]
    assert texture["component"][1]["valueString"] == "solid"
    assert [part["valueQuantity"]["value"] for part in texture["component"][2:]] == [0, 0, 0, 0, 1]
    assert observation(tree, "Lung-RADS v2022 category, by rule")["valueCodeableConcept"]["text"] == "4A"
    device, provenance = (entry["resource"] for entry in tree["entry"][-2:])
    assert device["identifier"][0]["value"] == "a" * 64
    assert device["version"] == [{"type": {"text": "r1jax"}, "value": "0.1.0"}]
    assert provenance["entity"][0]["what"]["identifier"]["value"] == "b" * 64
    assert provenance["recorded"] == tree["timestamp"] == "2025-01-31T12:00:00Z"


def test_status_and_notice_cannot_be_anything_else() -> None:
    report = report_of(full_prediction())
    for field, value in {"status": "final", "notice": "A medical device.", "colour": "red"}.items():
        with pytest.raises(ValidationError):
            Report.model_validate(report.model_dump() | {field: value})
    with pytest.raises(ValidationError):
        report.status = "final"  # type: ignore[misc,assignment]
    assert "Research software, not a medical device." in report.conclusion
    assert report.model_dump()["status"] == "preliminary"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_synthetic_cases_are_labelled_everywhere_and_others_nowhere(language: str) -> None:
    for synthetic in (True, False):
        report = report_of(full_prediction(), synthetic=synthetic, language=language)
        tree = to_fhir(report)
        for node in dicts(tree):
            if "resourceType" in node:
                labels = [label["code"] for label in node.get("meta", {}).get("security", [])]
                assert labels == (["HTEST"] if synthetic else []), node["resourceType"]
        assert report.conclusion.startswith({"en": "Synthetic data", "zh": "合成数据"}[language]) == synthetic
        assert ("ynthetic data, not a patient" in to_xml(tree)) == synthetic


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
    assert ("malignant" in to_xml(to_fhir(report))) == (call == "present")
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


# Rows of the Lung-RADS v2022 table for a baseline CT, written out by hand.
@pytest.mark.parametrize(
    ("texture", "size", "present", "calcification", "categories"),
    [
        (None, None, False, None, ("1",)),
        ("solid", 30.0, False, None, ("1",)),
        ("solid", 30.0, None, None, ()),
        ("solid", 20.0, True, "popcorn", ("1",)),
        ("solid", 20.0, True, "laminated", ("1",)),
        ("solid", 20.0, True, "solid", ("1",)),
        ("solid", 20.0, True, "central", ("1",)),
        (None, None, True, "central", ("1",)),
        ("solid", 20.0, True, "non-central", ("4B",)),
        ("solid", 20.0, True, "absent", ("4B",)),
        ("solid", 0.0, True, None, ("2",)),
        ("solid", 5.9, True, None, ("2",)),
        ("solid", 6.0, True, None, ("3",)),
        ("solid", 7.9, True, None, ("3",)),
        ("solid", 8.0, True, None, ("4A",)),
        ("solid", 14.9, True, None, ("4A",)),
        ("solid", 15.0, True, None, ("4B",)),
        ("part-solid", 5.9, True, None, ("2",)),
        ("part-solid", 6.0, True, None, ("3", "4A")),
        ("part-solid to solid", 7.9, True, None, ("3", "4A")),
        ("part-solid to solid", 8.0, True, None, ("3", "4A", "4B")),
        ("part-solid", 40.0, True, None, ("3", "4A", "4B")),
        ("non-solid", 29.9, True, None, ("2",)),
        ("non-solid", 30.0, True, None, ("3",)),
        ("non-solid to part-solid", 29.9, True, None, ("2",)),
        (None, 8.0, True, None, ()),
        ("solid", None, True, None, ()),
    ],
)
def test_lung_rads_follows_the_table(
    texture: str | None,
    size: float | None,
    present: bool | None,
    calcification: str | None,
    categories: tuple[str, ...],
) -> None:
    assert lung_rads(texture, size, present, calcification).categories == categories


@pytest.mark.parametrize(
    ("levels", "categories"),
    [
        ({"central": 1.0}, ("1",)),
        ({"central": 0.6, "solid": 0.4}, ("1",)),
        ({"central": 0.92, "absent": 0.08}, ("1",)),
        ({"central": 0.8, "absent": 0.2}, ("4A",)),
        ({"absent": 1.0}, ("4A",)),
    ],
)
def test_calcification_counts_as_benign_only_where_it_is_sure(
    levels: dict[str, float], categories: tuple[str, ...]
) -> None:
    probabilities = np.array([levels.get(level, 0.0) for level in FINDING["calcification"].levels])
    report = report_of(full_prediction() | {"calcification": probabilities})
    assert report.lung_rads is not None
    assert report.lung_rads.categories == categories
    assert LIMITS in report.conclusion


@pytest.mark.parametrize(("missing", "categories"), [(("image",), ()), (("volume", "text"), ()), (("table",), ("4A",))])
def test_no_lung_rads_without_the_ct(missing: tuple[str, ...], categories: tuple[str, ...]) -> None:
    report = report_of(full_prediction(), missing=missing)
    assert report.lung_rads is not None
    assert report.lung_rads.categories == categories
    codes = to_fhir(report)["entry"][0]["resource"].get("conclusionCode", [])
    assert [code["text"].split(" (")[0] for code in codes] == [
        f"Lung-RADS v2022 category {name}" for name in categories
    ]


def test_lung_rads_reads_the_size_that_is_reported() -> None:
    report = report_of(full_prediction() | {"long_axis_mm": 7.96})
    assert "8.0 mm" in report.conclusion
    assert report.lung_rads is not None
    assert report.lung_rads.categories == ("4A",)


def test_inputs_that_were_read_and_those_that_were_missing_are_listed() -> None:
    table = np.full(len(RECORD_FIELDS), np.nan, np.float32)
    table[0], table[2] = 63.2, 40
    report = report_of(full_prediction(), missing=("image",), table=table, text="咳嗽\x00 3 weeks")
    assert {value.name: value.value for value in report.record if value.value is not None} == {
        "age": 63.2,
        "pack_years": 40,
    }
    assert report.record_text == "咳嗽\ufffd 3 weeks"
    components = {
        part["code"]["text"]: part for part in observation(to_fhir(report), "Inputs of the model")["component"]
    }
    assert components["Age"]["valueQuantity"]["value"] == 63.2
    assert components["Age"]["valueQuantity"]["code"] == "a"
    assert "dataAbsentReason" in components["Haemoglobin"]
    assert "dataAbsentReason" in components["Modality image"]
    assert components["Record text"]["valueString"] == report.record_text
    # What the model did not get is not quoted as if it had been read.
    hidden = report_of(full_prediction(), missing=("table", "text"), table=table, text="cough")
    assert (hidden.record, hidden.record_text) == ((), "")


def test_bytes_and_ids_depend_on_nothing_but_the_arguments() -> None:
    # Another process has other string hashes.
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]; import conftest, test_medical_report as t; "
        "r = t.report_of(t.full_prediction(), 'x <肺>'); sys.stdout.reconfigure(encoding='utf-8'); "
        "sys.stdout.write(t.to_json(t.to_fhir(r)) + t.to_xml(t.to_fhir(r)))"
    )
    here = os.path.dirname(__file__)
    folders = [here, os.path.dirname(here), os.path.dirname(os.path.dirname(here))]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, env=environment, check=True)
    tree = to_fhir(report_of(full_prediction(), "x <肺>"))
    assert done.stdout.decode() == to_json(tree) + to_xml(tree)
    assert tree["id"] == str(uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(["a" * 64, "x <肺>", "bundle"])))
    other_case = to_fhir(report_of(full_prediction(), "y"))
    other = Provenance.model_validate(PROVENANCE.model_dump() | {"checkpoint_sha256": "c" * 64})
    other_checkpoint = to_fhir(report_of(full_prediction(), "x <肺>", provenance=other))
    ids = [{node["id"] for node in dicts(bundle) if "id" in node} for bundle in (tree, other_case, other_checkpoint)]
    assert len(set.union(*ids)) == 3 * len(ids[0])


def test_both_languages_have_the_same_sentences_and_every_term() -> None:
    def fields(template: str) -> set[str | None]:
        return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}

    assert SENTENCES["en"].keys() == SENTENCES["zh"].keys()
    for key, template in SENTENCES["en"].items():
        assert fields(template) == fields(SENTENCES["zh"][key]), key
    terms = {finding.text for finding in FINDINGS if finding.kind in ("binary", "rating")}
    terms |= {level for finding in RATINGS for level in finding.levels} | {field.text for field in RECORD_FIELDS}
    sizes = [5.0, 8.0]
    terms |= {lung_rads(texture, size, True, None).basis for texture in FINDING["texture"].levels for size in sizes}
    terms |= {lung_rads(None, None, present, None).basis for present in (True, False, None)}
    terms |= {
        lung_rads(None, None, True, "central").basis,
        NO_CT,
        LIMITS,
        POINT.unit,
        POINT.origin,
        "volume",
        "image",
        "table",
    }
    assert terms - TERMS_ZH.keys() == set()


def test_chinese_conclusion_is_chinese() -> None:
    report = report_of(full_prediction(), language="zh", missing=("table",), text="咳嗽")
    lines = report.conclusion.split("\n")
    assert "密度：实性（概率 1.000）；合计不低于 90% 的等级：实性。" in lines
    assert "长径：8.7 mm。" in lines
    assert "缺失的输入：病历字段。" in lines
    assert not re.search("[a-z]{3}", report.conclusion.replace("Lung-RADS", ""))
    assert to_fhir(report)["entry"][0]["resource"]["language"] == "zh"
