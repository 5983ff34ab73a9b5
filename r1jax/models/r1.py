"""R1: encoders of each modality, the DeepSeek-V3 decoder over their tokens and the text, heads at query tokens."""

import itertools
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from r1jax.config import ModelConfig
from r1jax.models.decoder import Decoder, language_logits
from r1jax.models.initial import normal
from r1jax.models.layers import Linear
from r1jax.models.lora import Lora
from r1jax.models.moe import RouterStats
from r1jax.models.ngrams import NgramScores
from r1jax.models.precision import PRECISIONS
from r1jax.models.quantized import added, parameter, rounding_by
from r1jax.models.series import SeriesEncoder
from r1jax.models.table import TableEncoder
from r1jax.models.text import TextSummary, grouped
from r1jax.models.vision import VisionEncoder
from r1jax.ops.axes import constrain
from r1jax.ops.quantized_dot import Ruled


class Inputs(NamedTuple):
    """One batch as the model reads it; a modality that the model lacks is None, one that a case lacks is not valid."""

    volume: Float[Array, "B Z Y X"] | None = None
    volume_spacing: Float[Array, "B 3"] | None = None
    has_volume: Bool[Array, " B"] | None = None
    image: Float[Array, "B Y X"] | None = None
    image_spacing: Float[Array, "B 2"] | None = None
    has_image: Bool[Array, " B"] | None = None
    series: Float[Array, "B S K C"] | None = None
    series_state: Int[Array, "B S K"] | None = None
    series_valid: Bool[Array, "B S K"] | None = None
    has_series: Bool[Array, " B"] | None = None
    table: Float[Array, "B F"] | None = None
    has_table: Bool[Array, " B"] | None = None
    text: Int[Array, "B T"] | None = None
    text_valid: Bool[Array, "B T"] | None = None


class Output(NamedTuple):
    """Everything that the model says of a batch."""

    heads: dict[str, Float[Array, "B _"]]
    """Raw numbers of each head, fp32."""
    router: tuple[RouterStats, ...]
    """One entry for each mixture layer, the MTP module's last if it ran."""
    where: Float[Array, "B z y x"] | None
    """Logit of each cell of the volume: the finding's centre lies in it."""
    text_states: Float[Array, "B T D"] | None
    """States at the text positions that, through the language head, predict the next token, if asked for."""
    mtp_states: Float[Array, "B S D"] | None
    """States that predict the token after next, for the first T - 1 text positions, if asked for."""
    lm_head: Float[Array, "V D"] | Ruled | None
    """Weight of the language head, for losses that never hold all logits; with the states."""

    @property
    def text_logits(self) -> Float[Array, "B T V"] | None:
        """Next-token logits at the text positions, fp32; formed only where somebody asks."""
        return None if self.text_states is None else language_logits(self.text_states, self.lm_head)

    @property
    def mtp_logits(self) -> Float[Array, "B S V"] | None:
        """Logits of the token after next, fp32; formed only where somebody asks."""
        return None if self.mtp_states is None else language_logits(self.mtp_states, self.lm_head)


