"""Norms of each part of the model: where gradients vanish, weights grow, or updates are out of proportion."""

from typing import Any

import optax
from jaxtyping import Array


def layer_metrics(params: Any, gradients: Any, updates: Any) -> dict[str, Array]:
    """Norms of weights and gradients, and the size of an update relative to its weights.

    Args:
      params: Trained weights before the step, fp32.
      gradients: Before clipping.
      updates: What the step adds.

    Returns:
      `weight_norm.PART`, `gradient_norm.PART` and `update_ratio.PART`; a part is a module at the top of the tree, a
      layer of the decoder, or all heads together.
    """
    weights, slopes, moved = map(_parts, (params, gradients, updates))
    found = {}
    for name in weights:
        weight, gradient, update = (optax.tree.norm(parts[name]) for parts in (weights, slopes, moved))
        found[f"weight_norm.{name}"], found[f"gradient_norm.{name}"] = weight, gradient
        found[f"update_ratio.{name}"] = update / (weight + 1e-12)
    return found


def _parts(tree: Any) -> dict[str, list[Any]]:
    """Subtrees by the name of their part."""
    found: dict[str, list[Any]] = {}
    for name, part in tree.items():
        for inner, x in part.items() if name == "decoder" else [("", part)]:
            part_name = f"{name}.{inner}" if inner else "head" if name.startswith("head_") else name
            found.setdefault(part_name, []).append(x)
    return found
