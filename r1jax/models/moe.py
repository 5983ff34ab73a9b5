"""DeepSeekMoE: shared and routed experts, sigmoid router, group limit, bias-only balancing (DeepSeek-V3, 2.1.2)."""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.config import DecoderConfig
from r1jax.errors import UserError
from r1jax.models.initial import normal
from r1jax.models.layers import MLP
from r1jax.models.lora import Lora
from r1jax.models.quantized import parameter, ruled
from r1jax.models.remat import kept
from r1jax.ops.axes import Placement, axes_of, gather_dimensions, gathered, placement, spread
from r1jax.ops.expert_exchange import exchange
from r1jax.ops.grouped_matmul import grouped_matmul, plan_dispatch, scatter_choices, scatter_rows, sum_rows
from r1jax.ops.grouped_quantized_dot import grouped_quantized_dot
from r1jax.ops.quantize import Quantized
from r1jax.ops.quantized_dot import Ruled, quantized_dot, rounded
from r1jax.ops.weight_only import grouped_weight_only_dot

ROWS = 128
"""Rows of a block; blocks of fewer are those of decoding."""


class RouterStats(NamedTuple):
    """What the router did in one layer."""

    load: Float[Array, " E"]
    """Tokens that chose each expert; padding is not counted."""
    balance_loss: Float[Array, ""]
    """Sequence-wise balance loss before its weight (equation 17), mean over the sequences."""
    sequence_load: Float[Array, "B E"]
    """`load` of each sequence by itself."""
    waited: Int[Array, ""] | None = None
    """Choices that found no place in the first exchange between devices and went in a later one; None without any."""


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
    def __call__(self, x: Float[Array, "*T D"]) -> tuple[Float[Array, "*T E"], Float[Array, " E"]]:
        c = self.config
        shape = (c.n_routed_experts, x.shape[-1])
        weight = self.param("weight", normal(c.initializer_range), shape, jnp.float32)
        # A buffer that the train step moves by its sign rule; no gradient flows into it.
        bias = self.param("e_score_correction_bias", nn.initializers.zeros, shape[:1], jnp.float32)
        exact, weight = jax.lax.Precision.HIGHEST, gathered(weight.astype(jnp.float32), (*self.path, "weight"))
        logits = jnp.einsum("...D,ED->...E", x.astype(jnp.float32), weight, precision=exact)
        scores = nn.sigmoid(logits) if c.scoring_func == "sigmoid" else nn.softmax(logits, axis=-1)
        return scores, jax.lax.stop_gradient(bias)


class Mixed(NamedTuple):
    """What the routed experts make of some tokens."""

    output: Float[Array, "*T D"]
    """sum_k w_k E_k(x)."""
    experts: Int[Array, "*T K"]
    """Which were chosen."""
    waited: Int[Array, ""] | None = None
    """Choices that found no place in the first exchange between devices."""


