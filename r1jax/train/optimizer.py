"""AdamW with warmup and cosine decay; weight decay on matrices only."""

from typing import Any

import jax
import optax

from r1jax.config import TrainConfig

BALANCE_BIAS = "e_score_correction_bias"
UNDECAYED = ("embed_tokens", "position", "queries", "missing", "frequency")


def _name(path: tuple[Any, ...]) -> str:
    return path[-1].key


def decays(params: Any) -> Any:
    """True for each weight matrix or kernel; norms, biases, embeddings and frequencies are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x.ndim > 1 and _name(path) not in UNDECAYED, params)


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warmup, then cosine decay to the final rate at the last step."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, config.final_learning_rate
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; the routers' balancing biases are left to their own rule.

    Args:
      config: Rates, decay and clipping.

    Returns:
      An optax transformation over the parameter tree.
    """

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "balance" if _name(path) == BALANCE_BIAS else "adamw", params
        )

    adamw = optax.adamw(schedule(config), config.b1, config.b2, weight_decay=config.weight_decay, mask=decays)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.multi_transform({"adamw": adamw, "balance": optax.set_to_zero()}, labels),
    )
