"""Rematerialisation changes memory, never numbers; parameters keep their names under every policy."""

import functools
import types
from dataclasses import replace
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import DecoderConfig, ModelConfig, TableConfig, VisionConfig
from r1jax.models.r1 import R1, Inputs
from r1jax.models.remat import Remat, attention, block
from r1jax.ops import attention as ops

CONFIG = ModelConfig(
    modalities=("image", "table", "text"),
    decoder=DecoderConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=5,
        q_lora_rank=None,
        kv_lora_rank=8,
        intermediate_size=64,
        moe_intermediate_size=8,
        n_routed_experts=4,
        n_group=2,
        num_nextn_predict_layers=0,
    ),
    image=VisionConfig(size=(16, 16), widths=(8,), blocks=(1,), num_attention_heads=2, merge=4),
    table=TableConfig(num_attention_heads=2),
    text_tokens=192,
    dropout=0.2,
    scan_layers=True,  # where layers are a loop, the compiler cannot undo what is computed again
)
HEADS = (("a", 1),)
BATCH = 2


def inputs():
    rng = np.random.default_rng(0)
    return Inputs(
        image=jnp.asarray(rng.standard_normal((BATCH, 16, 16)), jnp.float32),
        image_spacing=jnp.ones((BATCH, 2)),
        has_image=jnp.ones(BATCH, bool),
        table=jnp.asarray(rng.standard_normal((BATCH, 3)), jnp.float32),
        has_table=jnp.ones(BATCH, bool),
        text=jnp.asarray(rng.integers(0, 32, (BATCH, 192)), jnp.int32),
        text_valid=jnp.ones((BATCH, 192), bool),
    )


@pytest.fixture(scope="module")
def computed():
    """Gives loss and gradients, and the bytes of temporaries, of a policy; with dropout."""
    read, config = inputs()._replace(image=None), replace(CONFIG, modalities=("table", "text"))
    params = jax.jit(lambda: R1(config, HEADS).init(jax.random.key(0), read, language=True)["params"])()

    @functools.cache
    def of(policy):
        model = R1(replace(config, remat=policy), HEADS)

        def loss(params):
            rngs = {"dropout": jax.random.key(1)}
            out = model.apply({"params": params}, read, cases=jnp.arange(BATCH), language=True, rngs=rngs)
            return jnp.mean(out.heads["a"] ** 2) + jnp.mean(out.text_logits**2)

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return jax.device_get(compiled(params)), compiled.memory_analysis().temp_size_in_bytes

    return of


def test_names_and_shapes_stay():
    def shapes(policy):
        model = R1(replace(CONFIG, remat=policy), HEADS)
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs(), language=True)["params"])
        return jax.tree.map(jnp.shape, params)

    first, *others = map(shapes, get_args(Remat))
    assert len(first) > 1 and all(other == first for other in others)


ONCE = pytest.mark.once
"""JAX 0.11 compiles each of the programs for 6 seconds: there one policy stands for all."""


@pytest.mark.parametrize(
    "policy", [policy if policy == "full" else pytest.param(policy, marks=ONCE) for policy in get_args(Remat)[1:]]
)
def test_numbers_stay(computed, policy):
    (loss, gradients), (again, slopes) = computed("none")[0], computed(policy)[0]
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    pairs = list(zip(jax.tree.leaves(gradients), jax.tree.leaves(slopes), strict=True))
    size = np.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a, _ in pairs))
    assert np.sqrt(sum(np.sum(np.square(a.astype(np.float64) - b)) for a, b in pairs)) <= 1e-6 * size
    # The floor is for a bias before a softmax, whose gradient is nothing but rounding.
    assert all(np.abs(a - b).max() <= 3e-6 * np.abs(a).max() + 1e-8 * size for a, b in pairs)


@ONCE
def test_memory_falls(computed):
    size = {policy: computed(policy)[1] for policy in get_args(Remat)}
    assert size["none"] > size["attention"] > size["full"], size
    assert size["none"] > size["minimal"] > size["full"], size


def test_layers_in_a_loop_are_the_layers_one_by_one():
    """Dense and mixture layers, without dropout, whose numbers differ; the program does not grow with the depth."""
    read, results, sizes = inputs()._replace(image=None, table=None), [], []
    for depth, scan in ((5, False), (5, True), (9, True)):
        config = replace(
            CONFIG,
            modalities=("text",),
            decoder=replace(
                CONFIG.decoder, num_hidden_layers=depth, first_k_dense_replace=depth // 2, num_nextn_predict_layers=1
            ),
            scan_layers=scan,
        )
        model = R1(config, ())
        shapes = jax.eval_shape(lambda m=model: m.init(jax.random.key(0), read, language=True)["params"])
        params = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), shapes)

        def loss(params, m=model):
            out = m.apply({"params": params}, read, language=True)
            losses = jnp.mean(out.text_logits**2) + jnp.mean(out.mtp_logits**2)
            return losses, tuple(stats.load for stats in out.router)

        lowered = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params)
        sizes.append(len(lowered.as_text()))
        if depth == 5:
            results.append(jax.device_get(lowered.compile()(params)))
    ((one, loads), gradients), ((other, counts), slopes) = results
    np.testing.assert_allclose(other, one, rtol=1e-6)
    assert len(loads) == 4 and all(map(np.array_equal, loads, counts))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(slopes), strict=True):
        assert np.abs(a - b).max() <= 2e-6 * max(np.abs(a).max(), 1e-3), jax.tree_util.keystr(path)
    assert sizes[2] < 1.2 * sizes[1]


@pytest.mark.parametrize(("policy", "times"), [("none", 1), ("minimal", 1), ("full", 2)])
@pytest.mark.parametrize("length", [128, 129])
def test_minimal_does_not_compute_cudnns_attention_again(monkeypatch, policy, times, length):
    """Traced as for a GPU, and not run."""
    from jax._src.cudnn import fused_attention_stablehlo as library

    monkeypatch.setattr(ops, "target", lambda: types.SimpleNamespace(platform="gpu"))
    monkeypatch.setattr(ops, "_cudnn_agrees", lambda *_: True)
    monkeypatch.setattr(library, "check_cudnn_version", lambda *_, **__: 91900)
    monkeypatch.setattr(library, "check_is_flash_attention", lambda *_, **__: None)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            q = nn.Dense(2 * 24, dtype=jnp.bfloat16)(x).reshape(1, length, 2, 24)
            mixed = attention(policy)(q, jnp.cos(q), jnp.sin(q)[..., :16], None, scale=0.2, causal=True)
            return nn.Dense(8, dtype=jnp.bfloat16)(mixed.reshape(1, length, -1))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return block(lambda layer, x: layer(x), policy)(Layer(), x)

    x = jnp.ones((1, length, 8), jnp.bfloat16)
    params = jax.eval_shape(Model().init, jax.random.key(0), x)
    loss = lambda p: jnp.sum(Model().apply(p, x).astype(jnp.float32) ** 2)  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert program.count("dot_product_attention_fwd_wrapper") == times
    assert program.count("dot_product_attention_bwd_wrapper") == 1