def mix_experts(
    x: Float[Array, "T D"],
    scores: Float[Array, "T E"],
    bias: Float[Array, " E"],
    gate_up: Float[Array, "E F2 D"] | Ruled,
    down: Float[Array, "E D F"] | Ruled,
    *,
    config: DecoderConfig,
    few: bool = False,
) -> Mixed:
    """Chooses experts and mixes their results, on one device.

    Args:
      x: Tokens, in the dtype of the weights.
      scores: Affinities, fp32.
      bias: For the choice only.
      gate_up: Stacked weights, gate above up; F may be a part of the experts' width, and the output then a summand.
      down: Stacked weights.
      config: K, groups and scaling.
      few: Whether there are few tokens: blocks are then as long as an expert's mean share, and with one row a block no
        expert unasked is read.

    Returns:
      Output and choices.
    """
    experts, weights = select_experts(scores, bias, config)
    block = min(ROWS, -(-experts.size // config.n_routed_experts)) if few else ROWS
    plan = plan_dispatch(experts, config.n_routed_experts, block=block)
    rows = _feed_forward(scatter_rows(x, plan), scatter_choices(weights, plan), plan.block_expert, gate_up, down)
    return Mixed(sum_rows(rows, plan), experts)


_DENSE: ContextVar[bool] = ContextVar("dense", default=False)


@contextlib.contextmanager
def dense_mixtures() -> Iterator[None]:
    """Has mixtures that are traced within be computed by `mix_experts_dense`: edge run times cannot sort."""
    token = _DENSE.set(True)
    try:
        yield
    finally:
        _DENSE.reset(token)


def mix_experts_dense(
    x: Float[Array, "T D"],
    scores: Float[Array, "T E"],
    bias: Float[Array, " E"],
    gate_up: Float[Array, "E F2 D"] | Ruled,
    down: Float[Array, "E D F"] | Ruled,
    *,
    config: DecoderConfig,
) -> Mixed:
    """`mix_experts` as two products with all experts, weight 0 for those not chosen: no sort, E / K times the work.

    Args:
      x: Tokens, in the dtype of the weights.
      scores: Affinities, fp32.
      bias: For the choice only.
      gate_up: Stacked weights, gate above up, or codes.
      down: Stacked weights, or codes.
      config: K, groups and scaling.

    Returns:
      As `mix_experts`; equal to it up to the order of additions.
    """
    share, chosen = expert_shares(scores, bias, config), select_experts(scores, bias, config)[0]
    if isinstance(gate_up, Ruled):
        flat = jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), gate_up.weight)
        both = quantized_dot(x, flat, gate_up.scheme)
    else:
        both = jnp.einsum("TD,FD->TF", x, gate_up.reshape(-1, x.shape[-1]))
    both = both.reshape(*share.shape, -1)
    if isinstance(down, Ruled):  # codes, whose inputs each have a scale of their own
        product = jax.vmap(lambda x, w: quantized_dot(x, w, down.scheme), in_axes=(1, 0), out_axes=1)
        return Mixed(jnp.sum(product(_swiglu(both, None), down.weight) * share[..., None], axis=1), chosen)
    hidden = _swiglu(both, share).reshape(x.shape[0], -1)
    output = jnp.einsum("TF,DF->TD", hidden, jnp.swapaxes(down, 0, 1).reshape(x.shape[-1], -1))
    return Mixed(output, chosen)


def expert_shares(scores: Float[Array, "T E"], bias: Float[Array, " E"], config: DecoderConfig) -> Float[Array, "T E"]:
    """`select_experts` without sorting: the weight of every expert, 0 where it is not chosen."""
    biased = scores + jnp.broadcast_to(bias, scores.shape)
    if config.n_group > 1:
        groups = biased.reshape(scores.shape[0], config.n_group, -1)
        best = _largest(groups, 2 if config.scoring_func == "sigmoid" else 1)
        group_score = jnp.sum(jnp.where(best, groups, 0), axis=-1)
        open_group = _largest(group_score, config.topk_group)
        biased = jnp.where(open_group[:, :, None], groups, -jnp.inf).reshape(scores.shape)
    weights = jnp.where(_largest(biased, config.num_experts_per_tok), scores, 0)
    if config.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * config.routed_scaling_factor


def _largest(x: Float[Array, "*T E"], count: int) -> Bool[Array, "*T E"]:
    """Whether each number is among the `count` largest of its row; of equal ones the first, as `jax.lax.top_k`."""
    other, own, place = x[..., None, :], x[..., :, None], jnp.arange(x.shape[-1])
    earlier = jnp.broadcast_to(place[None, :] < place[:, None], (*x.shape, x.shape[-1]))
    return jnp.sum((other > own) | ((other == own) & earlier), axis=-1) < count


def _feed_forward(
    rows: Float[Array, "P D"],
    share: Float[Array, " P"] | None,
    block_expert: Int[Array, " blocks"],
    gate_up: Float[Array, "E F2 D"] | Ruled,
    down: Float[Array, "E D F"] | Ruled,
) -> Float[Array, "P D"]:
    """SwiGLU of each block of rows with its expert's weights, times the row's share."""
    both = kept(_grouped(rows, gate_up, block_expert))
    if share is not None and rows.dtype != jnp.float32:
        # With its share before the last product, whose result then is no part of the backward pass.
        return _grouped(_swiglu(both, share), down, block_expert)
    result = kept(_grouped(_swiglu(both, None), down, block_expert))
    return result if share is None else result * share[:, None]  # as Hugging Face does, to meet its numbers in fp32


