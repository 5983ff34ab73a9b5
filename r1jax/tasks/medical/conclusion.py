"""The conclusion of a report: templates filled from its fields, so that nothing can be invented."""

from r1jax.tasks.envelope import Language, OperatingPoint
from r1jax.tasks.medical.canonical import (
    COVERAGE,
    BinaryResult,
    FindingResult,
    LengthResult,
    LungRads,
    RatingResult,
    RecordValue,
    VectorResult,
)
from r1jax.tasks.medical.schema import FINDING
from r1jax.tasks.medical.wording import SENTENCES, term


def render(
    findings: tuple[FindingResult, ...],
    lung_rads: LungRads | None,
    *,
    missing: tuple[str, ...],
    record: tuple[RecordValue, ...],
    record_text: str,
    synthetic: bool,
    language: Language,
) -> str:
    """Writes the conclusion.

    Args:
      findings: What is reported, in the order of the schema.
      lung_rads: The category by rule, where it applies.
      missing: Modalities that the case lacks.
      record: Fields of the patient record.
      record_text: Text of the patient record.
      synthetic: Whether the case was generated, which is said first.
      language: Of the text.

    Returns:
      One statement a line; the last line says that this is no medical device.
    """
    say = SENTENCES[language]
    lines = [
        *([say["synthetic"]] if synthetic else []),
        *(sentence for result in findings for sentence in _finding_sentences(result, language)),
        *_presence_sentences(findings, language),
        *_lung_rads_sentences(lung_rads, language),
        *_input_sentences(missing, record, record_text, language),
        say["preliminary"],
        say["notice"],
    ]
    return "\n".join(lines)


def _presence_sentences(findings: tuple[FindingResult, ...], language: Language) -> list[str]:
    """Says why the descriptors of a nodule are left out, or on what assumption they stand."""
    presence = next((result for result in findings if result.name == "nodule_present"), None)
    if presence is None:
        return [SENTENCES[language]["assumed"]]
    called = isinstance(presence, BinaryResult) and presence.call == "present"
    return [] if called else [SENTENCES[language]["not_described"]]


def _finding_sentences(result: FindingResult, language: Language) -> list[str]:
    say = SENTENCES[language]
    finding = term(FINDING[result.name].text, language)
    match result:
        case BinaryResult():
            point = result.operating_point
            call = say[result.call].format(threshold=_three_decimals(point.threshold) if point else "")
            line = say["binary"].format(finding=finding, call=call, probability=_three_decimals(result.probability))
            return [line, _operating_point_sentence(point, language)] if point else [line]
        case LengthResult():
            return [say[result.name].format(result.value)]
        case VectorResult():
            return [say[result.name].format(*result.value)]
        case RatingResult():
            values = {
                "level": term(result.level, language, result.name),
                "probability": _three_decimals(result.probability),
                "levels": say["comma"].join(term(level, language, result.name) for level in result.likely_levels),
            }
            return [say["rating"].format(finding=finding, coverage=COVERAGE, **values)]


def _operating_point_sentence(point: OperatingPoint, language: Language) -> str:
    return SENTENCES[language]["operating_point"].format(
        sensitivity=_three_decimals(point.sensitivity),
        specificity=_three_decimals(point.specificity),
        positives=point.n_positive,
        negatives=point.n_negative,
        unit=term(point.unit, language),
        origin=term(point.origin, language),
    )


def _lung_rads_sentences(assessment: LungRads | None, language: Language) -> list[str]:
    if assessment is None:
        return []
    say = SENTENCES[language]
    template = say["lung_rads" if assessment.categories else "lung_rads_none"]
    categories = say["lung_rads_or"].join(assessment.categories)
    basis = term(assessment.basis, language)
    return [template.format(categories=categories, basis=basis), term(assessment.limits, language)]


def _input_sentences(
    missing: tuple[str, ...], record: tuple[RecordValue, ...], record_text: str, language: Language
) -> list[str]:
    say = SENTENCES[language]
    read = [_record_value(value, language) for value in record if value.value is not None]
    lines = (
        [say["missing"].format(names=say["comma"].join(term(name, language) for name in missing))] if missing else []
    )
    lines += [say["record"].format(names=say["comma"].join(read))] if read else []
    return lines + ([say["text"].format(length=len(record_text))] if record_text else [])


def _record_value(value: RecordValue, language: Language) -> str:
    """Name and value of a record field; a field of 0 and 1 says so in brackets, and is yes or no here."""
    name, say = term(value.text, language), SENTENCES[language]
    if value.unit == "1":
        return f"{name.partition(' (')[0].partition('（')[0]} {say['yes' if value.value else 'no']}"
    return f"{name} {value.value:g} {term(value.unit, language)}"


def _three_decimals(probability: float) -> str:
    """Three decimals, without saying 0 or 1 of a number that is neither."""
    if 0 < probability < 0.0005:
        return "<0.001"
    return ">0.999" if 0.9995 <= probability < 1 else f"{probability:.3f}"
