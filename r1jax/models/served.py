"""Weights of the decoder as a step of decoding reads them: what reads the same input is one matrix.

A product of one row costs its weight's bytes and a launch, and a compiler that joins two products copies their weights
in every step. So queries and latents are one product, gate and up another, `kv_b_proj` lies in its two halves, and the
rows of rotary numbers are in half layout. It is made when a model is served and is in no checkpoint; `unfused` gives
the checkpoint's tree back, number by number.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from r1jax.config import DecoderConfig
from r1jax.models.lora import PARTS
from r1jax.models.quantized import rule_of
from r1jax.ops.decode_attention import LatentWeights
from r1jax.ops.quantize import Quantized, dequantize
from r1jax.validation import quant_rules

Weight = Array | Quantized
Params = Any


class FeedForward(NamedTuple):
    """SwiGLU."""

    gate_up: Weight
    """[2 F, D], gate above up."""
    down: Weight


class Layer(NamedTuple):
    """A layer; of a mixture `experts` are the routed ones, as in the checkpoint, and `feed_forward` the shared ones."""

    input_norm: Float[Array, " D"]
    q_kv: Weight
    """[O, D]: queries, or what `q_b` reads, above latent and rotary key."""
    q_norm: Float[Array, " Q"] | None
    q_b: Weight | None
    latent: LatentWeights
    kv_b: Quantized | None
    """Codes, which a prompt is multiplied with; what they stand for is in `latent`, and floats are there alone."""
    o: Weight
    post_norm: Float[Array, " D"]
    feed_forward: FeedForward | None
    router: Params | None
    experts: Params | None


class Served(NamedTuple):
    """Weights of a decoder."""

    rest: Params
    """What is outside of the layers, as in the checkpoint."""
    layers: tuple[Layer, ...]
    second: Layer | None
    """MTP's."""


PAIRS = (("q_a_proj", "kv_a_proj_with_mqa"), ("q_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"))
"""What becomes one matrix."""


def can_be_fused(params: Params, quant: tuple[str, ...]) -> bool:
    """Whether all that is fused is floats, or codes that are multiplied with floats, on one device.

    Args:
      params: Parameter tree of the decoder.
      quant: Rules of `model.quant`.

    Returns:
      False for adapters, and for weights that are rounded anew in every product, too.
    """
    rules = quant_rules(quant)
    for name, leaf in _weights(params, ()):
        rule = rule_of("/".join(("decoder", *name)), rules)
        anew = rule is not None and rule.weights != "float"
        if isinstance(leaf, Quantized):
            anew = anew and rule.activations is not None
            if leaf.balance is not None or leaf.span is not None:  # no row of theirs belongs to one of the matrix
                return False
        elif leaf.ndim < 2 or "gate" in name:  # norms and routers follow no rule
            anew = False
        apart = any(len(x.devices()) > 1 for x in jax.tree.leaves(leaf) if isinstance(x, jax.Array))
        if anew or apart or name[-1] in PARTS:
            return False
    return all(_pairs_are_alike(part) for name, part in params.items() if isinstance(part, dict))


def _weights(tree: Params, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Weight]]:
    """Weights of the layers, with their paths."""
    for name, part in tree.items():
        if isinstance(part, dict):
            yield from _weights(part, (*path, name))
        elif path and path[0].startswith(("layers_", "mtp")):
            yield (*path, name), part


def _pairs_are_alike(tree: Params) -> bool:
    """Whether the matrices that become one are of one kind, everywhere in a tree."""
    for pair in PAIRS:
        if all(name in tree for name in pair):
            upper, lower = (jax.tree.map(lambda x: (x.dtype, x.shape[1:]), tree[name]["weight"]) for name in pair)
            if jax.tree.structure(upper) != jax.tree.structure(lower) or upper != lower:
                return False
    return all(_pairs_are_alike(part) for part in tree.values() if isinstance(part, dict))


def fused(params: Params, config: DecoderConfig, dtype: DTypeLike) -> Served:
    """Lays weights out for decoding; numbers stay what they are, and codes codes, with floats beside `kv_b_proj`'s.

    Args:
      params: Parameter tree of the decoder, in the dtypes of its products; `can_be_fused` must hold.
      config: Of the decoder.
      dtype: Of the products.

    Returns:
      The weights; those that are not fused are shared with the tree.
    """
    rest = {name: part for name, part in params.items() if not name.startswith("layers_")}
    second = None
    if "mtp" in rest:
        second = _layer(rest["mtp"]["layer"], config, dtype)
        rest["mtp"] = {name: part for name, part in rest["mtp"].items() if name != "layer"}
    every = (_layer(params[f"layers_{i}"], config, dtype) for i in range(config.num_hidden_layers))
    return Served(rest, tuple(every), second)


def unfused(served: Served, config: DecoderConfig) -> Params:
    """The checkpoint's tree of fused weights.

    Args:
      served: From `fused`.
      config: Of the decoder.

    Returns:
      Parameter tree of the decoder.
    """
    params = dict(served.rest)
    params |= {f"layers_{i}": _module_params(layer, config) for i, layer in enumerate(served.layers)}
    if served.second is not None:
        params["mtp"] = params["mtp"] | {"layer": _module_params(served.second, config)}
    return params


