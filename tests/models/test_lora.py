"""Adapters: absent at rank 0, without effect at their start, equal to the merged weights, alone in being trained."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import DecoderConfig, ModelConfig
from r1jax.models.lora import PARTS, join_trees, merge_lora, split_adapters
from r1jax.models.r1 import R1, Inputs

CONFIG = ModelConfig(
    modalities=("text",),
    decoder=DecoderConfig(
        vocab_size=13,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=6,
        kv_lora_rank=5,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        intermediate_size=10,
        moe_intermediate_size=6,
        n_routed_experts=4,
        n_group=2,
        initializer_range=0.3,
    ),
    text_tokens=6,
    dropout=0.0,
    lora_rank=3,
    lora_alpha=5.0,
)
INPUTS = Inputs(text=jnp.asarray([[1, 5, 3, 9, 0, 2]], jnp.int32), text_valid=jnp.ones((1, 6), bool))


def names(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


def init(config):
    return jax.jit(lambda: R1(config, ()).init(jax.random.key(0), INPUTS, language=True)["params"])()


def forward(config, params):
    out = jax.jit(lambda p: R1(config, ()).apply({"params": p}, INPUTS, language=True))(params)
    return np.concatenate([np.ravel(out.text_logits), np.ravel(out.mtp_logits)])


@pytest.fixture(scope="module")
def params():
    return init(CONFIG)


@pytest.fixture(scope="module")
def moved(params):
    """With adapters away from their start."""
    adapters, base = split_adapters(params)
    rng = np.random.default_rng(0)
    return join_trees(jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), adapters), base)


def test_without_rank_the_tree_has_no_adapters(params):
    plain = init(replace(CONFIG, lora_rank=0))
    adapters, base = split_adapters(params)
    assert names(base) == names(plain)
    for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)
    assert split_adapters(plain) == ({}, plain) and names(join_trees(adapters, base)) == names(params)


def test_adapters_sit_on_the_linear_layers_of_the_decoder(params):
    adapters, _ = split_adapters(params)
    places = {name.rpartition(".")[0] for name in names(adapters)}
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    feed = ("gate_proj", "up_proj", "down_proj")
    layers = {"layers_0": "mlp", "layers_1": "mlp.shared_experts", "mtp.layer": "mlp.shared_experts"}
    expected = {f"decoder.{layer}.self_attn.{name}" for layer in layers for name in attention}
    expected |= {f"decoder.{layer}.{mlp}.{name}" for layer, mlp in layers.items() for name in feed}
    assert places == expected | {"decoder.mtp.eh_proj"}
    o_proj = adapters["decoder"]["layers_0"]["self_attn"]["o_proj"]
    assert o_proj["lora_a"].shape == (3, 8) and o_proj["lora_b"].shape == (12, 3)


def test_fresh_adapters_change_nothing(params):
    _, base = split_adapters(params)
    np.testing.assert_array_equal(forward(CONFIG, params), forward(replace(CONFIG, lora_rank=0), base))


def test_merged_weights_are_those_of_the_formula(moved):
    merged = merge_lora(moved, CONFIG)
    layer = moved["decoder"]["layers_0"]["self_attn"]["o_proj"]
    w, a, b = (np.asarray(layer[name], np.float64) for name in ("weight", *PARTS))
    got = merged["decoder"]["layers_0"]["self_attn"]["o_proj"]
    assert got.keys() == {"weight"}
    np.testing.assert_allclose(got["weight"], w + 5 / 3 * b @ a, rtol=1e-5, atol=1e-6)


def test_merged_equals_unmerged(moved):
    merged, plain = merge_lora(moved, CONFIG), replace(CONFIG, lora_rank=0)
    got, expected = forward(plain, merged), forward(CONFIG, moved)
    assert np.abs(expected - forward(plain, split_adapters(moved)[1])).max() > 0.1
    assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max() + 1e-6
    assert merge_lora(merged, plain) is merged


def test_a_part_of_the_tree_and_numpy_can_be_merged(moved):
    host = jax.tree.map(np.asarray, moved["decoder"])
    for a, b in zip(
        jax.tree.leaves(merge_lora(host, CONFIG)), jax.tree.leaves(merge_lora(moved, CONFIG)["decoder"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
