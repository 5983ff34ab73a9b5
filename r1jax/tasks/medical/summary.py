"""Figures in words: the rows of a table, and the headline figures as lines of text."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from r1jax.tasks.intervals import figure_text
from r1jax.tasks.medical.evaluation import MODES
from r1jax.tasks.medical.figures import ECE_BINS
from r1jax.tasks.medical.schema import FINDINGS

_TEXT = {
    "auc": ("AUC", "1"),
    "share_of_ceiling": ("AUC: way from chance to ceiling", "%"),
    "average_precision": ("average precision", "1"),
    "sensitivity": ("sensitivity at the operating point", "%"),
    "specificity": ("specificity at the operating point", "%"),
    "ece": (f"calibration error (ECE, {ECE_BINS} equal bins)", "1"),
    "brier": ("Brier score", "1"),
    "accuracy": ("accuracy", "%"),
    "within_one": ("within one level", "%"),
    "mae": ("mean absolute error", "levels"),
    "quadratic_kappa": ("quadratic kappa", "1"),
    "mean_error": ("mean distance", "mm"),
    "median_error": ("median distance", "mm"),
    "mae_mm": ("mean absolute error", "mm"),
    "bias_mm": ("bias", "mm"),
    "relative_error": ("mean relative error", "%"),
}
_HEADLINES = (
    "auc",
    "share_of_ceiling",
    "sensitivity_at_specificity.0.973",
    "operating_point.sensitivity",
    "operating_point.specificity",
    "ece",
    "quadratic_kappa",
    "three_class.accuracy",
    "median_error",
    "mae_mm",
)


class Row(NamedTuple):
    """One figure in words; `figure` has value, low and high, and `unit` is 1, %, mm or levels."""

    key: str
    text: str
    unit: str
    figure: dict[str, Any]


def rows(entry: dict[str, Any]) -> Iterator[Row]:
    """The figures of one finding (an entry of "findings"), in reading order."""
    for key, part in entry.items():
        if not isinstance(part, dict):
            continue
        if "value" in part:
            yield Row(key, *_TEXT[key], part)
        elif key in ("sensitivity_at_specificity", "specificity_at_sensitivity"):
            for level, figure in part.items():
                yield Row(f"{key}.{level}", f"{key.replace('_', ' ')} {level}", "%", figure)
        elif key == "operating_point":
            for name in ("sensitivity", "specificity"):
                yield Row(f"{key}.{name}", *_TEXT[name], part[name])
        else:
            yield Row(f"{key}.accuracy", "accuracy in 3 classes (1-2, 3-4, 5)", "%", part["accuracy"])


def summary_lines(metrics: dict[str, Any]) -> list[str]:
    """The headline figures as a plain table, one column a mode.

    Args:
      metrics: What `evaluate` or `evaluate_modalities` returned.
    """
    modes = {"": metrics} if "findings" in metrics else {mode: metrics[mode] for mode in MODES if mode in metrics}
    lines = [_line("", [MODES.get(mode, "") for mode in modes])] if len(modes) > 1 else []
    for finding in FINDINGS:
        entries = [part["findings"].get(finding.name, {}) for part in modes.values()]
        first = next((entry for entry in entries if entry), None)
        if first is None:
            continue
        name = finding.name.removesuffix("_mm").replace("_", " ")
        columns = [{row.key: row for row in rows(entry)} for entry in entries]
        wanted = [key for key in _HEADLINES if any(key in column for column in columns)]
        if finding.kind == "binary" or not wanted:
            lines.append(f"{name} ({_cases(first)})")
        for key in wanted:
            text = next(column[key].text for column in columns if key in column)
            label = f"  {text}" if finding.kind == "binary" else f"{name}: {text}"
            lines.append(_line(label, [_cell(column.get(key)) for column in columns]))
            if key == "auc" and metrics.get("differences"):
                gains = [metrics["differences"].get(mode, {}).get(finding.name) for mode in modes]
                lines.append(_line("  AUC gained by having both", [_gain(gain) for gain in gains]))
    return lines


def _cases(entry: dict[str, Any]) -> str:
    if "positives" not in entry:
        return f"n = {entry['n']}"
    point = entry["operating_point"]
    counts = f"n = {entry['n']}, {entry['positives']} positive"
    return f"{counts}; threshold {point['threshold']:.3f} {point['origin']}, unit: one {point['unit']}"


def _line(label: str, cells: list[str]) -> str:
    return (f"{label:46}" + "".join(f"{cell:25}" for cell in cells)).rstrip()


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    value, interval = figure_text(row.figure, row.unit)
    return f"{value} [{interval.replace(' to ', ', ')}]" if interval else value


def _gain(gain: dict[str, Any] | None) -> str:
    return "-" if gain is None else _cell(Row("", "", "1", gain["auc"]))
