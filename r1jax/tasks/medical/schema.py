"""What a chest-CT case says: the findings that are reported and the record fields that are read.

Ratings follow the LIDC-IDRI reader form (Armato et al. 2011, table 2): levels, order and wording.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from r1jax.data.schema import Field, Schema


@dataclass(frozen=True)
class Finding:
    """One reported field; `levels` are the words of a rating, lowest first, and start at rating 1."""

    name: str
    kind: Literal["binary", "rating", "length", "vector"]
    text: str
    unit: str = "1"
    levels: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Numbers that the model's head puts out for this field."""
        return {"binary": 1, "rating": len(self.levels), "length": 1, "vector": 3}[self.kind]


FINDINGS: tuple[Finding, ...] = (
    Finding("nodule_present", "binary", "Nodule in the sub-volume"),
    Finding("malignancy", "binary", "Malignancy of the nodule (outcome)"),
    Finding("center_mm", "vector", "Nodule centre, (z, y, x) offset from the centre of the sub-volume", "mm"),
    Finding("long_axis_mm", "length", "Long axis of the nodule", "mm"),
    Finding(
        "texture",
        "rating",
        "Texture",
        levels=("non-solid", "non-solid to part-solid", "part-solid", "part-solid to solid", "solid"),
    ),
    Finding(
        "margin",
        "rating",
        "Margin",
        levels=("poorly defined", "near poorly defined", "medium margin", "near sharp", "sharp"),
    ),
    Finding(
        "spiculation",
        "rating",
        "Spiculation",
        levels=("no spiculation", "nearly no spiculation", "medium spiculation", "near marked", "marked"),
    ),
    Finding(
        "lobulation",
        "rating",
        "Lobulation",
        levels=("no lobulation", "nearly no lobulation", "medium lobulation", "near marked", "marked"),
    ),
    Finding(
        "calcification",
        "rating",
        "Calcification pattern",
        levels=("popcorn", "laminated", "solid", "non-central", "central", "absent"),
    ),
    Finding(
        "sphericity",
        "rating",
        "Sphericity",
        levels=("linear", "linear to ovoid", "ovoid", "ovoid to round", "round"),
    ),
    Finding(
        "subtlety",
        "rating",
        "Subtlety",
        levels=("extremely subtle", "moderately subtle", "fairly subtle", "moderately obvious", "obvious"),
    ),
    Finding(
        "malignancy_rating",
        "rating",
        "Likelihood of malignancy as a reader rates it",
        levels=(
            "highly unlikely",
            "moderately unlikely",
            "indeterminate",
            "moderately suspicious",
            "highly suspicious",
        ),
    ),
)
FINDING = {finding.name: finding for finding in FINDINGS}


@dataclass(frozen=True)
class RecordField:
    """A number of the patient record; `center` and `scale` bring it to order one, `low`..`high` is what is possible."""

    name: str
    text: str
    unit: str
    center: float
    scale: float
    low: float
    high: float


RECORD_FIELDS: tuple[RecordField, ...] = (
    RecordField("age", "Age", "years", 60.0, 12.0, 0.0, 120.0),
    RecordField("male", "Male sex (1 yes, 0 no)", "1", 0.5, 0.5, 0.0, 1.0),
    RecordField("pack_years", "Smoking", "pack-years", 20.0, 20.0, 0.0, 300.0),
    RecordField("family_history", "Lung cancer in a first-degree relative (1 yes, 0 no)", "1", 0.5, 0.5, 0.0, 1.0),
    RecordField("prior_cancer", "Earlier malignancy (1 yes, 0 no)", "1", 0.5, 0.5, 0.0, 1.0),
    RecordField("emphysema", "Emphysema (1 yes, 0 no)", "1", 0.5, 0.5, 0.0, 1.0),
    RecordField("cea", "Carcinoembryonic antigen", "ng/mL", 4.0, 4.0, 0.0, 10000.0),
    RecordField("crp", "C-reactive protein", "mg/L", 10.0, 20.0, 0.0, 1000.0),
    RecordField("hemoglobin", "Haemoglobin", "g/L", 140.0, 15.0, 10.0, 260.0),
)


def case_schema(pictures: Mapping[str, tuple[str, tuple[int, ...]]], *, table: bool, text: bool) -> Schema:
    """Says what a source of cases gives.

    Args:
      pictures: dtype and shape of "volume" and "image", those of them that there are.
      table: Whether there are record fields.
      text: Whether there are texts.

    Returns:
      The fields of `Source.read_batch` that are there for sure.
    """
    fields = [Field("case_id", "category")]
    for name, (dtype, shape) in pictures.items():
        fields += [Field(name, name, dtype, shape), Field(f"{name}_spacing", "number", "float32", (len(shape),))]
    fields += [Field("table", "table", "float32", (len(RECORD_FIELDS),))] if table else []
    fields += [Field("text", "text")] if text else []
    widths = {"vector": (3,)}
    fields += [Field(f"target.{f.name}", "number", "float32", widths.get(f.kind, ())) for f in FINDINGS]
    return Schema(tuple(fields))
