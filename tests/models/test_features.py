"""Reading from recorded features is reading, and reading from others is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import DecoderConfig, ModelConfig, SeriesConfig, TableConfig
from r1jax.models.features import read_from, record, record_experts
from r1jax.models.r1 import R1, Inputs

CONFIG = ModelConfig(
    modalities=("series", "table", "text"),
    decoder=DecoderConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        first_k_dense_replace=0,
        moe_intermediate_size=8,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=1,
        num_nextn_predict_layers=0,
    ),
    series=SeriesConfig(layers=0, bins=4, tokens=1, num_attention_heads=2),
    table=TableConfig(layers=0),
    text_tokens=6,
)


@pytest.fixture(scope="module")
def built():
    rng = np.random.default_rng(0)
    inputs = Inputs(
        series=jnp.asarray(rng.normal(size=(2, 2, 3, 5)), jnp.float32),
        series_state=jnp.asarray(rng.integers(0, 3, (2, 2, 3)), jnp.int32),
        series_valid=jnp.ones((2, 2, 3), bool),
        has_series=jnp.ones(2, bool),
        table=jnp.asarray(rng.normal(size=(2, 4)), jnp.float32),
        has_table=jnp.ones(2, bool),
        text=jnp.asarray(rng.integers(0, 256, (2, 6)), jnp.int32),
        text_valid=jnp.ones((2, 6), bool),
    )
    model = R1(CONFIG, (("fraud", 1),))
    return model, jax.jit(lambda key: model.init(key, inputs)["params"])(jax.random.key(0)), inputs


def test_recorded_features_give_the_same_answer(built):
    model, params, inputs = built
    seen = jax.jit(lambda p, x: record(model, p, x))(params, inputs)
    assert {name: x.shape for name, x in seen.items()} == {
        "stream_0": (2, 3, 5 * 5 + 3),
        "stream_1": (2, 3, 5 * 5 + 3),
        "text": (2, 6, 16),
    }
    read = jax.jit(lambda p, x, f: read_from(model, p, x, f).heads["fraud"])
    plain = jax.jit(lambda p, x: model.apply({"params": p}, x).heads["fraud"])(params, inputs)
    np.testing.assert_array_equal(read(params, inputs, seen), plain)
    for name in seen:
        other = read(params, inputs, seen | {name: seen[name] + 1})
        assert np.abs(other - plain).min() > 1e-5


def test_states_are_the_last_features_of_an_event(built):
    model, params, inputs = built
    seen = jax.jit(lambda p, x: record(model, p, x))(params, inputs)
    np.testing.assert_array_equal(seen["stream_1"][..., -3:], jax.nn.one_hot(inputs.series_state[:, 1], 3))
    np.testing.assert_array_equal(seen["stream_0"][..., :5], inputs.series[:, 0])


def test_with_held_experts_the_way_between_two_batches_has_no_jump(built):
    model, params, inputs = built
    params = jax.tree.map(lambda x: 2 * x, params)  # weights large enough to matter
    mixture = params["decoder"]["layers_0"]["mlp"]
    mixture["experts"] = jax.tree.map(lambda x: 20 * x, mixture["experts"])
    mixture["gate"]["weight"] *= 20
    mixture["gate"]["e_score_correction_bias"] = jnp.array([0.1, 0.0, 0.2, 0.1])
    seen, experts = jax.jit(lambda p, x: (record(model, p, x), record_experts(model, p, x)))(params, inputs)
    (chosen,) = experts.values()
    assert (chosen.sum(axis=-1) == 1).all() and (chosen.sum(axis=0) > 0).sum() > 1

    def walk(held):
        def at(share):  # from the other case of the batch
            between = jax.tree.map(lambda x: x[::-1] + share * (x - x[::-1]), seen)
            return read_from(model, params, inputs, between, held).heads["fraud"]

        return np.asarray(jax.jit(lambda: jax.lax.map(at, jnp.linspace(0, 1, 401)))())[..., 0]

    held, free = walk(experts), walk(None)
    np.testing.assert_array_equal(held[-1], free[-1])
    bent = [np.abs(np.diff(way, n=2, axis=0)).max() for way in (held, free)]
    assert 50 * bent[0] < bent[1]
