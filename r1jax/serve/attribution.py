"""Integrated gradients: what each input adds to an output on the way from a baseline, with the check that it adds up.

Source: Sundararajan, Taly, Yan 2017, Axiomatic attribution for deep networks (equations 1 and 3): the contributions
of all inputs add up to the difference of the output. The integral is a sum over midpoints, which takes kinks well.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


class Attribution(NamedTuple):
    """Contributions of the inputs of each case, in units of the output."""

    contributions: PyTree[Float[Array, "B ..."]]
    baseline: Float[Array, " B"]
    """Output at the baseline."""
    output: Float[Array, " B"]
    """Output at the inputs."""

    @property
    def residual(self) -> Float[Array, " B"]:
        """What the contributions miss of the difference: the error of the sum that stands for the integral."""
        found = sum(x.reshape(len(x), -1).sum(axis=1) for x in jax.tree.leaves(self.contributions))
        return self.output - self.baseline - found


def integrated_gradients(
    output: Callable[[PyTree[Float[Array, "B ..."]]], Float[Array, " B"]],
    baseline: PyTree[Float[Array, "B ..."]],
    inputs: PyTree[Float[Array, "B ..."]],
    steps: int,
    offset: Float[Array, ""] | float = 0.5,
) -> Attribution:
    """Attributes the change of an output to the inputs.

    Args:
      output: One number a case, which depends on that case alone.
      baseline: Where the way begins.
      inputs: Where it ends, of the same shapes; what is NaN (missing) there stays so all the way and adds nothing.
      steps: Points on the way.
      offset: Where in each step its point lies, 0 to 1; the mean over k offsets (i + 1/2) / k has k times the steps.

    Returns:
      The attribution.
    """
    missing = jax.tree.map(jnp.isnan, inputs)
    way = jax.tree.map(lambda end, start, gone: jnp.where(gone, 0, end - start), inputs, baseline, missing)

    def at(share: Float[Array, ""]) -> PyTree[Float[Array, "B ..."]]:
        return jax.tree.map(
            lambda end, start, gone, to: jnp.where(gone, end, start + share.astype(to.dtype) * to),
            *(inputs, baseline, missing, way),
        )

    def add(total: PyTree, share: Float[Array, ""]) -> tuple[PyTree, None]:
        slope = jax.grad(lambda x: jnp.sum(output(x)))(at(share))
        return jax.tree.map(jnp.add, total, slope), None

    shares = (jnp.arange(steps, dtype=jnp.float32) + offset) / steps
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, inputs), shares)
    contributions = jax.tree.map(lambda t, to: jnp.where(to == 0, 0, t * to / steps), total, way)
    ends = (output(at(jnp.asarray(share, jnp.float32))) for share in (0.0, 1.0))
    return Attribution(contributions, *ends)
