"""The export of a finance checkpoint: from streams, features and note to score, calibrated probability and band."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from r1jax.data.pipeline import original
from r1jax.data.transaction_cases import TransactionCases
from r1jax.data.transaction_history import CHANNELS, FEATURES
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.serve.export_graph import Graph, Held, Limits, Port, constants, text_inputs, text_ports, tokenize
from r1jax.serve.scored import refuse_not_finite
from r1jax.tasks.calibration import Calibration, Platt, from_json
from r1jax.tasks.finance.alerts import ACTIONS, ALERT, BANDS, Policy, make_policy
from r1jax.tasks.finance.operating import NEVER, stored_curve
from r1jax.tasks.finance.report import NOTICE
from r1jax.tasks.finance.task import MODES, Finance
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.evaluation import Evaluator

BATCH = 256
CALIBRATED = 1e-5
"""Largest difference of a probability from what the checkpoint's calibration makes of the artefact's own score."""
LARGEST_LOG_ODDS = 27.631
"""Those of a score that lies 1e-12 from 1, as far as a calibration reads them."""


class FinanceExport:
    """What is exported of a finance checkpoint (an `Exported`), and what the checkpoint says of the payments.

    Attributes:
      scores: By mode, before calibration, in the checkpoint's own precision.
      policy: Thresholds of the bands.
      calibration: From scores to probabilities.
    """

    notice = NOTICE
    batch = BATCH
    decided = ("score",)
    generated = "Trained on generated payments: no person, no bank."

    def __init__(self, checkpoint: Checkpoint, evaluator: Evaluator, params: Any, source: Any) -> None:
        """Has the checkpoint score the payments.

        Args:
          checkpoint: The checkpoint.
          evaluator: Compiled forward pass of its config.
          params: Weights to serve.
          source: The payments.

        Raises:
          UserError: It has no thresholds, or a score is not finite.
        """
        stored = (checkpoint.meta()["validation"] or {}).get("operating_points", {}).get("both")
        if not stored:
            raise UserError(
                f"{checkpoint.path} has no thresholds, as no validation had both fraud and genuine payments: train on "
                "a period that has both"
            )
        self.task, self.source = evaluator.task, source
        self.shown = tuple(self.task.modes())
        found, _, ids = evaluator.predict(params, source, batch_size=BATCH, modes=self.shown)
        for mode, outcome in found.items():
            refuse_not_finite(outcome, ids, mode)
        self.scores = {mode: outcome["fraud"] for mode, outcome in found.items()}
        self.policy = make_policy(stored_curve(stored["curve"]), self.task.config.task.finance.alerts)
        self.calibration = from_json(stored["calibration"])
        self.ports = ports(self.task)

    @staticmethod
    def chosen(source: Any, count: int) -> np.ndarray:
        """Payments from all of the period, half of them frauds where there are so many.

        Most of the others are far from any threshold, and so would prove little.
        """
        cases = original(source)
        assert isinstance(cases, TransactionCases)
        fraud = cases.table.fraud[cases.rows] == 1
        frauds = _spread(np.flatnonzero(fraud), count // 2)
        return np.sort(np.concatenate([frauds, _spread(np.flatnonzero(~fraud), count - len(frauds))]))

    def graph(self, task: Finance, model: R1, params: Any) -> Graph:
        """As `exported_graph`, with the calibration and the thresholds of the checkpoint."""
        return exported_graph(task, model, params, self.calibration, self.policy)

    def inputs(self, raw: dict[str, Any]) -> dict[str, np.ndarray]:
        """As `raw_inputs`."""
        return raw_inputs(raw, self.ports)

    def hidden(self, inputs: dict[str, np.ndarray], shown: str) -> dict[str, np.ndarray]:
        """The same payments without their numbers or their note."""
        changed = dict(inputs)
        if MODES[shown]["hide_numbers"]:
            changed["has_numbers"] = np.zeros_like(inputs["has_numbers"])
        if MODES[shown]["hide_notes"]:
            changed |= {name: np.zeros_like(inputs[name]) for name in ("text", "text_bytes") if name in inputs}
        return changed

    def held(
        self, shown: str, raw: dict[str, Any], rows: np.ndarray, found: dict[str, np.ndarray], limits: Limits
    ) -> dict[str, Held]:
        """The score, whose band is the decision, and the probability that follows from it."""
        theirs, ours = self.scores[shown][rows], found["score"]
        low, high = (self._bands(theirs.astype(np.float64) + near) for near in (-limits.near, limits.near))
        same = (low <= found["band"]) & (found["band"] <= high)
        apart = np.abs(ours.astype(np.float64) - theirs), np.abs(found["probability"] - self.calibration(ours))
        score, probability = (np.nan_to_num(difference, nan=np.inf) for difference in apart)
        return {
            "score": Held("band", score, limits.probability, same, True),
            "probability": Held("probability", probability, CALIBRATED, probability <= CALIBRATED, False),
        }

    def _bands(self, score: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        return self.policy.bands(score, self.calibration(score))

    def points(self) -> dict[str, dict[str, Any]]:
        """One policy, whatever is shown."""
        return {"both": self.policy._asdict()}

    def needs(self) -> dict[str, Any]:
        """What a history must know to make the streams."""
        return {"history": {"events": self.task.config.task.finance.events, "label_delay_seconds": self.task.delay}}

    def texts(self) -> dict[str, Any]:
        """Bands and their actions, and which number of an event is the amount."""
        amount = CHANNELS.index("amount")
        return {"notice": NOTICE, "bands": BANDS, "actions": ACTIONS, "alert": ALERT, "amount": amount}


def ports(task: Finance) -> dict[str, Port]:
    """Describes what the graph reads.

    Args:
      task: The task.

    Returns:
      By name.
    """
    model, streams = task.config.model, (2, task.config.task.finance.events)
    order = "stream of the customer, then of the terminal; events in the order of time, the payment itself the last"
    numbers = f"{', '.join(CHANNELS)} of each event (amounts as in training, times in seconds); {order}"
    found = {
        "series": Port((*streams, len(CHANNELS)), "float32", "see meaning", numbers),
        "series_state": Port(streams, "int32", "1", "label of each event: 0 not known yet, 1 genuine, 2 fraud"),
        "series_valid": Port(streams, "bool", "1", "which events there are; those that lack come first"),
        "has_numbers": Port((), "bool", "1", "true; false lets the note speak alone, if the model reads notes"),
    }
    if "table" in model.modalities:
        names = f"{', '.join(FEATURES)} (docs/finance.md)"
        found["table"] = Port((len(FEATURES),), "float32", "see meaning", f"features of the payment: {names}")
    return found | (text_ports(model.text_tokens) if "text" in model.modalities else {})


def raw_inputs(raw: dict[str, Any], wanted: dict[str, Port]) -> dict[str, np.ndarray]:
    """Turns a source's batch into what the graph reads; all that is left to the host.

    Args:
      raw: What `TransactionCases.read_batch` returned.
      wanted: From `ports`.

    Returns:
      Arrays with a leading batch axis.
    """
    count = len(raw["case_id"])
    found = {"has_numbers": np.ones(count, bool)}
    for name, port in wanted.items():
        if name == "text":
            found |= text_inputs(raw.get("text", [""] * count), port)
        elif name not in ("has_numbers", "text_bytes"):
            found[name] = np.asarray(raw[name], port.dtype)
    return found


def exported_graph(task: Finance, model: R1, params: Any, calibration: Calibration, policy: Policy) -> Graph:
    """Puts everything between what is known of a payment and its band into one function of arrays.

    Args:
      task: The task.
      model: The model.
      params: Its weights, which become constants of the graph.
      calibration: From scores to probabilities.
      policy: Thresholds of the bands.

    Returns:
      (arrays of `ports` with a leading batch axis) -> "score" before calibration, "probability" after it, and "band",
      0 to 3.
    """
    edges = [first_score(band, calibration, policy) for band in range(1, len(BANDS))]

    def graph(inputs: dict[str, Array]) -> dict[str, Array]:
        read = functools.partial(model.apply, {"params": constants(params)})
        batch = {name: inputs[name] for name in ("series", "series_state", "series_valid")}
        batch["target.fraud"] = jnp.zeros(inputs["has_numbers"].shape, jnp.float32)  # its shape is asked for
        batch |= {"table": inputs["table"]} if "table" in inputs else {}
        if "text" in inputs:
            batch["text"], batch["text_valid"] = tokenize(inputs["text"], inputs["text_bytes"])
        mode = {"hide_numbers": ~inputs["has_numbers"], "hide_notes": jnp.zeros_like(inputs["has_numbers"])}
        score = task.outcomes(read, batch, mode)["fraud"]
        band = sum((score >= edge).astype(jnp.int32) for edge in edges)
        return {"score": score, "probability": calibrated(score, calibration), "band": band}

    return graph


def calibrated(score: Float[Array, " B"], calibration: Calibration) -> Float[Array, " B"]:
    """What a calibration says of scores, in fp32 and without a search, which LiteRT lacks.

    Args:
      score: Before calibration.
      calibration: Of the checkpoint.

    Returns:
      Probabilities.
    """
    if isinstance(calibration, Platt):
        odds = jnp.clip(jnp.log(score) - jnp.log1p(-score), -LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)
        return jax.nn.sigmoid(jnp.float32(calibration.slope) * odds + jnp.float32(calibration.intercept))
    knots, levels = (jnp.asarray(x, jnp.float32) for x in calibration)
    if len(knots) == 1:
        return jnp.broadcast_to(levels, score.shape)
    below = jnp.sum(score[:, None] >= knots[None, 1:-1], axis=1, dtype=jnp.int32)
    x, width = knots[below], jnp.diff(knots)[below]
    share = jnp.clip((score - x) / width, 0, 1)
    return levels[below] + share * jnp.diff(levels)[below]


def first_score(band: int, calibration: Calibration, policy: Policy) -> np.float32:
    """The least fp32 score of a band or one above it: so fp32 decides as the evaluation does, by fp64 probabilities.

    Args:
      band: Index into `BANDS`.
      calibration: From scores to probabilities; it never falls, nor do bands.
      policy: Thresholds of the bands.

    Returns:
      From 0 to the first number above 1, which no score reaches.
    """
    low, high = (int(np.float32(end).view(np.int32)) for end in (0, NEVER))
    while low < high:
        middle = (low + high) // 2  # positive numbers are in the order of their bits
        score = np.array([middle], np.int32).view(np.float32)
        reached = policy.bands(score, calibration(score))[0] >= band
        low, high = (low, middle) if reached else (middle + 1, high)
    return np.int32(low).view(np.float32)


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    """So many of the rows at most, evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
