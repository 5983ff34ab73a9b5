"""The canonical report as a FHIR R4B bundle: one plain tree, elements in the order that FHIR's XML asks for.

Sources: https://hl7.org/fhir/R4B/ (bundle, diagnosticreport, observation, device, provenance). The codes of LOINC,
UCUM and HL7 were not checked against a terminology server; findings carry text instead of guessed codes.
"""

import json
import uuid
from typing import Any
from xml.sax.saxutils import escape

from r1jax.tasks.envelope import OperatingPoint
from r1jax.tasks.medical.canonical import (
    COVERAGE,
    BinaryResult,
    FindingResult,
    LengthResult,
    LungRads,
    RatingResult,
    Report,
    VectorResult,
)
from r1jax.tasks.medical.schema import FINDING
from r1jax.tasks.medical.wording import SYNTHETIC

Tree = dict[str, Any]
UCUM_CODE = {"years": "a", "pack-years": "{pack-years}"}  # every other unit of the schema is spelled as in UCUM
_HL7 = "http://terminology.hl7.org/CodeSystem"
_CALLS = {"present": ("POS", "Positive"), "absent": ("NEG", "Negative"), "indeterminate": ("IND", "Indeterminate")}


def to_fhir(report: Report) -> Tree:
    """Builds the bundle of a report.

    Args:
      report: The canonical report.

    Returns:
      A FHIR R4B Bundle of type collection: DiagnosticReport, one Observation a finding (and one each for Lung-RADS and
      for the inputs), Device, Provenance. Its ids are a function of checkpoint and case id; the status of the report
      and of every observation is preliminary.
    """
    observations = [_observation(report, result.name, **_finding_parts(result)) for result in report.findings]
    if report.lung_rads is not None:
        observations.append(_observation(report, "lung_rads", **_lung_rads_parts(report.lung_rads)))
    if components := _input_components(report):
        observations.append(_observation(report, "inputs", code=_text("Inputs of the model"), component=components))
    results = [{"reference": f"urn:uuid:{observation['id']}"} for observation in observations]
    resources = [
        _diagnostic_report(report, results),
        *observations,
        _device(report),
        _provenance(report, [{"reference": _urn(report, "report")}, *results]),
    ]
    return {
        "resourceType": "Bundle",
        "id": _identity(report, "bundle"),
        **_meta(report, report.notice),
        "type": "collection",
        "timestamp": report.provenance.created,
        "entry": [{"fullUrl": f"urn:uuid:{resource['id']}", "resource": resource} for resource in resources],
    }


def _diagnostic_report(report: Report, results: list[Tree]) -> Tree:
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in report.conclusion.split("\n"))
    code = _text("CT chest (LOINC code not checked against a terminology server)")
    assessment = report.lung_rads
    categories = " or ".join(assessment.categories) if assessment else ""
    tree = {
        "resourceType": "DiagnosticReport",
        "id": _identity(report, "report"),
        **_meta(report, report.notice),
        "language": report.language,
        "text": {"status": "generated", "div": f'<div xmlns="http://www.w3.org/1999/xhtml">{paragraphs}</div>'},
        "status": report.status,
        "code": {"coding": [{"system": "http://loinc.org", "code": "24627-2"}], **code},
        "subject": _subject(report),
        "issued": report.provenance.created,
        "result": results,
        "conclusion": report.conclusion,
        "conclusionCode": [_text(f"Lung-RADS v2022 category {categories} (by rule, this sub-volume only)")]
        if categories
        else [],
    }
    return {name: value for name, value in tree.items() if value != []}


def _observation(report: Report, name: str, *, code: Tree, **parts: Any) -> Tree:
    """One result; `parts` come in FHIR's order (value, interpretation, note, component)."""
    # FHIR has the device between the notes and the components.
    component = {"component": parts.pop("component")} if "component" in parts else {}
    return {
        "resourceType": "Observation",
        "id": _identity(report, name),
        **_meta(report),
        "status": report.status,
        "category": [{"coding": [{"system": f"{_HL7}/observation-category", "code": "imaging"}]}],
        "code": code,
        "subject": _subject(report),
        "issued": report.provenance.created,
        **parts,
        "device": {"reference": _urn(report, "device")},
        **component,
    }


def _finding_parts(result: FindingResult) -> Tree:
    code = _text(FINDING[result.name].text)
    match result:
        case BinaryResult():
            call, display = _CALLS[result.call]
            coding = {"system": f"{_HL7}/v3-ObservationInterpretation", "code": call, "display": display}
            point = result.operating_point
            return {
                "code": _text(f"{code['text']}: probability"),
                "valueQuantity": _quantity(result.probability, "1"),
                "interpretation": [{"coding": [coding], **_text(result.call)}],
                **({"component": _operating_point_components(point)} if point else {}),
            }
        case LengthResult():
            return {"code": code, "valueQuantity": _quantity(result.value, result.unit)}
        case VectorResult():
            axes = zip("zyx", result.value, strict=True)
            return {
                "code": code,
                "component": [_component(axis, valueQuantity=_quantity(mm, result.unit)) for axis, mm in axes],
            }
        case RatingResult():
            return {
                "code": code,
                "valueCodeableConcept": _text(result.level),
                "component": _rating_components(result),
            }


