"""Resources as JSON and as XML: one plain tree, two spellings, and the XML read back to the same tree.

A tree is what `json.loads` gives: dicts, lists, strings, numbers, booleans; a dict with `resourceType` is a resource.
JSON says by itself what is a list and what is a number; XML does not, so a `Dialect` lists the names for it. A tree
that could not be read back (a list at a place that the dialect does not know, an empty string) is refused on writing.

Source: https://hl7.org/fhir/R4B/json.html and https://hl7.org/fhir/R4B/xml.html (elements in the order of the tree,
primitive values in the attribute `value`, a resource inside `resource` as one child element, narrative as XHTML).
Extensions and element ids are not covered: r1jax writes none.
"""

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Any

from r1jax.errors import UserError

XHTML = "http://www.w3.org/1999/xhtml"
MAX_DEPTH = 64  # a report is 8 deep; deeper input is an attack on the recursion below
# Elements begin small and resources large, which tells a contained resource from a single child.
_ELEMENT = re.compile("[a-z][A-Za-z0-9]*")
_RESOURCE = re.compile("[A-Z][A-Za-z0-9]*")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
# What XML 1.0 (section 2.2) cannot carry, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Dialect:
    """What the XML of a tree does not say by itself; a name is "child" (under any parent) or "parent.child"."""

    namespace: str
    lists: frozenset[str]
    numbers: frozenset[str]
    booleans: frozenset[str] = frozenset()
    narratives: frozenset[str] = frozenset()


# The part of FHIR R4B that r1jax writes.
FHIR = Dialect(
    namespace="http://hl7.org/fhir",
    lists=frozenset(
        {"Bundle.entry", "meta.security", "meta.tag", "coding", "interpretation"}
        | {"Observation.category", "Observation.note", "Observation.component"}
        | {"DiagnosticReport.result", "DiagnosticReport.conclusionCode"}
        | {"Device.identifier", "Device.deviceName", "Device.version", "Device.note"}
        | {"Provenance.target", "Provenance.agent", "Provenance.entity"}
    ),
    numbers=frozenset({"valueQuantity.value", "valueInteger"}),
    booleans=frozenset({"valueBoolean"}),
    narratives=frozenset({"text.div"}),
)


