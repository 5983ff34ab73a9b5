"""The finance task: from a payment and what was known at it to the probability of fraud."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Array, Bool, Float, Key

from r1jax.config import Config
from r1jax.data.pipeline import Preprocessed, open_pipeline, original
from r1jax.data.source import Source
from r1jax.data.tokenizer import check_vocabulary
from r1jax.data.transaction_cases import TransactionCases, training_rows
from r1jax.data.transaction_files import column_names, read_transactions
from r1jax.data.transaction_history import History
from r1jax.data.transaction_simulator import attainable_recall, simulate
from r1jax.data.transactions import DAY, joined
from r1jax.errors import UserError
from r1jax.models.r1 import Inputs, Output
from r1jax.ops.losses import binary_cross_entropy, weighted_mean
from r1jax.tasks.finance import batch as b
from r1jax.tasks.finance.figures import RATE, fraud_figures, validation_table
from r1jax.tasks.finance.operating import operating_points, reference
from r1jax.tasks.finance.periods import period_rows
from r1jax.tasks.task import Figures

MODES = {
    "both": {"hide_numbers": False, "hide_notes": False},
    "transactions": {"hide_numbers": False, "hide_notes": True},
    "text": {"hide_numbers": True, "hide_notes": False},
}
"""What of a payment the model is shown."""


class Finance:
    """Payments in, a calibrated probability of fraud out (a `Task`)."""

    heads = (("fraud", 1),)
    language = False
    unit = "transactions"

    def __init__(self, config: Config) -> None:
        """Checks what the task needs of the config; nothing is read yet.

        Args:
          config: Model, task and data.

        Raises:
          UserError: An unknown preprocessor or column, or a vocabulary that is too small for the tokenizer.
        """
        if "text" in config.model.modalities:
            check_vocabulary(config.model.decoder.vocab_size)
        column_names(config.task.finance.columns)
        self.config = config
        self.pipeline = open_pipeline(config.data.preprocess, config.data.plugins)
        self.delay = round(config.task.finance.label_delay_days * DAY)
        self._opened: tuple[str, Any, History, int] | None = None

    def source(self, split: str) -> Source:
        """Opens the payments of `train`, `val`, `test` or `all`; those of training are a part of the genuine ones.

        Raises:
          UserError: The files are no stream of payments, or have none in the period.
        """
        finance, data = self.config.task.finance, self.config.data
        name, table, history, first = self._open()
        rows = first + period_rows(table.seconds[first:], split, finance)
        kept = finance.negatives_kept if split == "train" else 1.0
        if split == "train":
            rows = training_rows(table, rows, kept, data.seed)
        source: Source = TransactionCases(f"{name}, {split}", table, history, rows, kept)
        if self.pipeline.steps:
            if split == "train":
                self.pipeline.fit(source)
            source = Preprocessed(source, self.pipeline, data.seed)
        return source

    def _open(self) -> tuple[str, Any, History, int]:
        """Name, all payments, what is known at each, and the first that is not history alone; read once."""
        if self._opened is None:
            finance, data, first = self.config.task.finance, self.config.data, 0
            if data.path is None:
                table = simulate(data.seed, finance.simulated_customers, finance.simulated_days)
                name = f"synthetic transactions (generated, no person and no bank), seed {data.seed}"
            else:
                name, names = data.path, column_names(finance.columns)
                paths = (*finance.history, name)
                table = read_transactions(paths[0], finance.columns)
                for path in paths[1:]:
                    first = len(table)
                    table = joined(table, read_transactions(path, finance.columns), path, names)
            self._opened = name, table, History(table, self.delay, finance.events), first
        return self._opened

    def remarks(self, source: Source) -> list[str]:
        """Frauds and genuine payments to learn from, and what is lost of their notes.

        Raises:
          UserError: One of the two is missing.
        """
        cases = original(source)
        assert isinstance(cases, TransactionCases)
        frauds = int(np.nansum(cases.table.fraud[cases.rows]))
        if not 0 < frauds < len(cases):
            raise UserError(
                f"{cases.name} has {frauds} frauds among {len(cases)} transactions with a known label, but both kinds "
                "are needed: choose another period by --task.finance.train, or add the labels (docs/finance.md)"
            )
        note = f"note: {frauds} frauds and {cases.kept:.0%} of the genuine transactions ({len(cases) - frauds})"
        note += f"; labels are known after {self.config.task.finance.label_delay_days:g} days"
        return [note, *(f"warning: {line}" for line in self.note_warnings(cases))]

    def note_warnings(self, cases: TransactionCases) -> list[str]:
        """What of the notes the model cannot read: all of them where there are none, and the ends of long ones."""
        if "text" not in self.config.model.modalities:
            return []
        most = self.config.model.text_tokens - 1  # the first token marks the beginning
        written = cases.table.text
        sizes = np.zeros(0) if written is None else pc.binary_length(written.take(pa.array(cases.rows))).to_numpy()
        if not sizes.any():
            return ["the model reads notes, but none of these transactions has one: name their column by text=COLUMN"]
        cut = int((sizes > most).sum())
        return [f"{cut} of {len(sizes)} notes are longer than {most} bytes, and their ends are not read"] if cut else []

    def collate(self, raw: dict[str, Any]) -> dict[str, np.ndarray]:
        """Turns a source's batch into a flat dict of arrays."""
        return b.collate(raw, self.config.model.modalities, self.config.model.text_tokens)

    def prepare(self, batch: dict[str, Array], keys: Key[Array, " B"] | None = None) -> tuple[Inputs, dict[str, Array]]:
        """Scales a batch and, with keys, hides a modality of some cases; runs on the device.

        Args:
          batch: From `collate`.
          keys: A key for each case, of its randomness in training; None at evaluation.

        Returns:
          What the model reads, and "fraud".
        """
        arrays = {name: value for name, value in batch.items() if "target." not in name}
        targets = {"fraud": batch["target.fraud"]}
        here = jnp.ones(targets["fraud"].shape, bool)
        arrays["series"] = b.scale_events(arrays["series"])
        arrays["has_series"] = here
        if "table" in arrays:
            arrays["table"], arrays["has_table"] = b.scale_features(arrays["table"]), here
        inputs = Inputs(**arrays)
        rate = self.config.task.modality_dropout
        if keys is not None and rate > 0 and inputs.text is not None:
            draw = jax.vmap(jax.random.uniform)(keys)
            inputs = b.hide(inputs, draw > 1 - rate, draw < rate)
        return inputs, targets

    def weights(self, inputs: Inputs, targets: dict[str, Array]) -> dict[str, Float[Array, ""]]:
        """Known labels, and cases; arguments as in `Task`."""
        known = jnp.sum(~jnp.isnan(targets["fraud"])).astype(jnp.float32)
        return {"fraud": known, "balance": jnp.asarray(len(targets["fraud"]), jnp.float32)}

    def loss(
        self,
        output: Output,
        inputs: Inputs,
        targets: dict[str, Array],
        share: Float[Array, ""],
        weights: dict[str, Float[Array, ""]] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Binary cross-entropy of the known labels, and the balance loss; arguments as in `Task`."""
        task, fraud = self.config.task, targets["fraud"]
        own = self.weights(inputs, targets)
        weights = weights or own
        known = ~jnp.isnan(fraud)
        losses = binary_cross_entropy(
            output.heads["fraud"][:, 0], jnp.where(known, fraud, 0.0), smoothing=task.label_smoothing
        )
        parts = {"fraud": weighted_mean(losses, known.astype(jnp.float32), weights["fraud"])}
        total = parts["fraud"]
        if output.router:
            balance = jnp.mean(jnp.stack([stats.balance_loss for stats in output.router]))
            parts["balance"] = balance * (own["balance"] / weights["balance"])
            total = total + task.balance_weight * parts["balance"]
        return total, parts

    def modes(self) -> dict[str, dict[str, bool]]:
        """What can be shown: with notes, also each alone."""
        return MODES if "text" in self.config.model.modalities else {"both": MODES["both"]}

    @property
    def correction(self) -> np.float32:
        """What the logit of all payments is above that of those that were kept: log b, for a share b."""
        return np.float32(np.log(self.config.task.finance.negatives_kept))

    def outcomes(
        self, read: Callable[..., Output], batch: dict[str, Array], mode: dict[str, Bool[Array, "..."]]
    ) -> dict[str, Array]:
        """Probability of fraud among all payments, not only those that were kept for training.

        Keeping a share b of the genuine payments multiplies the odds by 1 / b, so p = s / (s + (1 - s) / b).

        Args:
          read: The model with its weights.
          batch: From `collate`.
          mode: An entry of `MODES`; of each switch one value, or one a case.

        Returns:
          "fraud" [B].
        """
        inputs, targets = self.prepare(batch)
        if len(self.modes()) > 1:
            everyone = jnp.ones(targets["fraud"].shape, bool)
            inputs = b.hide(inputs, everyone & mode["hide_numbers"], everyone & mode["hide_notes"])
        logit = read(inputs).heads["fraud"][:, 0]
        return {"fraud": jax.nn.sigmoid(logit + self.correction)}

    def figures(self, found: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> Figures:
        """Areas under both curves, and the recall at a false-positive rate of 0.3 %."""
        return dict(fraud_figures(targets["fraud"], found["fraud"]))

    def operating_points(
        self, found: dict[str, np.ndarray], targets: dict[str, np.ndarray]
    ) -> dict[str, dict[str, Any]]:
        """What thresholds yield here, the calibration, and what later periods are held against.

        Args:
          found: From `outcomes`.
          targets: From `collate`.

        Returns:
          As `operating_points`, and "reference"; empty without both kinds.
        """
        days = int(np.ptp(targets["day"])) + 1
        kind = self.config.task.finance.alerts.calibration
        points = operating_points(targets["fraud"], found["fraud"], days, kind)
        return points and points | {"reference": reference(targets["features"], found["fraud"], targets["day"])}

    def score(self, figures: Figures) -> float | None:
        """Area under the precision-recall curve; None where nothing can be judged."""
        return figures.get("auprc")

    def headline(self, figures: Figures) -> str:
        """The three figures."""
        return "  ".join(f"{name} {value:.3f}" for name, value in figures.items()) or "no transaction can be judged"

    def closing(self, figures: dict[str, Figures], source: Source, cases: int) -> str:
        """Figures of each way to show a payment, beside the attainable recall of generated ones."""
        shown = original(source)
        assert isinstance(shown, TransactionCases)
        ceilings = {}
        if shown.table.shown is not None:
            ceilings = attainable_recall(shown.table, shown.rows, self.delay, RATE)
        return validation_table(figures, ceilings, shown.table.fraud[shown.rows])
