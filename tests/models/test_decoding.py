"""Fused weights and the step over them against the modules over the checkpoint's tree."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import YarnConfig
from r1jax.models import decoding
from r1jax.models.decoder import Decoder, LatentCache
from r1jax.models.decoding import decode, decode_second, dense_layer, next_logits
from r1jax.models.lora import PARTS
from r1jax.models.quantized import rounding_by
from r1jax.models.served import can_be_fused, fused, unfused
from r1jax.ops.decode_layers import decode_layers_reference
from r1jax.ops.latent_attention import PagedLatents
from r1jax.ops.quantize import Quantized, dequantize, quantize
from tests.models.small_decoder import CONFIG, LENGTHS, PAGE

DIRECT = replace(CONFIG, q_lora_rank=None, rope_interleave=False, n_shared_experts=0, rope_scaling=YarnConfig())


def everything(decoder, tokens):
    positions, valid = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape), jnp.ones(tokens.shape, bool)
    hidden, _ = decoder(decoder.embed(tokens), positions, valid)
    return decoder.logits(decoder.predict_second(hidden, tokens, positions, valid)[0])


def params_of(config):
    rng, tokens = np.random.default_rng(0), jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(partial(Decoder(config).init, method=everything), jax.random.key(0), tokens)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(leaf.ndim == 1, 0.3, leaf.shape), jnp.float32), shapes)


def coded(params, kind="int8", block=None):
    """The tree with codes of all matrices of the layers but the router's."""

    def code(path, leaf):
        ruled = leaf.ndim > 1 and path[0].key.startswith(("layers_", "lm_head")) and path[-2].key != "gate"
        return quantize(leaf, kind, block=block, scale_dtype=jnp.bfloat16) if ruled else leaf

    return jax.tree_util.tree_map_with_path(code, params)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("config", "codes"), [(CONFIG, True), (DIRECT, False)], ids=["codes", "floats"])
def test_a_step_over_fused_weights_is_that_of_the_modules(config, codes):
    params = coded(params_of(config)) if codes else params_of(config)  # MTP's stay floats
    quant = ("layers_|lm_head=int8",) if codes else ()
    assert can_be_fused(params, quant)
    served, model = fused(params, config, jnp.float32), Decoder(config)
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.permutation(12).reshape(3, 4))
    cache = LatentCache(tuple(jnp.asarray(rng.normal(size=(12, PAGE, 11)), jnp.float32) for _ in range(3)), table)
    positions = jnp.asarray(LENGTHS)[:, None] + jnp.arange(2)[None]
    valid = jnp.asarray([[True, True], [True, False], [False, False]])
    x, following = (jnp.asarray(rng.normal(size=(3, 2, 16)), jnp.float32) for _ in range(2))

    @jax.jit
    def by_modules(x, following):
        with rounding_by(quant, ("decoder",)):
            run = partial(model.apply, {"params": params}, fresh=False)
            hidden, held = run(x, positions, valid, cache, method="cached")

            def second(decoder, hidden):  # `predict_second_cached` embeds tokens; here are embeddings
                states, _, paged = decoder.mtp(
                    hidden, following, positions, valid, cache=PagedLatents(held.pages[-1], table), fresh=False
                )
                return states, held._replace(pages=(*held.pages[:-1], paged.pages))

            states, held = model.apply({"params": params}, hidden, method=second)
            return *(model.apply({"params": params}, x, method="logits") for x in (hidden, states)), held

    @jax.jit
    def by_arrays(x, following):
        with rounding_by(quant, ("decoder",)):
            states, held = decode(config, served, x, positions, valid, cache)
            second, held = decode_second(config, served, states, following, positions, valid, held)
            norms = served.rest["norm"], served.rest["mtp"]["shared_head_norm"]
            gains = (norm["weight"] for norm in norms)
            return *(next_logits(model, served, x, g) for x, g in zip((states, second), gains, strict=True)), held

    (logits, second, pages), (want, wanted, kept) = by_arrays(x, following), by_modules(x, following)
    there = np.asarray(valid)
    # Both are sums of fp32 in other orders: some units of the last place of logits of about 3.
    np.testing.assert_allclose(logits[there], want[there], rtol=0, atol=1e-5)
    np.testing.assert_allclose(second[there], wanted[there], rtol=0, atol=1e-5)
    for a, b, before in zip(pages.pages, kept.pages, cache.pages, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
        changed = (np.asarray(a) != np.asarray(before)).any(-1).sum()
        assert changed == there.sum()


def test_a_dense_decoder_gives_its_layers_to_the_kernel_of_all_layers_as_they_are(monkeypatch):
    config = replace(DIRECT, first_k_dense_replace=DIRECT.num_hidden_layers)
    served = fused(params_of(config), config, jnp.float32)
    rng = np.random.default_rng(2)
    pages = tuple(jnp.asarray(rng.normal(size=(4, PAGE, 11)), jnp.float32) for _ in range(3))
    cache = LatentCache(pages, jnp.asarray([[2, 0, 3, 1]]))
    x, place = jnp.asarray(rng.normal(size=(1, 1, 16)), jnp.float32), jnp.asarray([[PAGE + 1]])
    asked = []

    def takes(*_):
        asked.append(_)
        return len(asked) > 1

    monkeypatch.setattr(decoding, "takes_layers", takes)
    monkeypatch.setattr(decoding, "decode_layers", decode_layers_reference)
    one_by_one, together = (decode(config, served, x, place, jnp.ones((1, 1), bool), cache) for _ in range(2))
    assert len(asked) == 2 and len(asked[0][1]) == config.num_hidden_layers
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), together, one_by_one)
    np.testing.assert_array_equal(together[1].pages[-1], pages[-1])  # MTP's pool is none of these layers'
    absent = decode(config, served, x, place, jnp.zeros((1, 1), bool), cache)[1]
    jax.tree.map(np.testing.assert_array_equal, absent.pages, pages)


