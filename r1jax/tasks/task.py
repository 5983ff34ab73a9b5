"""What the engine asks of a task; a new task is a class with these members and one line in the catalogue."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Key

from r1jax.config import Config
from r1jax.data.pipeline import Pipeline
from r1jax.data.source import Source
from r1jax.models.r1 import Inputs, Output

Figures = dict[str, float | list[float]]
"""Numbers by name; a list is written to metrics.jsonl alone."""


@runtime_checkable
class Task(Protocol):
    """What a case is, which heads it needs, how outputs become loss, outcomes and figures; no mesh, no optimizer.

    Attributes:
      config: The experiment.
      heads: Name and width of each head of the model.
      language: Whether training needs the states of the text.
      unit: What a case is called, in the plural.
      pipeline: Preprocessors that every case of `source` has passed through.
    """

    config: Config
    heads: tuple[tuple[str, int], ...]
    language: bool
    unit: str
    pipeline: Pipeline

    def source(self, split: str) -> Source:
        """Opens the cases of `train`, `val`, `test` or `all`.

        Raises:
          UserError: The data does not give what the model reads.
        """
        ...

    def remarks(self, source: Source) -> list[str]:
        """What a user should know of the training cases, a line each.

        Raises:
          UserError: Nothing can be learned from them.
        """
        ...

    def collate(self, raw: dict[str, Any]) -> dict[str, np.ndarray]:
        """Turns a source's batch into a flat dict of arrays with a leading batch axis; names `target.*` are targets."""
        ...

    def prepare(self, batch: dict[str, Array], keys: Key[Array, " B"] | None = None) -> tuple[Inputs, dict[str, Array]]:
        """Turns a collated batch into what the model reads, and the targets; runs on the device.

        Args:
          batch: From `collate`.
          keys: A key for each case, of its randomness in training; None at evaluation.

        Returns:
          Inputs and targets.
        """
        ...

    def weights(self, inputs: Inputs, targets: dict[str, Array]) -> dict[str, Float[Array, ""]]:
        """Over how much each mean of the loss is taken in these cases: known targets, tokens, sequences.

        Args:
          inputs: What the model reads.
          targets: From `prepare`.

        Returns:
          One sum a mean; those of the parts of a batch add up to those of the batch.
        """
        ...

    def loss(
        self,
        output: Output,
        inputs: Inputs,
        targets: dict[str, Array],
        share: Float[Array, ""],
        weights: dict[str, Float[Array, ""]] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Scalar loss and its parts; those of the parts of a batch add up to those of the batch.

        Args:
          output: Of the model.
          inputs: What it read.
          targets: From `prepare`.
          share: Of the run that is done, 0 to 1.
          weights: Of the whole batch; None where this is the whole.

        Returns:
          The loss, and its parts before their factors.
        """
        ...

    def modes(self) -> dict[str, Any]:
        """Ways to show a case, each with its switches (arrays of one shape), the one that shows all first."""
        ...

    def outcomes(self, read: Callable[..., Output], batch: dict[str, Array], mode: Any) -> dict[str, Array]:
        """What is scored of each case; runs on the device.

        Args:
          read: The model with its weights; takes inputs and, if need be, `language=True`.
          batch: From `collate`.
          mode: One value of `modes`.

        Returns:
          Arrays with a leading batch axis.
        """
        ...

    def figures(self, found: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> Figures:
        """Cheap figures for the validation during training, of the outcomes and targets of all cases."""
        ...

    def operating_points(
        self, found: dict[str, np.ndarray], targets: dict[str, np.ndarray]
    ) -> dict[str, dict[str, float]]:
        """Thresholds that validation sets, by what they decide; empty where nothing is decided."""
        ...

    def score(self, figures: Figures) -> float | None:
        """The number, higher is better, by which the best checkpoint is kept; None where nothing can be judged."""
        ...

    def headline(self, figures: Figures) -> str:
        """A few figures of a validation, for the progress view."""
        ...

    def closing(self, figures: dict[str, Figures], source: Source, cases: int) -> str:
        """The table that closes a run.

        Args:
          figures: Of the best checkpoint, by mode.
          source: The validation cases; synthetic ones know what is attainable.
          cases: Training cases that the best checkpoint has learned from, repetitions included.

        Returns:
          Lines of text.
        """
        ...
