"""The metrics of all findings against scikit-learn and NumPy on made-up predictions."""

import json

import numpy as np
import pytest
import sklearn.metrics

from r1jax.errors import UserError
from r1jax.tasks.intervals import figure_text
from r1jax.tasks.medical.evaluation import evaluate, evaluate_modalities, pick_cases
from r1jax.tasks.medical.schema import FINDINGS
from r1jax.tasks.medical.summary import rows, summary_lines

N = 300


def make(n=N, seed=0, skill=2.0):
    """Predictions of every finding with a given skill, and targets of which some are unknown."""
    rng = np.random.default_rng((n, seed))
    predictions, targets = {}, {}
    for finding in FINDINGS:
        truth_rng = np.random.default_rng((n, len(finding.name), finding.width))  # targets do not depend on the seed
        if finding.kind == "binary":
            truth = (truth_rng.random(n) < 0.4).astype(np.float32)
            predictions[finding.name] = 1 / (1 + np.exp(-(rng.normal(size=n) + skill * (truth - 0.5))))
        elif finding.kind == "rating":
            truth = truth_rng.integers(1, finding.width + 1, n).astype(np.float32)
            logits = rng.normal(size=(n, finding.width)) - skill * np.abs(
                np.arange(1, finding.width + 1) - truth[:, None]
            )
            predictions[finding.name] = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        elif finding.kind == "length":
            truth = truth_rng.uniform(4, 20, n).astype(np.float32)
            predictions[finding.name] = truth + rng.normal(size=n) + 0.5
        else:
            truth = truth_rng.normal(size=(n, 3)).astype(np.float32) * 5
            predictions[finding.name] = truth + rng.normal(size=(n, 3))
        truth[truth_rng.random(n) < 0.2] = np.nan
        targets[finding.name] = truth
    return {name: values.astype(np.float32) for name, values in predictions.items()}, targets


@pytest.fixture(scope="module")
def case():
    predictions, targets = make()
    return predictions, targets, evaluate(predictions, targets, resamples=100)


def known(case, name):
    predictions, targets, metrics = case
    keep = ~np.isnan(targets[name].reshape(N, -1)).any(axis=1)
    entry = metrics["findings"][name]
    assert (entry["n"], entry["excluded"]) == (keep.sum(), N - keep.sum())
    assert 0 < entry["excluded"] < N
    return predictions[name][keep], targets[name][keep], entry


def test_every_finding_is_measured_and_is_json(case):
    metrics = case[2]
    assert list(metrics["findings"]) == [finding.name for finding in FINDINGS]
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_every_figure_lies_within_its_interval(case):
    for name, entry in case[2]["findings"].items():
        figures = list(rows(entry))
        assert figures, name
        for row in figures:
            assert row.figure["low"] <= row.figure["value"] <= row.figure["high"], (name, row.text)
            assert row.figure["low"] < row.figure["high"], (name, row.text)


@pytest.mark.parametrize("name", ["nodule_present", "malignancy"])
def test_binary_figures_equal_sklearn(case, name):
    scores, labels, entry = known(case, name)
    assert entry["positives"] == labels.sum()
    assert entry["prevalence"] == pytest.approx(labels.mean())
    assert entry["auc"]["value"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores))
    precision = sklearn.metrics.average_precision_score(labels, scores)
    assert entry["average_precision"]["value"] == pytest.approx(precision)
    assert entry["brier"]["value"] == pytest.approx(sklearn.metrics.brier_score_loss(labels, scores))
    fpr, tpr, thresholds = sklearn.metrics.roc_curve(labels, scores, drop_intermediate=False)
    assert list(entry["sensitivity_at_specificity"]) == ["0.9", "0.95", "0.973", "0.99"]
    for level, figure in entry["sensitivity_at_specificity"].items():
        assert figure["value"] == pytest.approx(tpr[1 - fpr >= float(level)].max())
        assert ((scores >= figure["threshold"]) & (labels == 1)).sum() == round(figure["value"] * labels.sum())
    assert list(entry["specificity_at_sensitivity"]) == ["0.9", "0.95", "0.99"]
    for level, figure in entry["specificity_at_sensitivity"].items():
        assert figure["value"] == pytest.approx((1 - fpr)[tpr >= float(level)].max())


