"""The patients: distributions, the outcome model and the free text."""

import functools
import re

import numpy as np
import pytest

from r1jax.data.patients import (
    FACTORS,
    INTERCEPT,
    MISSING,
    PRESENCE,
    SYMPTOMS,
    attainable_probability,
    draw_patient,
    outcome_terms,
    sigmoid,
    write_text,
)
from r1jax.tasks.medical.schema import FINDING, FINDINGS, RECORD_FIELDS


@functools.lru_cache
def cohort(size=6000):
    """Many patients, drawn once."""
    return [draw_patient(np.random.default_rng((7, i))) for i in range(size)]


def column(name):
    """Terms of one factor."""
    return np.array([patient.terms for patient in cohort()])[:, [factor.name for factor in FACTORS].index(name)]


def test_factors_stand_by_side():
    sides = [factor.side for factor in FACTORS]
    assert sides == sorted(sides, key=["image", "table", "text"].index)
    tables = {factor.name for factor in FACTORS if factor.side == "table"}
    assert tables == {field.name for field in RECORD_FIELDS} - {"male", "crp", "hemoglobin"}


def test_outcome_terms_by_hand():
    findings = {"long_axis_mm": 25.0, "spiculation": 5.0, "texture": 3.0, "calcification": 5.0}
    record = dict(age=72.0, male=1.0, pack_years=40.0, family_history=1.0, prior_cancer=0.0, emphysema=1.0, cea=6.4)
    terms = outcome_terms(findings, record, {"hemoptysis": True, "weight_loss": False, "cough": True})
    weight = {factor.name: factor.weight for factor in FACTORS}
    expected = {
        "long_axis": np.log(2) * weight["long_axis"],
        "spiculation": 2 * weight["spiculation"],
        "part_solid": weight["part_solid"],
        "benign_calcification": weight["benign_calcification"],
        "age": weight["age"],
        "pack_years": 2 * weight["pack_years"],
        "family_history": weight["family_history"],
        "prior_cancer": 0.0,
        "emphysema": weight["emphysema"],
        "cea": np.log(2) * weight["cea"],
        "hemoptysis": weight["hemoptysis"],
        "weight_loss": 0.0,
    }
    np.testing.assert_allclose(terms, [expected[factor.name] for factor in FACTORS])


def test_probability_is_the_model():
    for patient in cohort()[:50]:
        assert patient.probability == pytest.approx(1 / (1 + np.exp(-INTERCEPT - patient.terms.sum())))
    np.testing.assert_allclose(sigmoid(np.array([-800.0, 0.0, 800.0])), [0, 0.5, 1])


def test_outcomes_are_calibrated_in_deciles():
    ill = [patient for patient in cohort() if patient.nodule]
    chance = np.array([patient.probability for patient in ill])
    outcome = np.array([patient.findings["malignancy"] for patient in ill])
    for rows in np.array_split(np.argsort(chance), 10):
        spread = np.sqrt((chance[rows] * (1 - chance[rows])).sum()) / len(rows)
        assert abs(outcome[rows].mean() - chance[rows].mean()) < 4 * spread + 1e-3
    assert 0.38 < outcome.mean() < 0.47


def test_shares_and_missing_values():
    present = np.array([patient.findings["nodule_present"] for patient in cohort()])
    table = np.stack([patient.table for patient in cohort()])
    assert present.mean() == pytest.approx(PRESENCE, abs=0.025)
    np.testing.assert_allclose(np.isnan(table).mean(axis=0), MISSING, atol=0.02)
    for values, field in zip(table.T, RECORD_FIELDS, strict=True):
        assert field.low <= np.nanmin(values) and np.nanmax(values) <= field.high
    for patient in cohort()[:200]:
        gone = {field.name for field, value in zip(RECORD_FIELDS, patient.table, strict=True) if np.isnan(value)}
        assert all(known == (factor.name not in gone) for known, factor in zip(patient.known, FACTORS, strict=True))


def test_findings_are_complete_and_legal():
    for patient in cohort()[:1000]:
        assert set(patient.findings) == {finding.name for finding in FINDINGS} - {"center_mm"}
        if patient.nodule is None:
            assert all(np.isnan(v) for name, v in patient.findings.items() if name != "nodule_present")
            continue
        for name, value in patient.findings.items():
            if FINDING[name].kind == "rating":
                assert value in range(1, len(FINDING[name].levels) + 1)
        assert 6 <= patient.findings["long_axis_mm"] <= 26


def test_every_rating_level_occurs():
    for finding in FINDINGS:
        if finding.kind == "rating":
            seen = {patient.findings[finding.name] for patient in cohort() if patient.nodule}
            assert seen == set(range(1, len(finding.levels) + 1)), finding.name


