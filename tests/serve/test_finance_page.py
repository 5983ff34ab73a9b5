"""The page of a scored period: one complete file, with the figures that it was given."""

import re

import numpy as np
import pytest

from r1jax.config import AlertConfig
from r1jax.serve.finance_charts import Labelled
from r1jax.serve.finance_page import ALERTS, write_page
from r1jax.tasks.finance.evaluation import evaluate, period_counts
from r1jax.tasks.finance.report import Alert, build_report
from r1jax.tasks.intervals import figure_text
from tests.serve.structure import Structure
from tests.tasks.finance_period import frozen, period
from tests.tasks.reports import PROVENANCE

SETTINGS = AlertConfig(per_day=6.0, step_up_per_day=20.0)


@pytest.fixture(scope="module")
def material():
    scored = period()
    policy, calibration = frozen(SETTINGS)
    probability = calibration(scored.score)
    scores = {"both": scored.score, "transactions": scored.score**2, "text": scored.score[::-1]}
    figures = evaluate(
        scored, scores, probability, policy, SETTINGS, ceilings={"both": 0.9, "transactions": 0.8}, resamples=5
    )
    metrics = {
        "warnings": ["<careful>"],
        "counts": period_counts(scored),
        "label_delay_days": 3.5,
        "alerts": 70,
        "explanations": {"mean_difference": 3.0, "mean_residual": 0.01, "largest_residual": 0.04},
        "figures": figures,
    }
    alert = Alert(
        transaction="tx-1",
        seconds=int(scored.seconds[0]),
        customer="<b>K</b>",
        terminal="终端 1",
        amount=1234.5,
        score=0.9,
        probability=0.8,
        band=2,
        reasons=(("note", 1.25, "not <confirmed>"), ("amount", 0.5, "")),
    )
    report = build_report(alert, policy=policy, provenance=PROVENANCE, synthetic=True, language="en")
    amount = scored.amount.astype(np.float64)
    return (
        metrics,
        Labelled(scored.fraud == 1, amount, {k: v.astype(np.float64) for k, v in scores.items()}, 20),
        report,
    )


@pytest.fixture(scope="module")
def page(material, tmp_path_factory):
    metrics, labelled, report = material
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_page(
        path,
        title="finance: <test>",
        metrics=metrics,
        labelled=labelled,
        reports=[report] * 70,
        provenance={"Data": "synthetic"},
        synthetic=True,
    )
    return path.read_text("utf-8")


def test_the_page_is_whole_and_safe(page):
    structure = Structure(page)
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert "<b>K</b>" not in page and "<confirmed>" not in page and "<careful>" not in page
    ids = structure.values("id")
    assert len(ids) == len(set(ids))
    assert page.count("<svg viewBox") >= 6 and "SYNTHETIC DATA" in structure.text


def test_the_page_shows_its_figures(page, material):
    text, figures = Structure(page).text, material[0]["figures"]
    both = figures["modes"]["both"]
    for figure, unit in (
        (both["at_rate"]["0.003"]["recall"], "%"),
        (both["auprc"], "1"),
        (figures["modes"]["text"]["auroc"], "1"),
        (figures["differences"]["text"]["auprc"], "1"),
        (figures["operating"]["false_positive_rate"], "rate"),
    ):
        value, interval = figure_text(figure, unit)
        assert value.split()[0] in text and interval in text
    assert "nobody could reach more than 90.0 %" in text
    assert "scenario 2" in text and "labels are known after 3.5 days" in text
    assert f"{figures['alerts_per_day']['0.003']:.1f} alerts a day" in text


def test_the_page_says_why_the_claim_is_no_accuracy(page, material):
    text, figures = Structure(page).text, material[0]["figures"]
    assert f"right for {100 * figures['accuracy']['nothing_is_fraud']:.2f} %" in text
    assert f"false positive rate of {100 * figures['modes']['both']['rate_for_claimed_recall']['value']:.1f} %" in text


def test_alerts_have_actions_reasons_and_the_check(page):
    structure = Structure(page)
    assert f"{ALERTS} of 70 alerts" in structure.text
    assert page.count("<q>not &lt;confirmed&gt;</q>") == ALERTS
    assert "review" in structure.text and "+1.25" in structure.text and "1,234.50" in structure.text
    assert "0.010 on average (0.040 at most)" in structure.text


def test_without_labels_there_are_alerts_alone(material, tmp_path):
    metrics, _, report = material
    write_page(
        tmp_path / "index.html",
        title="t",
        metrics=metrics | {"figures": None, "explanations": None, "warnings": []},
        labelled=None,
        reports=[report],
        provenance={},
        synthetic=False,
    )
    page = (tmp_path / "index.html").read_text("utf-8")
    text = Structure(page).text
    assert "no label is known yet" in text and "tx-1" in text
    assert "Recall" not in text and "SYNTHETIC" not in text and "<svg viewBox" not in page


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_leaves_figures_undefined_on_a_whole_page(material, tmp_path, label):
    metrics, _, report = material
    scored = period(60, 3)._replace(fraud=np.full(60, label, np.float32), scenario=None)
    policy, calibration = frozen(SETTINGS)
    scores = {"both": scored.score}
    figures = evaluate(scored, scores, calibration(scored.score), policy, SETTINGS, resamples=3)
    exact = {"both": scored.score.astype(np.float64)}
    write_page(
        tmp_path / "index.html",
        title="t",
        metrics=metrics | {"figures": figures},
        labelled=Labelled(scored.fraud == 1, scored.amount.astype(np.float64), exact, 3),
        reports=[],
        provenance={},
        synthetic=False,
    )
    text = Structure((tmp_path / "index.html").read_text("utf-8")).text
    assert "undefined" in text and "No transaction reaches the threshold" in text