def _layer(params: Params, config: DecoderConfig, dtype: DTypeLike) -> Layer:
    mlp = params["mlp"]
    mixture = "experts" in mlp
    feed_forward = mlp.get("shared_experts") if mixture else mlp
    attention = {name: part["weight"] for name, part in params["self_attn"].items()}
    down, pair = None, None
    if feed_forward is not None:
        down = feed_forward["down_proj"]["weight"]
        pair = feed_forward["gate_proj"]["weight"], feed_forward["up_proj"]["weight"]
    q_kv, q_b, keys, values, gate_up = _fused(attention, pair, config, dtype)
    return Layer(
        input_norm=params["input_layernorm"]["weight"],
        q_kv=q_kv,
        q_norm=attention.get("q_a_layernorm"),
        q_b=q_b,
        latent=LatentWeights(keys, values, attention["kv_a_layernorm"]),
        kv_b=attention["kv_b_proj"] if isinstance(attention["kv_b_proj"], Quantized) else None,
        o=attention["o_proj"],
        post_norm=params["post_attention_layernorm"]["weight"],
        feed_forward=None if down is None else FeedForward(gate_up, down),
        router=mlp["gate"] if mixture else None,
        experts=mlp["experts"] if mixture else None,
    )


# One program for all layers of a kind; what passes through a program unchanged would be copied.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _fused(
    attention: dict[str, Weight], pair: tuple[Weight, Weight] | None, config: DecoderConfig, dtype: DTypeLike
) -> tuple[Weight, Weight | None, Array, Array, Weight | None]:
    """The matrices that are new: q_kv, q_b, keys, values and gate_up."""
    queries, latents = _rows(config)
    kv_a = _take(attention["kv_a_proj_with_mqa"], latents)
    q = _take(attention["q_b_proj" if config.q_lora_rank else "q_proj"], queries)
    kv_b = attention["kv_b_proj"]
    kv_b = dequantize(kv_b, dtype) if isinstance(kv_b, Quantized) else kv_b
    halves = kv_b.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, values = jnp.split(halves, [config.qk_nope_head_dim], axis=1)
    q_kv = _above(attention["q_a_proj"] if config.q_lora_rank else q, kv_a)
    return q_kv, q if config.q_lora_rank else None, keys, values, None if pair is None else _above(*pair)


def _module_params(layer: Layer, config: DecoderConfig) -> Params:
    """The tree of `DecoderLayer`."""
    queries, latents = _rows(config)
    first, kv_a = _apart(layer.q_kv, layer.q_kv.shape[0] - len(latents))
    q = _take(first if layer.q_b is None else layer.q_b, np.argsort(queries))
    kv_b = layer.kv_b
    if kv_b is None:
        kv_b = jnp.concatenate([layer.latent.keys, layer.latent.values], axis=1).reshape(-1, config.kv_lora_rank)
    attention = {
        "kv_a_proj_with_mqa": _take(kv_a, np.argsort(latents)),
        "kv_a_layernorm": layer.latent.gain,
        "kv_b_proj": kv_b,
        "o_proj": layer.o,
    }
    if layer.q_b is None:
        attention["q_proj"] = q
    else:
        attention |= {"q_a_proj": first, "q_a_layernorm": layer.q_norm, "q_b_proj": q}
    mlp = {}
    if layer.feed_forward is not None:
        gate, up = _apart(layer.feed_forward.gate_up, layer.feed_forward.gate_up.shape[0] // 2)
        mlp = _named({"gate_proj": gate, "up_proj": up, "down_proj": layer.feed_forward.down})
    if layer.experts is not None:
        shared = {"shared_experts": mlp} if mlp else {}
        mlp = {"gate": layer.router, "experts": layer.experts} | shared
    norms = _named({"input_layernorm": layer.input_norm, "post_attention_layernorm": layer.post_norm})
    return norms | {"self_attn": _named(attention), "mlp": mlp}


def _named(weights: dict[str, Weight]) -> Params:
    return {name: {"weight": weight} for name, weight in weights.items()}


def _rows(config: DecoderConfig) -> tuple[Int[np.ndarray, " Q"], Int[np.ndarray, " C"]]:
    """In which order the rows of the queries' and of the latents' weight are served."""
    heads, wide, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    half = np.arange(rope)
    half = np.concatenate([half[0::2], half[1::2]]) if config.rope_interleave else half
    start = np.arange(heads)[:, None] * (wide + rope)
    queries = np.concatenate([(start + np.arange(wide)).reshape(-1), (start + wide + half).reshape(-1)])
    return queries, np.concatenate([np.arange(config.kv_lora_rank), config.kv_lora_rank + half])


def _take(weight: Weight, rows: Int[np.ndarray, " n"]) -> Weight:
    return jax.tree.map(lambda part: part[rows], weight)


def _above(upper: Weight, lower: Weight) -> Weight:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), upper, lower)


def _apart(weight: Weight, row: int) -> tuple[Weight, Weight]:
    return jax.tree.map(lambda part: part[:row], weight), jax.tree.map(lambda part: part[row:], weight)
