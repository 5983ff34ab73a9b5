"""The records task: from a record's numbers, history and text to the probability of each class."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from r1jax.config import Config
from r1jax.data import tokenizer
from r1jax.data.credit_files import read_credit
from r1jax.data.phrase_agreement import read_agreed
from r1jax.data.phrase_files import CLASSES, read_phrases
from r1jax.data.pipeline import Preprocessed, open_pipeline, original
from r1jax.data.records import UNKNOWN, RecordCases, Records, held_out, in_periods, known
from r1jax.data.source import Source
from r1jax.data.stock_features import COUNTS
from r1jax.data.stock_files import EARLIER, ENDS, read_stocks
from r1jax.errors import UserError
from r1jax.models.r1 import Inputs, Output
from r1jax.ops.losses import cross_entropy, hinge_probabilities, squared_hinge, weighted_mean
from r1jax.tasks.finance.batch import hide
from r1jax.tasks.records.figures import record_figures
from r1jax.tasks.task import Figures


class Kind(NamedTuple):
    """What `task.records` names."""

    read: Callable[[str], Records]
    classes: tuple[str, ...]
    outcomes: tuple[int, ...] = ()
    """Class of each outcome that is learned; empty where these are the classes."""
    counts: int = 0
    """Numbers at the table's end that were counted in the text, and are shown and hidden with it."""


KINDS = {
    "credit": Kind(read_credit, ("paid", "missed")),
    "sentiment": Kind(read_phrases, CLASSES),
    # A large gain is told apart while learning: it is as sure a sign of large moves as a loss is.
    "stocks": Kind(read_stocks, ("other", "loss"), outcomes=(0, 1, 0), counts=COUNTS),
}
MODES = {
    "both": {"hide_numbers": False, "hide_text": False},
    "numbers": {"hide_numbers": False, "hide_text": True},
    "text": {"hide_numbers": True, "hide_text": False},
}
"""What of a record the model is shown."""


