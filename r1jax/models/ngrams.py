"""What the words of a text, and pieces of them, say of each class by themselves (Joulin et al. 2017)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.models.layers import Dropout
from r1jax.models.quantized import parameter, scheme_for
from r1jax.ops.axes import gathered
from r1jax.ops.embedding import embed
from r1jax.ops.ngrams import GROUPS, hashed_ngrams

RARITY = "rarity"
"""Name of the weights that are measured, not trained (`r1jax.train.rarity`)."""


class NgramScores(nn.Module):
    """Sum of what the different n-grams of a text say of each class, the wide part of the model (Cheng et al. 2016).

    One that comes again counts once: repeated pieces of common words would drown the rest. The rarer an n-gram is in
    the training part, the more it counts (inverse document frequency, Sparck Jones 1972); these weights are measured
    before the first step and never trained. Those of each group of `GROUPS` have norm 1 over a text, so that the few
    words weigh as much as their many pieces, and a short text as much as a long one. Buckets begin at zero, so that
    what training has never seen says nothing.
    """

    buckets: int
    features: int
    """Numbers that each n-gram says: one for each output of the heads."""
    dtype: DTypeLike = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], *, cases: Int[Array, " B"] | None = None
    ) -> Float[Array, "B F"]:
        """Scores a batch.

        Args:
          tokens: Of the byte-level tokenizer.
          valid: Which of them exist.
          cases: Index of each case in the batch, for dropout of whole n-grams; None leaves it out.

        Returns:
          `features` numbers a text in fp32, 0 without any n-gram.
        """
        shape = (self.buckets, self.features)
        table = parameter(self, "embed_tokens", nn.initializers.zeros, shape)
        rarity = self.param(RARITY, nn.initializers.ones, (self.buckets,), jnp.float32)
        rarity = jax.lax.stop_gradient(gathered(rarity, (*self.path, RARITY)).astype(jnp.float32))
        path = (*self.path, "embed_tokens")
        scheme = scheme_for(path, "embedding", shape)
        ids, exist = hashed_ngrams(tokens, valid, self.buckets)
        total = jnp.zeros((ids.shape[0], self.features), jnp.float32)
        for first, last in GROUPS:
            found, once = different(ids[..., first:last], exist[..., first:last], self.buckets)
            weight = jnp.where(once, rarity[found], 0)
            norm = jnp.sqrt(jnp.maximum(jnp.sum(weight**2, axis=1, keepdims=True), 1e-6))  # 0 without any that is known
            kept = Dropout(self.dropout)(weight / norm, cases)
            said = embed(table, found, self.dtype, path, scheme).astype(jnp.float32)
            total = total + jnp.sum(kept[..., None] * said, axis=1)
        return total / len(GROUPS) ** 0.5


def different(
    ids: Int[Array, "B T kinds"], exist: Bool[Array, "B T kinds"], buckets: int
) -> tuple[Int[Array, "B N"], Bool[Array, "B N"]]:
    """Each n-gram of a text once.

    Args:
      ids: From `hashed_ngrams`.
      exist: Likewise.
      buckets: How many numbers there are.

    Returns:
      The numbers in their order, and which of them count; the others are repetitions and 0.
    """
    ids = jnp.sort(jnp.where(exist, ids, buckets).reshape(ids.shape[0], -1), axis=1)
    first = (ids < buckets) & (ids != jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1))
    return jnp.where(first, ids, 0), first
