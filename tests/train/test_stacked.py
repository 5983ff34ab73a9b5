"""A step on layers that are stacked is that on the same layers one by one, also where it is about one of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.config import DecoderConfig, MeshConfig, TrainConfig
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.ops.pipeline import Stages
from r1jax.parallel import mesh as mesh_module
from r1jax.parallel.mesh import make_mesh, shard_tree
from r1jax.parallel.stages import into_stages, out_of_stages, stages_on
from r1jax.tasks.language.task import Language
from r1jax.train.layer_metrics import layer_metrics
from r1jax.train.optimizer import BALANCE_BIAS, make_optimizer
from r1jax.train.plan import example_batch
from r1jax.train.step import NO_LIMIT, balance_routers, compile_step, init_state
from tests.train.experiment import optax_promotes
from tests.train.tiny_language import get_config

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


@pytest.mark.slow
def test_a_whole_step(monkeypatch):
    """AdamW, averages, routers, metrics; after some steps more, AdamW makes much of what is nothing but rounding."""
    monkeypatch.setattr(mesh_module, "SMALLEST_SHARDED", 64)
    tiny = get_config()
    decoder = replace(tiny.model.decoder, num_hidden_layers=4, first_k_dense_replace=1, num_nextn_predict_layers=0)
    train = replace(tiny.train, batch_size=8, warmup_steps=0, rules=("layers_2/=0.5:0",))
    config = replace(tiny, model=replace(tiny.model, decoder=decoder, dropout=0.0), train=train)
    task = Language(config)
    model, source = R1(config.model, task.heads), task.source("train")
    batches = [task.collate(source.read_batch(np.arange(8 * i, 8 * i + 8))) for i in range(3)]
    example = example_batch(source, task, 8)
    first = jax.device_get(jax.jit(lambda: init_state(config, model, task, example))())
    found = []
    for mesh_config, count in ((MeshConfig(data=1), 1), (MeshConfig(data=2, pipe=2), 4)):
        here, mesh = replace(config, mesh=mesh_config), make_mesh(mesh_config, jax.devices()[:count])
        stages = stages_on(mesh, mesh_config, decoder)
        with optax_promotes():
            step = compile_step(here, model, task, mesh, example)
        state = into_stages(jax.device_put(first, shard_tree(mesh, first)), mesh, stages)
        rows = []
        for batch in batches:
            state, metrics = step(state, batch, NO_LIMIT)
            rows.append(jax.device_get(metrics))
        found.append((rows, jax.device_get(out_of_stages(state, mesh, stages))))
    (rows, state), (expected, alone) = found[1], found[0]
    for row, other in zip(rows, expected, strict=True):
        assert {name for name in row if ".waited" not in name} == set(other)
        for name, value in other.items():
            np.testing.assert_allclose(row[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.shape(a), np.shape(b)), state, alone)
    biases = [s.params["decoder"]["layers_3"]["mlp"]["gate"][BALANCE_BIAS] for s in (state, alone)]
    np.testing.assert_allclose(*biases, atol=1e-7)
    assert np.any(biases[0])
