"""What the reports of all tasks have in common: frozen models that refuse unknown fields and NaN, origin, status."""

import re
from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema

# Inside a character class: what neither FHIR nor XML 1.0 (section 2.2) can carry.
NOT_TEXT = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff"

Language = Literal["en", "zh"]
Probability = Annotated[float, Field(ge=0, le=1)]
Line = Annotated[str, StringConstraints(pattern=f"^[^\t\n\r{NOT_TEXT}]*[^\\s{NOT_TEXT}][^\t\n\r{NOT_TEXT}]*$")]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


def _checked_instant(value: str) -> str:
    """Refuses a 30th of February, which the pattern takes."""
    datetime.fromisoformat(value)
    return value


# Zones reach as far as those of XML Schema.
_INSTANT = (
    r"^[12][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?"
    r"(Z|[+\-]((0[0-9]|1[0-3]):[0-5][0-9]|14:00))$"
)
Instant = Annotated[
    str,
    StringConstraints(pattern=_INSTANT),
    AfterValidator(_checked_instant),
    WithJsonSchema({"type": "string", "format": "date-time", "pattern": _INSTANT}),
]
"""A time such as 2025-01-31T12:00:00Z, with its zone."""


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
