"""DeepSeekMoE: shared and routed experts, sigmoid router, group limit, bias-only balancing (DeepSeek-V3, 2.1.2)."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.config import DecoderConfig
from r1jax.models.layers import MLP
from r1jax.models.lora import Lora
from r1jax.models.remat import kept
from r1jax.ops.grouped_matmul import grouped_matmul, plan_dispatch, scatter_choices, scatter_rows, sum_rows


class RouterStats(NamedTuple):
    """What the router did in one layer."""

    load: Float[Array, " E"]
    """Tokens that chose each expert; padding is not counted."""
    balance_loss: Float[Array, ""]
    """Sequence-wise balance loss before its weight (equation 17), mean over the sequences."""
    sequence_load: Float[Array, "B E"]
    """`load` of each sequence by itself."""


def select_experts(
    scores: Float[Array, "T E"], bias: Float[Array, " E"], config: DecoderConfig
) -> tuple[Int[Array, "T K"], Float[Array, "T K"]]:
    """Chooses K experts a token from the best groups; the bias decides who wins, never how much they weigh.

    Args:
      scores: Affinity of each token and expert, fp32.
      bias: `e_score_correction_bias`, added for the choice only.
      config: Groups, K and scaling.

    Returns:
      Expert indices and their weights; the experts of dropped groups are set to -inf before the choice.
    """
    biased = scores + jnp.broadcast_to(bias, scores.shape)
    if config.n_group > 1:
        groups = biased.reshape(scores.shape[0], config.n_group, -1)
        if config.scoring_func == "sigmoid":
            group_score = jnp.sum(jax.lax.top_k(groups, 2)[0], axis=-1)
        else:  # DeepSeek-V2 ranks a group by its best expert
            group_score = jnp.max(groups, axis=-1)
        kept = jax.lax.top_k(group_score, config.topk_group)[1]
        open_group = jnp.any(kept[:, :, None] == jnp.arange(config.n_group)[None, None, :], axis=1)
        biased = jnp.where(open_group[:, :, None], groups, -jnp.inf).reshape(scores.shape)
    experts = jax.lax.top_k(biased, config.num_experts_per_tok)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if config.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return experts, weights * config.routed_scaling_factor


def sequence_balance_loss(
    scores: Float[Array, "B T E"], chosen: Float[Array, "B T E"], valid: Bool[Array, "B T"], top_k: int
) -> Float[Array, ""]:
    """sum_i f_i P_i of each sequence (DeepSeek-V3, equations 17 to 20), mean over the sequences.

    Args:
      scores: Affinities.
      chosen: 1 where the expert was chosen.
      valid: Tokens that count.
      top_k: K.

    Returns:
      Scalar; 1 for perfectly even routing.
    """
    weight = valid.astype(jnp.float32)[..., None]
    tokens = jnp.maximum(jnp.sum(weight, axis=1), 1.0)
    share = scores / jnp.sum(scores, axis=-1, keepdims=True)
    f = jnp.sum(chosen * weight, axis=1) / tokens * (scores.shape[-1] / top_k)
    p = jnp.sum(share * weight, axis=1) / tokens
    return jnp.mean(jnp.sum(jax.lax.stop_gradient(f) * p, axis=-1))


class Router(nn.Module):
    """Affinities in fp32 and the balancing bias; named as in the checkpoint."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "T D"]) -> tuple[Float[Array, "T E"], Float[Array, " E"]]:
        c = self.config
        shape = (c.n_routed_experts, x.shape[-1])
        weight = self.param("weight", nn.initializers.normal(c.initializer_range), shape, jnp.float32)
        # A buffer that the train step moves by its sign rule; no gradient flows into it.
        bias = self.param("e_score_correction_bias", nn.initializers.zeros, shape[:1], jnp.float32)
        exact = jax.lax.Precision.HIGHEST
        logits = jnp.einsum("TD,ED->TE", x.astype(jnp.float32), weight.astype(jnp.float32), precision=exact)
        scores = nn.sigmoid(logits) if c.scoring_func == "sigmoid" else nn.softmax(logits, axis=-1)
        return scores, jax.lax.stop_gradient(bias)


@functools.partial(jax.checkpoint, prevent_cse=False)  # of all that lies between, nothing is worth keeping
def _weighted_swiglu(both: Float[Array, "P G"], share: Float[Array, " P"]) -> Float[Array, "P F"]:
    """silu(gate) * up of each row [gate, up], times the row's weight; in fp32 between the products."""
    gate, up = jnp.split(both.astype(jnp.float32), 2, axis=-1)
    return (nn.silu(gate) * up * share[:, None]).astype(both.dtype)


class Experts(nn.Module):
    """Routed feed-forward experts with stacked weights, gate above up."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "T D"], experts: Int[Array, "T K"], weights: Float[Array, "T K"], *, few: bool = False
    ) -> Float[Array, "T D"]:
        c = self.config
        width, hidden = x.shape[-1], c.moe_intermediate_size
        init = nn.initializers.normal(c.initializer_range)
        gate_up = self.param("gate_up_proj", init, (c.n_routed_experts, 2 * hidden, width), jnp.float32)
        down = self.param("down_proj", init, (c.n_routed_experts, width, hidden), jnp.float32)
        # Few tokens: blocks as long as an expert's mean share, and with one row a block no expert unasked is read.
        block = min(128, -(-experts.size // c.n_routed_experts)) if few else 128
        plan = plan_dispatch(experts, c.n_routed_experts, block=block)
        rows = scatter_rows(x.astype(self.dtype), plan)
        both = kept(grouped_matmul(rows, gate_up.astype(self.dtype), plan.block_expert))
        # Weighted before the last product, whose result then is no part of the backward pass.
        hidden = _weighted_swiglu(both, scatter_choices(weights, plan))
        return sum_rows(grouped_matmul(hidden, down.astype(self.dtype), plan.block_expert), plan).astype(x.dtype)


class MoE(nn.Module):
    """y = sum_k w_k E_k(x) + shared(x); no token is dropped."""

    config: DecoderConfig
    dtype: DTypeLike
    lora: Lora = Lora()
    """Of the shared experts; the routed ones are not adapted."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"], *, few: bool = False
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        c = self.config
        batch, length, width = x.shape
        flat = x.reshape(-1, width)
        scores, bias = Router(c, name="gate")(flat)
        experts, weights = select_experts(scores, bias, c)
        routed = Experts(c, self.dtype, name="experts")(flat, experts, weights, few=few).reshape(x.shape)
        shared_width = c.n_shared_experts * c.moe_intermediate_size
        if shared_width:
            shared = MLP(shared_width, self.dtype, c.initializer_range, self.lora, name="shared_experts")
            routed = routed + shared(x)
        chosen = jnp.sum(jax.nn.one_hot(experts, c.n_routed_experts), axis=1).reshape(batch, length, -1)
        existing = chosen * valid[..., None].astype(jnp.float32)
        balance = sequence_balance_loss(scores.reshape(chosen.shape), chosen, valid, c.num_experts_per_tok)
        return routed, RouterStats(jnp.sum(existing, axis=(0, 1)), balance, jnp.sum(existing, axis=1))
