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
    """Clip by global norm, then AdamW, slower for the decoder; the routers' biases are left to their own rule.

    Args:
      config: Rates, decay and clipping.

    Returns:
      An optax transformation over the parameter tree.
    """

    def label(path: tuple[Any, ...], _: Any) -> str:
        if _name(path) == BALANCE_BIAS:
            return "balance"
        return "decoder" if path[0].key == "decoder" else "encoders"

    def adamw(factor: float) -> optax.GradientTransformation:
        rate = schedule(config)
        return optax.adamw(
            lambda step: factor * rate(step), config.b1, config.b2, weight_decay=config.weight_decay, mask=decays
        )

    rules = {"encoders": adamw(1.0), "decoder": adamw(config.decoder_rate), "balance": optax.set_to_zero()}
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)  # noqa: E731
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.multi_transform(rules, labels))
