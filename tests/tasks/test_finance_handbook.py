"""Loader, features, split and figures together against a published table, on the public stream of the handbook.

Source: Le Borgne et al., Reproducible Machine Learning for Credit Card Fraud Detection, chapter 3, baseline: logistic
regression, trained on a week, delay of a week, tested on the next one: AUROC .871, average precision .606, card
precision .291.
"""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from r1jax.data.transaction_files import read_transactions
from r1jax.data.transaction_history import window_features
from r1jax.data.transactions import DAY
from r1jax.tasks.finance.metrics import card_precision, rank_fraud

FIRST = int(np.datetime64("2018-07-25", "D").astype(int))
WEEK = 7


def test_logistic_regression_scores_what_the_handbook_says(shared_data):
    stream = read_transactions(str(shared_data / "fraud_handbook"))
    day, fraud = stream.seconds // DAY, stream.fraud == 1
    train = np.flatnonzero((day >= FIRST) & (day < FIRST + WEEK))
    known, parts = set(stream.customer[train][fraud[train]].tolist()), []
    for today in range(FIRST + 2 * WEEK, FIRST + 3 * WEEK):
        known |= set(stream.customer[(day == today - WEEK - 1) & fraud].tolist())  # cards that are blocked by then
        rows = np.flatnonzero(day == today)
        parts.append(rows[~np.isin(stream.customer[rows], list(known))])
    test = np.concatenate(parts)
    assert (len(train), fraud[train].sum(), len(test), fraud[test].sum()) == (67_240, 598, 58_264, 385)
    features = window_features(stream, WEEK * DAY).astype(np.float64)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(features[train], fraud[train])
    score = model.predict_proba(features[test])[:, 1]
    ranking = rank_fraud(fraud[test], score, stream.amount[test])
    assert ranking.counts.auc()[0] == pytest.approx(0.871, abs=1.5e-3)
    assert ranking.counts.average_precision()[0] == pytest.approx(0.606, abs=1.5e-3)
    cards = card_precision(fraud[test], score, stream.customer[test], day[test])
    assert cards.mean() == pytest.approx(0.291, abs=1e-3)
