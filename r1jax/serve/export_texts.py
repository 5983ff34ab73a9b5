"""What a report says beside the numbers, as plain data for a process without r1jax: schema, wording, Lung-RADS."""

from itertools import groupby
from typing import Any

from r1jax.tasks.medical.canonical import COVERAGE
from r1jax.tasks.medical.fhir import UCUM_CODE
from r1jax.tasks.medical.lung_rads import BENIGN_CALCIFICATION, LIMITS, Assessment, lung_rads
from r1jax.tasks.medical.report import NO_CT
from r1jax.tasks.medical.schema import FINDING, FINDINGS, RECORD_FIELDS
from r1jax.tasks.medical.wording import NOTICE, SENTENCES, SYNTHETIC, TERMS_ZH

LARGEST_MM = 100.0
"""Size up to which the rule is tabulated; its last step is at 30 mm."""


def report_texts() -> dict[str, Any]:
    """Gathers what `r1jax.edge.report` fills its reports from; JSON as it stands.

    Returns:
      Findings, record fields, sentences and terms by language, and the table of Lung-RADS.
    """
    return {
        "notice": NOTICE,
        "synthetic": SYNTHETIC,
        "coverage": COVERAGE,
        "ucum": UCUM_CODE,
        "findings": [
            {"name": f.name, "kind": f.kind, "text": f.text, "unit": f.unit, "levels": list(f.levels)} for f in FINDINGS
        ],
        "record": [
            {"name": f.name, "text": f.text, "unit": f.unit, "low": f.low, "high": f.high} for f in RECORD_FIELDS
        ],
        "sentences": SENTENCES,
        "terms": {"en": {}, "zh": TERMS_ZH},
        "lung_rads": {
            "version": "v2022",
            "limits": LIMITS,
            "benign": sorted(BENIGN_CALCIFICATION),
            "no_ct": {"categories": [], "basis": NO_CT},
            "indeterminate": _plain(lung_rads(None, None, None, None)),
            "absent": _plain(lung_rads(None, None, False, None)),
            "benign_pattern": _plain(lung_rads(None, None, True, min(BENIGN_CALCIFICATION))),
            "unknown": _plain(lung_rads(None, None, True, None)),
            "sizes": {texture: _steps(texture) for texture in FINDING["texture"].levels},
        },
    }


def _steps(texture: str) -> list[dict[str, Any]]:
    """The rule of one texture as steps of size: tabulated, so that no second copy of it can differ."""
    sizes = [tenth / 10 for tenth in range(int(10 * LARGEST_MM) + 1)]  # reported to one decimal
    runs = groupby(sizes, key=lambda size: lung_rads(texture, size, True, None))
    return [{"from_mm": next(run)} | _plain(assessment) for assessment, run in runs]


def _plain(assessment: Assessment) -> dict[str, Any]:
    return {"categories": list(assessment.categories), "basis": assessment.basis}