def test_mixtures_and_compressed_queries_are_not_for_the_kernel_of_all_layers():
    dense, mixture = fused(params_of(DIRECT), DIRECT, jnp.float32).layers[:2]
    assert dense_layer(dense) is not None and dense_layer(mixture) is None
    assert dense_layer(fused(params_of(CONFIG), CONFIG, jnp.float32).layers[0]) is None


@pytest.mark.parametrize("config", [CONFIG, DIRECT], ids=["compressed", "direct"])
def test_fused_weights_are_the_checkpoints_number_by_number(config):
    params = params_of(config)
    equal(unfused(fused(params, config, jnp.float32), config), params)
    codes = coded(params)
    equal(unfused(fused(codes, config, jnp.float32), config), codes)


def test_what_is_not_fused_is_shared():
    """Of the arrays that a served model has besides those of the checkpoint, only what is fused is new."""
    params = params_of(CONFIG)
    held = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}
    served = fused(params, CONFIG, jnp.float32)
    new = sorted(x.shape for x in jax.tree.leaves(served) if x.unsafe_buffer_pointer() not in held)
    dense, mixture = (48, 16), (16, 16)
    each = [(12 + 7 + 4, 16), (20, 12), (2, 6, 7), (2, 5, 7)]  # q_kv, q_b, keys, values
    assert new == sorted([*each * 3, dense, mixture, mixture])


def test_what_cannot_be_fused_is_left_to_the_modules():
    params = params_of(CONFIG)
    codes = coded(params)
    assert can_be_fused(params, ()) and can_be_fused(params, ("lm_head=int8",))
    assert not can_be_fused(params, ("layers_1=int8",))  # floats that are rounded in every product
    assert can_be_fused(codes, ("layers_=int8",)) and not can_be_fused(codes, ("layers_=int8:int8",))
    gate = codes["layers_0"]["mlp"]["gate_proj"]
    mixed = gate | {"weight": dequantize(gate["weight"])}
    assert not can_be_fused(
        codes | {"layers_0": codes["layers_0"] | {"mlp": codes["layers_0"]["mlp"] | {"gate_proj": mixed}}}, ()
    )
    for extra in ({"balance": jnp.ones((1, 1))}, {"span": jnp.ones((1, 1))}):
        of_inputs = jax.tree.map(
            lambda x, extra=extra: x._replace(**extra) if isinstance(x, Quantized) else x,
            codes,
            is_leaf=lambda x: isinstance(x, Quantized),
        )
        assert not can_be_fused(of_inputs, ("layers_=int8",))
    adapters = dict.fromkeys(PARTS, jnp.ones((2, 2)))
    assert not can_be_fused(params | {"layers_1": params["layers_1"] | {"self_attn": adapters}}, ())
    spread = jax.device_put(params, jax.sharding.NamedSharding(jax.make_mesh((2,), ("data",)), jax.P()))
    assert not can_be_fused(spread, ())
