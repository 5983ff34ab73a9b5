"""AdamW with warmup and one of five ways to decay; weight decay on matrices only, unless a rule says otherwise."""

import re
from typing import Any

import jax
import optax
from jaxtyping import Array, Int

from r1jax.config import TrainConfig
from r1jax.errors import UserError
from r1jax.validation import Rule, read_rule

BALANCE_BIAS = "e_score_correction_bias"
UNDECAYED = ("embed_tokens", "position", "queries", "missing", "frequency")


def _name(path: tuple[Any, ...]) -> str:
    return path[-1].key


def decays(params: Any) -> Any:
    """True for each weight matrix or kernel; norms, biases, embeddings and frequencies are not decayed."""
    return jax.tree_util.tree_map_with_path(_decays, params)


def _decays(path: tuple[Any, ...], x: Any) -> bool:
    return x.ndim > 1 and _name(path) not in UNDECAYED


def schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warmup, then what `train.schedule` says.

    Args:
      config: Rates, lengths and milestones.

    Returns:
      Learning rate by the number of steps done; at `train.steps` and after it, that of the end.
    """
    peak, final, warmup, steps = config.learning_rate, config.final_learning_rate, config.warmup_steps, config.steps
    match config.schedule:
        case "cosine":
            return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, final)
        case "linear":
            body = optax.linear_schedule(peak, final, steps - warmup)
        case "wsd":
            decay = max(1, min(round(config.decay_share * steps), steps - warmup))
            body = optax.linear_schedule(peak, final, decay, transition_begin=steps - warmup - decay)
        case "step":
            falls = {round(share * steps) - warmup: config.milestone_factor for share in config.milestones}
            body = optax.piecewise_constant_schedule(peak, falls)
        case "constant":
            body = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), body], [warmup]) if warmup else body


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW, slower for the decoder; the routers' biases are left to their own rule.

    Args:
      config: Rates, decay, clipping and rules for single weights.

    Returns:
      An optax transformation over the parameter tree; its `init` raises UserError where a rule matches no weight.
    """
    rules, rate = tuple(map(read_rule, config.rules)), schedule(config)

    def label(path: tuple[Any, ...], _: Any) -> str:
        if _name(path) == BALANCE_BIAS:
            return "balance"
        return "decoder" if path[0].key == "decoder" else "encoders"

    def adamw(factor: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(config.b1, config.b2),
            _add_decay(config.weight_decay, rules),
            optax.scale_by_learning_rate(lambda step: factor * rate(step)),
        )

    groups = {"encoders": adamw(1.0), "decoder": adamw(config.decoder_rate), "balance": optax.set_to_zero()}
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)  # noqa: E731
    inner = optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.multi_transform(groups, labels))

    def init(params: Any) -> Any:
        _check_rules(params, rules)
        return inner.init(params)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(gradients, state, params)
        slowed = lambda path, x: x * rule.rate if (rule := _rule_of(path, rules)) else x  # noqa: E731
        return jax.tree_util.tree_map_with_path(slowed, updates), state

    return optax.GradientTransformation(init, update)


def updates_done(state: Any) -> Int[Array, ""]:
    """Updates that an optimizer has made: steps, less those that were refused."""
    return optax.tree.get_all_with_path(state, "count")[0][1]


def _rule_of(path: tuple[Any, ...], rules: tuple[Rule, ...]) -> Rule | None:
    """The first rule whose pattern occurs in the weight's path, such as `decoder/layers_0/self_attn/o_proj/weight`."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return next((rule for rule in rules if re.search(rule.pattern, name)), None)


def _check_rules(params: Any, rules: tuple[Rule, ...]) -> None:
    """Refuses a rule that no weight follows: its pattern is wrong, or an earlier rule takes all that it means."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    followed = {_rule_of(path, rules) for path in paths}
    for rule in rules:
        if rule not in followed:
            some = ", ".join(jax.tree_util.keystr(path, simple=True, separator="/") for path in paths[:3])
            raise UserError(
                f"train.rules: no trained weight follows the pattern {rule.pattern!r}, or earlier rules take all that "
                f"it matches; weights are called {some}, ..."
            )


def _add_decay(weight_decay: float, rules: tuple[Rule, ...]) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` with a factor for each weight; its state is the same, so that checkpoints fit."""

    def factor(path: tuple[Any, ...], x: Any) -> float:
        rule = _rule_of(path, rules)
        return float(_decays(path, x)) if rule is None or rule.decay is None else rule.decay

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        add = lambda path, u, p: u + weight_decay * factor(path, p) * p  # noqa: E731
        return jax.tree_util.tree_map_with_path(add, updates, params), state

    mask = lambda params: jax.tree_util.tree_map_with_path(lambda path, x: factor(path, x) > 0, params)  # noqa: E731
    return optax.masked(optax.GradientTransformation(optax.init_empty_state, update), mask)
