"""Summary of a text: which short wordings occur in it."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.models.layers import Dropout, Linear, RMSNorm


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

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"], *, cases: Int[Array, " B"] | None = None
    ) -> Float[Array, "B F"]:
        """Encodes a batch.

        Args:
          x: Embedded bytes.
          valid: Which of them exist.
          cases: Index of each case in the batch, for dropout; None leaves it out.

        Returns:
          One summary of `features` numbers a text; without any byte, whatever the caller then hides.
        """
        x = jnp.where(valid[..., None], RMSNorm(name="input_norm")(x), 0)
        words = nn.silu(self._convolve(x, 1, "words"))
        phrases = nn.silu(self._convolve(jnp.where(valid[..., None], words, 0), self.window // 2, "phrases"))
        found = jnp.concatenate([words, phrases], axis=-1)
        strongest = jnp.max(jnp.where(valid[..., None], found, -1), axis=1)  # silu is above -1
        strongest = Dropout(self.dropout)(strongest, cases)
        return Linear(self.features, self.dtype, name="summary")(strongest)

    def _convolve(self, x: Float[Array, "B T D"], step: int, name: str) -> Float[Array, "B T D"]:
        """Convolution over `window` places, `step` apart, up to and with each place; a matmul of joined neighbours."""
        reach = (self.window - 1) * step
        padded = jnp.pad(x, ((0, 0), (reach, 0), (0, 0)))
        joined = [padded[:, i * step : i * step + x.shape[1]] for i in range(self.window)]
        return Linear(x.shape[-1], self.dtype, bias=True, name=name)(jnp.concatenate(joined, axis=-1))
