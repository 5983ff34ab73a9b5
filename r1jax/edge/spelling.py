"""A report as JSON and as XML, and the name of its file."""

import hashlib
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from .report import XHTML

Tree = dict[str, Any]
FHIR, RISK_REPORT = "http://hl7.org/fhir", "urn:r1jax:risk-report:1"
"""Namespaces of the XML of both kinds of report."""


def to_json(tree: Tree) -> str:
    """JSON text, two spaces, with a newline at its end."""
    return json.dumps(tree, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def to_xml(tree: Tree, namespace: str = FHIR) -> str:
    """The XML of the same tree, to be stored as UTF-8."""
    root = ET.Element(tree["resourceType"], {"xmlns": namespace})
    narratives: list[tuple[ET.Element, str]] = []
    _write(root, tree, narratives)
    ET.indent(root)
    for place, text in narratives:  # after the indentation: spaces inside a narrative are content
        narrative = ET.fromstring(text.replace(f' xmlns="{XHTML}"', "", 1))
        place.set("xmlns", XHTML)
        place.text = narrative.text
        place.extend(narrative)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _write(parent: ET.Element, tree: Tree, narratives: list[tuple[ET.Element, str]]) -> None:
    for name, value in tree.items():
        if name == "resourceType":
            continue
        for item in value if isinstance(value, list) else [value]:
            element = ET.SubElement(parent, name)
            if name == "div":
                narratives.append((element, item))
            elif not isinstance(item, dict):
                element.set("value", item if isinstance(item, str) else json.dumps(item))
            else:
                inner = ET.SubElement(element, item["resourceType"]) if "resourceType" in item else element
                _write(inner, item, narratives)


def file_name(case: str) -> str:
    """The case id where it can be a file's name; else what can be kept of it and part of its SHA-256."""
    if re.fullmatch(r"\w[\w.\- ]*(?<! )", case) and len(case.encode()) <= 120:
        return case
    kept = re.sub(r"[^\w.\-]", "_", case).encode()[:107].decode("utf-8", errors="ignore")
    return f"{kept.lstrip('.-') or 'case'}-{hashlib.sha256(case.encode()).hexdigest()[:12]}"


def write_report(folder: Path, case: str, tree: Tree, namespace: str) -> None:
    """Writes a report as .json and .xml, named after its case."""
    name = file_name(case)
    (folder / f"{name}.json").write_text(to_json(tree), "utf-8")
    (folder / f"{name}.xml").write_text(to_xml(tree, namespace), "utf-8")
