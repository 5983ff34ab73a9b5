"""Summary of a text by its words and pieces of words, each with numbers of its own (Joulin et al. 2017)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.models.layers import Dropout, Linear
from r1jax.models.quantized import parameter, scheme_for
from r1jax.ops.embedding import embed
from r1jax.ops.ngrams import hashed_ngrams

RANK = 16
"""Numbers of each bucket."""


class NgramSummary(nn.Module):
    """Sum of what the different n-grams of a text say, over the root of their number.

    One that comes again counts once: repeated pieces of common words would drown the rest. Buckets begin at zero, so
    that what training has never seen says nothing.
    """

    buckets: int
    features: int
    dtype: DTypeLike = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], *, cases: Int[Array, " B"] | None = None
    ) -> Float[Array, "B F"]:
        """Encodes a batch.

        Args:
          tokens: Of the byte-level tokenizer.
          valid: Which of them exist.
          cases: Index of each case in the batch, for dropout of whole n-grams; None leaves it out.

        Returns:
          One summary of `features` numbers a text, 0 without any n-gram.
        """
        table = parameter(self, "embed_tokens", nn.initializers.zeros, (self.buckets, RANK))
        ids, exist = hashed_ngrams(tokens, valid, self.buckets)
        ids = jnp.sort(jnp.where(exist, ids, self.buckets).reshape(ids.shape[0], -1), axis=1)
        exist = (ids < self.buckets) & (ids != jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1))
        path = (*self.path, "embed_tokens")
        scheme = scheme_for(path, "embedding", (self.buckets, RANK))
        said = embed(table, jnp.where(exist, ids, 0), self.dtype, path, scheme)
        kept = Dropout(self.dropout)(exist.astype(jnp.float32), cases)
        count = jnp.sum(exist, axis=1, keepdims=True).astype(jnp.float32)
        total = jnp.sum(kept[..., None] * said.astype(jnp.float32), axis=1) / jnp.sqrt(jnp.maximum(count, 1))
        return Linear(self.features, self.dtype, name="summary")(total)