def to_json(tree: dict[str, Any]) -> str:
    """Writes a tree as JSON text: UTF-8 characters as they are, two spaces, keys in the order of the tree.

    Args:
      tree: The resource.

    Returns:
      The text, with a newline at its end; equal trees of equal order give equal bytes.

    Raises:
      ValueError: A number is NaN or infinite.
    """
    return json.dumps(tree, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def to_xml(tree: dict[str, Any], dialect: Dialect = FHIR) -> str:
    """Writes a tree as XML text, to be stored as UTF-8.

    Args:
      tree: The resource; its `resourceType` names the root element.
      dialect: Which names repeat and which hold numbers.

    Returns:
      The text with its declaration; equal trees of equal order give equal bytes.

    Raises:
      ValueError: The tree holds what `from_xml` could not give back; the message names the place.
    """
    root = ET.Element(_checked_name(_RESOURCE, tree["resourceType"]), {"xmlns": dialect.namespace})
    narratives: list[tuple[ET.Element, ET.Element]] = []
    _write_children(root, tree, dialect, narratives)
    ET.indent(root)
    # Spaces inside a narrative are content: it goes in after the indentation.
    for place, narrative in narratives:
        place.text = narrative.text
        place.attrib.update(narrative.attrib)
        place.extend(narrative)
    _check_depth(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def from_xml(text: str, dialect: Dialect = FHIR) -> dict[str, Any]:
    """Reads back what `to_xml` wrote.

    Args:
      text: XML; document type and entity declarations are refused, so nothing is expanded or fetched.
      dialect: Which names repeat and which hold numbers.

    Returns:
      The tree, equal to the one that was written.

    Raises:
      UserError: The text is not XML, or not of this dialect.
    """
    for declaration in ("<!DOCTYPE", "<!ENTITY"):
        if declaration in text:
            raise UserError(f"the XML holds {declaration}, which is not read for safety: remove the declaration")
    try:
        root = ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise UserError(f"the text is not well-formed XML ({error}): check that the file is whole") from None
    _check_depth(root)
    _refuse(root.tag, "attribute", list(root.attrib))
    return _read_resource(root, dialect)


def _write_children(parent: ET.Element, tree: dict[str, Any], dialect: Dialect, narratives: list) -> None:
    """Appends the elements of a dict to `parent`; narratives wait in `narratives` until indentation is done."""
    if not tree.keys() - {"resourceType"}:
        raise ValueError(f"{parent.tag}: an empty object cannot be written")
    for name, value in tree.items():
        if name == "resourceType":
            continue
        place = f"{parent.tag}.{name}"
        repeats = _known(dialect.lists, place)
        if repeats != isinstance(value, list) or value == []:
            raise ValueError(f"{place}: {value!r} should be {'a list with entries' if repeats else 'one value'}")
        for item in value if repeats else [value]:
            element = ET.SubElement(parent, _checked_name(_ELEMENT, name))
            if _known(dialect.narratives, place):
                narratives.append((element, _narrative_element(place, item)))
            elif not isinstance(item, dict):
                element.set("value", _primitive_text(place, item, dialect))
            elif "resourceType" in item:
                resource = ET.SubElement(element, _checked_name(_RESOURCE, item["resourceType"]))
                _write_children(resource, item, dialect, narratives)
            else:
                _write_children(element, item, dialect, narratives)


def _primitive_text(place: str, value: Any, dialect: Dialect) -> str:
    """The attribute text of a string, number or boolean that is allowed at `place`."""
    if _known(dialect.booleans, place) and isinstance(value, bool):
        return "true" if value else "false"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if _known(dialect.numbers, place) and number and math.isfinite(value):
        return json.dumps(value)
    plain = not (_known(dialect.booleans, place) or _known(dialect.numbers, place))
    if plain and isinstance(value, str) and value and not _NOT_XML.search(value):
        return value
    raise ValueError(f"{place}: {value!r} cannot be written there")


def _checked_name(pattern: re.Pattern, name: str) -> str:
    if not pattern.fullmatch(name):
        raise ValueError(f"{name!r} is no name for an XML element here: expected {pattern.pattern}")
    return name


def _narrative_element(place: str, text: str) -> ET.Element:
    """Parses an XHTML string that is spelled as `from_xml` will spell it."""
    try:
        element = _without_namespace(ET.fromstring(text))
    except ET.ParseError as error:
        raise ValueError(f"{place}: {text!r} is not XHTML ({error})") from None
    if ET.tostring(element, encoding="unicode") != text:
        raise ValueError(f"{place}: {text!r} is not XHTML in its shortest spelling")
    return element


def _read_resource(element: ET.Element, dialect: Dialect) -> dict[str, Any]:
    return {"resourceType": _local_name(element, dialect.namespace), **_read_children(element, dialect)}


def _read_children(parent: ET.Element, dialect: Dialect) -> dict[str, Any]:
    """The dict of an element's children."""
    result: dict[str, Any] = {}
    parent_name = _local_name(parent, dialect.namespace)
    _refuse(parent_name, "text", [text for text in [parent.text, *(child.tail for child in parent)] if _filled(text)])
    for child in parent:
        narrative = child.tag.startswith(f"{{{XHTML}}}")
        name = _local_name(child, XHTML if narrative else dialect.namespace)
        place = f"{parent_name}.{name}"
        if narrative != _known(dialect.narratives, place):
            raise UserError(f"the XML element {place} is in the wrong namespace: expected {dialect.namespace}")
        if narrative:
            value: Any = ET.tostring(_without_namespace(child), encoding="unicode")
        else:
            value = _read_value(place, child, dialect)
        if _known(dialect.lists, place):
            result.setdefault(name, []).append(value)
        elif name in result:
            raise UserError(f"the XML element {place} occurs twice: only one is allowed there")
        else:
            result[name] = value
    return result


def _read_value(place: str, element: ET.Element, dialect: Dialect) -> Any:
    """One primitive, one object, or one resource in its container."""
    _refuse(place, "attribute", [name for name in element.attrib if name != "value"])
    text = element.get("value")
    if (text is None) != (len(element) > 0) or text == "":
        raise UserError(f"the XML element {place} must have either a filled value attribute or child elements")
    if text is None:
        if len(element) == 1 and _RESOURCE.fullmatch(element[0].tag.rpartition("}")[2]):
            _refuse(place, "attribute", list(element[0].attrib))
            return _read_resource(element[0], dialect)
        return _read_children(element, dialect)
    if _known(dialect.booleans, place):
        if text not in ("true", "false"):
            raise UserError(f"the XML element {place} is {text!r}: expected true or false")
        return text == "true"
    return _read_number(place, text) if _known(dialect.numbers, place) else text


def _read_number(place: str, text: str) -> int | float:
    """An integer where the text has neither point nor exponent, otherwise a float."""
    match = _NUMBER.fullmatch(text)
    value = math.inf if match is None or len(text) > 400 else float(text)
    if not math.isfinite(value):
        raise UserError(f"the XML element {place} is {text[:40]!r}: expected a finite decimal number")
    return value if match and (match[2] or match[3]) else int(text)


def _without_namespace(element: ET.Element) -> ET.Element:
    """A copy of an XHTML element with plain tags and one `xmlns` attribute at the top, as ElementTree writes it."""
    copy = ET.Element(_local_name(element, XHTML), {"xmlns": XHTML, **element.attrib})
    copy.text = element.text
    for child in element:
        inner = _without_namespace(child)
        del inner.attrib["xmlns"]
        inner.tail = child.tail
        copy.append(inner)
    return copy


def _local_name(element: ET.Element, namespace: str) -> str:
    prefix = f"{{{namespace}}}"
    if not element.tag.startswith(prefix):
        raise UserError(f"the XML element {element.tag} is in the wrong namespace: expected {namespace}")
    return element.tag.removeprefix(prefix)


def _known(names: frozenset[str], place: str) -> bool:
    return place in names or place.rpartition(".")[2] in names


def _filled(text: str | None) -> bool:
    return text is not None and text.strip() != ""


def _refuse(place: str, what: str, found: list[Any]) -> None:
    """Raises where the XML holds something that the tree has no place for, so that nothing is lost in silence."""
    if found:
        raise UserError(
            f"the XML element {place} holds the {what} {str(found[0])[:40]!r}, which is not read: remove it"
        )


def _check_depth(root: ET.Element) -> None:
    level = [root]
    for _ in range(MAX_DEPTH):
        level = [child for element in level for child in element]
    if level:
        raise UserError(f"the XML is nested more than {MAX_DEPTH} levels deep: no report is")
