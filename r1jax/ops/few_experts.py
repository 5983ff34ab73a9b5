"""Routed experts of a few tokens by kernels that read each choice's weights in place (few_experts_kernel.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from r1jax.ops.quantized_dot import Ruled
from r1jax.ops.self_test import agrees, takes_triton

CHOICES = 64
"""Choices of all tokens up to which an expert's weights may be read once for each: more of them share experts."""


def takes_few_experts(tokens: int, choices: int, gate_up: Array | Ruled, down: Array | Ruled) -> bool:
    """Whether the kernels run here, are right, and take so many tokens of so many choices, and such weights."""
    floats = all(isinstance(w, jax.Array) and w.dtype == jnp.bfloat16 for w in (gate_up, down))
    if tokens * choices > CHOICES or not floats or not takes_triton():
        return False
    from r1jax.ops import few_experts_kernel

    return few_experts_kernel.fits(choices, gate_up, down) and _kernels_agree()


def few_experts(
    x: Float[Array, "T D"],
    experts: Int[Array, "T K"],
    shares: Float[Array, "T K"],
    gate_up: Float[Array, "E F2 D"],
    down: Float[Array, "E D F"],
    added: Float[Array, "T D"],
    *,
    interpret: bool = False,
) -> Float[Array, "T D"]:
    """The sum of shares of chosen experts' results, sum_k s_k E_k(x), on top of what is added; two launches.

    Args:
      x: Tokens.
      experts: Choices.
      shares: What each weighs.
      gate_up: Stacked weights, gate above up.
      down: Stacked weights.
      added: Residual stream and shared experts.
      interpret: Whether JAX computes it without Triton, as a test on a CPU does.

    Returns:
      Array of x's dtype.
    """
    from r1jax.ops import few_experts_kernel as kernel

    hidden = kernel.gate_and_up(x, experts, gate_up, interpret=interpret)
    return kernel.weigh_down(hidden, experts, shares, down, added, interpret=interpret)


def few_experts_reference(
    x: Float[Array, "T D"],
    experts: Int[Array, "T K"],
    shares: Float[Array, "T K"],
    gate_up: Float[Array, "E F2 D"],
    down: Float[Array, "E D F"],
    added: Float[Array, "T D"],
) -> Float[Array, "T D"]:
    """`few_experts` with a copy of each choice's weights; arguments and result are those."""
    gate, up = jnp.split(jnp.einsum("TD,TKFD->TKF", x, gate_up[experts]), 2, axis=-1)
    hidden = jax.nn.silu(gate) * up * shares[..., None].astype(x.dtype)
    return added + jnp.einsum("TKF,TKDF->TD", hidden, down[experts])


@functools.cache
def _kernels_agree() -> bool:
    """Tries the kernels on this device: two tokens, an expert that both choose."""
    rng = np.random.default_rng(0)
    experts = np.array([[3, 0], [1, 3]], np.int32)
    arrays = [rng.standard_normal(shape) for shape in ((2, 128), (4, 256, 128), (4, 128, 128), (2, 128))]
    x, gate_up, down, added = (a.astype(jnp.bfloat16) for a in (arrays[0], *(0.1 * a for a in arrays[1:])))

    def run(mix, x: Array, gate_up: Array, down: Array, added: Array) -> Array:
        shares = jnp.asarray([[0.7, 0.3], [0.5, 1.5]], jnp.float32)
        return mix(x, jnp.asarray(experts), shares, gate_up, down, added)

    fast, slow = (functools.partial(run, mix) for mix in (few_experts, few_experts_reference))
    return agrees("the kernels of a few tokens' experts", fast, slow, (x, gate_up, down, added), gradients=False)