def _grouped(
    rows: Float[Array, "P D"], weight: Float[Array, "E F D"] | Ruled, block_expert: Int[Array, " blocks"]
) -> Float[Array, "P F"]:
    """Each block of rows times its expert's weights, rounded where they are ruled."""
    if not isinstance(weight, Ruled):
        return grouped_matmul(rows, weight, block_expert)
    if weight.scheme.activations is None:
        if isinstance(weight.weight, Quantized) and rows.shape[0] < ROWS * block_expert.shape[0]:
            return grouped_weight_only_dot(rows, weight.weight, block_expert)
        return grouped_matmul(rows, rounded(weight.weight, weight.scheme, rows.dtype), block_expert)
    return grouped_quantized_dot(rows, weight.weight, block_expert, weight.scheme, key=weight.key)


@functools.partial(jax.checkpoint, prevent_cse=False)  # of all that lies between, nothing is worth keeping
def _swiglu(both: Float[Array, "*P G"], share: Float[Array, "*P"] | None) -> Float[Array, "*P F"]:
    """silu(gate) * up of each row [gate, up], times the row's share; in fp32 between the products."""
    gate, up = jnp.split(both.astype(jnp.float32), 2, axis=-1)
    hidden = nn.silu(gate) * up
    return (hidden if share is None else hidden * share[..., None]).astype(both.dtype)


def exchange_and_mix(
    x: Float[Array, "T D"],
    scores: Float[Array, "T E"],
    bias: Float[Array, " E"],
    gate_up: Float[Array, "e F2 D"] | Ruled,
    down: Float[Array, "e D F"] | Ruled,
    *,
    config: DecoderConfig,
    axis: str,
    everywhere: tuple[str, ...],
    capacity: float,
) -> Mixed:
    """`mix_experts` where each device along an axis has e of the E experts; the other arguments are `exchange`'s."""
    experts, weights = select_experts(scores, bias, config)
    local = gate_up.shape[0]

    def compute(rows: Float[Array, "P D"], expert: Int[Array, " P"]) -> Float[Array, "P D"]:
        plan = plan_dispatch(expert[:, None], local + 1)  # empty places last: they are zeros for any expert
        owner = jnp.minimum(plan.block_expert, local)
        return sum_rows(_feed_forward(scatter_rows(rows, plan), None, owner, gate_up, down), plan)

    output, waited = exchange(
        x, experts, weights, compute, local_experts=local, axis=axis, everywhere=everywhere, capacity=capacity
    )
    return Mixed(output, experts, waited)


def spread_experts(
    where: Placement,
    x: Float[Array, "B T D"],
    scores: Float[Array, "B T E"],
    bias: Float[Array, " E"],
    gate_up: Float[Array, "E F2 D"] | Ruled,
    down: Float[Array, "E D F"] | Ruled,
    *,
    config: DecoderConfig,
    path: tuple[str, ...],
) -> Mixed:
    """`mix_experts` on a mesh: each device sorts its own tokens, and gathers the parts of its experts' weights.

    Args:
      where: The mesh.
      x: Tokens.
      scores: Affinities.
      bias: For the choice only.
      gate_up: Stacked weights, gate above up.
      down: Stacked weights.
      config: K, groups and scaling.
      path: Of the module, for the place of its weights.

    Returns:
      As `mix_experts`, with the tokens' two dimensions; equal to it up to the order of additions.
    """
    names = ("experts", None, "hidden", None), ("experts", None, "hidden")
    schemes = [part.scheme if isinstance(part, Ruled) else None for part in (gate_up, down)]
    keys = tuple(part.key if isinstance(part, Ruled) else None for part in (gate_up, down))
    gate_up, down = (part.weight if isinstance(part, Ruled) else part for part in (gate_up, down))
    # Gate and up are each divided over the devices of their width, so that these hold matching parts of both.
    pairs = jax.tree.map(lambda part: part.reshape(len(part), 2, -1, part.shape[-1]), gate_up)
    experts, _, hidden, _ = map(axes_of, where.spec(names[0], pairs.shape))
    if any(schemes) and hidden:
        raise UserError(
            "model.quant rounds routed experts, and mesh.tensor divides their width, so that the scale of a row would "
            'depend on the mesh: leave mesh.tensor at 1, or add "experts=float" before the other rules'
        )
    weights = (pairs, "gate_up_proj", names[0]), (down, "down_proj", names[1])
    apart = tuple(
        (PartitionSpec(experts or None), ()) if isinstance(w, Quantized) else where.kept(w.shape, dims, (*path, name))
        for w, name, dims in weights
    )
    tokens, total = where.spec(("batch", "length", None), x.shape), where.all_axes()
    counted = tuple(axis for part in tokens for axis in axes_of(part))

    def local(
        x: Array, scores: Array, bias: Array, pairs: Any, down: Any, keys: Any
    ) -> tuple[Array, Array, Array | None]:
        pairs, down = (
            jax.tree.map(lambda part, over=over: gather_dimensions(part, over), w)
            for w, (_, over) in zip((pairs, down), apart, strict=True)
        )
        gate_up = jax.tree.map(lambda part: part.reshape(len(part), -1, part.shape[-1]), pairs)
        # Each device numbers the rows of its own tokens from 0.
        keys = jax.tree.map(lambda key: jax.random.fold_in(key, jax.lax.axis_index(total)), keys)
        parts = zip((gate_up, down), schemes, keys, strict=True)
        both = (w if s is None else Ruled(w, s, key) for w, s, key in parts)
        flat = x.reshape(-1, x.shape[-1]), scores.reshape(-1, scores.shape[-1]), bias, *both
        if experts:
            mixed = exchange_and_mix(*flat, config=config, axis=experts[0], everywhere=total, capacity=where.capacity)
        else:
            mixed = mix_experts(*flat, config=config)
        output = jax.lax.psum(mixed.output.astype(jnp.float32), hidden) if hidden else mixed.output
        waited = None if mixed.waited is None else jax.lax.psum(mixed.waited, counted)
        return output.reshape(x.shape), mixed.experts.reshape(*x.shape[:2], -1), waited

    in_specs = tokens, tokens, PartitionSpec(), *(spec for spec, _ in apart), PartitionSpec()
    run = spread(local, in_specs, (tokens, tokens, PartitionSpec()))
    return Mixed(*run(x, scores, bias, pairs, down, keys))


