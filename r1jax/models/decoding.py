"""A step of decoding over fused weights: `Decoder.cached` for the next token or two of each row, in few launches.

It is the decoder once more as a function of arrays, because norms, SwiGLU and residuals belong to the products here and
to modules there; a test holds both together.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from r1jax.config import DecoderConfig
from r1jax.models.attention import LATENT_NORM_EPS
from r1jax.models.decoder import Decoder, LatentCache
from r1jax.models.moe import Router, mix_experts, select_experts
from r1jax.models.quantized import scheme_for
from r1jax.models.served import Layer, Served
from r1jax.ops.decode_attention import Turn, decode_attention
from r1jax.ops.decode_layers import DenseLayer, Norms, decode_layers, takes_layers
from r1jax.ops.few_experts import few_experts, takes_few_experts
from r1jax.ops.latent_attention import PagedLatents, Pages
from r1jax.ops.norm import rms_norm
from r1jax.ops.quantize import Quantized
from r1jax.ops.quantized_dot import Ruled, Scheme
from r1jax.ops.rope import inverse_frequencies, rotary_factors, softmax_scale, yarn_magnitude
from r1jax.ops.row_products import row_product

CODES = Scheme("int8")
"""Codes of any kind that are multiplied with floats."""


def decode(
    config: DecoderConfig,
    served: Served,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    cache: LatentCache,
) -> tuple[Float[Array, "B T D"], LatentCache]:
    """`Decoder.cached` where something came before, but for the final norm.

    Args:
      config: The decoder.
      served: Its weights.
      x: Embeddings.
      positions: Place of each token in its row.
      valid: Tokens that exist.
      cache: What came before.

    Returns:
      States before the final norm, which `next_logits` and `decode_second` apply, and the cache with x in it.
    """
    rows, pools, turn = x.reshape(-1, x.shape[-1]), list(cache.pages), turns(config, positions)
    if together := layers_together(config, served, x, cache):
        limit = jnp.where(valid, positions, -1)[0, 0]
        rows, caches = decode_layers(rows, *together, limit, turn, norms_of(config))
        after = tuple(each.pages for each in caches)
        return rows.reshape(x.shape), cache._replace(pages=after + tuple(pools[len(after) :]))
    for i, layer in enumerate(served.layers):
        rows, pools[i] = _step(config, layer, rows, positions, valid, pools[i], cache.table, turn)
    return rows.reshape(x.shape), cache._replace(pages=tuple(pools))


def layers_together(
    config: DecoderConfig, served: Served, x: Float[Array, "B T D"], cache: LatentCache
) -> tuple[list[DenseLayer], list[PagedLatents]] | None:
    """What `decode` gives to one launch; where it does, a pass over a token that does not exist costs next to nothing.

    Args:
      config: The decoder.
      served: Its weights.
      x: Embeddings, whose shape and dtype count.
      cache: What came before.

    Returns:
      All layers and their caches; None where they are run one by one.
    """
    dense = [dense_layer(layer) for layer in served.layers]
    caches = [PagedLatents(pages, cache.table) for pages in cache.pages[: len(dense)]]
    rows = x.reshape(-1, x.shape[-1])
    return (dense, caches) if None not in dense and takes_layers(rows, dense, caches, norms_of(config)) else None


def decode_second(
    config: DecoderConfig,
    served: Served,
    x: Float[Array, "B T D"],
    following: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    cache: LatentCache,
) -> tuple[Float[Array, "B T D"], LatentCache]:
    """`Decoder.predict_second_cached` where something came before, but for its last norm.

    Args:
      config: The decoder.
      served: Its weights, MTP's among them.
      x: From `decode`.
      following: Embeddings of the tokens after those.
      positions: As there.
      valid: As there.
      cache: As there; the last pool is MTP's own.

    Returns:
      MTP's states before that norm, and the cache.
    """
    mtp, eps = served.rest["mtp"], config.rms_norm_eps
    hidden = rms_norm(x, served.rest["norm"]["weight"], eps)
    parts = ((following, "enorm"), (hidden, "hnorm"))
    pair = [rms_norm(part.reshape(-1, x.shape[-1]), mtp[name]["weight"], eps) for part, name in parts]
    rows = row_product(jnp.concatenate(pair, axis=-1), mtp["eh_proj"]["weight"])
    turn = turns(config, positions)
    rows, pool = _step(config, served.second, rows, positions, valid, cache.pages[-1], cache.table, turn)
    return rows.reshape(x.shape), cache._replace(pages=(*cache.pages[:-1], pool))


def next_logits(
    model: Decoder, served: Served, x: Float[Array, "B T D"], gain: Float[Array, " D"]
) -> Float[Array, "B T V"]:
    """`Decoder.logits` of states before their norm.

    Args:
      model: The decoder.
      served: Its weights.
      x: From `decode` or `decode_second`.
      gain: Of the norm: `norm` or MTP's `shared_head_norm`.

    Returns:
      Logits in fp32.
    """
    weight, eps = served.rest["lm_head"]["weight"], model.config.rms_norm_eps
    scheme = scheme_for(("lm_head", "weight"), "head", weight.shape)
    if scheme is None or (isinstance(weight, Quantized) and scheme.activations is None):
        logits = row_product(x.reshape(-1, x.shape[-1]), weight, gain=gain, eps=eps)
        return logits.astype(jnp.float32).reshape(*x.shape[:2], -1)
    return model.apply({"params": served.rest}, rms_norm(x, gain, eps), method="logits")


def turns(config: DecoderConfig, positions: Int[Array, "B T"]) -> Turn:
    """Cosine and sine of each token, as `apply_rope` forms them in every layer."""
    yarn = config.rope_scaling
    frequencies = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, yarn)
    magnitude = yarn_magnitude(yarn.factor, yarn.mscale) / yarn_magnitude(yarn.factor, yarn.mscale_all_dim)
    return Turn(*rotary_factors(positions.reshape(-1), frequencies, magnitude))


def dense_layer(layer: Layer) -> DenseLayer | None:
    """A layer for `decode_layers`; None of a mixture, and where queries are of low rank."""
    if layer.experts is not None or layer.q_b is not None:
        return None
    weights = layer.feed_forward.gate_up, layer.feed_forward.down
    return DenseLayer(layer.input_norm, layer.q_kv, layer.latent, layer.o, layer.post_norm, *weights)


def norms_of(config: DecoderConfig) -> Norms:
    """What norms add, and the factor on scores."""
    scale = softmax_scale(config.qk_nope_head_dim + config.qk_rope_head_dim, config.rope_scaling)
    return Norms(config.rms_norm_eps, LATENT_NORM_EPS, scale)


def _step(
    config: DecoderConfig,
    layer: Layer,
    x: Float[Array, "T D"],
    positions: Int[Array, "B t"],
    valid: Bool[Array, "B t"],
    pages: Pages,
    table: Int[Array, "B n"],
    turn: Turn,
) -> tuple[Float[Array, "T D"], Pages]:
    """A layer on all rows' tokens."""
    eps, _, scale = norms_of(config)
    both = row_product(x, layer.q_kv, gain=layer.input_norm, eps=eps)
    q = both if layer.q_b is None else row_product(both, layer.q_b, gain=layer.q_norm, eps=LATENT_NORM_EPS)
    cache = PagedLatents(pages, table)
    mixed, cache = decode_attention(
        q, both, layer.latent, cache, positions, valid, turn, eps=LATENT_NORM_EPS, scale=scale
    )
    x = row_product(mixed, layer.o, added=x)
    if layer.experts is None:
        hidden = row_product(x, layer.feed_forward.gate_up, gain=layer.post_norm, eps=eps, paired=True)
        return row_product(hidden, layer.feed_forward.down, added=x), cache.pages
    normed = rms_norm(x, layer.post_norm, eps)
    scores, bias = Router(config, parent=None).apply({"params": layer.router}, normed)
    gate_up, down = (_multiplied(layer.experts[name]) for name in ("gate_up_proj", "down_proj"))
    if layer.feed_forward is not None:
        hidden = row_product(normed, layer.feed_forward.gate_up, paired=True)
        x = row_product(hidden, layer.feed_forward.down, added=x)
    if takes_few_experts(len(x), config.num_experts_per_tok, gate_up, down):
        chosen = select_experts(scores, bias, config)
        return few_experts(normed, *chosen, gate_up, down, x), cache.pages
    return x + mix_experts(normed, scores, bias, gate_up, down, config=config, few=True).output, cache.pages


def _multiplied(weight: Any) -> jax.Array | Ruled:
    """Stacked weights as `mix_experts` takes them."""
    return Ruled(weight, CODES) if isinstance(weight, Quantized) else weight
