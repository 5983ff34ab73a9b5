from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.config import Config, TrainConfig
from r1jax.errors import UserError
from r1jax.ops.pipeline import STACKED
from r1jax.train.layer_metrics import layer_metrics
from r1jax.train.optimizer import BALANCE_BIAS, decays, make_optimizer, schedule
from r1jax.validation import validate
from tests.train.experiment import optax_promotes

CONFIG = TrainConfig(steps=100, warmup_steps=10, learning_rate=2e-3, final_learning_rate=1e-4, weight_decay=0.1)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (5, 1e-3),
        (10, 2e-3),
        (55, (2e-3 + 1e-4) / 2),  # half of the decay
        (100, 1e-4),
        (1000, 1e-4),
    ],
)
def test_schedule(step, rate):
    np.testing.assert_allclose(schedule(CONFIG)(step), rate, rtol=1e-5)


def test_schedule_never_rises_after_the_warmup():
    rates = np.array([schedule(CONFIG)(step) for step in range(10, 101)])
    assert np.all(np.diff(rates) < 0)


def closed_form(config, step):
    """The rate in plain Python."""
    peak, final, warmup, steps = config.learning_rate, config.final_learning_rate, config.warmup_steps, config.steps
    if step < warmup:
        return peak * step / warmup
    match config.schedule:
        case "linear":
            return peak + (final - peak) * min(1, (step - warmup) / (steps - warmup))
        case "wsd":
            length = min(config.decay_share * steps, steps - warmup)
            return peak + (final - peak) * min(1, max(0, step - (steps - length)) / length)
        case "step":
            return peak * config.milestone_factor ** sum(step >= round(share * steps) for share in config.milestones)
        case "constant":
            return peak


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("name", ["linear", "wsd", "step", "constant"])
def test_schedules_equal_their_closed_forms(name, warmup):
    config = replace(CONFIG, schedule=name, warmup_steps=warmup, milestones=(0.3, 0.6, 0.9), milestone_factor=0.2)
    with optax_promotes():
        rate = jax.jit(jax.vmap(schedule(config)))(jnp.arange(121))
    np.testing.assert_allclose(rate, [closed_form(config, step) for step in range(121)], rtol=2e-6, atol=1e-12)


def test_a_decay_that_is_longer_than_the_run():
    config = replace(CONFIG, schedule="wsd", decay_share=1.0)
    np.testing.assert_allclose(schedule(config)(10), 2e-3, rtol=1e-6)
    np.testing.assert_allclose(schedule(config)(100), 1e-4, rtol=1e-5)


def test_a_milestone_within_the_warmup_is_refused():
    train = replace(CONFIG, schedule="step", milestones=(0.1, 0.5))
    with pytest.raises(
        UserError, match=r"train.milestones is \(0.1, 0.5\), but it must be after the warmup \(10 of 100"
    ):
        validate(Config(train=train))
    validate(Config(train=replace(train, milestones=(0.11, 0.5))))


def run(config, params, gradients):
    """Applies one update for each tree of gradients."""
    optimizer = make_optimizer(config)
    with optax_promotes():
        state = jax.jit(optimizer.init)(params)
        update = jax.jit(optimizer.update)
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
    return params, state


