"""Charts as SVG: they show the numbers, in the page's colours, and leave Matplotlib's settings alone."""

import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from r1jax.serve import page_charts as charts
from r1jax.serve.page_charts import Scores
from r1jax.tasks.metrics import Estimate, average_precision, roc_auc


def scores(mode="both", n=200, seed=0, threshold=None):
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.4).astype(np.float32)
    return Scores("malignancy", mode, labels, 1 / (1 + np.exp(-rng.normal(size=n) - 2 * labels + 1)), threshold)


def lines(svg, variable):
    """Points of every line in a colour of the page."""
    found = []
    for path in ElementTree.fromstring(svg).iter("path"):
        if f"stroke: var(--{variable})" in path.get("style", "") and "fill: none" in path.get("style", ""):
            found.append(np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.get("d")), float))
    return found


def unit_square(points, svg):
    """SVG points as data: the line of chance goes from (0, 0) to (1, 1)."""
    chance = lines(svg, "muted")[0]
    return (points - chance[0]) / (chance[-1] - chance[0])


def area(points):
    return np.trapezoid(points[:, 1], points[:, 0])


def test_area_under_the_drawn_roc_curve_is_the_auc():
    curve = scores()
    svg = charts.roc_chart([curve])
    (line,) = lines(svg, "both")
    points = unit_square(line, svg)
    assert area(points) == pytest.approx(roc_auc(curve.labels, curve.scores), abs=0.005)


def test_area_under_the_drawn_precision_recall_curve_is_the_average_precision():
    curve = scores(n=25)
    svg = charts.precision_recall_chart([curve])
    (line,) = lines(svg, "both")
    chance = lines(svg, "muted")[0]
    left, right, prevalence = chance[0, 0], chance[-1, 0], float(curve.labels.mean())
    top = line[:, 1].min()  # precision 1, where nothing is called
    precision = 1 - (line[:, 1] - top) / (chance[0, 1] - top) * (1 - prevalence)
    points = np.stack([(line[:, 0] - left) / (right - left), precision], axis=1)
    assert area(points) == pytest.approx(average_precision(curve.labels, curve.scores), abs=0.003)


def test_modes_differ_in_colour_and_dashes():
    svg = charts.roc_chart([scores(mode, seed=k) for k, mode in enumerate(charts.COLOR)])
    styles = {path.get("style") for path in ElementTree.fromstring(svg).iter("path")}
    for mode, dashed in (("both", False), ("image-only", True), ("record-only", True)):
        (style,) = [s for s in styles if s and f"stroke: var(--{mode})" in s and "stroke-width: 1.2" not in s]
        assert ("stroke-dasharray" in style) == dashed


@pytest.mark.parametrize("n", [1, 2, 5000])
def test_any_number_of_cases_can_be_drawn(n):
    curve = scores(n=n, threshold=0.5)
    drawn = [charts.calibration_chart([curve]), charts.score_chart(curve)]
    if 0 < curve.labels.sum() < n:
        drawn += [charts.roc_chart([curve]), charts.precision_recall_chart([curve])]
    for svg in drawn:
        ElementTree.fromstring(svg)
        assert len(svg) < 100_000


def test_forest_shows_every_mode_and_widens_its_axis():
    figures = {"both": Estimate(0.9, 0.85, 0.95), "record_only": Estimate(0.4, 0.3, 0.5)}
    svg = charts.forest_chart([("Malignancy", figures, {"both": 0.97})], "AUC", low=0.5, title="AUC")
    texts = {text.text for text in ElementTree.fromstring(svg).iter("text")}
    assert {"Malignancy", "AUC", "0.3"} <= texts
    (whisker,), (other,), ceiling = lines(svg, "both"), lines(svg, "record-only"), lines(svg, "ink")[-1]
    assert np.ptp(other[:, 0]) == pytest.approx(2 * np.ptp(whisker[:, 0]), rel=0.01)
    assert ceiling[0, 0] > whisker[:, 0].max()


def test_colours_are_those_of_the_page_and_settings_stay():
    before = dict(matplotlib.rcParams)
    svg = charts.calibration_chart([scores(), scores("image_only", seed=1)])
    assert dict(matplotlib.rcParams) == before
    assert not re.search(r"#[0-9a-f]{6}", re.sub(r"url\(#\w+\)|href=\"#\w+\"|id=\"\w+\"", "", svg))
    assert "font-family" not in svg
    assert "<style" not in svg


def test_labels_of_ticks_are_not_rounded_away():
    curve = Scores("malignancy", "both", np.array([0.0, 1.0] * 20), np.linspace(0.01, 0.99, 40))
    texts = [t.text for t in ElementTree.fromstring(charts.score_chart(curve)).iter("text")]
    numbers = [float(t) for t in texts if t and re.fullmatch(r"[\d.]+", t)][6:]
    assert np.allclose(np.diff(numbers), np.diff(numbers)[0], atol=1e-9)
