"""The report of a case as a FHIR R4B bundle, from the numbers of an exported model."""

import json
import math
import re
import uuid
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from .artefact import InputError
from .cases import points_of
from .conclusion import conclusion_of

HL7 = "http://terminology.hl7.org/CodeSystem"
XHTML = "http://www.w3.org/1999/xhtml"
NOT_TEXT = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ud800-\udfff"
CALLS = {"present": ("POS", "Positive"), "absent": ("NEG", "Negative"), "indeterminate": ("IND", "Indeterminate")}
UNKNOWN = {"coding": [{"system": f"{HL7}/data-absent-reason", "code": "unknown"}]}
Tree = dict[str, Any]


class ReportWriter:
    """Fills the report of a case: the same FHIR R4B bundle as r1jax's eval.py."""

    def __init__(
        self, card: Tree, texts: Tree, *, language: str, created: str, data: tuple[str, str], synthetic: bool
    ) -> None:
        """Takes what all reports share.

        Args:
          card: Of the artefact.
          texts: Schema and wording.
          language: en or zh.
          created: Time, as FHIR writes it.
          data: Name and SHA-256 of the cases.
          synthetic: Whether the cases were generated.
        """
        self.card, self.texts, self.language, self.created, self.data = card, texts, language, created, data
        self.synthetic = synthetic
        self.findings = {finding["name"]: finding for finding in texts["findings"]}

    def bundle(
        self, case: str, found: dict[str, np.ndarray], missing: list[str], table: np.ndarray | None, text: str
    ) -> Tree:
        """Builds the report.

        Args:
          case: Its id.
          found: From `Artefact.predict`.
          missing: Modalities that the case lacks.
          table: Record values, NaN where unknown.
          text: Record text.

        Returns:
          The bundle.

        Raises:
          InputError: A number cannot be reported, or the id cannot.
        """
        if re.search(f"[\t\n\r{NOT_TEXT}]", case) or not case.strip():
            raise InputError(f"case {case!r}: the id is empty or holds control characters")
        points = points_of(self.card, missing)
        results = [
            self._result(case, finding, found, points) for name, finding in self.findings.items() if name in found
        ]
        presence = next((result for result in results if result["name"] == "nodule_present"), None)
        if presence is not None and presence["call"] != "present":
            results = [presence]
        assessment = self._lung_rads(results, missing)
        record = [] if table is None or "table" in missing else self._record(table)
        text = "" if "text" in missing else re.sub(f"[{NOT_TEXT}]", "\ufffd", text)
        observations = [self._observation(case, result["name"], **self._parts(result)) for result in results]
        if assessment is not None:
            observations.append(self._observation(case, "lung_rads", **self._lung_rads_parts(assessment)))
        if components := self._inputs(record, text, missing):
            parts = {"code": {"text": "Inputs of the model"}, "component": components}
            observations.append(self._observation(case, "inputs", **parts))
        conclusion = conclusion_of(
            self.texts,
            self.language,
            results,
            assessment,
            missing=missing,
            record=record,
            text=text,
            synthetic=self.synthetic,
        )
        references = [{"reference": f"urn:uuid:{observation['id']}"} for observation in observations]
        head = self._report(case, conclusion, assessment, references)
        targets = [{"reference": self._urn(case, "report")}, *references]
        resources = [head, *observations, self._device(case), self._provenance(case, targets)]
        return {
            "resourceType": "Bundle",
            "id": self._identity(case, "bundle"),
            **self._meta(self.texts["notice"]),
            "type": "collection",
            "timestamp": self.created,
            "entry": [{"fullUrl": f"urn:uuid:{resource['id']}", "resource": resource} for resource in resources],
        }

    def _result(self, case: str, finding: Tree, found: dict[str, np.ndarray], points: dict[str, Tree]) -> Tree:
        """Checks one prediction and names what it says."""
        name, kind, values = finding["name"], finding["kind"], np.asarray(found[finding["name"]], np.float64)
        low, high = (-math.inf, math.inf) if kind == "vector" else (0, math.inf if kind == "length" else 1 + 1e-6)
        if not (np.isfinite(values).all() and (values >= low).all() and (values <= high).all()):
            raise InputError(f"case {case!r}: {name} is {values.tolist()}, which cannot be reported: check its input")
        result: Tree = {"name": name, "kind": kind}
        if kind == "binary":
            point = points.get(name)
            call = "indeterminate" if point is None else "present" if int(found[f"call.{name}"]) else "absent"
            return result | {"probability": min(float(values), 1.0), "call": call, "point": point}
        if kind != "rating":
            return result | {"value": [round(value, 1) + 0.0 for value in np.atleast_1d(values).tolist()]}
        order = np.argsort(-values, kind="stable")
        held = np.cumsum(values[order]) / values.sum()
        likely = sorted(order[: int(np.argmax(held >= self.texts["coverage"])) + 1].tolist())
        return result | {
            "rating": int(order[0]) + 1,
            "level": finding["levels"][int(order[0])],
            "probabilities": [min(value, 1.0) for value in values.tolist()],
            "likely": [finding["levels"][level] for level in likely],
        }

    def _record(self, table: np.ndarray) -> list[Tree]:
        """The record's fields with their values."""
        values = [None if np.isnan(value) else float(str(value)) for value in table]
        return [field | {"value": value} for field, value in zip(self.texts["record"], values, strict=True)]

    def _lung_rads(self, results: list[Tree], missing: list[str]) -> Tree | None:
        """The category by the rule's table; None where nothing that it reads was predicted."""
        named, rule = {result["name"]: result for result in results}, self.texts["lung_rads"]
        if not named.keys() & {"nodule_present", "texture", "long_axis_mm"}:
            return None
        if {"volume", "image"} & {*missing}:
            return rule["no_ct"]
        call = named.get("nodule_present", {}).get("call", "present")
        if call != "present":
            return rule[call]
        pattern = named.get("calcification", {}).get("likely", [None])
        if {*pattern} <= {*rule["benign"]}:
            return rule["benign_pattern"]
        if not {"texture", "long_axis_mm"} <= named.keys():
            return rule["unknown"]
        size, steps = named["long_axis_mm"]["value"][0], rule["sizes"][named["texture"]["level"]]
        return [step for step in steps if size >= step["from_mm"]][-1]

    def _observation(self, case: str, name: str, *, code: Tree, **parts: Any) -> Tree:
        component = {"component": parts.pop("component")} if "component" in parts else {}
        return {
            "resourceType": "Observation",
            "id": self._identity(case, name),
            **self._meta(),
            "status": "preliminary",
            "category": [{"coding": [{"system": f"{HL7}/observation-category", "code": "imaging"}]}],
            "code": code,
            "subject": self._subject(case),
            "issued": self.created,
            **parts,
            "device": {"reference": self._urn(case, "device")},
            **component,
        }

    def _parts(self, result: Tree) -> Tree:
        """Value, interpretation and components of a finding."""
        finding = self.findings[result["name"]]
        text, unit = finding["text"], finding["unit"]
        if result["kind"] == "binary":
            call, display = CALLS[result["call"]]
            coding = {"system": f"{HL7}/v3-ObservationInterpretation", "code": call, "display": display}
            return {
                "code": {"text": f"{text}: probability"},
                "valueQuantity": self._quantity(result["probability"], "1"),
                "interpretation": [{"coding": [coding], "text": result["call"]}],
                **({"component": self._point(result["point"])} if result["point"] else {}),
            }
        if result["kind"] == "length":
            return {"code": {"text": text}, "valueQuantity": self._quantity(result["value"][0], unit)}
        if result["kind"] == "vector":
            axes = zip("zyx", result["value"], strict=True)
            parts = [_component(axis, valueQuantity=self._quantity(mm, unit)) for axis, mm in axes]
            return {"code": {"text": text}, "component": parts}
        together = f"Levels that together hold at least {self.texts['coverage']:.0%}"
        levels = enumerate(zip(finding["levels"], result["probabilities"], strict=True), start=1)
        parts = [
            _component("Rating", valueInteger=result["rating"]),
            _component(together, valueString="; ".join(result["likely"])),
            *(
                _component(f"Probability of {number} ({level})", valueQuantity=self._quantity(probability, "1"))
                for number, (level, probability) in levels
            ),
        ]
        return {"code": {"text": text}, "valueCodeableConcept": {"text": result["level"]}, "component": parts}

    def _point(self, point: Tree) -> list[Tree]:
        measured = f"({point['unit']}, {point['origin']})"
        return [
            _component("Operating threshold", valueQuantity=self._quantity(point["threshold"], "1")),
            _component(
                f"Sensitivity at the threshold {measured}", valueQuantity=self._quantity(point["sensitivity"], "1")
            ),
            _component(
                f"Specificity at the threshold {measured}", valueQuantity=self._quantity(point["specificity"], "1")
            ),
            _component(f"Positive cases {measured}", valueInteger=point["n_positive"]),
            _component(f"Negative cases {measured}", valueInteger=point["n_negative"]),
        ]

    def _lung_rads_parts(self, assessment: Tree) -> Tree:
        rule = self.texts["lung_rads"]
        return {
            "code": {"text": f"Lung-RADS {rule['version']} category, by rule"},
            "valueCodeableConcept": {"text": " or ".join(assessment["categories"]) or "not assigned"},
            "note": [{"text": f"Row of the table: {assessment['basis']}."}, {"text": rule["limits"]}],
        }

    def _inputs(self, record: list[Tree], text: str, missing: list[str]) -> list[Tree]:
        parts = [
            _component(field["text"], dataAbsentReason=UNKNOWN)
            if field["value"] is None
            else _component(field["text"], valueQuantity=self._quantity(field["value"], field["unit"]))
            for field in record
        ]
        parts += [_component("Record text", valueString=text)] if text else []
        return parts + [_component(f"Modality {name}", dataAbsentReason=UNKNOWN) for name in missing]

    def _report(self, case: str, conclusion: str, assessment: Tree | None, results: list[Tree]) -> Tree:
        paragraphs = "".join(f"<p>{escape(line)}</p>" for line in conclusion.split("\n"))
        categories = " or ".join(assessment["categories"]) if assessment else ""
        coded = f"Lung-RADS v2022 category {categories} (by rule, this sub-volume only)"
        tree = {
            "resourceType": "DiagnosticReport",
            "id": self._identity(case, "report"),
            **self._meta(self.texts["notice"]),
            "language": self.language,
            "text": {"status": "generated", "div": f'<div xmlns="{XHTML}">{paragraphs}</div>'},
            "status": "preliminary",
            "code": {
                "coding": [{"system": "http://loinc.org", "code": "24627-2"}],
                "text": "CT chest (LOINC code not checked against a terminology server)",
            },
            "subject": self._subject(case),
            "issued": self.created,
            "result": results,
            "conclusion": conclusion,
            "conclusionCode": [{"text": coded}] if categories else [],
        }
        return {name: value for name, value in tree.items() if value != []}

    def _device(self, case: str) -> Tree:
        made = self.card["checkpoint"]
        return {
            "resourceType": "Device",
            "id": self._identity(case, "device"),
            **self._meta(),
            "identifier": [{"type": {"text": "SHA-256 of the checkpoint"}, "value": made["sha256"]}],
            "status": "active",
            "deviceName": [{"name": self.card["model"], "type": "model-name"}],
            "type": {"text": self.texts["notice"]},
            "version": [{"type": {"text": "r1jax"}, "value": self.card["versions"]["r1jax"]}],
        }

    def _provenance(self, case: str, targets: list[Tree]) -> Tree:
        name, fingerprint = self.data
        what = {"type": {"text": "SHA-256 fingerprint of the data"}, "value": fingerprint}
        return {
            "resourceType": "Provenance",
            "id": self._identity(case, "provenance"),
            **self._meta(),
            "target": targets,
            "recorded": self.created,
            "activity": {"text": "Prediction by a model"},
            "agent": [{"who": {"reference": self._urn(case, "device")}}],
            "entity": [{"role": "source", "what": {"identifier": what, "display": name}}],
        }

    def _meta(self, *tags: str) -> Tree:
        test = {"system": f"{HL7}/v3-ActReason", "code": "HTEST", "display": "test health data"}
        shown = [*([self.texts["synthetic"]] if self.synthetic else []), *tags]
        meta = {"security": [test]} if self.synthetic else {}
        meta |= {"tag": [{"display": text} for text in shown]} if shown else {}
        return {"meta": meta} if meta else {}

    def _subject(self, case: str) -> Tree:
        return {"type": "Patient", "identifier": {"type": {"text": "Pseudonymous case id"}, "value": case}}

    def _identity(self, case: str, name: str) -> str:
        key = json.dumps([self.card["checkpoint"]["sha256"], case, name])
        return str(uuid.uuid5(uuid.NAMESPACE_OID, key))

    def _urn(self, case: str, name: str) -> str:
        return f"urn:uuid:{self._identity(case, name)}"

    def _quantity(self, value: float, unit: str) -> Tree:
        code = self.texts["ucum"].get(unit, unit)
        return {"value": value, "unit": unit, "system": "http://unitsofmeasure.org", "code": code}


def _component(what: str, **value: Any) -> Tree:
    return {"code": {"text": what}, **value}
