"""Risk reports as JSON and as XML: two spellings of one tree, each with a published schema (docs/schemas)."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from r1jax.errors import UserError
from r1jax.serve.case_reports import file_name
from r1jax.serve.structured import Dialect, from_xml, to_json, to_xml
from r1jax.tasks.finance.report import RiskReport

RISK_REPORT = Dialect(
    namespace="urn:r1jax:risk-report:1",
    lists=frozenset({"reasons"}),
    numbers=frozenset(
        {"amount", "score", "probability", "contribution", "baseline", "output", "rest", "residual"}
        | {"threshold", "sensitivity", "specificity", "nPositive", "nNegative", "stepUpThreshold", "blockProbability"}
    ),
    booleans=frozenset({"synthetic", "complete"}),
)
"""What the XML of a risk report does not say by itself."""


def to_tree(report: RiskReport) -> dict[str, Any]:
    """The report as the tree that is written; what is None or an empty list is left out."""
    tree = report.model_dump(by_alias=True, exclude_none=True, mode="json")
    return {name: value for name, value in tree.items() if value != []}


def from_tree(tree: dict[str, Any]) -> RiskReport:
    """The report that a tree holds.

    Args:
      tree: What `json.loads` or `read_xml` gave.

    Returns:
      The report.

    Raises:
      UserError: A field is missing, unknown or has a value that it cannot have; names it.
    """
    try:
        return RiskReport.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the report"
        raise UserError(f"{place} of a risk report: {first['msg']}: check that the file is whole") from None


def report_xml(report: RiskReport) -> str:
    """The report as XML text."""
    return to_xml(to_tree(report), RISK_REPORT)


def read_xml(text: str) -> RiskReport:
    """The report that `report_xml` wrote.

    Raises:
      UserError: The text is no such XML.
    """
    return from_tree(from_xml(text, RISK_REPORT))


def write_report(folder: Path, report: RiskReport) -> None:
    """Writes one report as .json and .xml.

    Args:
      folder: Where to; it must exist.
      report: The report; its transaction names the files.
    """
    name = file_name(report.case_id)
    (folder / f"{name}.json").write_text(to_json(to_tree(report)), "utf-8")
    (folder / f"{name}.xml").write_text(report_xml(report), "utf-8")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the tree, as it is published."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RiskReport.model_json_schema(by_alias=True)}
