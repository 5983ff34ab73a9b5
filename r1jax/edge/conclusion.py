"""The conclusion of a report: sentences filled from its fields."""

from typing import Any

Tree = dict[str, Any]


def conclusion_of(
    texts: Tree,
    language: str,
    results: list[Tree],
    assessment: Tree | None,
    *,
    missing: list[str],
    record: list[Tree],
    text: str,
    synthetic: bool,
) -> str:
    """Writes the conclusion.

    Args:
      texts: Wording of the reports.
      language: en or zh.
      results: What is reported.
      assessment: Lung-RADS by rule, where it applies.
      missing: Modalities that the case lacks.
      record: Fields of the record.
      text: Record text.
      synthetic: Whether the case was generated.

    Returns:
      One statement a line.
    """
    writer = _Writer(texts, language)
    say = writer.say
    lines = [say["synthetic"]] if synthetic else []
    for result in results:
        lines += writer.finding(result)
    presence = next((result for result in results if result["name"] == "nodule_present"), None)
    if presence is None or presence["call"] != "present":
        lines.append(say["assumed" if presence is None else "not_described"])
    if assessment is not None:
        categories = say["lung_rads_or"].join(assessment["categories"])
        template = say["lung_rads" if categories else "lung_rads_none"]
        lines.append(template.format(categories=categories, basis=writer.term(assessment["basis"])))
        lines.append(writer.term(texts["lung_rads"]["limits"]))
    read = [writer.record(field) for field in record if field["value"] is not None]
    lines += [say["missing"].format(names=say["comma"].join(map(writer.term, missing)))] if missing else []
    lines += [say["record"].format(names=say["comma"].join(read))] if read else []
    lines += [say["text"].format(length=len(text))] if text else []
    return "\n".join([*lines, say["preliminary"], say["notice"]])


class _Writer:
    """Sentences of one language."""

    def __init__(self, texts: Tree, language: str) -> None:
        self.texts, self.say = texts, texts["sentences"][language]
        self.terms = texts["terms"][language]
        self.names = {finding["name"]: finding["text"] for finding in texts["findings"]}

    def term(self, english: str, field: str = "") -> str:
        """A term in the language, or the English one where the table has none."""
        return self.terms.get(f"{field}.{english}", self.terms.get(english, english))

    def finding(self, result: Tree) -> list[str]:
        """What is said of one finding."""
        name, say = result["name"], self.say
        if result["kind"] in ("length", "vector"):
            return [say[name].format(*result["value"])]
        finding = self.term(self.names[name])
        if result["kind"] == "rating":
            levels = say["comma"].join(self.term(level, name) for level in result["likely"])
            values = {
                "level": self.term(result["level"], name),
                "probability": _three_decimals(result["probabilities"][result["rating"] - 1]),
            }
            return [say["rating"].format(finding=finding, coverage=self.texts["coverage"], levels=levels, **values)]
        point = result["point"]
        call = say[result["call"]].format(threshold=_three_decimals(point["threshold"]) if point else "")
        line = say["binary"].format(finding=finding, call=call, probability=_three_decimals(result["probability"]))
        return [line, self._point(point)] if point else [line]

    def _point(self, point: Tree) -> str:
        return self.say["operating_point"].format(
            sensitivity=_three_decimals(point["sensitivity"]),
            specificity=_three_decimals(point["specificity"]),
            positives=point["n_positive"],
            negatives=point["n_negative"],
            unit=self.term(point["unit"]),
            origin=self.term(point["origin"]),
        )

    def record(self, field: Tree) -> str:
        """Name and value of a record field; one of 0 and 1 is yes or no."""
        name = self.term(field["text"])
        if field["unit"] == "1":
            return f"{name.partition(' (')[0].partition('（')[0]} {self.say['yes' if field['value'] else 'no']}"
        return f"{name} {field['value']:g} {self.term(field['unit'])}"


def _three_decimals(probability: float) -> str:
    """Three decimals, without saying 0 or 1 of a number that is neither."""
    if 0 < probability < 0.0005:
        return "<0.001"
    return ">0.999" if 0.9995 <= probability < 1 else f"{probability:.3f}"