def test_frozen_threshold_is_used_and_its_origin_named(case):
    predictions, targets, here = case
    frozen = evaluate(predictions, targets, operating_points={"malignancy": 0.7}, resamples=20)["findings"]
    scores, labels, _ = known(case, "malignancy")
    point = frozen["malignancy"]["operating_point"]
    assert (point["threshold"], point["origin"], point["unit"]) == (0.7, "set on validation", "case")
    tn, fp, fn, tp = sklearn.metrics.confusion_matrix(labels, scores >= 0.7).ravel()
    assert point["counts"] == {"true_positive": tp, "false_negative": fn, "false_positive": fp, "true_negative": tn}
    assert point["sensitivity"]["value"] == pytest.approx(tp / (tp + fn))
    assert point["specificity"]["value"] == pytest.approx(tn / (tn + fp))
    for entry in (frozen["nodule_present"], here["findings"]["malignancy"]):
        assert entry["operating_point"]["origin"] == "set on this split (specificity 0.95)"
        assert entry["operating_point"]["specificity"]["value"] >= 0.95


@pytest.mark.parametrize("finding", [f for f in FINDINGS if f.kind == "rating"], ids=lambda f: f.name)
def test_rating_figures_equal_sklearn(case, finding):
    probabilities, truth, entry = known(case, finding.name)
    assert entry["accuracy"]["value"] == pytest.approx(np.mean(probabilities.argmax(axis=1) + 1 == truth))
    median = np.array([np.searchsorted(np.cumsum(p), 0.5) + 1 for p in probabilities])
    assert entry["mae"]["value"] == pytest.approx(np.abs(median - truth).mean())
    assert entry["within_one"]["value"] == pytest.approx(np.mean(np.abs(median - truth) <= 1))
    levels = range(1, finding.width + 1)
    kappa = sklearn.metrics.cohen_kappa_score(truth, median, labels=levels, weights="quadratic")
    assert entry["quadratic_kappa"]["value"] == pytest.approx(kappa)
    assert entry["majority_share"] == pytest.approx(max(np.mean(truth == level) for level in levels))


def test_texture_in_three_classes(case):
    probabilities, truth, entry = known(case, "texture")
    summed = np.stack([probabilities[:, :2].sum(1), probabilities[:, 2:4].sum(1), probabilities[:, 4]], axis=1)
    group = np.where(truth <= 2, 0, np.where(truth <= 4, 1, 2))
    assert entry["three_class"]["accuracy"]["value"] == pytest.approx(np.mean(summed.argmax(axis=1) == group))
    assert "three_class" not in case[2]["findings"]["margin"]


def test_sizes_and_places_in_mm(case):
    predicted, truth, entry = known(case, "long_axis_mm")
    assert entry["mae_mm"]["value"] == pytest.approx(np.abs(predicted - truth).mean(), rel=1e-5)
    assert entry["bias_mm"]["value"] == pytest.approx((predicted - truth).mean(), rel=1e-4)
    assert entry["relative_error"]["value"] == pytest.approx((np.abs(predicted - truth) / truth).mean(), rel=1e-5)
    predicted, truth, entry = known(case, "center_mm")
    distance = np.sqrt(((predicted - truth) ** 2).sum(axis=1))
    assert entry["mean_error"]["value"] == pytest.approx(distance.mean(), rel=1e-5)
    assert entry["median_error"]["value"] == pytest.approx(np.median(distance), rel=1e-5)


def test_mean_ratings_of_readers_count_towards_the_nearest_level():
    probabilities = np.eye(5, dtype=np.float32)[[3, 2]]
    predictions, targets = {"margin": probabilities}, {"margin": np.array([3.5, 2.4], np.float32)}
    entry = evaluate(predictions, targets, resamples=10)["findings"]["margin"]
    assert entry["accuracy"]["value"] == 0.5
    assert entry["mae"]["value"] == pytest.approx((0.5 + 0.6) / 2)


def test_share_of_the_way_to_the_ceiling(case):
    predictions, targets, _ = case
    metrics = evaluate(predictions, targets, ceilings={"malignancy": 0.95}, resamples=50)["findings"]
    auc, share = metrics["malignancy"]["auc"], metrics["malignancy"]["share_of_ceiling"]
    for key in ("value", "low", "high"):
        assert share[key] == pytest.approx((auc[key] - 0.5) / 0.45)
    assert "ceiling" not in metrics["nodule_present"]


