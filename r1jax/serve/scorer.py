"""A checkpoint that scores payments as they come in: history, model, calibration, band, and reasons if asked for."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from r1jax.arguments import EvalArguments
from r1jax.config import MeshConfig
from r1jax.data.transaction_cases import TransactionCases
from r1jax.data.transaction_history import History, Streams
from r1jax.data.transaction_live import LiveHistory, Payment
from r1jax.data.transaction_rows import Row, take
from r1jax.data.transactions import DAY, Transactions
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import make_mesh
from r1jax.serve.evaluate import restore_served, scoring_task
from r1jax.serve.explain import FINER, TYPICAL, Explainer
from r1jax.serve.finance_alerts import worded
from r1jax.serve.finance_judged import typical
from r1jax.serve.progress import progress
from r1jax.tasks.calibration import from_json
from r1jax.tasks.finance.alerts import ACTIONS, BANDS, Action, Band, make_policy
from r1jax.tasks.finance.operating import stored_curve
from r1jax.tasks.finance.report import Explanation
from r1jax.tasks.finance.task import Finance
from r1jax.train.checkpoint import Checkpoint

STEPS = 16
"""Points on the way of reasons; `FINER` times as many where they do not add up."""
RECENT = 1024
"""Last payments of a history among which typical ones are looked for."""


class Verdict(NamedTuple):
    """What follows for a payment."""

    payment: Payment
    score: float
    """Before calibration."""
    probability: float
    """Of fraud, after calibration."""
    band: Band
    action: Action
    reasons: tuple[tuple[str, float, str], ...]
    """Code, what it adds to the log-odds, and the words that it rests on or the empty string; see `Alert`."""
    explanation: Explanation | None
    """None where reasons were not asked for."""


class _Seen(NamedTuple):
    """What the model reads of a payment."""

    payment: Payment
    note: str
    features: Float32[np.ndarray, "1 F"]
    streams: Streams


class Scorer:
    """Scores payment after payment, as eval.py scores the same payments: within 1e-6 in fp32 on one device.

    Attributes:
      live: All that is known of the payments so far; may be replaced by one that was kept.
      start: The typical payment that reasons are told against; None where there is none yet.
    """

    def __init__(self, checkpoint: Checkpoint, *, alerts_per_day: float | None = None, batch: int = 1) -> None:
        """Reads the checkpoint; nothing is compiled yet.

        Args:
          checkpoint: Of the finance task.
          alerts_per_day: Replaces the budget of the checkpoint.
          batch: Payments that are scored together at most.

        Raises:
          UserError: It is damaged, of another task, reads payments through preprocessors, or has no thresholds.
        """
        config, where = checkpoint.config(), checkpoint.path
        if config.task.name != "finance":
            raise UserError(f"{where} is of the {config.task.name} task: only finance checkpoints score payments")
        if config.data.preprocess:
            raise UserError(
                f"{where} reads payments through data.preprocess {config.data.preprocess!r}, which a stream does not "
                "pass through: train without it"
            )
        stored = (checkpoint.meta()["validation"] or {}).get("operating_points", {}).get("both")
        if not stored:
            raise UserError(f"{where} has no thresholds, as no validation had both fraud and genuine payments")
        alerts = scoring_task(
            config, EvalArguments(checkpoint=str(where), alerts_per_day=alerts_per_day)
        ).finance.alerts
        self.policy = make_policy(stored_curve(stored["curve"]), alerts)
        self.calibration = from_json(stored["calibration"])
        self.task, self.batch = Finance(config), batch
        model, mesh = R1(config.model, self.task.heads), make_mesh(MeshConfig(), jax.devices()[:1])
        shapes = _any_cases(self.task.delay, config.task.finance.events)
        params = restore_served(checkpoint, config, model, self.task, mesh, shapes)
        self.live, self.start = LiveHistory(self.task.delay, config.task.finance.events), None
        mode = jax.tree.map(jnp.asarray, next(iter(self.task.modes().values())))
        # The weights are constants: handing over a hundred arrays takes a good part of the time of one payment.
        self.forward = jax.jit(
            lambda batch: self.task.outcomes(functools.partial(model.apply, {"params": params}), batch, mode)["fraud"]
        )
        self.explainer = Explainer(model, self.task, params, STEPS)

    def __call__(self, rows: Sequence[Row], explain: int = len(BANDS)) -> list[Verdict | bool | UserError]:
        """Takes the next rows.

        Args:
          rows: In their order.
          explain: First band whose payments get reasons; by default none.

        Returns:
          One answer a row: what follows for a payment, whether the payment of an outcome is still held, or why the row
          was refused, which changed nothing.

        Raises:
          UserError: A score is not finite.
        """
        answers: list[Any] = []
        seen: dict[int, _Seen] = {}
        for place, row in enumerate(rows):
            try:
                answers.append(found := take(self.live, row))
            except UserError as error:
                answers.append(error)
                continue
            if row.payment is not None:
                seen[place] = _Seen(row.payment, row.note, *found)
        places = list(seen)
        for first in range(0, len(places), self.batch):
            here = places[first : first + self.batch]
            for place, verdict in zip(here, self._judge([seen[place] for place in here], explain), strict=True):
                answers[place] = verdict
        return answers

    def read_history(self, table: Transactions) -> None:
        """Takes all payments of a table with their labels, and finds what is typical among the last of them.

        Args:
          table: Payments before any that was taken yet.
        """
        whose = table.customers.take(pa.array(table.customer)), table.terminals.take(pa.array(table.terminal))
        words = (column.to_pylist() for column in (table.ids, *whose))
        columns = (*words, table.seconds.tolist(), table.amount.tolist(), table.fraud.tolist())
        with progress("history", len(table)) as steps:
            for name, customer, terminal, seconds, amount, fraud in zip(*columns, strict=True):
                outcome = None if math.isnan(fraud) else fraud == 1
                take(self.live, Row(name, Payment(name, seconds, customer, terminal, amount), "", outcome))
                steps.advance(1)
        history = History(table, self.live.delay, self.live.events)
        last = np.arange(max(0, len(table) - RECENT), len(table))
        cases = TransactionCases("history", table, history, last)
        batches = [self.task.collate(cases.read_batch(np.array([i]))) for i in range(len(last))]
        scores = np.concatenate([np.asarray(self.forward(self._filled(batch)))[:1] for batch in batches])
        self.start = jax.device_get(self.explainer.typical(batches[i] for i in typical(scores, TYPICAL)))

    def _judge(self, seen: Sequence[_Seen], explain: int) -> list[Verdict]:
        """Scores payments in one pass."""
        batch = self._collated(seen)
        score = np.asarray(self.forward(self._filled(batch)))[: len(seen)]
        if not np.isfinite(score).all():
            name = seen[int(np.argmin(np.isfinite(score)))].payment.id
            raise UserError(f"transaction {name!r}: its score is not finite: check whether the training diverged")
        probability = self.calibration(score)
        bands = self.policy.bands(score, probability)
        verdicts = []
        for i, (payment, note, *_) in enumerate(seen):
            reasons, check = (), None
            if bands[i] >= explain:
                reasons, check = self._explain({name: x[i : i + 1] for name, x in batch.items()}, note)
            # str() gives the shortest digits that are still the same number in float32.
            rounded = float(str(score[i])), float(probability[i])
            verdicts.append(Verdict(payment, *rounded, BANDS[bands[i]], ACTIONS[bands[i]], reasons, check))
        return verdicts

    def _explain(
        self, batch: dict[str, np.ndarray], note: str
    ) -> tuple[tuple[tuple[str, float, str], ...], Explanation]:
        """Reasons of one payment."""
        if self.start is None:
            raise UserError("reasons need a typical payment to be told against: name earlier payments by --history")
        found = self.explainer.explain(batch, self.start)
        if not found.complete[0]:
            found = self.explainer.explain(batch, self.start, FINER)
        return worded(found, [note])[0]

    def _collated(self, seen: Sequence[_Seen]) -> dict[str, np.ndarray]:
        """What the model reads of some payments."""
        streams = Streams(*(np.concatenate(column) for column in zip(*(one.streams for one in seen), strict=True)))
        raw = {
            "case_id": [one.payment.id for one in seen],
            "series": streams.numbers,
            "series_state": streams.states,
            "series_valid": streams.valid,
            "table": np.concatenate([one.features for one in seen]),
            "text": [one.note for one in seen],
            "target.fraud": np.full(len(seen), np.nan, np.float32),
            "target.day": np.array([one.payment.seconds // DAY for one in seen], np.int32),
        }
        return self.task.collate(raw)

    def _filled(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with its last case repeated up to the size that is compiled."""
        missing = self.batch - len(batch["target.day"])
        if not missing:
            return batch
        return {name: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) for name, x in batch.items()}


def _any_cases(delay: int, events: int) -> TransactionCases:
    """One payment of nobody, for the shapes of what a model reads."""
    zero, name = np.zeros(1, np.int32), pa.array(["-"])
    table = Transactions(
        ids=name,
        seconds=np.zeros(1, np.int64),
        customer=zero,
        terminal=zero,
        amount=np.zeros(1, np.float32),
        fraud=np.zeros(1, np.float32),
        scenario=None,
        text=name,
        customers=name,
        terminals=name,
    )
    return TransactionCases("one payment", table, History(table, delay, events), np.zeros(1, np.int64))
