from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.config import Config, DecoderConfig, ModelConfig, TrainConfig
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.tasks.medical.task import Medical
from r1jax.train.optimizer import BALANCE_BIAS
from r1jax.train.step import NO_LIMIT, balance_routers, check_offload, init_state, make_step
from tests.train.experiment import optax_promotes


@pytest.fixture(scope="module")
def run(tiny):
    """Takes steps from a fresh state; returns every state and the metrics, on the host."""

    def take(batches, state=None):
        state = tiny.init() if state is None else state
        states, metrics = [jax.device_get(state)], []
        for batch in batches:
            state, figures = tiny.step(jax.device_put(state), batch, NO_LIMIT)
            states.append(jax.device_get(state))
            metrics.append(jax.device_get(figures))
        return states, metrics

    return take


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def same(a, b):
    a, b = leaves(a), leaves(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_loss_falls_on_one_batch(tiny, run):
    _, metrics = run(tiny.batches(1) * 30)
    losses = [m["loss"] for m in metrics]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_steps_are_deterministic(tiny, run):
    (first, figures), (second, again) = run(tiny.batches(3)), run(tiny.batches(3))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert all(same(a, b) for a, b in zip(figures, again, strict=True))


def test_steps_move_everything_but_the_key(tiny, run):
    states, _ = run(tiny.batches(2))
    assert [int(s.step) for s in states] == [0, 1, 2]
    assert all(np.array_equal(s.key, states[0].key) for s in states)
    still = [k for k, x in leaves(states[0].params).items() if np.array_equal(x, leaves(states[2].params)[k])]
    assert not [k for k in still if BALANCE_BIAS not in k], "no gradient reached these weights"


def test_average_follows_its_formula(tiny, run):
    states, _ = run(tiny.batches(3))
    expected = leaves(states[0].params)
    for count, state in enumerate(states[1:]):
        decay = np.float32(min(0.9, (1 + count) / (10 + count)))
        expected = {k: decay * expected[k] + (1 - decay) * x for k, x in leaves(state.params).items()}
        for k, x in leaves(state.ema).items():
            np.testing.assert_allclose(x, expected[k], rtol=1e-5, atol=1e-7, err_msg=k)


def test_average_starts_at_the_weights(tiny):
    state = tiny.init()
    assert same(state.params, state.ema)


def test_an_average_that_nobody_reads_is_not_kept(tiny):
    config = replace(tiny.config, train=replace(tiny.config.train, ema=0.0))
    with optax_promotes():
        state = jax.eval_shape(lambda: init_state(config, tiny.model, tiny.task, tiny.batch))
        after, _ = jax.eval_shape(make_step(config, tiny.model, tiny.task), state, tiny.batch, NO_LIMIT)
    assert state.ema == {} and after == state


def loss_at(run, tiny, step):
    """Loss of the fresh weights, at a step that only the random numbers depend on."""
    state = tiny.init()._replace(step=jnp.asarray(step, jnp.int32))
    return float(run(tiny.batches(1), state)[1][0]["loss"])


def test_every_step_draws_anew(tiny, run):
    losses = [loss_at(run, tiny, step) for step in (0, 1, 2, 1)]
    assert len(set(losses[:3])) == 3
    assert losses[3] == losses[1]


def test_nothing_else_is_random(tiny):
    config = replace(
        tiny.config,
        model=replace(tiny.config.model, dropout=0.0),
        task=replace(tiny.config.task, modality_dropout=0.0, augment="none"),
    )
    task = Medical(config)
    step = make_step(config, R1(config.model, task.heads), task)
    with optax_promotes():
        loss = jax.jit(lambda state, batch: step(state, batch, jnp.asarray(NO_LIMIT))[1]["loss"])
        states = [tiny.fresh._replace(step=jnp.asarray(step, jnp.int32)) for step in (0, 7)]
        losses = [float(loss(state, tiny.batches(1)[0])) for state in states]
    assert losses[0] == losses[1]


def test_metrics_say_what_was_done(tiny, run):
    states, metrics = run(tiny.batches(2))
    assert metrics[0]["learning_rate"] == 0 and np.isclose(metrics[1]["learning_rate"], 3e-3 / 4)
    parts = {k for k in metrics[0] if k.startswith("loss.")}
    assert {"loss.nodule_present", "loss.malignancy", "loss.center_mm", "loss.texture"} <= parts
    moved = jax.tree.map(np.subtract, states[2].params, states[1].params)
    assert metrics[0]["gradient_norm"] > 0 and optax.tree.norm(moved) > 0


def test_routers_move_against_their_load():
    config = DecoderConfig(num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=4, n_group=2, topk_group=1)
    tree = lambda: {"mlp": {"gate": {BALANCE_BIAS: jnp.zeros(4), "weight": jnp.ones((4, 2))}}}  # noqa: E731
    params = {"decoder": {"layers_1": tree(), "layers_2": tree(), "mtp": {"layer": tree()}}}
    loads = [[4.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 5.0], [2.0, 2.0, 2.0, 2.0]]
    loads = tuple(jnp.asarray(load) for load in loads)
    moved = balance_routers(params, loads, config, 0.5)["decoder"]
    at = lambda part: np.asarray(part["mlp"]["gate"][BALANCE_BIAS])  # noqa: E731
    np.testing.assert_array_equal(at(moved["layers_1"]), [-0.5, 0.5, 0, 0])
    np.testing.assert_array_equal(at(moved["layers_2"]), [0.5, 0.5, 0.5, -0.5])
    np.testing.assert_array_equal(at(moved["mtp"]["layer"]), 0)
    np.testing.assert_array_equal(moved["layers_1"]["mlp"]["gate"]["weight"], 1)
    without = balance_routers(params, loads[:2], config, 0.5)["decoder"]  # the MTP module did not run
    np.testing.assert_array_equal(at(without["mtp"]["layer"]), 0)


def test_the_step_takes_over_the_memory_of_the_state(tiny):
    held = sum(x.nbytes for x in jax.tree.leaves(tiny.fresh))
    assert tiny.step.memory_analysis().alias_size_in_bytes >= 0.99 * held
    state = tiny.init()
    tiny.step(state, tiny.batches(1)[0], NO_LIMIT)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.optimizer, state.ema)))


def test_offloading_needs_a_device_that_reaches_the_host():
    device = SimpleNamespace(device_kind="toy", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    offload, host = Config(model=ModelConfig(remat="offload")), Config(train=TrainConfig(moments_on="host"))
    with pytest.raises(UserError, match="model.remat is 'offload', but toy cannot reach the host's memory: use 'full'"):
        check_offload(offload, device)
    with pytest.raises(UserError, match="train.moments_on is 'host', but toy cannot .* memory: use 'device'"):
        check_offload(host, device)
    check_offload(Config(), device)
    device.addressable_memories = lambda: [SimpleNamespace(kind="pinned_host")]
    check_offload(host, device)
    check_offload(offload, device)
