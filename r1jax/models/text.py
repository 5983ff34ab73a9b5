"""Summary of a text: which short wordings occur in it, in all of it and in each group of its bytes."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from r1jax.models.layers import Dropout, Linear, RMSNorm


class Wordings(NamedTuple):
    """What was found in a batch of texts."""

    summary: Float[Array, "B F"]
    tokens: Float[Array, "B G F"] | None
    """One token for each group of `merge` bytes; None where a token is a byte."""


class TextSummary(nn.Module):
    """Wordings found by two convolutions over the bytes, and the strongest sign of each kept (Kim 2014).

    A byte says nothing alone, and a few thousand labels do not teach a causal decoder to spell. Windows of bytes are
    words or short phrases in any script, so that a label reaches them directly.
    """

    features: int
    dtype: DTypeLike = jnp.float32
    dropout: float = 0.0
    window: int = 8
    """Bytes of the first convolution; the second spans `window` of these windows, side by side."""
    merge: int = 1
    """Bytes of a group, whose strongest signs become one token."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"], *, cases: Int[Array, " B"] | None = None
    ) -> Wordings:
        """Encodes a batch.

        Args:
          x: Embedded bytes, a multiple of `merge`.
          valid: Which of them exist.
          cases: Index of each case in the batch, for dropout; None leaves it out.

        Returns:
          Summary and tokens of `features` numbers; without any byte, whatever the caller then hides.
        """
        x = jnp.where(valid[..., None], RMSNorm(name="input_norm")(x), 0)
        words = nn.silu(self._convolve(x, 1, "words"))
        phrases = nn.silu(self._convolve(jnp.where(valid[..., None], words, 0), self.window // 2, "phrases"))
        found = jnp.concatenate([words, phrases], axis=-1)
        found = jnp.where(valid[..., None], found, -1)  # silu is above -1
        strongest = Dropout(self.dropout)(jnp.max(found, axis=1), cases)
        summary = Linear(self.features, self.dtype, name="summary")(strongest)
        if self.merge == 1:
            return Wordings(summary, None)
        groups = jnp.max(grouped(found, self.merge), axis=2)
        return Wordings(summary, Linear(self.features, self.dtype, name="tokens")(groups))

    def _convolve(self, x: Float[Array, "B T D"], step: int, name: str) -> Float[Array, "B T D"]:
        """Convolution over `window` places, `step` apart, up to and with each place; a matmul of joined neighbours."""
        reach = (self.window - 1) * step
        padded = jnp.pad(x, ((0, 0), (reach, 0), (0, 0)))
        joined = [padded[:, i * step : i * step + x.shape[1]] for i in range(self.window)]
        return Linear(x.shape[-1], self.dtype, bias=True, name=name)(jnp.concatenate(joined, axis=-1))


def grouped(x: Shaped[Array, "B T ..."], merge: int) -> Shaped[Array, "B G merge ..."]:
    """Every `merge` places of a text together."""
    return x.reshape(x.shape[0], -1, merge, *x.shape[2:])
