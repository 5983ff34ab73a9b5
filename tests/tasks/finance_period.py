"""A scored period to test with."""

import numpy as np

from r1jax.config import AlertConfig
from r1jax.data.transactions import DAY
from r1jax.tasks.calibration import Calibration, from_json
from r1jax.tasks.finance.alerts import Policy, make_policy
from r1jax.tasks.finance.operating import operating_points, stored_curve
from r1jax.tasks.finance.scored import ScoredTransactions

MONDAY = 17_749 * DAY  # 2018-08-06


def period(n: int = 4000, days: int = 20, seed: int = 0, start: int = MONDAY) -> ScoredTransactions:
    """Three per cent fraud, of which the score finds the most; scenario 2 worst."""
    rng = np.random.default_rng(seed)
    seconds = np.sort(rng.integers(start, start + days * DAY, n))
    scenario = np.where(rng.random(n) < 0.03, rng.integers(1, 4, n), 0)
    strength = np.array([0.0, 6.0, 1.5, 4.0])[scenario]
    score = 1 / (1 + np.exp(-(rng.normal(-4, 1, n) + strength)))
    return ScoredTransactions(
        ids=[f"tx-{i}" for i in range(n)],
        seconds=seconds.astype(np.int64),
        amount=rng.gamma(2, 40, n).astype(np.float32),
        customer=rng.integers(0, 400, n),
        terminal=rng.integers(0, 300, n),
        fraud=(scenario > 0).astype(np.float32),
        scenario=scenario.astype(np.int64),
        score=score.astype(np.float32),
    )


def frozen(settings: AlertConfig, seed: int = 1) -> tuple[Policy, Calibration]:
    """Policy and calibration of another period of the same kind."""
    before = period(seed=seed, start=MONDAY - 30 * DAY)
    stored = operating_points(before.fraud, before.score.astype(np.float64), before.days, settings.calibration)
    return make_policy(stored_curve(stored["curve"]), settings), from_json(stored["calibration"])
