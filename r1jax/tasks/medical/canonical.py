"""The canonical report of one chest-CT case as plain data."""

from typing import Annotated, Literal

from pydantic import Field

from r1jax.tasks.envelope import Envelope, Frozen, OperatingPoint, Probability
from r1jax.tasks.medical.lung_rads import LIMITS, Category
from r1jax.tasks.medical.wording import NOTICE

COVERAGE = 0.9  # the levels listed for a rating hold at least this much of the probability

Call = Literal["present", "absent", "indeterminate"]
Modality = Literal["volume", "image", "table", "text"]


class BinaryResult(Frozen):
    """A probability, and the call at the operating threshold ("indeterminate" where there is none)."""

    kind: Literal["binary"] = "binary"
    name: str
    probability: Probability
    call: Call
    operating_point: OperatingPoint | None


class LengthResult(Frozen):
    """A length, to one decimal."""

    kind: Literal["length"] = "length"
    name: str
    value: Annotated[float, Field(ge=0)]
    unit: str


class VectorResult(Frozen):
    """A position (z, y, x), to one decimal."""

    kind: Literal["vector"] = "vector"
    name: str
    value: tuple[float, float, float]
    unit: str


class RatingResult(Frozen):
    """An ordered rating: the most likely level (`rating` counts from 1) and the levels that hold `COVERAGE`."""

    kind: Literal["rating"] = "rating"
    name: str
    rating: Annotated[int, Field(ge=1)]
    level: str
    probability: Probability
    probabilities: tuple[Probability, ...]
    likely_levels: tuple[str, ...]


FindingResult = BinaryResult | LengthResult | VectorResult | RatingResult


class LungRads(Frozen):
    """The Lung-RADS categories that a rule leaves possible; none where it cannot be applied."""

    version: Literal["v2022"] = "v2022"
    categories: tuple[Category, ...]
    basis: str
    limits: str = LIMITS


class RecordValue(Frozen):
    """One field of the patient record that the model read; `value` is None where the field was missing."""

    name: str
    text: str
    unit: str
    value: float | None


class Report(Envelope):
    """Everything that leaves the system about one case."""

    notice: Literal["Research software, not a medical device."] = NOTICE
    findings: tuple[Annotated[FindingResult, Field(discriminator="kind")], ...]
    lung_rads: LungRads | None
    missing: tuple[Modality, ...]
    record: tuple[RecordValue, ...]
    record_text: str
    conclusion: str