def test_only_matrices_decay(tiny):
    params = jax.tree.map(lambda x: jnp.ones_like(x), tiny.init().params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    after, _ = run(CONFIG, params, [zeros, zeros])  # the first update has rate 0
    decayed = 1 - float(schedule(CONFIG)(1)) * CONFIG.weight_decay
    shrunk, kept = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if np.allclose(leaf, decayed, rtol=1e-6, atol=0):
            shrunk.append((name, leaf.ndim))
        else:
            np.testing.assert_array_equal(leaf, 1.0, err_msg=name)
            kept.append(name)
    assert shrunk and all(rank > 1 for _, rank in shrunk)
    assert not [name for name, _ in shrunk if "norm" in name or "bias" in name or "embed" in name]
    names = [name for name, _ in shrunk]
    for part in ("q_a_proj", "kv_b_proj", "experts", "volume", "head"):
        assert any(part in name for name in names), f"no weight of {part} decays"
    assert any("embed_tokens" in name for name in kept) and any("norm" in name for name in kept)
    assert len(shrunk) == sum(jax.tree.leaves(decays(params)))


def adamw(config, params, gradients):
    """AdamW with clipping in numpy, after Loshchilov and Hutter (algorithm 2)."""
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    for step, gradient in enumerate(gradients):
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        for k in params:
            g = gradient[k] * min(1.0, config.clip_norm / norm)
            m[k] = config.b1 * m[k] + (1 - config.b1) * g
            v[k] = config.b2 * v[k] + (1 - config.b2) * g**2
            m_hat, v_hat = m[k] / (1 - config.b1 ** (step + 1)), v[k] / (1 - config.b2 ** (step + 1))
            decay = config.weight_decay * params[k] if params[k].ndim > 1 else 0.0
            params[k] = params[k] - float(schedule(config)(step)) * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay)
    return params


def test_updates_follow_the_published_rule():
    rng = np.random.default_rng(0)
    params = {"weight": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    scales = (0.1, 5.0, 0.3, 2.0, 0.01)  # some of them clipped
    gradients = [{k: s * rng.normal(size=v.shape) for k, v in params.items()} for s in scales]
    single = lambda tree: {k: jnp.asarray(v, jnp.float32) for k, v in tree.items()}  # noqa: E731
    got, _ = run(CONFIG, single(params), [single(g) for g in gradients])
    for name, expected in adamw(CONFIG, params, gradients).items():
        np.testing.assert_allclose(got[name], expected, rtol=2e-5, atol=1e-6, err_msg=name)


def test_balance_biases_are_left_alone():
    params = {"gate": {BALANCE_BIAS: jnp.ones(4), "weight": jnp.ones((4, 2))}}
    gradients = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), params)
    after, state = run(CONFIG, params, [gradients] * 3)
    np.testing.assert_array_equal(after["gate"][BALANCE_BIAS], 1.0)
    assert np.all(np.asarray(after["gate"]["weight"]) < 1.0)
    moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert moments == [(4, 2), (4, 2)], "the bias has moments"


TREE = {
    "decoder": {"embed_tokens": jnp.ones((3, 2)), "norm": {"weight": jnp.ones(2)}},
    "head_a": {"weight": jnp.ones((2, 2)), "bias": jnp.ones(2)},
}


def test_rules_slow_and_decay_single_weights():
    gradients = [jax.tree.map(lambda x: 0.01 * jnp.ones_like(x), TREE)] * 3
    plain, _ = run(CONFIG, TREE, gradients)
    rules = ("decoder/norm=0", "embed_tokens=0.5:1", r"head_.*/weight$=1:0")
    ruled, _ = run(replace(CONFIG, rules=rules), TREE, gradients)
    np.testing.assert_array_equal(ruled["decoder"]["norm"]["weight"], 1.0)
    np.testing.assert_array_equal(ruled["head_a"]["bias"], plain["head_a"]["bias"])
    rates = sum(float(schedule(CONFIG)(step)) for step in range(3))
    adam = 1 - np.asarray(plain["head_a"]["bias"])  # what AdamW alone takes off, without decay
    np.testing.assert_allclose(1 - ruled["head_a"]["weight"], np.tile(adam, (2, 1)), rtol=1e-4)
    decayed = 0.5 * (adam[0] + 0.1 * rates)  # decay acts on weights that are still nearly 1
    np.testing.assert_allclose(1 - ruled["decoder"]["embed_tokens"], decayed, rtol=1e-2)


def test_rules_leave_the_state_as_it_is():
    _, plain = run(CONFIG, TREE, [])
    _, ruled = run(replace(CONFIG, rules=("head=0.5:0",)), TREE, [])
    assert jax.tree.structure(plain) == jax.tree.structure(ruled)


@pytest.mark.parametrize("rules", [("decder=0.5",), ("decoder=1", "norm=0.5")])
def test_a_rule_that_nothing_follows_is_refused(rules):
    with pytest.raises(UserError, match="train.rules: no trained weight follows the pattern"):
        make_optimizer(replace(CONFIG, rules=rules)).init(TREE)