def test_perfect_and_constant_predictions():
    labels = np.repeat([0.0, 1.0], 20).astype(np.float32)
    perfect = evaluate({"malignancy": labels}, {"malignancy": labels}, resamples=50)["findings"]["malignancy"]
    assert perfect["auc"]["value"] == 1
    assert perfect["ece"]["value"] == perfect["brier"]["value"] == 0
    sensitivity = perfect["operating_point"]["sensitivity"]
    assert sensitivity == pytest.approx({"value": 1, "low": 0.8389, "high": 1}, abs=1e-4)  # not certain: 20 of 20
    constant = evaluate({"malignancy": np.full(40, 0.5)}, {"malignancy": labels}, resamples=50)["findings"][
        "malignancy"
    ]
    assert constant["auc"] == {"value": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_leaves_figures_undefined_in_valid_json(label):
    scores, labels = np.linspace(0, 1, 10), np.full(10, label)
    metrics = evaluate({"malignancy": scores}, {"malignancy": labels}, resamples=20)
    json.dumps(metrics, allow_nan=False)
    entry = metrics["findings"]["malignancy"]
    assert entry["auc"] == {"value": None, "low": None, "high": None}
    assert entry["brier"]["value"] is not None
    assert any("undefined" in line for line in summary_lines(metrics))


def test_nothing_known_about_a_finding(case):
    predictions, targets, _ = case
    targets = {**targets, "center_mm": np.full((N, 3), np.nan), "malignancy": np.full(N, np.nan)}
    metrics = evaluate(predictions, targets, resamples=10)["findings"]
    assert metrics["center_mm"]["n"] == metrics["malignancy"]["n"] == 0
    assert metrics["malignancy"]["excluded"] == N
    assert list(rows(metrics["malignancy"])) == []


def test_no_cases_at_all():
    empty = {"malignancy": np.zeros(0), "center_mm": np.zeros((0, 3)), "margin": np.zeros((0, 5))}
    metrics = evaluate(empty, {**empty, "margin": np.zeros(0)})
    assert [entry["n"] for entry in metrics["findings"].values()] == [0, 0, 0]


def test_both_modalities_against_each_alone():
    (good, targets), (poor, _) = make(skill=2.0), make(seed=1, skill=1.0)
    metrics = evaluate_modalities({"record_only": poor, "both": good, "image_only": poor}, targets, resamples=200)
    assert list(metrics) == ["both", "image_only", "record_only", "differences"]
    assert metrics["both"] == evaluate(good, targets, resamples=200)
    difference = metrics["differences"]["image_only"]["malignancy"]
    aucs = [metrics[mode]["findings"]["malignancy"]["auc"]["value"] for mode in ("both", "image_only")]
    assert difference["auc"]["value"] == pytest.approx(aucs[0] - aucs[1])
    assert difference["auc"]["low"] > 0  # a clear gain
    assert difference["n"] == metrics["both"]["findings"]["malignancy"]["n"]
    json.dumps(metrics, allow_nan=False)


def test_differences_are_paired():
    """Nearly the same scores: their AUC differ far less than each of them varies."""
    predictions, targets = make()
    other = {**predictions, "malignancy": predictions["malignancy"] * np.float32(0.99)}
    noise = np.random.default_rng(0).normal(size=N).astype(np.float32) * 0.003
    other["malignancy"] = np.clip(other["malignancy"] + noise, 0, 1)
    metrics = evaluate_modalities({"both": predictions, "image_only": other}, targets, resamples=200)
    difference = metrics["differences"]["image_only"]["malignancy"]["auc"]
    auc = metrics["both"]["findings"]["malignancy"]["auc"]
    assert difference["high"] - difference["low"] < 0.2 * (auc["high"] - auc["low"])


def test_modes_may_be_missing_and_thresholds_and_ceilings_belong_to_modes():
    predictions, targets = make()
    only = {"nodule_present": predictions["nodule_present"]}
    metrics = evaluate_modalities(
        {"image_only": only},
        targets,
        operating_points={"image_only": {"nodule_present": 0.25}},
        ceilings={"image_only": {"nodule_present": 0.9}},
        resamples=10,
    )
    assert list(metrics) == ["image_only", "differences"]
    assert metrics["differences"] == {}
    entry = metrics["image_only"]["findings"]["nodule_present"]
    assert entry["operating_point"]["threshold"] == 0.25
    assert entry["ceiling"] == 0.9


def test_groups_widen_the_intervals():
    predictions, targets = make(100)
    five = [{name: np.repeat(values, 5, axis=0) for name, values in part.items()} for part in (predictions, targets)]
    plain = evaluate(*five, resamples=200)
    grouped = evaluate(*five, groups=np.repeat(np.arange(100), 5), resamples=200)
    assert "groups" in grouped["interval"]
    for name in five[0]:
        for row, wide in zip(rows(plain["findings"][name]), rows(grouped["findings"][name]), strict=True):
            assert wide.figure["value"] == row.figure["value"]
        key = {"binary": "auc", "rating": "mae", "length": "mae_mm", "vector": "mean_error"}[
            plain["findings"][name]["kind"]
        ]
        widths = [part["findings"][name][key]["high"] - part["findings"][name][key]["low"] for part in (plain, grouped)]
        assert widths[1] > 1.5 * widths[0]


def spoil(predictions, targets, name):
    """Breaks one thing about the second known case of a finding."""
    index = np.flatnonzero(~np.isnan(targets["malignancy"]))[1]
    if name == "nan":
        predictions["malignancy"][index] = np.nan
        return rf"'malignancy': the predictions of 1 of 300 cases are not finite \(the first is case {index}\)"
    if name == "logit":
        predictions["malignancy"] *= 40
        return r"'malignancy': probability .* is not between 0 and 1"
    if name == "unknown":
        predictions["malignancie"] = predictions.pop("malignancy")
        return "'malignancie' is no finding of the schema .did you mean 'malignancy'"
    if name == "no target":
        del targets["margin"]
        return "'margin' is predicted but has no target"
    if name == "length":
        predictions["margin"] = predictions["margin"][:-1]
        return "do not fit together"
    if name == "levels":
        predictions["margin"] = predictions["margin"][:, :-1]
        return "'margin'.*do not fit together"
    if name == "logits of a rating":
        predictions["margin"] -= 1
        return "'margin': predictions are no probabilities of its 5 levels"
    if name == "rating":
        targets["margin"][:] = 6
        return "'margin': targets reach from 6 to 6, not 1..5"
    targets["long_axis_mm"][:] = 0
    return "target length is 0 mm"


@pytest.mark.parametrize(
    "name", ["nan", "logit", "unknown", "no target", "length", "levels", "logits of a rating", "rating", "size"]
)
def test_bad_input_is_refused_in_one_sentence(name):
    predictions, targets = make()
    message = spoil(predictions, targets, name)
    with pytest.raises(UserError, match=message):
        evaluate(predictions, targets, resamples=2)


def test_nan_prediction_of_an_unknown_case_does_not_matter():
    predictions, targets = make()
    expected = evaluate(predictions, targets, resamples=5)
    predictions["malignancy"][np.isnan(targets["malignancy"])] = np.nan
    assert evaluate(predictions, targets, resamples=5) == expected


def test_unknown_mode_is_refused():
    with pytest.raises(UserError, match="'image' is unknown.*'image_only'"):
        evaluate_modalities({"image": {}}, {})


def test_picked_cases_are_the_worst_mistakes_and_typical_right_calls():
    labels = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, np.nan])
    scores = np.array([0.4, 0.1, 0.9, 0.8, 0.6, 0.2, 0.7, 0.99, 0.1, 1.0])
    assert pick_cases(labels, scores, 0.5, each=1) == [
        (1, "false negative"),
        (7, "false positive"),
        (2, "true positive"),
        (8, "true negative"),
    ]
    picked = pick_cases(labels, scores, 0.5, each=2)
    assert [i for i, kind in picked if kind == "true positive"] == [2, 4]  # the surest and the least sure
    assert [i for i, kind in picked if kind == "false negative"] == [1, 0]
    assert len(picked) == 8


