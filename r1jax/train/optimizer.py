"""AdamW with warmup and one of five ways to decay, SGD or Muon for chosen weights; decay on matrices, or by rules."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from r1jax.config import TrainConfig
from r1jax.errors import UserError
from r1jax.models.ngrams import RARITY
from r1jax.ops.pipeline import STACKED
from r1jax.train.muon import scale_by_matched_muon
from r1jax.validation import Rule, read_rule

BALANCE_BIAS = "e_score_correction_bias"
UNDECAYED = ("embed_tokens", "position", "queries", "missing", "frequency")


def _name(path: tuple[Any, ...]) -> str:
    return path[-1].key


def decays(params: Any) -> Any:
    """True for each weight matrix or kernel; norms, biases, embeddings and frequencies are not decayed."""
    return jax.tree_util.tree_map_with_path(_decays, params)


def _decays(path: tuple[Any, ...], x: Any) -> bool:
    return x.ndim - any(part.key == STACKED for part in path) > 1 and _name(path) not in UNDECAYED


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


def make_optimizer(config: TrainConfig, order: tuple[int, ...] = ()) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW, SGD or Muon, slower for the decoder; the routers' biases have their own rule.

    Args:
      config: Rates, decay, clipping and rules for single weights.
      order: Numbers of the layers that are stacked, or will be, where some are.

    Returns:
      An optax transformation over the parameter tree; its `init` raises UserError where a rule or a pattern of
      `train.sgd` or `train.muon` matches no weight, some layers of a pipeline, or what the other has chosen.
    """
    rules, rate = tuple(map(read_rule, config.rules)), schedule(config)

    def label(path: tuple[Any, ...], x: Any) -> str:
        if _name(path) in (BALANCE_BIAS, RARITY):
            return "balance"
        part = "decoder" if path[0].key == "decoder" else "encoders"
        found = _chosen_by(path, x, config, order)
        return f"{part} by {found[0]}" if found else part

    def decoupled(direction: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
        return optax.chain(
            direction,
            _add_decay(config.weight_decay, rules, order),
            optax.scale_by_learning_rate(lambda step: factor * rate(step)),
        )

    def adamw(factor: float) -> optax.GradientTransformation:
        return decoupled(optax.scale_by_adam(config.b1, config.b2), factor)

    def muon(factor: float) -> optax.GradientTransformation:
        return decoupled(scale_by_matched_muon(config.b1), factor)

    def sgd(factor: float) -> optax.GradientTransformation:
        return optax.chain(
            _add_decay(config.weight_decay, rules, order),  # L2: within the momentum, as a part of the loss
            optax.trace(config.b1),
            optax.scale_by_learning_rate(lambda step: factor * rate(step)),
        )

    groups = {"encoders": adamw(1.0), "decoder": adamw(config.decoder_rate), "balance": optax.set_to_zero()}
    for name, method in (("sgd", sgd), ("muon", muon)):
        if getattr(config, name):
            groups |= {f"encoders by {name}": method(1.0), f"decoder by {name}": method(config.decoder_rate)}
    labels = lambda params: jax.tree_util.tree_map_with_path(label, params)  # noqa: E731
    inner = optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.multi_transform(groups, labels))

    def init(params: Any) -> Any:
        _check_rules(params, rules, order)
        _check_chosen(params, config, order)
        return inner.init(params)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(gradients, state, params)
        return jax.tree_util.tree_map_with_path(slowed, updates), state

    def slowed(path: tuple[Any, ...], x: Array) -> Array:
        found = _rules_of(path, rules, order)
        return x * _column([rule.rate if rule else 1.0 for rule in found], x) if any(found) else x

    return optax.GradientTransformation(init, update)


def updates_done(state: Any) -> Int[Array, ""]:
    """Updates that an optimizer has made: steps, less those that were refused."""
    return optax.tree.get_all_with_path(state, "count")[0][1]


def _rules_of(path: tuple[Any, ...], rules: tuple[Rule, ...], order: tuple[int, ...]) -> list[Rule | None]:
    """The first rule whose pattern occurs in the weight's name, for each layer where some are stacked in it."""
    return [next((rule for rule in rules if re.search(rule.pattern, name)), None) for name in _names(path, order)]


