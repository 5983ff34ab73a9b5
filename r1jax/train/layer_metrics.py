"""Norms of each part of the model: where gradients vanish, weights grow, or updates are out of proportion."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from r1jax.models.lora import split_tree
from r1jax.models.ngrams import RARITY
from r1jax.ops.axes import constrain
from r1jax.ops.pipeline import STACKED


def layer_metrics(params: Any, gradients: Any, updates: Any, order: tuple[int, ...] = ()) -> dict[str, Array]:
    """Norms of weights and gradients, and the size of an update relative to its weights.

    Args:
      params: Trained weights before the step, fp32.
      gradients: Before clipping.
      updates: What the step adds.
      order: Numbers of the layers that are stacked, where some are.

    Returns:
      `weight_norm.PART`, `gradient_norm.PART` and `update_ratio.PART`; a part is a module at the top of the tree, a
      layer of the decoder, or all heads together. How rare n-grams are is measured, and is no part's weight.
    """
    params = split_tree(params, (RARITY,))[1]
    weights, slopes, moved = (_norms(tree, order) for tree in (params, gradients, updates))
    found = {}
    for name in weights:
        weight, gradient, update = (norms[name] for norms in (weights, slopes, moved))
        found[f"weight_norm.{name}"], found[f"gradient_norm.{name}"] = weight, gradient
        found[f"update_ratio.{name}"] = update / (weight + 1e-12)
    return found


def _norms(tree: Any, order: tuple[int, ...]) -> dict[str, Array]:
    """Norm of each part by its name."""
    parts = _parts(tree)
    layers = parts.pop(f"decoder.{STACKED}", None)
    found = {name: optax.tree.norm(part) for name, part in parts.items()}
    if layers is not None:
        squares = [jnp.sum(x**2, axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(layers)]
        norms = constrain(jnp.sqrt(sum(squares, jnp.zeros(len(order)))), None)  # to all devices at once, not one by one
        found |= {f"decoder.layers_{i}": norms[slot] for slot, i in enumerate(order)}
    return found


def _parts(tree: Any) -> dict[str, list[Any]]:
    """Subtrees by the name of their part."""
    found: dict[str, list[Any]] = {}
    for name, part in tree.items():
        for inner, x in part.items() if name == "decoder" else [("", part)]:
            part_name = f"{name}.{inner}" if inner else "head" if name.startswith("head_") else name
            found.setdefault(part_name, []).append(x)
    return found
