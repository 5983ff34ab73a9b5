"""What a compiler must not make one kernel of."""

import jax
from jaxtyping import Array


def held_apart(*parts: Array) -> tuple[Array, ...]:
    """The parts as they are; on an NVIDIA GPU, no kernel that forms one of them also joins them.

    Of means over an axis and of joining them side by side, XLA of JAX 0.11 makes one Triton kernel. Where a program of
    it takes two cases, the second reads numbers of its neighbour: seen in bf16, and in fp32 in a model of int8 codes.
    benchmarks/precision_gap.py scores cases beside other neighbours to find such kernels.

    Args:
      parts: What is to be joined.

    Returns:
      The same arrays.
    """
    return jax.lax.platform_dependent(*parts, cuda=lambda *x: jax.lax.optimization_barrier(x), default=lambda *x: x)
