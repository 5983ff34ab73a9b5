"""The cases of the page: which, where the model and the truth see the nodule, what both say, and the saliency."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from r1jax.data.pipeline import original
from r1jax.serve.case_reports import Reporter
from r1jax.serve.page_slices import Marker, Picture
from r1jax.serve.scored import Scored
from r1jax.tasks.medical.batch import PICTURES
from r1jax.tasks.medical.canonical import BinaryResult, FindingResult, LengthResult, RatingResult, Report
from r1jax.tasks.medical.evaluation import pick_cases
from r1jax.tasks.medical.schema import FINDING, Finding

Saliency = Callable[[list[int], str], list[Float[np.ndarray, "..."]]]
"""From indices of cases and the picture's modality to one map a case."""


def gallery(reporter: Reporter, count: int, finding: str, saliency: Saliency) -> list[Picture]:
    """Chooses cases and draws them up.

    Args:
      reporter: Predictions and reports.
      count: Cases at most.
      finding: What the choice and the saliency are about.
      saliency: Computes the maps.

    Returns:
      The pictures, mistakes first; none where the model or the data has no picture.
    """
    scored = reporter.scored
    picture = next(
        (name for name in PICTURES if name in scored.reads and name in scored.source.schema.modalities), None
    )
    if picture is None or count == 0:
        return []
    chosen = _choose(scored, count, finding, _pictured(scored, picture))
    if not chosen:
        return []
    indices = [index for index, _ in chosen]
    maps, raw = saliency(indices, picture), scored.source.read_batch(np.array(indices))
    pictures = []
    for row, (index, outcome) in enumerate(chosen):
        report, truth = reporter.report(index, raw, row), {name: v[index] for name, v in scored.targets.items()}
        pixels, spacing = raw[picture][row], tuple(float(step) for step in raw[f"{picture}_spacing"][row])
        pictures.append(
            Picture(
                case_id=scored.ids[index],
                outcome=outcome,
                pixels=pixels,
                spacing=spacing,
                predicted=_predicted_marker(report, pixels.shape, spacing),
                truth=_true_marker(truth, pixels.shape, spacing),
                saliency=maps[row],
                report=report.conclusion,
                facts=_facts(report, truth),
            )
        )
    return pictures


def _pictured(scored: Scored, picture: str) -> Bool[np.ndarray, "n"]:
    """Cases that have the picture; folders say so in their flags, generated cases all have it."""
    source = original(scored.source)
    flags = source.cases.has.get(f"has_{picture}") if hasattr(source, "cases") else None
    return np.ones(len(scored.ids), bool) if flags is None else flags[source.rows]


def _choose(scored: Scored, count: int, name: str, shown: Bool[np.ndarray, "n"]) -> list[tuple[int, str]]:
    """Mistakes and right calls of a binary finding; ratings by how far off they are; else cases spread evenly."""
    values = scored.predicted[scored.main][name].astype(np.float64)
    kind = FINDING[name].kind
    truth = np.where(shown, scored.targets[name], np.nan) if kind != "vector" else np.full(len(shown), np.nan)
    known, threshold = np.flatnonzero(~np.isnan(truth)), scored.threshold(scored.main, name)
    if kind == "binary" and threshold is not None and len(known):
        return pick_cases(truth.astype(np.float64), values, threshold, each=-(-count // 4))[:count]
    if kind == "rating" and len(known):
        off = np.abs(values[known].argmax(axis=1) + 1 - truth[known])
        order = known[np.argsort(-off, kind="stable")]
        worst, rest = order[: count // 2], order[count // 2 :]
        spread = rest[np.linspace(0, len(rest) - 1, min(count - len(worst), len(rest))).round().astype(int)]
        levels = dict(zip(known.tolist(), off.tolist(), strict=True))
        return [(int(i), _distance(name, levels[int(i)])) for i in [*worst, *spread]]
    index = np.flatnonzero(shown)
    index = index[np.linspace(0, len(index) - 1, min(count, len(index))).round().astype(int)]
    return [(int(i), "no known answer") for i in index]


def _distance(name: str, levels: float) -> str:
    words = name.replace("_", " ")
    return f"{words} right" if levels == 0 else f"{words} off by {levels:g}"


def _voxels(center: np.ndarray, shape: tuple[int, ...], spacing: tuple[float, ...]) -> tuple[float, ...]:
    """An offset (z, y, x) in mm from the centre as voxels; an image has its last two axes."""
    offset = center[-len(shape) :]
    return tuple((n - 1) / 2 + float(mm) / step for n, mm, step in zip(shape, offset, spacing, strict=True))


def _predicted_marker(report: Report, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Marker | None:
    """Where the report puts the nodule; a report without a call describes none."""
    named = {result.name: result for result in report.findings}
    if "center_mm" not in named:
        return None
    length = named.get("long_axis_mm")
    return Marker(
        _voxels(np.array(named["center_mm"].value), shape, spacing),
        length.value if isinstance(length, LengthResult) else None,
    )


def _true_marker(
    truth: dict[str, np.ndarray | np.floating], shape: tuple[int, ...], spacing: tuple[float, ...]
) -> Marker | None:
    if "center_mm" not in truth or np.isnan(truth["center_mm"]).any():
        return None
    length = float(truth.get("long_axis_mm", np.float32(np.nan)))
    return Marker(_voxels(truth["center_mm"], shape, spacing), None if np.isnan(length) else length)


def _facts(report: Report, truth: dict[str, np.ndarray | np.floating]) -> tuple[tuple[str, str, str], ...]:
    """Finding, what the model says, what is true; without findings that neither says anything of."""
    said = {result.name: _said(result) for result in report.findings}
    rows = []
    for finding in FINDING.values():
        if finding.name in truth:
            model, true = said.get(finding.name, "-"), _true(finding, truth[finding.name])
            if (model, true) != ("-", "-"):
                words = finding.name.removesuffix("_mm").replace("_", " ").replace("center", "centre")
                rows.append((words, model, true))
    return tuple(rows)


def _said(result: FindingResult) -> str:
    if isinstance(result, BinaryResult):
        return f"{result.call} ({result.probability:.2f})"
    if isinstance(result, RatingResult):
        return f"{result.level} ({result.probability:.2f})"
    if isinstance(result, LengthResult):
        return f"{result.value:.1f} mm"
    return f"{', '.join(f'{mm:.1f}' for mm in result.value)} mm"


def _true(finding: Finding, value: np.ndarray | np.floating) -> str:
    if np.isnan(value).any():
        return "-"
    match finding.kind:
        case "binary":
            return "present" if value == 1 else "absent"
        case "rating":
            return finding.levels[int(value) - 1]
        case "length":
            return f"{float(value):.1f} mm"
        case _:
            return f"{', '.join(f'{float(mm):.1f}' for mm in value)} mm"
