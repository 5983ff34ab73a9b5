"""What the words of a text, and pieces of them, say of each class by themselves (Joulin et al. 2017)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.models.layers import Dropout
from r1jax.models.quantized import parameter, scheme_for
from r1jax.ops.embedding import embed
from r1jax.ops.ngrams import GROUPS, hashed_ngrams


class NgramScores(nn.Module):
    """Sum of what the different n-grams of a text say of each class: the wide part beside a deep one (Cheng et al. 2016).

    One that comes again counts once: repeated pieces of common words would drown the rest. Each group of `GROUPS` is
    divided by the root of its number of n-grams, so that the few words of a text weigh as much as their many pieces, and
    a short text as much as a long one. Buckets begin at zero, so that what training has never seen says nothing.
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
        path = (*self.path, "embed_tokens")
        scheme = scheme_for(path, "embedding", shape)
        ids, exist = hashed_ngrams(tokens, valid, self.buckets)
        total = jnp.zeros((len(ids), self.features), jnp.float32)
        for first, last in GROUPS:
            found, once = _different(ids[..., first:last], exist[..., first:last], self.buckets)
            said = embed(table, found, self.dtype, path, scheme)
            kept = Dropout(self.dropout)(once.astype(jnp.float32), cases)
            count = jnp.sum(once, axis=1, keepdims=True).astype(jnp.float32)
            total += jnp.sum(kept[..., None] * said.astype(jnp.float32), axis=1) / jnp.sqrt(jnp.maximum(count, 1))
        return total / len(GROUPS) ** 0.5


def _different(
    ids: Int[Array, "B T kinds"], exist: Bool[Array, "B T kinds"], buckets: int
) -> tuple[Int[Array, "B N"], Bool[Array, "B N"]]:
    """The n-grams of each text in the order of their numbers, and which of them are the first of their number."""
    ids = jnp.sort(jnp.where(exist, ids, buckets).reshape(ids.shape[0], -1), axis=1)
    first = (ids < buckets) & (ids != jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1))
    return jnp.where(first, ids, 0), first