def _operating_point_components(point: OperatingPoint) -> list[Tree]:
    measured = f"({point.unit}, {point.origin})"
    return [
        _component("Operating threshold", valueQuantity=_quantity(point.threshold, "1")),
        _component(f"Sensitivity at the threshold {measured}", valueQuantity=_quantity(point.sensitivity, "1")),
        _component(f"Specificity at the threshold {measured}", valueQuantity=_quantity(point.specificity, "1")),
        _component(f"Positive cases {measured}", valueInteger=point.n_positive),
        _component(f"Negative cases {measured}", valueInteger=point.n_negative),
    ]


def _rating_components(result: RatingResult) -> list[Tree]:
    levels = zip(FINDING[result.name].levels, result.probabilities, strict=True)
    return [
        _component("Rating", valueInteger=result.rating),
        _component(f"Levels that together hold at least {COVERAGE:.0%}", valueString="; ".join(result.likely_levels)),
        *(
            _component(f"Probability of {rating} ({level})", valueQuantity=_quantity(probability, "1"))
            for rating, (level, probability) in enumerate(levels, start=1)
        ),
    ]


def _lung_rads_parts(assessment: LungRads) -> Tree:
    categories = " or ".join(assessment.categories)
    return {
        "code": _text(f"Lung-RADS {assessment.version} category, by rule"),
        "valueCodeableConcept": _text(categories or "not assigned"),
        "note": [{"text": f"Row of the table: {assessment.basis}."}, {"text": assessment.limits}],
    }


def _input_components(report: Report) -> list[Tree]:
    """What was read and what was missing."""
    unknown = {"coding": [{"system": f"{_HL7}/data-absent-reason", "code": "unknown"}]}
    record = [
        _component(field.text, dataAbsentReason=unknown)
        if field.value is None
        else _component(field.text, valueQuantity=_quantity(field.value, field.unit))
        for field in report.record
    ]
    text = [_component("Record text", valueString=report.record_text)] if report.record_text else []
    return record + text + [_component(f"Modality {name}", dataAbsentReason=unknown) for name in report.missing]


def _device(report: Report) -> Tree:
    provenance = report.provenance
    return {
        "resourceType": "Device",
        "id": _identity(report, "device"),
        **_meta(report),
        "identifier": [_hash("SHA-256 of the checkpoint", provenance.checkpoint_sha256)],
        "status": "active",
        "deviceName": [{"name": provenance.model, "type": "model-name"}],
        "type": _text(report.notice),
        "version": [{"type": _text("r1jax"), "value": provenance.r1jax_version}],
    }


def _provenance(report: Report, targets: list[Tree]) -> Tree:
    provenance = report.provenance
    data = {"identifier": _hash("SHA-256 fingerprint of the data", provenance.data_fingerprint)}
    return {
        "resourceType": "Provenance",
        "id": _identity(report, "provenance"),
        **_meta(report),
        "target": targets,
        "recorded": provenance.created,
        "activity": _text("Prediction by a model"),
        "agent": [{"who": {"reference": _urn(report, "device")}}],
        "entity": [{"role": "source", "what": {**data, "display": provenance.data_name}}],
    }


def _meta(report: Report, *tags: str) -> Tree:
    """The `meta` element with what a reader must know of a resource that travels alone; empty where that is nothing."""
    test = {"system": f"{_HL7}/v3-ActReason", "code": "HTEST", "display": "test health data"}
    security = {"security": [test]} if report.synthetic else {}
    displays = [*([SYNTHETIC] if report.synthetic else []), *tags]
    meta = {**security, **({"tag": [{"display": display} for display in displays]} if displays else {})}
    return {"meta": meta} if meta else {}


def _subject(report: Report) -> Tree:
    """The patient by pseudonym only: a bundle holds no Patient resource."""
    return {"type": "Patient", "identifier": {"type": _text("Pseudonymous case id"), "value": report.case_id}}


def _identity(report: Report, name: str) -> str:
    """A UUID that is the same for the same checkpoint, case and resource."""
    # JSON keeps the three apart whatever characters they hold.
    key = json.dumps([report.provenance.checkpoint_sha256, report.case_id, name])
    return str(uuid.uuid5(uuid.NAMESPACE_OID, key))


def _urn(report: Report, name: str) -> str:
    return f"urn:uuid:{_identity(report, name)}"


def _text(text: str) -> Tree:
    return {"text": text}


def _hash(what: str, sha256: str) -> Tree:
    return {"type": _text(what), "value": sha256}


def _quantity(value: float, unit: str) -> Tree:
    return {"value": value, "unit": unit, "system": "http://unitsofmeasure.org", "code": UCUM_CODE.get(unit, unit)}


def _component(what: str, **value: Any) -> Tree:
    return {"code": _text(what), **value}
