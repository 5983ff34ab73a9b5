"""Draws synthetic patients: nodule, record, free text, and an outcome from a stated model (no real patient).

The outcome is malignancy ~ Bernoulli(sigmoid(INTERCEPT + sum of weight x value over FACTORS)): a logistic model over
image and record factors in the spirit of the Brock (PanCan) model (McWilliams et al., "Probability of cancer in
pulmonary nodules detected on first screening CT", N Engl J Med 2013; 369:910-919, doi:10.1056/NEJMoa1214726). The
coefficients are our own, chosen for the difficulty of the task: they say nothing about real patients.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float64

from r1jax.data.phantom import Nodule
from r1jax.tasks.medical.schema import FINDINGS, RECORD_FIELDS


@dataclass(frozen=True)
class Factor:
    """One term of the outcome model, `weight` x value; `unit` says what the value counts from and in."""

    name: str
    side: Literal["image", "table", "text"]
    unit: str
    weight: float


FACTORS: tuple[Factor, ...] = (
    Factor("long_axis", "image", "ln(mm / 12.5)", 4.8),
    Factor("spiculation", "image", "rating steps above 3", 0.5),
    Factor("part_solid", "image", "1 if texture is rated 2 to 4", 1.5),
    Factor("benign_calcification", "image", "1 if popcorn, laminated, solid or central", -4.4),
    Factor("age", "table", "decades above 62 years", 1.35),
    Factor("pack_years", "table", "20 pack-years", 1.15),
    Factor("family_history", "table", "1 if yes", 1.9),
    Factor("prior_cancer", "table", "1 if yes", 1.9),
    Factor("emphysema", "table", "1 if yes", 1.6),
    Factor("cea", "table", "ln(ng/mL / 3.2)", 2.4),
    Factor("hemoptysis", "text", "1 if stated", 1.9),
    Factor("weight_loss", "text", "1 if stated", 1.9),
)
INTERCEPT = -3.9
IMAGE_FACTORS = tuple(factor.name for factor in FACTORS if factor.side == "image")
"""They stand first in FACTORS."""

PRESENCE = 0.7
"""Share of cases with a nodule, which alone have an outcome to learn from."""
LONG_AXIS_MM = (6.0, 26.0)
"""Smallest and largest nodule; below 6 mm Lung-RADS asks for no more than the yearly screening."""
MISSING = 0.08
"""Chance that a number of the record is missing."""
BENIGN_PATTERNS = (1, 2, 3, 5)

# Free text, (English, Chinese); the first two findings count in FACTORS, the others are distractors.
Words = tuple[str, ...]


@dataclass(frozen=True)
class Symptom:
    """Wordings of one symptom: as a noun for lists, and as whole statements of presence and absence."""

    name: str
    frequency: float
    nouns: tuple[Words, Words]
    present: tuple[Words, Words]
    absent: tuple[Words, Words]


SYMPTOMS: tuple[Symptom, ...] = (
    Symptom(
        "hemoptysis",
        0.25,
        (("haemoptysis", "blood in sputum"), ("咯血", "痰中带血")),
        (("coughs up blood", "blood-streaked sputum", "recent haemoptysis"), ("痰中带血", "间断咯血", "咳出血丝痰")),
        (("no haemoptysis", "sputum clear of blood", "haemoptysis denied"), ("无咯血", "否认咯血", "痰中无血")),
    ),
    Symptom(
        "weight_loss",
        0.3,
        (("weight loss",), ("消瘦", "体重下降")),
        (("lost 5 kg", "weight is falling", "marked weight loss"), ("体重下降", "近来消瘦", "三月瘦了5公斤")),
        (("weight stable", "no weight loss", "weight unchanged"), ("体重无变化", "体重稳定", "无消瘦")),
    ),
    Symptom(
        "cough",
        0.5,
        (("cough",), ("咳嗽",)),
        (("dry cough", "coughs for 2 weeks", "chronic cough"), ("干咳两周", "偶有咳嗽", "慢性咳嗽")),
        (("no cough", "cough denied"), ("无咳嗽", "不咳")),
    ),
    Symptom(
        "fever",
        0.2,
        (("fever",), ("发热",)),
        (("fever at night", "mild fever"), ("夜间发热", "低热")),
        (("no fever", "afebrile"), ("无发热", "体温正常")),
    ),
    Symptom(
        "chest_pain",
        0.25,
        (("chest pain",), ("胸痛",)),
        (("some chest pain", "left chest pain"), ("偶有胸痛", "左侧胸痛")),
        (("no chest pain", "chest pain denied"), ("无胸痛", "否认胸痛")),
    ),
)
HISTORIES: tuple[Words, Words] = (
    ("", "", "Routine check", "Hypertension", "Diabetes", "Old TB", "Screening"),
    ("", "", "体检发现", "高血压史", "糖尿病史", "陈旧结核", "筛查"),
)
VERBS: tuple[tuple[Words, Words], tuple[Words, Words]] = (
    (("denies ", "no "), ("has ", "reports ")),
    (("无", "否认"), ("有", "诉")),
)
"""By language, then absent or present."""
CONJUNCTIONS: tuple[Words, Words] = ((" or ", " and "), ("、", "、"))


@dataclass(frozen=True)
class Patient:
    """One drawn case without its picture."""

    nodule: Nodule | None
    spare: Nodule
    """The nodule that would have been there (equal to `nodule` where there is one)."""
    table: Float[np.ndarray, " fields"]
    """The record in the order of RECORD_FIELDS, NaN where missing."""
    text: str
    findings: dict[str, float]
    """Every finding except the centre; NaN where it does not apply."""
    terms: Float64[np.ndarray, " factors"]
    """weight x value of every factor, in the order of FACTORS, missing values included as they truly are."""
    known: tuple[bool, ...]
    """Which factors can be known from picture and record (a missing number cannot)."""
    probability: float
    """Of malignancy, had everything been known; defined for a case without a nodule too."""


def sigmoid(logit: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Logistic function without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logit))


def _rating(value: float, thresholds: tuple[float, ...]) -> float:
    """1 plus the number of thresholds that the value reaches."""
    return 1.0 + sum(value >= threshold for threshold in thresholds)


def _pick(rng: np.random.Generator, options: Words) -> str:
    """Draws one of the wordings."""
    return options[int(rng.integers(len(options)))]


def draw_nodule(rng: np.random.Generator) -> tuple[Nodule, dict[str, float]]:
    """Draws a nodule and the ratings that a careful reader gives it.

    Args:
      rng: Source of randomness.

    Returns:
      The nodule, and its findings without presence, malignancy and centre.
    """
    long_axis = float(np.exp(rng.uniform(*map(math.log, LONG_AXIS_MM))))
    # Patterns need room; a small calcified nodule is calcified throughout.
    patterns = (1, 2, 3, 4, 5) if long_axis >= 7 else (3,)
    calcification = int(rng.choice(patterns)) if rng.random() < 0.32 else 6
    texture = 5 if calcification < 6 else int(rng.choice([1, 2, 3, 4, 5], p=[0.12, 0.08, 0.12, 0.1, 0.58]))
    core = (0.0, 0.35, 0.52, 0.7, 1.0)[texture - 1]
    # No semi-axis below 1.3 mm: the picture could not show it.
    roundness = min(1.0, max(rng.uniform(0.4, 1.0), 2.6 / long_axis))
    margin, lobulation, spiculation = (int(rng.integers(1, 6)) for _ in range(3))
    spikes = 0 if spiculation == 1 else int(rng.integers(4 * spiculation - 6, 4 * spiculation - 3))
    nodule = Nodule(
        place=(rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(-1, 1)),
        long_axis_mm=long_axis,
        roundness=roundness,
        core=core,
        softness=0.075 * (5 - margin) + rng.uniform(0, 0.04),
        lobulation=0.035 * (lobulation - 1) + rng.uniform(0, 0.015),
        spikes=spikes,
        calcification=calcification,
    )
    conspicuity = 1.6 * math.log(long_axis / 5) + 0.45 * (texture - 3) + rng.normal(0, 0.3)
    findings = {
        "long_axis_mm": long_axis,
        "texture": float(texture),
        "margin": float(margin),
        "spiculation": float(spiculation),
        "lobulation": float(lobulation),
        "calcification": float(calcification),
        "sphericity": _rating(roundness, (0.48, 0.6, 0.73, 0.86)),
        "subtlety": _rating(conspicuity, (0.0, 0.8, 1.6, 2.6)),
    }
    return nodule, findings


def _draw_record(rng: np.random.Generator) -> dict[str, float]:
    """Draws the true numbers of a record, rounded as a hospital would write them."""
    packs = 0.0 if rng.random() < 0.25 else round(min(rng.gamma(2.2, 15.0), 120.0))
    return {
        "age": float(min(max(round(rng.normal(62, 10)), 30), 92)),
        "male": float(rng.random() < 0.55),
        "pack_years": float(packs),
        "family_history": float(rng.random() < 0.2),
        "prior_cancer": float(rng.random() < 0.2),
        "emphysema": float(rng.random() < 0.3),
        "cea": max(round(3.2 * math.exp(rng.normal(0, 0.75)), 1), 0.2),
        "crp": round(6.0 * math.exp(rng.normal(0, 1.0)), 1),
        "hemoglobin": float(round(rng.normal(138, 14))),
    }


def write_text(rng: np.random.Generator, stated: dict[str, bool]) -> str:
    """Writes a short history in English or Chinese.

    Args:
      rng: Draws language, order and wording.
      stated: For each symptom to mention, by name, whether it is present.

    Returns:
      One short group of clauses, mostly below 96 UTF-8 bytes.
    """
    language = int(rng.integers(2))
    enumeration, separators = ((", ", ("; ",)), ("、", ("，", "；")))[language]
    symptoms = [SYMPTOMS[i] for i in rng.permutation(len(SYMPTOMS)) if SYMPTOMS[i].name in stated]
    clauses = []
    if rng.random() < 0.5:
        for symptom in symptoms:
            clauses.append(_pick(rng, (symptom.present if stated[symptom.name] else symptom.absent)[language]))
    else:
        for present in rng.permutation(2):
            nouns = [_pick(rng, symptom.nouns[language]) for symptom in symptoms if stated[symptom.name] == present]
            if nouns:
                verb = _pick(rng, VERBS[language][present])
                last = CONJUNCTIONS[language][present] + nouns.pop() if len(nouns) > 1 else nouns.pop()
                clauses.append(verb + enumeration.join(nouns) + last)
    body = _pick(rng, separators).join(clauses)
    parts = [part for part in (_pick(rng, HISTORIES[language]), body) if part]
    if language == 1:
        return "，".join(parts) + "。"
    return " ".join(f"{part[0].upper()}{part[1:]}." for part in parts)


def outcome_terms(findings: dict[str, float], record: dict[str, float], stated: dict[str, bool]) -> list[float]:
    """Evaluates the outcome model term by term.

    Args:
      findings: Of the nodule (`draw_nodule`).
      record: True numbers, without missing ones.
      stated: Symptoms that the text tells, by name; one that is not mentioned counts as absent.

    Returns:
      weight x value of every factor, in the order of FACTORS.
    """
    values = {
        **record,
        **{symptom.name: float(stated.get(symptom.name, False)) for symptom in SYMPTOMS},
        "long_axis": math.log(findings["long_axis_mm"] / 12.5),
        "spiculation": findings["spiculation"] - 3,
        "part_solid": float(2 <= findings["texture"] <= 4),
        "benign_calcification": float(findings["calcification"] in BENIGN_PATTERNS),
        "age": (record["age"] - 62) / 10,
        "pack_years": record["pack_years"] / 20,
        "cea": math.log(record["cea"] / 3.2),
    }
    return [factor.weight * values[factor.name] for factor in FACTORS]


def draw_patient(rng: np.random.Generator) -> Patient:
    """Draws one case; nodule and record are independent of each other except through the outcome.

    Args:
      rng: Source of randomness.

    Returns:
      The case without its picture.
    """
    spare, ratings = draw_nodule(rng)
    present = bool(rng.random() < PRESENCE)
    record = _draw_record(rng)
    missing = rng.random(len(RECORD_FIELDS)) < MISSING
    # The symptoms that count are always mentioned, of the distractors one or two.
    mentioned = [*SYMPTOMS[:2], *(SYMPTOMS[2 + i] for i in rng.permutation(3)[: rng.integers(1, 3)])]
    stated = {symptom.name: bool(rng.random() < symptom.frequency) for symptom in mentioned}
    terms = np.array(outcome_terms(ratings, record, stated))
    probability = float(sigmoid(INTERCEPT + terms.sum(keepdims=True))[0])
    suspicion = float(terms[: len(IMAGE_FACTORS)].sum()) + rng.normal(0, 0.8)
    ratings["malignancy_rating"] = _rating(suspicion, (-4.0, -1.5, 0.5, 2.5))
    ratings["malignancy"] = float(rng.random() < probability)
    findings = {finding.name: ratings.get(finding.name, math.nan) if present else math.nan for finding in FINDINGS}
    del findings["center_mm"]
    findings["nodule_present"] = float(present)
    lost = {field.name for field, gone in zip(RECORD_FIELDS, missing, strict=True) if gone}
    return Patient(
        nodule=spare if present else None,
        spare=spare,
        table=np.where(missing, np.nan, [record[field.name] for field in RECORD_FIELDS]),
        text=write_text(rng, stated),
        findings=findings,
        terms=terms,
        known=tuple(factor.name not in lost for factor in FACTORS),
        probability=probability,
    )


def attainable_probability(
    terms: Float64[np.ndarray, "B factors"],
    known: Bool[np.ndarray, "B factors"],
    population: Float64[np.ndarray, "K factors"],
) -> Float64[np.ndarray, " B"]:
    """Computes P(malignant | known factors) by averaging the model over the factors that are not known.

    Exact up to the size of `population`, because picture, record numbers and symptoms are drawn independently.

    Args:
      terms: weight x value of every factor (`Patient.terms`).
      known: Which of them a reader may use.
      population: Terms of reference patients that stand in for the unknown ones.

    Returns:
      One probability a case.
    """
    certain = INTERCEPT + np.where(known, terms, 0.0).sum(axis=1)
    hidden = (~known).astype(np.float64) @ population.T
    return sigmoid(certain[:, None] + hidden).mean(axis=1)