class RecordsTask:
    """Records in, a probability of each class out (a `Task`)."""

    language = False
    unit = "records"

    def __init__(self, config: Config) -> None:
        """Checks what the task needs of the config; nothing is read yet.

        Args:
          config: Model, task and data.

        Raises:
          UserError: An unknown preprocessor, or a vocabulary that is too small for the tokenizer.
        """
        if "text" in config.model.modalities:
            tokenizer.check_vocabulary(config.model.decoder.vocab_size)
        fold, periods = config.data.fold, len(EARLIER) - 1
        if config.task.records == "stocks" and fold is not None and fold >= periods:
            raise UserError(
                f"data.fold is {fold}, but it must be below {periods} for stocks, an earlier period (docs/records.md)"
            )
        self.config, self.kind = config, KINDS[config.task.records]
        self.heads = (("class", len(self.kind.outcomes or self.kind.classes)),)
        self.pipeline = open_pipeline(config.data.preprocess, config.data.plugins)
        self._opened: Records | None = None

    def source(self, split: str) -> Source:
        """Opens the records of `train`, `val`, `test` or `all`.

        Stocks are divided by periods, others by folds: the fold that is held out (`data.fold`, or else the first) is
        the validation, and there is no test.

        Raises:
          UserError: The file is no such file, lacks what the model reads, or has no such part.
        """
        data = self.config.data
        if self._opened is None:
            self._opened = (read_agreed if self.config.task.agreement else self.kind.read)(data.path)
        records = self._opened
        name = f"{data.path}, {split}"
        rows = np.flatnonzero(self._part(records, split))
        if not len(rows):
            raise UserError(f"{name} has no records: choose another part by --data.split, or --data.split all")
        if split == "train":
            rows = known(rows, records, name)
        source: Source = RecordCases(name, records, rows)
        lacking = set(self.config.model.modalities) - source.schema.modalities
        if lacking:
            raise UserError(
                f"model.modalities has {sorted(lacking)[0]!r}, which {self.config.task.records} records lack: they "
                f"have {', '.join(sorted(source.schema.modalities))}"
            )
        if self.pipeline.steps:
            if split == "train":
                self.pipeline.fit(source)
            source = Preprocessed(source, self.pipeline, data.seed)
        return source

    def _part(self, records: Records, split: str) -> np.ndarray:
        """Which records are of a part."""
        data = self.config.data
        own = np.ones(len(records.ids), bool) if records.beside is None else ~records.beside
        if split == "all":
            return own
        if records.day is not None:
            ends = ENDS if data.fold is None else EARLIER[data.fold : data.fold + 2]
            return in_periods(records.day, split, ends)
        if split == "test":
            raise UserError(
                f"{data.path} has no test part, only folds: score the validation by --data.split val, or another file "
                "by --data.path FILE --data.split all"
            )
        held = np.zeros_like(own)
        held[own] = held_out(records.label[own], data.folds, data.fold or 0, data.seed)
        return held if split == "val" else ~held

    def remarks(self, source: Source) -> list[str]:
        """How many records each class has to learn from, and how many texts are cut."""
        cases = original(source)
        assert isinstance(cases, RecordCases)
        counts = np.bincount(cases.records.label[cases.rows], minlength=len(self.kind.classes))
        told = ", ".join(f"{count} {name}" for name, count in zip(self.kind.classes, counts, strict=True))
        return [
            f"note: to learn from are {told}",
            *self._agreement(cases),
            *(f"warning: {line}" for line in self.text_warnings(cases)),
        ]

    def _agreement(self, cases: RecordCases) -> list[str]:
        """How much of what is learned from comes from other files, and how sure it is."""
        records, rows = cases.records, cases.rows
        if not self.config.task.agreement:
            return []
        if records.agreed is None:
            return ["note: data.path is no Sentences_*Agree.txt with others beside it, so that all labels count alike"]
        other = 0 if records.beside is None else int(records.beside[rows].sum())
        unsure = int((records.agreed[rows] < 1).sum())
        return [f"note: {other} of them come from other files of the folder; annotators disagreed on {unsure}"]

    def text_warnings(self, cases: RecordCases) -> list[str]:
        """What of the texts the model cannot read."""
        most = self.config.model.text_tokens - 1  # the first token marks the beginning
        text = cases.records.text
        if "text" not in self.config.model.modalities or text is None:
            return []
        cut = sum(len(text[row].encode()) > most for row in cases.rows)
        return [f"{cut} of {len(cases)} texts are longer than {most} bytes, and their ends are not read"] if cut else []

    def collate(self, raw: dict[str, Any]) -> dict[str, np.ndarray]:
        """Turns a source's batch into a flat dict of arrays of the modalities that the model reads."""
        reads = self.config.model.modalities
        batch = {name: raw[name] for name in ("target.class", "target.agreed", "target.outcome") if name in raw}
        batch |= {name: raw[name] for name in ("table", "series") if name in reads}
        if "text" in reads:
            batch["text"], batch["text_valid"] = tokenizer.encode_batch(raw["text"], self.config.model.text_tokens)
        return batch

    def prepare(self, batch: dict[str, Array], keys: Key[Array, " B"] | None = None) -> tuple[Inputs, dict[str, Array]]:
        """Says which inputs exist and, with keys, hides numbers or text of some cases; runs on the device.

        Args:
          batch: From `collate`.
          keys: A key for each case, of its randomness in training; None at evaluation.

        Returns:
          What the model reads, "class", and "agreed" and "outcome" where there are such.
        """
        arrays = {name: value for name, value in batch.items() if "target." not in name}
        targets = {name.removeprefix("target."): value for name, value in batch.items() if "target." in name}
        here = jnp.ones(targets["class"].shape, bool)
        arrays |= {f"has_{name}": here for name in ("table", "series") if name in arrays}
        if "series" in arrays:
            shape = arrays["series"].shape[:-1]
            arrays["series_state"], arrays["series_valid"] = jnp.zeros(shape, jnp.int8), jnp.ones(shape, bool)
        inputs, rate = Inputs(**arrays), self.config.task.modality_dropout
        if keys is not None and rate > 0 and len(self.modes()) > 1:
            draw = jax.vmap(jax.random.uniform)(keys)
            inputs = self._hide(inputs, draw > 1 - rate, draw < rate)
        return inputs, targets

    def _hide(self, inputs: Inputs, numbers: Bool[Array, " B"], text: Bool[Array, " B"]) -> Inputs:
        """Hides the numbers or the text of the chosen cases, and what was counted in the text with it."""
        hidden = hide(inputs, numbers, text)
        if inputs.table is None or not self.kind.counts:
            return hidden
        counted = jnp.arange(inputs.table.shape[1]) >= inputs.table.shape[1] - self.kind.counts
        table = jnp.where(jnp.where(counted[None], text[:, None], numbers[:, None]), jnp.nan, inputs.table)
        return hidden._replace(table=table, has_table=inputs.has_table)

    def weights(self, inputs: Inputs, targets: dict[str, Array]) -> dict[str, Float[Array, ""]]:
        """Known labels, and cases; arguments as in `Task`."""
        label = targets["class"]
        return {
            "class": jnp.sum(label != UNKNOWN).astype(jnp.float32),
            "balance": jnp.asarray(len(label), jnp.float32),
        }

    def loss(
        self,
        output: Output,
        inputs: Inputs,
        targets: dict[str, Array],
        share: Float[Array, ""],
        weights: dict[str, Float[Array, ""]] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """What `task.loss` says of the known labels, and the balance loss; arguments as in `Task`."""
        task, label, own = self.config.task, targets["class"], self.weights(inputs, targets)
        weights = weights or own
        losses = self._losses(
            output.heads["class"], jnp.maximum(targets.get("outcome", label), 0), targets.get("agreed")
        )
        parts = {"class": weighted_mean(losses, (label != UNKNOWN).astype(jnp.float32), weights["class"])}
        total = parts["class"]
        if output.router:
            balance = jnp.mean(jnp.stack([stats.balance_loss for stats in output.router]))
            parts["balance"] = balance * (own["balance"] / weights["balance"])
            total = total + task.balance_weight * parts["balance"]
        return total, parts

    def _losses(
        self, logits: Float[Array, "B C"], label: Int[Array, " B"], agreed: Float[Array, " B"] | None
    ) -> Float[Array, " B"]:
        """Loss of each case; the fewer annotators agreed, the less its label is believed."""
        if self.config.task.loss == "squared_hinge":
            # By the majority's lead: a label that no more choose than reject teaches nothing.
            return squared_hinge(logits, label) * (1.0 if agreed is None else jnp.maximum(2 * agreed - 1, 0))
        smoothing: float | Float[Array, " B"] = self.config.task.label_smoothing
        if agreed is not None:  # the other classes share what the annotators left, where that is more
            classes = logits.shape[-1]
            smoothing = jnp.maximum(smoothing, (1 - agreed) * (classes / (classes - 1)))
        return cross_entropy(logits, label, smoothing=smoothing)

    def modes(self) -> dict[str, dict[str, bool]]:
        """What can be shown: with numbers and text, or what was counted in it, also each alone."""
        reads = self.config.model.modalities
        apart = ("text" in reads and len(reads) > 1) or ("table" in reads and self.kind.counts > 0)
        return MODES if apart else {"both": MODES["both"]}

    def outcomes(
        self, read: Callable[..., Output], batch: dict[str, Array], mode: dict[str, Bool[Array, ""]]
    ) -> dict[str, Array]:
        """Probability of each class.

        Args:
          read: The model with its weights.
          batch: From `collate`.
          mode: An entry of `MODES`.

        Returns:
          "class" [B, C].
        """
        inputs, targets = self.prepare(batch)
        if len(self.modes()) > 1:
            everyone = jnp.ones(targets["class"].shape, bool)
            inputs = self._hide(inputs, everyone & mode["hide_numbers"], everyone & mode["hide_text"])
        hinge = self.config.task.loss == "squared_hinge"
        said = (hinge_probabilities if hinge else jax.nn.softmax)(read(inputs).heads["class"])
        if self.kind.outcomes:
            of = np.asarray(self.kind.outcomes)  # summed, as a product would be rounded more coarsely on a GPU
            said = jnp.stack([said[:, of == i].sum(axis=1) for i in range(len(self.kind.classes))], axis=1)
        return {"class": said}

    def figures(self, found: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> Figures:
        """Accuracy, macro F1 and, for two classes, areas and calibration."""
        return dict(record_figures(targets["class"], found["class"]))

    def operating_points(
        self, found: dict[str, np.ndarray], targets: dict[str, np.ndarray]
    ) -> dict[str, dict[str, float]]:
        """None: the most probable class is called, and risks are left to the reader's costs."""
        return {}

    def score(self, figures: Figures) -> float | None:
        """Area under the ROC curve of two classes, else accuracy; None where nothing can be judged."""
        return figures.get("auroc" if len(self.kind.classes) == 2 else "accuracy")

    def headline(self, figures: Figures) -> str:
        """The first figures."""
        names = ("auroc", "auprc", "ks") if len(self.kind.classes) == 2 else ("accuracy", "macro_f1", "cross_entropy")
        told = "  ".join(f"{name} {figures[name]:.3f}" for name in names if name in figures)
        return told or "no record can be judged"

    def closing(self, figures: dict[str, Figures], source: Source, cases: int) -> str:
        """Figures of each way to show a record, beside the share of the largest class."""
        shown = original(source)
        assert isinstance(shown, RecordCases)
        label = shown.records.label[shown.rows]
        counts = np.bincount(label[label != UNKNOWN], minlength=len(self.kind.classes))
        largest = f"the largest class is {counts.max() / max(counts.sum(), 1):.3f} of {counts.sum()}"
        lines = [f"  {mode:<8}{self.headline(found)}" for mode, found in figures.items()]
        return "\n".join([f"validation ({shown.name}); {largest}", *lines])
