"""A step on layers that are stacked is that on the same layers one by one, also where it is about one of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.config import DecoderConfig, TrainConfig
from r1jax.errors import UserError
from r1jax.ops.pipeline import Stages
from r1jax.train.layer_metrics import layer_metrics
from r1jax.train.optimizer import BALANCE_BIAS, make_optimizer
from r1jax.train.step import balance_routers
from tests.train.experiment import optax_promotes

STAGES = Stages(devices=2, rounds=2, layers=range(1, 5))
CONFIG = TrainConfig(steps=20, warmup_steps=0, learning_rate=2e-3, weight_decay=0.1, clip_norm=1.0)
RULES = ("layers_2/.*weight$=0.5:0", "layers_[14]/norm=2:1", "layers_3/mlp=0")


def draw(seed):
    """A tree with the shapes of every kind of weight; all layers but the first are alike."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731

    def layer():
        gate = {"weight": normal(4, 3), BALANCE_BIAS: normal(4)}
        return {"mlp": {"up_proj": {"weight": normal(5, 3)}, "gate": gate}, "norm": {"weight": normal(3)}}

    layers = {f"layers_{i}": layer() for i in range(5)}
    return {"decoder": {"embed_tokens": normal(7, 3), **layers}, "head_a": {"weight": normal(2, 3), "bias": normal(2)}}


def together(tree):
    layers = [tree["decoder"][f"layers_{i}"] for i in STAGES.order]
    rest = {name: x for name, x in tree["decoder"].items() if name in ("embed_tokens", "layers_0")}
    return {**tree, "decoder": {**rest, "stages": jax.tree.map(lambda *x: jnp.stack(x), *layers)}}


def close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), one, other)


def trained(params, gradients, order, rules):
    optimizer = make_optimizer(replace(CONFIG, rules=rules), order)
    with optax_promotes():
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("rules", [(), RULES], ids=["without rules", "rules for single layers"])
def test_updates(rules):
    params, gradients = draw(0), [draw(seed) for seed in range(1, 4)]
    alone = trained(params, gradients, (), rules)
    close(trained(together(params), list(map(together, gradients)), STAGES.order, rules), together(alone))


def test_a_rule_that_no_stacked_layer_follows_is_refused():
    optimizer = make_optimizer(replace(CONFIG, rules=("layers_5/=0.5",)), STAGES.order)
    with pytest.raises(UserError, match=r"'layers_5/'.*decoder/embed_tokens, decoder/layers_0/mlp/gate"):
        optimizer.init(together(draw(0)))


def test_norms_of_each_layer():
    trees = draw(0), draw(1), draw(2)
    close(layer_metrics(*map(together, trees), STAGES.order), layer_metrics(*trees))


def test_routers_move_against_their_own_load():
    decoder = DecoderConfig(num_hidden_layers=5, first_k_dense_replace=0)
    loads = tuple(jnp.asarray(np.random.default_rng(i).integers(0, 9, 4), jnp.float32) for i in range(5))
    alone = balance_routers(draw(0), loads, decoder, 0.5)
    close(balance_routers(together(draw(0)), loads, decoder, 0.5, STAGES), together(alone))
