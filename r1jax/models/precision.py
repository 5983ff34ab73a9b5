"""Named precision policies: in which types a model multiplies, and what its training keeps them in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Precision(NamedTuple):
    """Types of one policy; whatever it says, router, softmax, norms, losses and all sums are fp32."""

    compute: DTypeLike
    """Of the operands of products, and of the activations between them."""
    weights: DTypeLike = jnp.float32
    """Of the weights that are trained; vectors and the router's matrix are fp32 always."""
    moments: DTypeLike | None = None
    """Of the optimizer's moments; None leaves it to `train.moments`."""
    scaled: bool = False
    """Whether the loss is scaled up, because small gradients would round to zero."""


PRECISIONS = {
    "fp32": Precision(jnp.float32),
    "bf16": Precision(jnp.bfloat16),
    "fp16": Precision(jnp.float16, scaled=True),
    "bf16_pure": Precision(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
}


def stored(params: Any, precision: Precision) -> Any:
    """Rounds fresh weights to the type that the policy keeps them in.

    Args:
      params: Parameter tree of R1, fp32.
      precision: The policy.

    Returns:
      The same tree; what would lose its meaning stays fp32: vectors, the routers, and frequencies.
    """

    def narrow(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        names = [part.key for part in path]
        exact = x.ndim < 2 or "gate" in names or names[-1] == "frequency"
        return x if exact else x.astype(precision.weights)

    return jax.tree_util.tree_map_with_path(narrow, params)
