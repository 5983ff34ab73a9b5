"""What a compiler must not make one kernel of."""

import jax
from jaxtyping import Array


def held_apart(*parts: Array) -> tuple[Array, ...]:
    """The parts as they are; on an NVIDIA GPU, no kernel that forms one of them also joins them.

    Of sums over an axis, such as means, and of joining them side by side, XLA of JAX 0.11 makes one Triton kernel, in
    which, with two cases a tile, every other case reads numbers of its neighbour (seen in bf16 and with products of
    codes; benchmarks/precision_gap.py scores cases beside other neighbours to find such kernels).

    Args:
      parts: What is to be joined.

    Returns:
      The same arrays.
    """
    return jax.lax.platform_dependent(*parts, cuda=lambda *x: jax.lax.optimization_barrier(x), default=lambda *x: x)
