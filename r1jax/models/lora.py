"""Low-rank adapters (Hu et al. 2021): W x + (alpha / r) B A x with a frozen W; here, what is done with their tree."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax.config import ModelConfig

PARTS = ("lora_a", "lora_b")


class Lora(NamedTuple):
    """How the decoder's linear layers are adapted."""

    rank: int = 0
    """Width of the adapters; 0 leaves them out."""
    alpha: float = 1.0
    """Strength: the product of the adapters is scaled by alpha / rank."""

    @property
    def scale(self) -> float:
        """Factor of the product of the adapters."""
        return self.alpha / self.rank


def split_adapters(params: Any) -> tuple[Any, Any]:
    """Separates the adapters from the weights that they adapt."""
    return split_tree(params, PARTS)


def split_tree(params: Any, names: tuple[str, ...]) -> tuple[Any, Any]:
    """Separates the arrays of some names from the others.

    Args:
      params: Parameter tree.
      names: Last parts of their paths.

    Returns:
      Trees of these arrays and of everything else; groups without content are left out.
    """
    named, rest = {}, {}
    for name, part in params.items():
        if isinstance(part, dict):
            for tree, inner in zip((named, rest), split_tree(part, names), strict=True):
                if inner:
                    tree[name] = inner
        else:
            (named if name in names else rest)[name] = part
    return named, rest


def join_trees(a: Any, b: Any) -> Any:
    """Undoes `split_tree`: one tree with the content of two that share no array."""
    both = {name: join_trees(a[name], b[name]) for name in a.keys() & b.keys()}
    return {name: both.get(name, a.get(name, b.get(name))) for name in sorted(a.keys() | b.keys())}


def merge_weight(weight: Any, a: Any, b: Any, scale: float) -> Float[Array, "O I"]:
    """W + scale B A, summed in fp32.

    Args:
      weight: W, [out, in].
      a: A, [rank, in].
      b: B, [out, rank].
      scale: Strength of the adapters, alpha / rank.

    Returns:
      Array of the weight's dtype.
    """
    product = jnp.matmul(jnp.asarray(b, jnp.float32), jnp.asarray(a, jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return (jnp.asarray(weight, jnp.float32) + scale * product).astype(weight.dtype)


def merge_lora(params: Any, config: ModelConfig, merge: Callable[[Any, Any, Any, float], Any] = merge_weight) -> Any:
    """Adds the adapters to their weights.

    Args:
      params: Parameter tree of R1, or of any part of it such as its decoder.
      config: Rank and alpha.
      merge: How one weight is merged, where the arrays are not in memory.

    Returns:
      A tree without adapters whose model, with `lora_rank` 0, gives the same outputs; without adapters the tree itself.
    """
    if not config.lora_rank:
        return params
    scale = Lora(config.lora_rank, config.lora_alpha).scale

    def merged(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        kept = {name: merged(part) for name, part in tree.items() if name not in PARTS}
        if PARTS[0] in tree:
            kept["weight"] = merge(tree["weight"], *(tree[name] for name in PARTS), scale)
        return kept

    return merged(params)
