"""The language task: next-token and multi-token prediction on packed text."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from r1jax.config import Config
from r1jax.data.documents import read_documents
from r1jax.data.packed import PackedText, synthetic_text
from r1jax.data.pipeline import open_pipeline
from r1jax.data.source import Source
from r1jax.data.vocabulary import open_vocabulary
from r1jax.errors import UserError
from r1jax.models.r1 import Inputs, Output
from r1jax.ops.linear_cross_entropy import token_losses
from r1jax.tasks.language.figures import closing_lines, language_figures
from r1jax.tasks.language.loss import counted, mtp_weight, text_losses, token_counts
from r1jax.tasks.task import Figures

MODE = "text"


class Language:
    """Packed sequences in, the decoder alone, cross-entropy out (a `Task`)."""

    heads: tuple[tuple[str, int], ...] = ()
    language = True
    unit = "sequences"

    def __init__(self, config: Config) -> None:
        """Opens the tokenizer.

        Args:
          config: Model, task and data.

        Raises:
          UserError: The tokenizer or a preprocessor cannot be opened, or the model has too few tokens.
        """
        self.config, self.vocabulary = config, open_vocabulary(config.data.tokenizer)
        self.pipeline = open_pipeline(config.data.preprocess, config.data.plugins)
        if config.model.decoder.vocab_size < self.vocabulary.size:
            raise UserError(
                f"model.decoder.vocab_size is {config.model.decoder.vocab_size}, but the tokenizer "
                f"({self.vocabulary.name}) has {self.vocabulary.size} tokens; set it to at least that"
            )

    def source(self, split: str) -> Source:
        """Opens the sequences of `train`, `val`, `test` or, of a user's text, `all`.

        Raises:
          UserError: There is no such text, or a preprocessor fails on it.
        """
        data, length = self.config.data, self.config.model.text_tokens
        if data.path is not None:
            documents = read_documents(data.path, split)
            return PackedText(f"{data.path}, {split}", self.pipeline.documents(documents), self.vocabulary, length)
        if self.pipeline.steps:
            raise UserError("data.preprocess is for text of your own: name it with data.path, or leave both out")
        sizes = {"train": data.train_cases, "val": data.val_cases, "test": data.test_cases}
        if split not in sizes:
            raise UserError(f"data.split is {split!r}, but the synthetic data has {', '.join(sizes)}")
        return synthetic_text(data.seed, sizes[split], split, self.vocabulary, length)

    def remarks(self, source: Source) -> list[str]:
        """Nothing: every text has a next token."""
        return []

    def collate(self, raw: dict[str, Any]) -> dict[str, np.ndarray]:
        """Tokens, which of them exist, and the bytes that they stand for."""
        return {"text": raw["text"], "text_valid": raw["text_valid"], "target.bytes": raw["bytes"]}

    def prepare(self, batch: dict[str, Array], keys: Key[Array, " B"] | None = None) -> tuple[Inputs, dict[str, Array]]:
        """What the model reads; nothing is augmented, and the targets are the tokens themselves."""
        return Inputs(text=batch["text"], text_valid=batch["text_valid"]), {}

    def weights(self, inputs: Inputs, targets: dict[str, Array]) -> dict[str, Float[Array, ""]]:
        """Tokens that count for each prediction, and sequences; arguments as in `Task`."""
        next_tokens, second = token_counts(inputs.text, inputs.text_valid, self.vocabulary.end)
        return {"next": next_tokens, "mtp": second, "balance": jnp.asarray(len(inputs.text), jnp.float32)}

    def loss(
        self,
        output: Output,
        inputs: Inputs,
        targets: dict[str, Array],
        share: Float[Array, ""],
        weights: dict[str, Float[Array, ""]] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Next token, MTP by its schedule, and the balance loss of every mixture layer (equations 17, 24 and 25).

        Args:
          output: Of the model.
          inputs: What it read.
          targets: None.
          share: Of the run that is done.
          weights: Of the whole batch; None where this is the whole.

        Returns:
          Scalar loss; its parts before their weights, "balance" as the mean over the layers (1 is even).
        """
        c = self.config.task
        own = self.weights(inputs, targets)
        weights = weights or own
        losses = text_losses(
            output,
            inputs.text,
            inputs.text_valid,
            end=self.vocabulary.end,
            smoothing=c.label_smoothing,
            z_loss=c.z_loss,
            totals=(weights["next"], weights["mtp"]),
        )
        parts = dict(zip(("next", "mtp"), losses, strict=False))
        total = parts["next"]
        if "mtp" in parts:
            total = total + mtp_weight(c, share) * parts["mtp"]
        if output.router:
            balance = jnp.stack([stats.balance_loss for stats in output.router]) * (own["balance"] / weights["balance"])
            parts["balance"] = jnp.mean(balance)
            total = total + c.balance_weight * jnp.sum(balance)
        return total, parts

    def modes(self) -> dict[str, Any]:
        """One way to show a sequence."""
        return {MODE: {}}

    def outcomes(self, read: Callable[..., Output], batch: dict[str, Array], mode: Any) -> dict[str, Array]:
        """Nats and tokens of each sequence, for the next token and for MTP, and the load of every expert.

        Args:
          read: The model with its weights.
          batch: From `collate`.
          mode: The only one.

        Returns:
          "nats", "tokens", "mtp_nats" and "mtp_tokens" [B]; "load.<layer>" [B, E].
        """
        inputs, _ = self.prepare(batch)
        output = read(inputs, language=True)
        text, places = inputs.text, counted(inputs.text, inputs.text_valid, self.vocabulary.end)
        states = [("", output.text_states), ("mtp_", output.mtp_states)]
        found = {}
        for ahead, ((name, x), weight) in enumerate(zip(states, places, strict=True), start=1):
            if x is not None:
                x = x[:, : text.shape[1] - ahead]
                losses = token_losses(x, output.lm_head, text[:, ahead:])
                found[f"{name}nats"], found[f"{name}tokens"] = jnp.sum(losses * weight, 1), jnp.sum(weight, 1)
        return found | {f"load.{i}": stats.sequence_load for i, stats in enumerate(output.router)}

    def figures(self, found: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> Figures:
        """Losses, bits a byte, perplexity, and how the experts were used."""
        return language_figures(found, targets["bytes"])

    def operating_points(
        self, found: dict[str, np.ndarray], targets: dict[str, np.ndarray]
    ) -> dict[str, dict[str, float]]:
        """None: nothing is decided."""
        return {}

    def score(self, figures: Figures) -> float | None:
        """Minus the loss."""
        return -figures["loss"]

    def headline(self, figures: Figures) -> str:
        """Loss in both units."""
        return f"loss {figures['loss']:.4f} nats/token, {figures['bits_per_byte']:.4f} bits/byte"

    def closing(self, figures: dict[str, Figures], source: Source, cases: int) -> str:
        """Losses of validation, and what they took."""
        tokens = cases * (self.config.model.text_tokens - 1)
        return closing_lines(figures[MODE], getattr(source, "entropy", None), tokens)
