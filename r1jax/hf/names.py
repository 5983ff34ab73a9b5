"""Which tensor on disk is which part of the decoder's parameter tree."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from r1jax.config import DecoderConfig

Path = tuple[str, ...]
ROUTER_BIAS = "e_score_correction_bias"
ROUTER = ("gate", "weight")
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Frequencies that old checkpoints store and everybody computes."""


@dataclass(frozen=True)
class Piece:
    """A tensor on disk and the part of a leaf that it fills."""

    name: str
    shape: tuple[int, ...]
    place: tuple[slice | int, ...] = ()
    """Index into the leaf; empty for all of it."""


@dataclass(frozen=True)
class Leaf:
    """One array of the parameter tree."""

    path: Path
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """What fills it on disk; none where the model type has no such tensor and it is zero."""

    @property
    def is_router(self) -> bool:
        """Whether it belongs to a router, which computes in fp32."""
        return self.path[-2:] == ROUTER or self.path[-1] == ROUTER_BIAS


def layout(config: DecoderConfig) -> tuple[Leaf, ...]:
    """Every leaf of the decoder and the tensors that it is made of (DeepSeek-V3 `README_WEIGHTS.md`).

    Args:
      config: The decoder.

    Returns:
      Leaves in the order of the layers; linear weights are [out, in], experts are stacked, gate above up.
    """
    c = config
    top = {"embed_tokens": "model.embed_tokens.weight", "norm": "model.norm.weight", "lm_head": "lm_head.weight"}
    table = (c.vocab_size, c.hidden_size)
    leaves = [_whole(("embed_tokens",), top["embed_tokens"], table)]
    for i in range(c.num_hidden_layers):
        leaves += _block(c, (f"layers_{i}",), f"model.layers.{i}.", dense=i < c.first_k_dense_replace)
    leaves.append(_whole(("norm", "weight"), top["norm"], table[1:]))
    leaves.append(_whole(("lm_head", "weight"), top["lm_head"], table))
    if c.num_nextn_predict_layers:
        prefix, width = f"model.layers.{c.num_hidden_layers}.", c.hidden_size
        leaves += [_whole(("mtp", name, "weight"), f"{prefix}{name}.weight", (width,)) for name in ("enorm", "hnorm")]
        leaves.append(_whole(("mtp", "eh_proj", "weight"), f"{prefix}eh_proj.weight", (width, 2 * width)))
        leaves += _block(c, ("mtp", "layer"), prefix, dense=False)
        leaves.append(_whole(("mtp", "shared_head_norm", "weight"), f"{prefix}shared_head.norm.weight", (width,)))
    return tuple(leaves)


def copies(config: DecoderConfig) -> dict[str, str]:
    """Tensors of the MTP module that repeat tensors of the main model, as the published checkpoints have them.

    Args:
      config: The decoder.

    Returns:
      Name of the main tensor by the name of its copy; empty without MTP.
    """
    if not config.num_nextn_predict_layers:
        return {}
    prefix = f"model.layers.{config.num_hidden_layers}."
    return {
        f"{prefix}embed_tokens.weight": "model.embed_tokens.weight",
        f"{prefix}shared_head.head.weight": "lm_head.weight",
    }


def nest(arrays: dict[Path, Any]) -> dict[str, Any]:
    """Builds the parameter tree.

    Args:
      arrays: Array by its path.

    Returns:
      Nested dicts, as `Decoder(config).apply({"params": ...})` takes them.
    """
    tree: dict[str, Any] = {}
    for path, value in arrays.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


def _whole(path: Path, name: str, shape: tuple[int, ...]) -> Leaf:
    return Leaf(path, shape, (Piece(name, shape),))


def _block(c: DecoderConfig, path: Path, prefix: str, *, dense: bool) -> Iterator[Leaf]:
    """Leaves of one layer."""

    def whole(name: str, *shape: int) -> Leaf:
        return _whole((*path, *name.split(".")), prefix + name, shape)

    def mlp(name: str, hidden: int) -> Iterator[Leaf]:
        for part in ("gate_proj", "up_proj"):
            yield whole(f"{name}.{part}.weight", hidden, width)
        yield whole(f"{name}.down_proj.weight", width, hidden)

    width, heads, key = c.hidden_size, c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
    yield whole("input_layernorm.weight", width)
    if c.q_lora_rank:
        yield whole("self_attn.q_a_proj.weight", c.q_lora_rank, width)
        yield whole("self_attn.q_a_layernorm.weight", c.q_lora_rank)
        yield whole("self_attn.q_b_proj.weight", heads * key, c.q_lora_rank)
    else:
        yield whole("self_attn.q_proj.weight", heads * key, width)
    yield whole("self_attn.kv_a_proj_with_mqa.weight", c.kv_lora_rank + c.qk_rope_head_dim, width)
    yield whole("self_attn.kv_a_layernorm.weight", c.kv_lora_rank)
    yield whole("self_attn.kv_b_proj.weight", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    yield whole("self_attn.o_proj.weight", width, heads * c.v_head_dim)
    yield whole("post_attention_layernorm.weight", width)
    if dense:
        yield from mlp("mlp", c.intermediate_size)
        return
    yield whole("mlp.gate.weight", c.n_routed_experts, width)
    bias = whole(f"mlp.gate.{ROUTER_BIAS}", c.n_routed_experts)
    yield bias if c.scoring_func == "sigmoid" else Leaf(bias.path, bias.shape, ())  # DeepSeek-V2 has none
    yield from _experts(c, (*path, "mlp", "experts"), f"{prefix}mlp.experts.")
    if c.n_shared_experts:
        yield from mlp("mlp.shared_experts", c.n_shared_experts * c.moe_intermediate_size)


def _experts(c: DecoderConfig, path: Path, prefix: str) -> Iterator[Leaf]:
    """The two stacks of routed experts."""
    count, width, hidden = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
    halves = {"gate": slice(0, hidden), "up": slice(hidden, 2 * hidden)}
    gate_up = [
        Piece(f"{prefix}{expert}.{half}_proj.weight", (hidden, width), (expert, rows))
        for expert in range(count)
        for half, rows in halves.items()
    ]
    down = [Piece(f"{prefix}{expert}.down_proj.weight", (width, hidden), (expert,)) for expert in range(count)]
    yield Leaf((*path, "gate_up_proj"), (count, 2 * hidden, width), tuple(gate_up))
    yield Leaf((*path, "down_proj"), (count, width, hidden), tuple(down))