def _names(path: tuple[Any, ...], order: tuple[int, ...]) -> list[str]:
    """Names of a weight, such as `decoder/layers_0/self_attn/o_proj/weight`: several where layers are stacked in it."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if all(part.key != STACKED for part in path):
        return [name]
    return [name.replace(f"/{STACKED}/", f"/layers_{i}/") for i in order]


def _column(factors: list[float], x: Array) -> Array | float:
    """Factors of a weight: a number where they are the same for all its layers, else one for each."""
    if len(set(factors)) == 1:
        return factors[0]
    return jnp.broadcast_to(jnp.asarray(factors, x.dtype).reshape(-1, *[1] * (x.ndim - 1)), x.shape)


def _check_rules(params: Any, rules: tuple[Rule, ...], order: tuple[int, ...]) -> None:
    """Refuses a rule that no weight follows: its pattern is wrong, or an earlier rule takes all that it means."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    followed = {rule for path in paths for rule in _rules_of(path, rules, order)}
    for rule in rules:
        if rule not in followed:
            some = ", ".join([name for path in paths[:3] for name in _names(path, order)][:3])
            raise UserError(
                f"train.rules: no trained weight follows the pattern {rule.pattern!r}, or earlier rules take all that "
                f"it matches; weights are called {some}, ... (--train.rules without a value clears the config's)"
            )


def _chosen_by(path: tuple[Any, ...], x: Any, config: TrainConfig, order: tuple[int, ...]) -> list[str]:
    """Which of `sgd` and `muon` choose a weight, or any of the layers that are stacked in it; Muon takes matrices."""
    names = _names(path, order)
    found = lambda patterns: any(re.search(pattern, name) for pattern in patterns for name in names)  # noqa: E731
    return [
        *(["sgd"] if found(config.sgd) else []),
        *(["muon"] if _decays(path, x) and found(config.muon) else []),
    ]


def _check_chosen(params: Any, config: TrainConfig, order: tuple[int, ...]) -> None:
    """Refuses patterns that choose nothing, some of the layers that are or will be stacked, or what is chosen already.

    Raises:
      UserError: Names the field and a weight.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, x in leaves:
        if len(_chosen_by(path, x, config, order)) > 1:
            raise UserError(f"train.sgd and train.muon both choose {_names(path, order)[0]}: leave it to one of them")
    every = [name for path, _ in leaves for name in _names(path, order)]
    matrices = [name for path, x in leaves if _decays(path, x) for name in _names(path, order)]
    _check_patterns("train.sgd", config.sgd, every, "weight", order)
    _check_patterns("train.muon", config.muon, matrices, "matrix", order)


def _check_patterns(field: str, patterns: tuple[str, ...], names: list[str], kind: str, order: tuple[int, ...]) -> None:
    """Refuses a pattern that is in no name, and some of the layers that are stacked, or will be."""
    plural = {"weight": "weights", "matrix": "matrices"}[kind]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(
                f"{field}: no trained {kind} follows the pattern {pattern!r}; {plural} are called "
                f"{', '.join(names[:3])}, ... (--{field} without a value clears the config's)"
            )
    layers = [f"decoder/layers_{i}/" for i in order]
    for name in names:
        layer = next((layer for layer in layers if name.startswith(layer)), None)
        chosen = next((pattern for pattern in patterns if re.search(pattern, name)), None)
        if layer is None or chosen is None:
            continue
        for other in (name.replace(layer, one, 1) for one in layers):
            if not any(re.search(pattern, other) for pattern in patterns):
                raise UserError(
                    f"{field}: the pattern {chosen!r} chooses {name} and not {other}: layers of a pipeline "
                    "(mesh.pipe) have one optimizer, so choose all or none"
                )


def _add_decay(weight_decay: float, rules: tuple[Rule, ...], order: tuple[int, ...]) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` with a factor for each weight; its state is the same, so that checkpoints fit."""

    def factors(path: tuple[Any, ...], x: Any) -> list[float]:
        own = float(_decays(path, x))
        found = _rules_of(path, rules, order)
        return [own if rule is None or rule.decay is None else rule.decay for rule in found]

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        add = lambda path, u, p: u + weight_decay * _column(factors(path, p), p) * p  # noqa: E731
        return jax.tree_util.tree_map_with_path(add, updates, params), state

    mask = lambda params: jax.tree_util.tree_map_with_path(lambda path, x: any(factors(path, x)), params)  # noqa: E731
    return optax.masked(optax.GradientTransformation(optax.init_empty_state, update), mask)
