"""Balance between a weight and its inputs: what is large in one of few bits is made smaller, and the other larger.

SmoothQuant (Xiao et al. 2023, equation 4) divides each input by max|x|^a / max|w|^(1 - a) and multiplies the weight's
column by it, so that inputs with outliers can be rounded; AWQ (Lin et al. 2024, section 3.2) by |x|^a, so that columns
of large inputs lose less. Here the factors are powers of two: the balanced product of floats is then the product
itself, to the last bit. They stay with the codes, since a norm before a weight often serves others too.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from r1jax.ops.quantize import Quantized
from r1jax.ops.quantized_dot import Scheme, quantized_dot

STRENGTHS = (0.25, 0.5, 0.75)
"""Values of a that are tried; without balance is one more."""
WORTH = 0.8
"""Share of the squared error to which a balance must bring it down: it takes a byte a column, and an operation."""
WIDEST = 12
"""Largest exponent of a factor, either way."""
CLIPPED = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the largest input that are tried as the range of all inputs."""


def powers(ratio: Float[np.ndarray, " I"]) -> Float[np.ndarray, " I"]:
    """The nearest powers of two, on average 1; scales make good any common factor.

    Args:
      ratio: Positive numbers; 0 takes no part and becomes 1.

    Returns:
      Powers of two.
    """
    exponent = np.zeros(ratio.shape)
    live = (ratio > 0) & np.isfinite(ratio)
    if live.any():
        wide = np.log2(ratio[live])
        exponent[live] = np.clip(np.round(wide - wide.mean()), -WIDEST, WIDEST)
    return np.exp2(exponent)


def powers_by_inputs(size: Float[np.ndarray, " I"]) -> Iterator[Float[np.ndarray, " I"]]:
    """Factors for a weight of few bits whose inputs are not rounded, one set for each strength.

    Args:
      size: Root mean square of each input, up to a common factor.

    Yields:
      Powers of two.
    """
    for a in STRENGTHS:
        yield powers(size**a)


def powers_by_both(
    largest: Float[np.ndarray, " I"], weight: Float[np.ndarray, "O I"]
) -> Iterator[Float[np.ndarray, " I"]]:
    """Factors for a weight and inputs that are both rounded, one set for each strength.

    Args:
      largest: Magnitude of each input.
      weight: Its columns are those of the inputs.

    Yields:
      Powers of two.
    """
    columns = np.abs(weight).max(axis=0)
    known = (largest > 0) & (columns > 0)
    for a in STRENGTHS:
        yield powers(np.where(known, largest, 0) ** a / np.where(known, columns, 1) ** (1 - a))


def better_balanced(plain: Quantized, balanced: list[Quantized], error: Callable[[Quantized], float]) -> Quantized:
    """The balanced codes of the least error, where that is worth it; otherwise those without balance."""
    best = min(balanced, key=error, default=plain)
    return best if error(best) < WORTH * error(plain) else plain


def with_span(codes: Quantized, largest: Float[np.ndarray, " I"], error: Callable[[Quantized], float]) -> Quantized:
    """The codes with the range of all inputs that gives the least error; what is beyond it will be clipped.

    Of inputs that were all zeros, as those of a modality that no calibration case has, no range is known: the codes
    stay without, and each row has a scale of its own.

    Args:
      codes: Of a weight.
      largest: Magnitude of each input.
      error: Of codes.

    Returns:
      Codes.
    """
    if codes.balance is not None:
        largest = largest / np.asarray(codes.balance[0], np.float32)
    if not np.max(largest) > 0:
        return codes
    spans = (jnp.full((1, 1), share * np.max(largest), jnp.float32) for share in CLIPPED)
    return min((codes._replace(span=span) for span in spans), key=error)


@functools.partial(jax.jit, static_argnums=0)
def served_error(
    scheme: Scheme, rows: Float[Array, "R I"], codes: Quantized, exact: Float[Array, "R O"]
) -> Float[Array, ""]:
    """Sum of the squared changes of outputs that codes make as they are served, their inputs rounded.

    Args:
      scheme: How inputs are rounded.
      rows: Inputs.
      codes: Of the weight.
      exact: Outputs of the weight itself.

    Returns:
      Scalar.
    """
    return jnp.sum((quantized_dot(rows, codes, scheme) - exact) ** 2)
