"""Named rematerialisation policies: which activations the backward pass finds in memory, and which it computes again.

`none` keeps everything. `attention` computes scores and softmax again, which are quadratic in the length. `minimal`
keeps of each block the results of its products and of attention, and computes the cheap steps between them again.
`full` keeps only what enters a block. `offload` keeps what `minimal` keeps, but in the host's memory.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from r1jax.ops.attention import dot_product_attention, is_fused
from r1jax.ops.axes import placement, spread

Remat = Literal["none", "attention", "minimal", "full", "offload"]
PRODUCT = "product"
"""Name of the activations that `minimal` keeps."""
CUDNN = "dot_product_attention_fwd_wrapper"
"""JAX's name of cuDNN's forward pass: its backward pass reads the result and the normaliser, or it is done again."""


def kept(x: Array) -> Array:
    """Marks the result of a product or of attention, which is expensive to compute again."""
    return checkpoint_name(x, PRODUCT)


def block(call: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Wraps the call of a block of the model by the policy.

    Args:
      call: Takes a Linen module and arrays, returns arrays.
      remat: Policy.

    Returns:
      A function with the same arguments, results and parameters.
    """
    policies = jax.checkpoint_policies
    match remat:
        case "minimal":
            named = policies.save_only_these_names(PRODUCT)
            policy = lambda primitive, *x, **y: primitive.name == CUDNN or named(primitive, *x, **y)  # noqa: E731
        case "full":
            policy = policies.nothing_saveable
        case "offload":
            policy = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[PRODUCT],
                offload_src="device",
                offload_dst="pinned_host",
            )
        case _:
            return call
    return nn.remat(call, policy=policy)


def spread_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N Hv"],
    valid: Bool[Array, "B S"] | None,
    *,
    scale: float,
    causal: bool,
) -> Float[Array, "B T N Hv"]:
    """`dot_product_attention`; on a mesh within each device's own cases and heads, and nothing is exchanged."""
    where, attend = placement(), functools.partial(dot_product_attention, scale=scale, causal=causal)
    if where is None:
        return attend(q, k, v, valid=valid)
    heads = where.spec(("batch", None, "heads", None), q.shape)
    arrays = (q, k, v) if valid is None else (q, k, v, valid)

    def local(q: Array, k: Array, v: Array, *valid: Array) -> Array:
        return attend(q, k, v, valid=valid[0] if valid else None)

    return spread(local, (heads, heads, heads, PartitionSpec(heads[0]))[: len(arrays)], heads)(*arrays)


def attention(remat: Remat) -> Callable[..., Array]:
    """`dot_product_attention` by the policy; its keyword arguments are settings, its positional ones arrays.

    Args:
      remat: Policy.

    Returns:
      (q, k, v, valid, scale=, causal=) -> mixed values.
    """

    def attend(q: Array, k: Array, v: Array, valid: Array | None, *, scale: float, causal: bool) -> Array:
        def run(q: Array, k: Array, v: Array, valid: Array | None) -> Array:
            return spread_attention(q, k, v, valid, scale=scale, causal=causal)

        mixed = (jax.checkpoint(run) if remat == "attention" else run)(q, k, v, valid)
        if remat == "minimal" and is_fused(q, k, v, causal=causal, masked=valid is not None):
            return mixed  # cuDNN's own result is kept; this is the same, and would be kept a second time
        return kept(mixed)

    return attend
