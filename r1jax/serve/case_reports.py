"""The structured report of every case, as FHIR in JSON and in XML."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r1jax.serve.scored import Scored
from r1jax.serve.structured import to_json, to_xml
from r1jax.tasks.envelope import Language, Provenance
from r1jax.tasks.medical.canonical import Report
from r1jax.tasks.medical.fhir import to_fhir
from r1jax.tasks.medical.report import build_report

CHUNK = 64
"""Cases read at once."""
LONGEST_NAME = 120
"""Bytes; file systems take 255."""


@dataclass(frozen=True, eq=False)
class Reporter:
    """Makes the report of a case; a pure function of the case.

    Attributes:
      scored: Predictions and operating points.
      provenance: What made the predictions, with one time for the whole evaluation.
      synthetic: Whether the cases were generated.
      language: Of the texts.
    """

    scored: Scored
    provenance: Provenance
    synthetic: bool
    language: Language

    def report(self, index: int, raw: dict[str, Any], row: int) -> Report:
        """Builds one report.

        Args:
          index: Which case of the source.
          raw: A batch of the source that holds it.
          row: Its place in the batch.

        Returns:
          The canonical report.
        """
        scored, missing = self.scored, self.scored.missing(raw, row)
        return build_report(
            scored.ids[index],
            {name: values[index] for name, values in scored.predicted[scored.main].items()},
            operating_points=scored.points[scored.mode_of(missing)],
            provenance=self.provenance,
            missing=missing,
            synthetic=self.synthetic,
            language=self.language,
            table=raw["table"][row] if "table" in scored.reads and "table" in raw else None,
            text=raw["text"][row] if "text" in scored.reads and "text" in raw else "",
        )

    def reports(self) -> Iterator[Report]:
        """The reports of all cases, in order."""
        for first in range(0, len(self.scored.ids), CHUNK):
            indices = np.arange(first, min(first + CHUNK, len(self.scored.ids)))
            raw = self.scored.source.read_batch(indices)
            yield from (self.report(int(index), raw, row) for row, index in enumerate(indices))


def write_report(folder: Path, report: Report) -> None:
    """Writes one report as .json and .xml.

    Args:
      folder: Where to; it must exist.
      report: The report; its case names the files.
    """
    tree, name = to_fhir(report), file_name(report.case_id)
    (folder / f"{name}.json").write_text(to_json(tree), "utf-8")
    (folder / f"{name}.xml").write_text(to_xml(tree), "utf-8")


def file_name(case_id: str) -> str:
    """The case id where it can be a file's name; else what can be kept of it and part of its SHA-256."""
    if re.fullmatch(r"\w[\w.\- ]*(?<! )", case_id) and len(case_id.encode()) <= LONGEST_NAME:
        return case_id
    kept = re.sub(r"[^\w.\-]", "_", case_id).encode()[: LONGEST_NAME - 13].decode("utf-8", errors="ignore")
    return f"{kept.lstrip('.-') or 'case'}-{hashlib.sha256(case_id.encode()).hexdigest()[:12]}"
