"""The canonical report of one chest-CT case as plain data: frozen pydantic models without unknown fields or NaN."""

import re
from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from r1jax.tasks.medical.lung_rads import LIMITS, Category
from r1jax.tasks.medical.wording import NOTICE, Language

COVERAGE = 0.9  # the levels listed for a rating hold at least this much of the probability
# Inside a character class: what neither FHIR nor XML 1.0 (section 2.2) can carry.
NOT_TEXT = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff"

Call = Literal["present", "absent", "indeterminate"]
Modality = Literal["volume", "image", "table", "text"]
Probability = Annotated[float, Field(ge=0, le=1)]
Line = Annotated[str, StringConstraints(pattern=f"^[^\t\n\r{NOT_TEXT}]*[^\\s{NOT_TEXT}][^\t\n\r{NOT_TEXT}]*$")]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


def _checked_instant(value: str) -> str:
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)", value):
        raise ValueError("expected a time such as 2025-01-31T12:00:00Z, with its zone")
    datetime.fromisoformat(value)
    return value


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OperatingPoint(_Frozen):
    """The threshold that turns a probability into a call, and what was measured there."""

    threshold: Probability
    sensitivity: Probability
    specificity: Probability
    n_positive: Annotated[int, Field(ge=1)]
    n_negative: Annotated[int, Field(ge=1)]
    unit: Line = "per case"
    origin: Line = "validation split"


class Provenance(_Frozen):
    """What made the report, from what, and when; `data_*` name the source that the case was read from."""

    model: Line
    r1jax_version: Line
    checkpoint_sha256: Sha256
    data_name: Line
    data_fingerprint: Sha256
    created: Annotated[str, AfterValidator(_checked_instant)]


class BinaryResult(_Frozen):
    """A probability, and the call at the operating threshold ("indeterminate" where there is none)."""

    kind: Literal["binary"] = "binary"
    name: str
    probability: Probability
    call: Call
    operating_point: OperatingPoint | None


class LengthResult(_Frozen):
    """A length, to one decimal."""

    kind: Literal["length"] = "length"
    name: str
    value: Annotated[float, Field(ge=0)]
    unit: str


class VectorResult(_Frozen):
    """A position (z, y, x), to one decimal."""

    kind: Literal["vector"] = "vector"
    name: str
    value: tuple[float, float, float]
    unit: str


class RatingResult(_Frozen):
    """An ordered rating: the most likely level (`rating` counts from 1) and the levels that hold `COVERAGE`."""

    kind: Literal["rating"] = "rating"
    name: str
    rating: Annotated[int, Field(ge=1)]
    level: str
    probability: Probability
    probabilities: tuple[Probability, ...]
    likely_levels: tuple[str, ...]


FindingResult = BinaryResult | LengthResult | VectorResult | RatingResult


class LungRads(_Frozen):
    """The Lung-RADS categories that a rule leaves possible; none where it cannot be applied."""

    version: Literal["v2022"] = "v2022"
    categories: tuple[Category, ...]
    basis: str
    limits: str = LIMITS


class RecordValue(_Frozen):
    """One field of the patient record that the model read; `value` is None where the field was missing."""

    name: str
    text: str
    unit: str
    value: float | None


class Report(_Frozen):
    """Everything that leaves the system about one case."""

    case_id: Line
    status: Literal["preliminary"] = "preliminary"
    notice: Literal["Research software, not a medical device."] = NOTICE
    synthetic: bool
    language: Language
    findings: tuple[Annotated[FindingResult, Field(discriminator="kind")], ...]
    lung_rads: LungRads | None
    missing: tuple[Modality, ...]
    record: tuple[RecordValue, ...]
    record_text: str
    conclusion: str
    provenance: Provenance