@pytest.mark.parametrize("rule", ["decoder", "=1", "decoder=x", "decoder=-1", "decoder=1:nan", "(=1", "a=1:2:3"])
def test_a_rule_that_cannot_be_read_is_refused(rule):
    with pytest.raises(UserError, match="train.rules is .* a list of PATTERN=RATE or PATTERN=RATE:DECAY"):
        validate(Config(train=TrainConfig(rules=(rule,))))


def test_chosen_weights_are_moved_by_sgd_with_momentum_and_l2():
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), TREE) for _ in range(4)]
    config = replace(CONFIG, clip_norm=100.0, decoder_rate=0.5)
    plain, _ = run(config, TREE, gradients)
    got, state = run(replace(config, sgd=("embed_tokens", "head_a/weight"), rules=("head=1:3",)), TREE, gradients)
    for (part, name), factor, decay in ((("decoder", "embed_tokens"), 0.5, 0.0), (("head_a", "weight"), 1.0, 0.3)):
        weight, momentum = np.ones(TREE[part][name].shape), 0.0
        for step, gradient in enumerate(gradients):
            momentum = CONFIG.b1 * momentum + np.asarray(gradient[part][name]) + decay * weight
            weight = weight - factor * float(schedule(CONFIG)(step)) * momentum
        np.testing.assert_allclose(got[part][name], weight, rtol=1e-5)
    np.testing.assert_array_equal(got["decoder"]["norm"]["weight"], plain["decoder"]["norm"]["weight"])
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == [(2,), (2,), (2,), (2,), (2, 2), (3, 2)]  # one number a weight, where AdamW has two


def test_patterns_of_sgd_that_choose_nothing_or_half_a_pipeline_are_refused():
    with pytest.raises(UserError, match="train.sgd: no trained weight follows the pattern 'ngrams/'"):
        make_optimizer(replace(CONFIG, sgd=("ngrams/",))).init(TREE)
    with pytest.raises(UserError, match=r"train.sgd is \('\(',\), but it must be a list of regular expressions"):
        validate(Config(train=TrainConfig(sgd=("(",))))
    tree = {"decoder": {STACKED: {"weight": jnp.ones((2, 3))}}}
    with pytest.raises(UserError, match="train.sgd: the pattern 'layers_1' chooses decoder/layers_1/weight and not"):
        make_optimizer(replace(CONFIG, sgd=("layers_1",)), (0, 1)).init(tree)
    apart = {"decoder": {f"layers_{i}": {"weight": jnp.ones(3)} for i in range(3)}}  # as a run has them at its start
    with pytest.raises(UserError, match="chooses decoder/layers_1/weight and not decoder/layers_2/weight"):
        make_optimizer(replace(CONFIG, sgd=("layers_1",)), (1, 2)).init(apart)
    for sgd in (("layers_1", "layers_2"), ("layers_[012]/",), ("layers_0",)):  # all that are stacked, or none of them
        make_optimizer(replace(CONFIG, sgd=sgd), (1, 2)).init(apart)


def test_norms_of_layers():
    two = jax.tree.map(lambda x: 2 * x, TREE)
    found = layer_metrics(
        TREE | {"head_b": {"weight": jnp.ones((3, 1))}},
        two | {"head_b": {"weight": jnp.ones(3)}},
        {**jax.tree.map(lambda x: 0.1 * x, TREE), "head_b": {"weight": jnp.zeros(3)}},
    )
    assert {name.partition(".")[2] for name in found} == {"decoder.embed_tokens", "decoder.norm", "head"}
    np.testing.assert_allclose(found["weight_norm.head"], np.sqrt(4 + 2 + 3), rtol=1e-6)
    np.testing.assert_allclose(found["gradient_norm.head"], np.sqrt(4 * 4 + 4 * 2 + 3), rtol=1e-6)
    np.testing.assert_allclose(found["update_ratio.head"], np.sqrt(0.06 / 9), rtol=1e-5)
    np.testing.assert_allclose(found["update_ratio.decoder.norm"], 0.1, rtol=1e-5)