def test_figures_as_text():
    figure = {"value": 0.98765, "low": 0.9, "high": 1.0}
    assert figure_text(figure, "1") == ("0.988", "0.900 to 1.000")
    assert figure_text(figure, "%") == ("98.8 %", "90.0 to 100.0")
    assert figure_text({"value": 1.5, "low": None, "high": None}, "mm") == ("1.50 mm", "")
    assert figure_text({"value": None, "low": None, "high": None}, "mm") == ("undefined", "")


def test_summary_shows_headline_figures_of_all_modes():
    predictions, targets = make()
    metrics = evaluate_modalities({"both": predictions, "record_only": predictions}, targets, resamples=10)
    lines = summary_lines(metrics)
    assert "image + record" in lines[0]
    assert "record only" in lines[0]
    value = figure_text(metrics["both"]["findings"]["malignancy"]["auc"], "1")[0]
    assert sum(line.startswith("  AUC  ") for line in lines) == 2
    assert any(line.startswith("  AUC gained") and line.endswith("0.000 [0.000, 0.000]") for line in lines)
    assert any(line.startswith("  AUC ") and line.count(value) == 2 for line in lines)
    assert max(map(len, lines)) <= 120
    assert len(summary_lines(metrics["both"])) == len(lines) - 3  # without the head and the gains
