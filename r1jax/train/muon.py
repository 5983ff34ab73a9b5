"""Muon: steps of matrices whose singular values are all about one (Jordan et al. 2024; Liu et al. 2025)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from r1jax.ops.pipeline import STACKED

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration, steep at zero: five rounds bring singular values near one (Jordan et al. 2024)."""
RMS = 0.2
"""About the root mean square of AdamW's steps, so that its rates and decay hold here too (Liu et al. 2025, 2.2)."""


def scale_by_matched_muon(momentum: float) -> optax.GradientTransformation:
    """Orthogonalises the momentum of each matrix, and gives it the size of a step of AdamW.

    The last two axes of a weight are (out, in), those before them count matrices, such as experts; a convolution
    kernel of [y, x, in, out] is the matrix from all that it sees to `out`. One number a weight is kept.

    Args:
      momentum: Decay of the mean gradient, which is applied ahead (Nesterov).

    Returns:
      An optax transformation over a tree of which each leaf has two axes or more, or is masked.
    """
    inner = scale_by_muon(COEFFICIENTS, beta=momentum, weight_dimension_numbers=_axes)

    def init(params: Any) -> MuonState:
        return inner.init(params)._replace(ns_coeffs=())  # constants are no state

    def update(gradients: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        updates, state = inner.update(gradients, state._replace(ns_coeffs=jnp.asarray(COEFFICIENTS)), params)
        return jax.tree_util.tree_map_with_path(_matched, updates), state._replace(ns_coeffs=())

    return optax.GradientTransformation(init, update)


def _axes(params: Any) -> Any:
    """Which axes of each weight are the rows and the columns of its matrices."""

    def of(path: tuple[Any, ...], x: Array) -> MuonDimensionNumbers:
        if _is_kernel(path, x):
            return MuonDimensionNumbers((x.ndim - 4, x.ndim - 3, x.ndim - 2), x.ndim - 1)
        return MuonDimensionNumbers(x.ndim - 1, x.ndim - 2)

    return jax.tree_util.tree_map_with_path(of, params)


def _matched(path: tuple[Any, ...], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """An orthogonal matrix has the root mean square 1 / sqrt(longer side)."""
    *_, rows, columns = (math.prod(x.shape[-4:-1]), x.shape[-1]) if _is_kernel(path, x) else x.shape
    return x * (RMS * math.sqrt(max(rows, columns)))


def _is_kernel(path: tuple[Any, ...], x: Array) -> bool:
    """Whether this is a kernel of a convolution: experts have as many axes where layers are stacked."""
    return x.ndim - any(part.key == STACKED for part in path) == 4
