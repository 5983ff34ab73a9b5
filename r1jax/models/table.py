"""Encoder of record fields: one token a field, periodic features of its value (Gorishniy et al. 2022)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from r1jax.config import TableConfig
from r1jax.models.initial import normal
from r1jax.models.layers import EncoderLayer, Linear, RMSNorm
from r1jax.models.quantized import added, parameter, rounding_key, scheme_for
from r1jax.models.remat import Remat, block
from r1jax.ops.apart import held_apart
from r1jax.ops.axes import constrain, gathered
from r1jax.ops.quantized_dot import quantized_dot


class TableEncoder(nn.Module):
    """Tokens of decoder width from standardised values; a missing value has an embedding of its own."""

    config: TableConfig
    features: int
    dtype: DTypeLike = jnp.float32
    dropout: float = 0.0
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, values: Float[Array, "B F"], *, cases: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B F D"], Float[Array, "B D"]]:
        """Encodes a batch.

        Args:
          values: Standardised fields, NaN where missing.
          cases: Index of each case in the batch, for dropout; None leaves it out.

        Returns:
          One token a field, and a summary of all fields.
        """
        c, fields = self.config, values.shape[1]
        missing = jnp.isnan(values)
        known = jnp.where(missing, 0.0, values)[..., None]
        start = 0.1 * 2.0 ** jnp.arange(c.frequencies, dtype=jnp.float32)
        frequency = self.param("frequency", lambda _, shape: jnp.broadcast_to(start, shape), (fields, c.frequencies))
        angle = 2 * math.pi * known * frequency[None]
        parts = [known, jnp.sin(angle), jnp.cos(angle), jnp.ones_like(known)]
        x = jnp.concatenate(parts, axis=-1).astype(self.dtype)
        init = normal(x.shape[-1] ** -0.5)
        weight = parameter(self, "weight", init, (fields, self.features, x.shape[-1]))
        absent = parameter(self, "missing", normal(1.0), (fields, self.features))
        weight = jax.tree.map(lambda part: gathered(part, (*self.path, "weight")), weight)
        absent = added(self, "missing", absent, self.dtype)
        scheme = scheme_for((*self.path, "weight"), "fields", weight.shape, x)
        if scheme is None:
            x = jnp.einsum("BFI,FOI->BFO", x, weight.astype(self.dtype))
        else:
            key = rounding_key(self, scheme)
            keys = None if key is None else jax.random.split(key, fields)
            product = lambda x, w, key: quantized_dot(x, w, scheme, key=key)  # noqa: E731
            x = jax.vmap(product, in_axes=(1, 0, 0), out_axes=1)(x, weight, keys)
        x = constrain(x, "batch", None, None)
        x = jnp.where(missing[..., None], jnp.broadcast_to(absent[None], x.shape), x)
        fields_alone = jnp.mean(x, axis=1)
        for i in range(c.layers):
            layer = EncoderLayer(c.num_attention_heads, self.dtype, self.dropout, self.remat, name=f"layers_{i}")
            x = block(EncoderLayer.__call__, self.remat)(layer, x, cases)
        x = RMSNorm(name="final_norm")(x)
        # Beside what the layers make of the fields together, each field as it is: norms would bend a plain sum.
        joined = jnp.concatenate(held_apart(fields_alone, jnp.mean(x, axis=1)), axis=-1)
        summary = Linear(self.features, self.dtype, name="summary")(joined)
        return Linear(self.features, self.dtype, name="projection")(x), summary
