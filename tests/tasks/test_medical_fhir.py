"""The bundle: valid FHIR in JSON and XML, and the same whoever writes it."""

import json
import os
import subprocess
import sys
import uuid
from typing import Any
from xml.etree.ElementTree import canonicalize

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.serve.structured import from_xml, to_json, to_xml
from r1jax.tasks.envelope import OperatingPoint, Provenance
from r1jax.tasks.medical.canonical import Report
from r1jax.tasks.medical.fhir import to_fhir
from r1jax.tasks.medical.schema import FINDING, FINDINGS, RECORD_FIELDS
from tests.tasks.reports import (
    POINTS,
    PROVENANCE,
    dicts,
    full_prediction,
    observation,
    parse_by_peer,
    report_of,
)


def plain(bundle: Any) -> dict[str, Any]:
    """What the peer read, with the narrative spelled in one way."""
    tree = json.loads(bundle.model_dump_json())
    narrative = tree["entry"][0]["resource"]["text"]
    narrative["div"] = canonicalize(narrative["div"].strip())
    return tree


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
    presence = observation(tree, "Nodule in the sub-volume: probability")
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


def test_bytes_and_ids_depend_on_nothing_but_the_arguments() -> None:
    # Another process has other string hashes.
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]; import conftest, tests.tasks.reports as t; "
        "r = t.report_of(t.full_prediction(), 'x <肺>'); sys.stdout.reconfigure(encoding='utf-8'); "
        "from r1jax.serve.structured import to_json, to_xml; from r1jax.tasks.medical.fhir import to_fhir; "
        "sys.stdout.write(to_json(to_fhir(r)) + to_xml(to_fhir(r)))"
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