def test_image_and_record_are_independent():
    sides = np.array([factor.side == "image" for factor in FACTORS])
    terms = np.stack([patient.terms for patient in cohort()])
    image, record = terms[:, sides].sum(axis=1), terms[:, ~sides].sum(axis=1)
    assert abs(np.corrcoef(image, record)[0, 1]) < 0.05
    present = np.array([patient.nodule is not None for patient in cohort()])
    assert abs(record[present].mean() - record[~present].mean()) < 0.3


def test_what_carries_the_outcome():
    terms = np.stack([patient.terms for patient in cohort()])
    sides = np.array([factor.side for factor in FACTORS])
    image = terms[:, sides == "image"].sum(axis=1).var()
    record = terms[:, sides != "image"].sum(axis=1).var()
    assert terms[:, sides == "text"].sum(axis=1).var() < 0.2 * record
    assert column("long_axis").var() + column("benign_calcification").var() > 0.7 * image
    assert column("spiculation").var() < 0.1 * image


def test_reader_rates_the_picture_only():
    ill = [patient for patient in cohort() if patient.nodule]
    rating = np.array([patient.findings["malignancy_rating"] for patient in ill])
    sides = np.array([factor.side == "image" for factor in FACTORS])
    terms = np.stack([patient.terms for patient in ill])
    assert np.corrcoef(rating, terms[:, sides].sum(axis=1))[0, 1] > 0.85
    assert abs(np.corrcoef(rating, terms[:, ~sides].sum(axis=1))[0, 1]) < 0.06


def test_attainable_probability_averages_what_is_unknown():
    terms = np.array([[1.0, 2.0], [1.0, 2.0]])
    known = np.array([[True, True], [True, False]])
    population = np.array([[5.0, -1.0], [5.0, 3.0]])
    result = attainable_probability(terms, known, population)

    def chance(x):
        return 1 / (1 + np.exp(-INTERCEPT - x))

    np.testing.assert_allclose(result, [chance(3.0), (chance(0.0) + chance(4.0)) / 2])


def test_unknown_factors_stay_calibrated():
    """Frequencies of the outcome match the probabilities of a reader who sees the picture only."""
    ill = [patient for patient in cohort() if patient.nodule]
    terms = np.stack([patient.terms for patient in ill])
    known = np.broadcast_to([factor.side == "image" for factor in FACTORS], terms.shape)
    chance = attainable_probability(terms, known, np.stack([patient.terms for patient in cohort()[:1000]]))
    outcome = np.array([patient.findings["malignancy"] for patient in ill])
    for rows in np.array_split(np.argsort(chance), 5):
        assert outcome[rows].mean() == pytest.approx(chance[rows].mean(), abs=0.07)


def test_text_languages_and_length():
    texts = [patient.text for patient in cohort()]
    chinese = np.mean([bool(re.search("[\u4e00-\u9fff]", text)) for text in texts])
    size = np.array([len(text.encode()) for text in texts])
    print("UTF-8 bytes, quantiles 0 5 50 95 99 100 %:", np.quantile(size, [0, 0.05, 0.5, 0.95, 0.99, 1]))
    assert 0.45 < chinese < 0.55
    assert (size <= 96).mean() > 0.995 and size.min() > 15
    assert len(set(texts)) > 0.8 * len(texts)
    assert not any(re.search("[\u4e00-\u9fff]", text) and re.search("[A-Za-z]{3}", text) for text in texts)


@pytest.mark.parametrize("name", ["hemoptysis", "weight_loss"])
def test_text_tells_each_symptom_that_counts(name):
    """A reader with the wordings finds in every text whether the symptom is present, as the model says."""
    symptom = next(symptom for symptom in SYMPTOMS if symptom.name == name)
    words = {
        word.lower() for pair in (symptom.nouns, symptom.present, symptom.absent) for group in pair for word in group
    }
    absent = {word.lower() for group in symptom.absent for word in group}
    wrong = 0
    for patient, term in zip(cohort()[:1500], column(name), strict=False):
        text = patient.text.lower()
        found = max((word for word in words if word in text), key=len)
        # In a list the verb at the head of the clause decides.
        clause = next(clause for clause in re.split("; |；|，|\\. ", text) if found in clause)
        denied = found in absent or bool(re.match("denies |no |无|否认", clause))
        wrong += denied == (term > 0)
    assert wrong == 0


def test_text_is_pure_in_its_generator():
    stated = {"hemoptysis": True, "weight_loss": False}
    assert write_text(np.random.default_rng(5), stated) == write_text(np.random.default_rng(5), stated)
    assert len({write_text(np.random.default_rng(i), stated) for i in range(60)}) > 30
