"""Encoder of streams of events: piecewise-linear features of each number, layers over the events, a few tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.config import SeriesConfig
from r1jax.models.layers import EncoderLayer, Linear, RMSNorm
from r1jax.models.remat import Remat, block

STATES = 3
"""What can be known of an event's outcome: nothing yet, no, yes."""
REACH = 3.0
"""The pieces cover -REACH to REACH; beyond, the plain number goes on."""


def piecewise_linear(x: Float[Array, "*B C"], bins: int) -> Float[Array, "*B I"]:
    """Each number, and how much of each of its pieces it fills (Gorishniy et al. 2022, section 3.1).

    A linear function of these is piecewise linear in the number, so that one layer can draw a threshold.

    Args:
      x: Numbers of about -REACH to REACH.
      bins: Pieces of equal length.

    Returns:
      C (bins + 1) features.
    """
    width = 2 * REACH / bins
    low = -REACH + width * jnp.arange(bins, dtype=x.dtype)
    filled = jnp.clip((x[..., None] - jnp.expand_dims(low, tuple(range(x.ndim)))) / width, 0, 1)
    return jnp.concatenate([x, filled.reshape(*x.shape[:-1], -1)], axis=-1)


class StreamEncoder(nn.Module):
    """One stream: tokens of decoder width that look at different events, and one of the last event."""

    config: SeriesConfig
    features: int
    dtype: DTypeLike = jnp.float32
    dropout: float = 0.0
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        numbers: Float[Array, "B K C"],
        states: Int[Array, "B K"],
        valid: Bool[Array, "B K"],
        *,
        cases: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B M D"], Float[Array, "B D"]]:
        """Encodes a batch.

        Args:
          numbers: Of each event, about -3 to 3.
          states: What is known of each event's outcome.
          valid: Which events exist; the last one does.
          cases: Index of each case in the batch, for dropout; None leaves it out.

        Returns:
          The pooled tokens and that of the last event, and a summary.
        """
        c = self.config
        known = jax.nn.one_hot(states, STATES, dtype=numbers.dtype)
        x = jnp.concatenate([piecewise_linear(numbers, c.bins), known], axis=-1)
        x = Linear(self.features, self.dtype, bias=True, name="events")(x)
        for i in range(c.layers):
            layer = EncoderLayer(c.num_attention_heads, self.dtype, self.dropout, self.remat, name=f"layers_{i}")
            x = block(EncoderLayer.__call__, self.remat)(layer, x, cases, valid)
        x = RMSNorm(name="final_norm")(x)
        scores = Linear(c.tokens, self.dtype, bias=True, name="scores")(x).astype(jnp.float32)
        shares = jax.nn.softmax(jnp.where(valid[..., None], scores, -jnp.inf), axis=1).astype(x.dtype)
        pooled = jnp.concatenate([jnp.einsum("BKM,BKD->BMD", shares, x), x[:, -1:]], axis=1)
        summary = Linear(self.features, self.dtype, name="summary")(pooled.reshape(pooled.shape[0], -1))
        return Linear(self.features, self.dtype, name="projection")(pooled), summary


class SeriesEncoder(nn.Module):
    """All streams of a case, each with weights of its own."""

    config: SeriesConfig
    features: int
    dtype: DTypeLike = jnp.float32
    dropout: float = 0.0
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        numbers: Float[Array, "B S K C"],
        states: Int[Array, "B S K"],
        valid: Bool[Array, "B S K"],
        *,
        cases: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B M D"], Float[Array, "B D"]]:
        """Encodes a batch; arguments as in `StreamEncoder`, S streams each.

        Returns:
          The tokens of all streams, one stream after another, and the sum of their summaries.
        """
        tokens, summary = [], 0
        for i in range(numbers.shape[1]):
            stream = StreamEncoder(self.config, self.features, self.dtype, self.dropout, self.remat, name=f"stream_{i}")
            token, read = stream(numbers[:, i], states[:, i], valid[:, i], cases=cases)
            tokens.append(token)
            summary = summary + read
        return jnp.concatenate(tokens, axis=1), summary
