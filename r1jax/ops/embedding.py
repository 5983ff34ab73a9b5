"""Rows of a table of tokens, whose rows may lie on different devices."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from r1jax.ops.axes import axes_of, gather_dimensions, placement, spread
from r1jax.ops.quantize import Quantized, dequantize
from r1jax.ops.quantized_dot import Scheme, rounded


def embed(
    table: Float[Array, "V D"] | Quantized,
    tokens: Int[Array, "B T"],
    dtype: DTypeLike,
    path: tuple[str, ...],
    scheme: Scheme | None = None,
) -> Float[Array, "B T D"]:
    """table[tokens]; on a mesh each device looks up the tokens of its part of the vocabulary.

    Args:
      table: Embeddings, or their codes.
      tokens: From 0 to V - 1.
      dtype: Of the result.
      path: Of the table in the parameter tree.
      scheme: What its rows are rounded to; None leaves them.

    Returns:
      Array of that dtype.
    """
    if isinstance(table, Quantized):
        return dequantize(jax.tree.map(lambda part: part[tokens], table), dtype)
    if scheme is not None:
        return rounded(embed(table, tokens, table.dtype, path), scheme, dtype)
    where = placement()
    if where is None:
        return table[tokens].astype(dtype)
    kept, apart = where.kept(table.shape, ("vocabulary", None), path)
    vocabulary = axes_of(where.spec(("vocabulary", None), table.shape)[0])

    def local(table: Array, tokens: Array) -> Array:
        table = gather_dimensions(table, apart)
        own = tokens - jax.lax.axis_index(vocabulary) * len(table) if vocabulary else tokens
        inside = (own >= 0) & (own < len(table))
        rows = jnp.where(inside[..., None], table[jnp.where(inside, own, 0)], 0)
        return jax.lax.psum(rows, vocabulary) if vocabulary else rows

    rows = where.spec(("batch", "length", None), (*tokens.shape, table.shape[1]))
    ids = where.spec(("batch", "length"), tokens.shape)
    return spread(local, (kept, ids), rows)(table.astype(dtype), tokens)