class R1(nn.Module):
    """Modality tokens, then text, then one query token a head; the decoder is causal, so queries see everything.

    With text alone and no heads it is the language model: its parameters are those of the decoder.
    """

    config: ModelConfig
    heads: tuple[tuple[str, int], ...]
    """Name and width of each head."""

    def setup(self) -> None:
        c = self.config
        self.dtype = PRECISIONS[c.precision].compute
        width = c.decoder.hidden_size
        alone = c.modalities == ("text",) and not self.heads
        self.decoder = Decoder(
            c.decoder, self.dtype, c.dropout, Lora(c.lora_rank, c.lora_alpha), c.remat, c.scan_layers, prefix=alone
        )
        if "volume" in c.modalities:
            self.volume = VisionEncoder(c.volume, width, self.dtype, c.dropout, c.remat)
        if "image" in c.modalities:
            self.image = VisionEncoder(c.image, width, self.dtype, c.dropout, c.remat)
        if "series" in c.modalities:
            self.series = SeriesEncoder(c.series, width, self.dtype, c.dropout, c.remat)
        if "table" in c.modalities:
            self.table = TableEncoder(c.table, width, self.dtype, c.dropout, c.remat)
        if not self.heads:
            return
        if "text" in c.modalities:
            self.text = TextSummary(width, self.dtype, c.dropout, merge=c.text_merge)
            if c.text_ngrams:
                self.ngrams = NgramScores(c.text_ngrams, sum(size for _, size in self.heads), self.dtype, c.dropout)
        self.queries = parameter(self, "queries", normal(0.02), (len(self.heads), width))
        # Beside n-grams the decoder starts silent: a random opinion of it would first have to be unlearned by them.
        std = 0.0 if c.text_ngrams and "text" in c.modalities else None
        self.head = {name: Linear(size, jnp.float32, bias=True, init_std=std) for name, size in self.heads}

    def encode(
        self, inputs: Inputs, *, cases: Int[Array, " B"] | None
    ) -> tuple[
        list[Float[Array, "B _ D"]], list[Bool[Array, "B _"]], Float[Array, "B D"] | int, Float[Array, "B z y x"] | None
    ]:
        """Tokens of each modality but text, which of them exist, the sum of their summaries, and where to look."""
        tokens, valid, summaries, where = [], [], [], None

        def add(token: Float[Array, "B m D"], summary: Float[Array, "B D"], has: Bool[Array, " B"]) -> None:
            tokens.append(token)
            valid.append(jnp.broadcast_to(has[:, None], token.shape[:2]))
            summaries.append(jnp.where(has[:, None], summary, 0))

        if inputs.volume is not None:
            seen = self.volume(inputs.volume, inputs.volume_spacing, cases=cases)
            add(seen.tokens, seen.summary, inputs.has_volume)
            where = seen.where
        if inputs.image is not None:
            seen = self.image(inputs.image, inputs.image_spacing, cases=cases)
            add(seen.tokens, seen.summary, inputs.has_image)
        if inputs.series is not None:
            streams = self.series(inputs.series, inputs.series_state, inputs.series_valid, cases=cases)
            add(*streams, inputs.has_series)
        if inputs.table is not None:
            add(*self.table(inputs.table, cases=cases), inputs.has_table)
        return tokens, valid, sum(summaries), where

    def __call__(self, inputs: Inputs, *, cases: Int[Array, " B"] | None = None, language: bool = False) -> Output:
        """Reads a batch.

        Args:
          inputs: The batch; its modalities are those of the config.
          cases: Index of each case in the batch, on which its dropout depends (needs the rng `dropout`); None leaves
            dropout out.
          language: Whether to compute the states of the text and of MTP.

        Returns:
          Heads, router statistics and, if asked for, what a language loss needs.

        Raises:
          ValueError: States of the text are asked for, whose bytes are merged.
        """
        if language and self.config.text_merge > 1:
            raise ValueError(
                f"model.text_merge is {self.config.text_merge}: no byte of the text has a state of its own"
            )
        with rounding_by(self.config.quant):
            return self._read(inputs, cases, language)

    def _read(self, inputs: Inputs, cases: Int[Array, " B"] | None, language: bool) -> Output:
        """Reads a batch; the rules of the config hold."""
        tokens, exist, summary, where = self.encode(inputs, cases=cases)
        first = sum(part.shape[1] for part in tokens)
        if inputs.text is not None:
            text, there = self.decoder.embed(inputs.text), inputs.text_valid
            if self.heads:
                read = self.text(text, there, cases=cases)
                summary = summary + jnp.where(jnp.any(there, axis=1)[:, None], read.summary, 0)
                if read.tokens is not None:
                    text, there = read.tokens, jnp.any(grouped(there, self.config.text_merge), axis=2)
            tokens, exist = [*tokens, text], [*exist, there]
        if self.heads:
            # Queries start from the summaries: a direct way for gradients, which attention over many tokens dilutes.
            asked = added(self, "queries", self.queries, tokens[0].dtype)[None]
            asked = jnp.broadcast_to(asked, (tokens[0].shape[0], *asked.shape[1:])) + summary[:, None]
            tokens, exist = [*tokens, asked], [*exist, jnp.ones(asked.shape[:2], bool)]
        x, valid = constrain(jnp.concatenate(tokens, axis=1), "batch", "length", None), jnp.concatenate(exist, axis=1)
        # Positions count what exists, so that a missing modality and padding shift nothing.
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        hidden, router = self.decoder(x, positions, valid, cases=cases)
        last = hidden[:, -len(self.heads) :].astype(jnp.float32)
        heads = {name: self.head[name](last[:, i]) for i, (name, _) in enumerate(self.heads)}
        if self.heads and inputs.text is not None and self.config.text_ngrams:
            said = self.ngrams(inputs.text, inputs.text_valid, cases=cases)
            ends = list(itertools.accumulate(size for _, size in self.heads))[:-1]
            heads = {name: heads[name] + part for name, part in zip(heads, jnp.split(said, ends, axis=1), strict=True)}
        states = second = weight = None
        if language and inputs.text is not None:
            text = slice(first, first + inputs.text.shape[1])
            states = hidden[:, text]
            weight = self.decoder.lm_head.matrix(states)
            if self.config.decoder.num_nextn_predict_layers:
                second, stats = self.decoder.predict_second(
                    states[:, :-1],
                    inputs.text[:, 1:],
                    positions[:, text][:, :-1],
                    inputs.text_valid[:, 1:],
                    cases=cases,
                )
                router = (*router, stats)
        return Output(heads, router, where, states, second, weight)
