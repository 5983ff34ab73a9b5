"""The report of one alert as plain data: what is recommended, on which ground, and what made it.

It shares its envelope with the medical report. `r1jax/serve/risk_reports.py` writes it as JSON and as XML.
"""

import math
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from r1jax.errors import UserError
from r1jax.tasks.envelope import (
    Envelope,
    Frozen,
    Instant,
    Language,
    Line,
    OperatingPoint,
    Probability,
    Provenance,
    one_line,
)
from r1jax.tasks.finance.alerts import ACTIONS, BANDS, Action, Band, Policy
from r1jax.tasks.finance.reasons import CATALOGUE, MOST

NOTICE = "Research software: a recommendation to a human investigator, not a decision."


class Reason(Frozen):
    """What raises the score, and by how much; `span` is the part of the note that it rests on."""

    code: Literal[tuple(CATALOGUE)]
    text: Line
    contribution: Annotated[float, Field(gt=0)]
    """Added to the log-odds of fraud."""
    span: Line | None = None


class Explanation(Frozen):
    """The check that the contributions of all inputs add up."""

    method: Literal["integrated gradients"]
    baseline: float
    """Log-odds of a typical transaction of the period, read by the experts that read this one."""
    output: float
    """Log-odds of this one."""
    rest: float
    """What everything that is no reason of the report adds or takes away."""
    residual: float
    """Difference between both that the contributions of all inputs together miss: output - baseline is the sum of the
    reasons, the rest and this."""
    complete: bool
    """Whether that is little enough (`TOLERANCE`); where it is not, the reasons are not to be relied on."""


class AlertPoint(OperatingPoint):
    """The threshold of an alert; what it counts and where it was chosen are always said."""

    unit: Line
    origin: Line


def _add_rules(schema: dict[str, Any]) -> None:
    """Adds to the JSON Schema what no single field can say: one action a band, and no reason twice."""
    schema["oneOf"] = [
        {"properties": {"band": {"const": band}, "action": {"const": action}}}
        for band, action in zip(BANDS, ACTIONS, strict=True)
    ]
    schema["properties"]["reasons"]["allOf"] = [
        {"contains": {"properties": {"code": {"const": code}}}, "minContains": 0, "maxContains": 1}
        for code in CATALOGUE
    ]


class RiskReport(Envelope):
    """Everything that leaves the system about one alert."""

    model_config = ConfigDict(json_schema_extra=_add_rules)

    resource_type: Literal["RiskReport"]
    status: Literal["preliminary"]
    notice: Literal["Research software: a recommendation to a human investigator, not a decision."]
    time: Instant
    customer: Line
    terminal: Line
    amount: Annotated[float, Field(ge=0)]
    score: Probability
    """Before calibration; bands are decided by it."""
    probability: Probability
    """After calibration."""
    band: Band
    action: Action
    operating_point: AlertPoint
    step_up_threshold: Probability
    block_probability: Probability
    reasons: tuple[Reason, ...] = Field(default=(), max_length=MOST)
    explanation: Explanation | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> "RiskReport":
        """Refuses an action that is not the band's, and a reason that is given twice."""
        if ACTIONS[BANDS.index(self.band)] != self.action:
            raise ValueError(f"band {self.band} goes with action {ACTIONS[BANDS.index(self.band)]}, not {self.action}")
        codes = [reason.code for reason in self.reasons]
        if len(set(codes)) < len(codes):
            raise ValueError(f"reasons {', '.join(codes)}: one is given twice")
        return self


class Alert(Frozen):
    """What is told of one transaction, before wording."""

    transaction: str
    seconds: int
    customer: str
    terminal: str
    amount: float
    score: float
    probability: float
    band: int
    reasons: tuple[tuple[str, float, str], ...] = ()
    """Code, contribution, and span or the empty string."""
    explanation: Explanation | None = None


def build_report(
    alert: Alert, *, policy: Policy, provenance: Provenance, synthetic: bool, language: Language
) -> RiskReport:
    """Words one alert.

    Args:
      alert: What is told.
      policy: Thresholds of the bands.
      provenance: What made the score.
      synthetic: Whether the transaction was generated.
      language: Of the reasons' texts.

    Returns:
      The report; a pure function of the arguments.

    Raises:
      UserError: A number is not finite or a name cannot be written; names the transaction.
    """
    for name in ("amount", "score", "probability"):
        if not math.isfinite(getattr(alert, name)):
            raise UserError(f"transaction {alert.transaction!r}: {name} is {getattr(alert, name)}: check its input")
    point = AlertPoint(
        threshold=policy.review,
        sensitivity=policy.recall,
        specificity=1 - policy.false_positive_rate,
        n_positive=policy.n_positive,
        n_negative=policy.n_negative,
        unit="per transaction",
        origin=policy.origin,
    )
    return RiskReport(
        resource_type="RiskReport",
        status="preliminary",
        notice=NOTICE,
        case_id=one_line(alert.transaction),
        synthetic=synthetic,
        language=language,
        time=datetime.fromtimestamp(alert.seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        customer=one_line(alert.customer),
        terminal=one_line(alert.terminal),
        amount=alert.amount,
        score=alert.score,
        probability=alert.probability,
        band=BANDS[alert.band],
        action=ACTIONS[alert.band],
        operating_point=point,
        step_up_threshold=policy.step_up,
        block_probability=policy.block,
        reasons=tuple(
            Reason(code=code, text=CATALOGUE[code][language], contribution=gain, span=one_line(span).strip() or None)
            for code, gain, span in alert.reasons
        ),
        explanation=alert.explanation,
        provenance=provenance,
    )
