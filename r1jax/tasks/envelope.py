"""What the reports of all tasks have in common: frozen models that refuse unknown fields and NaN, origin, status."""

import re
from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

# Inside a character class: what neither FHIR nor XML 1.0 (section 2.2) can carry.
NOT_TEXT = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff"

Language = Literal["en", "zh"]
Probability = Annotated[float, Field(ge=0, le=1)]
Line = Annotated[str, StringConstraints(pattern=f"^[^\t\n\r{NOT_TEXT}]*[^\\s{NOT_TEXT}][^\t\n\r{NOT_TEXT}]*$")]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


def _checked_instant(value: str) -> str:
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)", value):
        raise ValueError("expected a time such as 2025-01-31T12:00:00Z, with its zone")
    datetime.fromisoformat(value)
    return value


Instant = Annotated[str, AfterValidator(_checked_instant)]


def camel_case(name: str) -> str:
    """The name under which a field is published: `data_name` is `dataName`."""
    first, *rest = name.split("_")
    return first + "".join(map(str.capitalize, rest))


class Frozen(BaseModel):
    """A part of a report; written under names in camelCase where a task publishes it as it is."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=camel_case,
        validate_by_name=True,
        validate_by_alias=True,
    )


class OperatingPoint(Frozen):
    """The threshold that turns a probability into a call, and what was measured there."""

    threshold: Probability
    sensitivity: Probability
    specificity: Probability
    n_positive: Annotated[int, Field(ge=1)]
    n_negative: Annotated[int, Field(ge=1)]
    unit: Line = "per case"
    origin: Line = "validation split"


class Provenance(Frozen):
    """What made the report, from what, and when; `data_*` name the source that the case was read from."""

    model: Line
    r1jax_version: Line
    checkpoint_sha256: Sha256
    data_name: Line
    data_fingerprint: Sha256
    created: Instant


class Envelope(Frozen):
    """What a report of any task says beside its findings; it is always preliminary."""

    case_id: Line
    status: Literal["preliminary"] = "preliminary"
    synthetic: bool
    language: Language
    provenance: Provenance


def one_line(text: str) -> str:
    """The text as a report can carry it in one line: a space for each character that it cannot."""
    return re.sub(f"[\t\n\r{NOT_TEXT}\ud800-\udfff]", " ", text)