class Experts(nn.Module):
    """Routed feed-forward experts with stacked weights, gate above up."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], scores: Float[Array, "B T E"], bias: Float[Array, " E"], *, few: bool = False
    ) -> Mixed:
        c = self.config
        width, hidden = x.shape[-1], c.moe_intermediate_size
        init = normal(c.initializer_range)
        gate_up = parameter(self, "gate_up_proj", init, (c.n_routed_experts, 2 * hidden, width))
        down = parameter(self, "down_proj", init, (c.n_routed_experts, width, hidden))
        x = x.astype(self.dtype)
        gate_up, down = ruled(self, "gate_up_proj", "experts", gate_up, x), ruled(self, "down_proj", "experts", down, x)
        gate_up, down = (w if isinstance(w, Ruled) else w.astype(self.dtype) for w in (gate_up, down))
        where = placement()
        if where is not None:
            return spread_experts(where, x, scores, bias, gate_up, down, config=c, path=self.path)
        tokens = x.reshape(-1, width), scores.reshape(-1, c.n_routed_experts)
        if _DENSE.get():
            mixed = mix_experts_dense(*tokens, bias, gate_up, down, config=c)
        else:
            mixed = mix_experts(*tokens, bias, gate_up, down, config=c, few=few)
        return Mixed(mixed.output.reshape(x.shape), mixed.experts.reshape(*x.shape[:2], -1))


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
        # On a mesh the tokens keep their two dimensions, each of which may be divided over devices.
        tokens = x.reshape(-1, x.shape[-1]) if placement() is None else x
        scores, bias = Router(c, name="gate")(tokens)
        scores = scores.reshape(*x.shape[:2], -1)
        mixed = Experts(c, self.dtype, name="experts")(x, scores, bias, few=few)
        routed = mixed.output.astype(x.dtype)
        shared_width = c.n_shared_experts * c.moe_intermediate_size
        if shared_width:
            shared = MLP(shared_width, self.dtype, c.initializer_range, self.lora, name="shared_experts")
            routed = routed + shared(x)
        chosen = jnp.sum(jax.nn.one_hot(mixed.experts, c.n_routed_experts), axis=2)
        existing = chosen * valid[..., None].astype(jnp.float32)
        balance = sequence_balance_loss(scores, chosen, valid, c.num_experts_per_tok)
        load, waited = jnp.sum(existing, axis=(0, 1)), mixed.waited
        return routed, RouterStats(load, balance, jnp.sum(existing, axis=1), waited)
