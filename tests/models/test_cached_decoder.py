"""The decoder over its cache against its own training forward, token by token."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import YarnConfig
from r1jax.models.decoder import Decoder, LatentCache
from tests.models.small_decoder import CONFIG, LENGTHS, PAGE


@pytest.fixture(scope="module", params=["yarn", "plain"])
def model(request):
    """Config, parameters, tokens and the logits of the whole rows, main and MTP."""
    config = CONFIG
    if request.param == "plain":
        config = replace(CONFIG, q_lora_rank=None, rope_interleave=False, rope_scaling=YarnConfig(), n_group=1)
        config = replace(config, topk_group=1, first_k_dense_replace=0, n_shared_experts=0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (3, 14)), jnp.int32)

    def everything(decoder, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        valid = jnp.ones(tokens.shape, bool)
        hidden, _ = decoder(decoder.embed(tokens), positions, valid)
        states, _ = decoder.predict_second(hidden, jnp.roll(tokens, -1, axis=1), positions, valid)
        return decoder.logits(hidden), decoder.logits(states)

    init = partial(Decoder(config).init, jax.random.key(0), tokens, method=everything)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(leaf.ndim == 1, 0.3, leaf.shape), jnp.float32), jax.eval_shape(init)
    )
    logits = jax.jit(lambda params: Decoder(config).apply(params, tokens, method=everything))(params)
    return config, params, logits, tokens


@pytest.mark.parametrize("width", [1, 2])
def test_cached_logits_equal_the_training_forward(model, width):
    config, params, (logits, second), tokens = model
    assert np.std(logits) > 0.3

    def step(decoder, tokens, following, positions, valid, cache, fresh):
        hidden, cache = decoder.cached(decoder.embed(tokens), positions, valid, cache, fresh=fresh)
        states, cache = decoder.predict_second_cached(hidden, following, positions, valid, cache, fresh=fresh)
        return decoder.logits(hidden), decoder.logits(states), cache

    run = jax.jit(
        lambda fresh, *arguments: Decoder(config).apply(params, *arguments, fresh, method=step), static_argnums=0
    )
    table = jnp.asarray(np.random.default_rng(1).permutation(12).reshape(3, 4))
    cache = LatentCache(tuple(jnp.zeros((12, PAGE, 11)) for _ in range(3)), table)
    positions = jnp.broadcast_to(jnp.arange(12)[None], (3, 12))
    valid = positions < jnp.asarray(LENGTHS)[:, None]
    following = jnp.roll(tokens, -1, axis=1)
    found, draft, cache = run(True, jnp.where(valid, tokens[:, :12], 39), following[:, :12], positions, valid, cache)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(found[row, :length], logits[row, :length], rtol=0, atol=1e-5)
        np.testing.assert_allclose(draft[row, :length], second[row, :length], rtol=0, atol=1e-5)
    place = jnp.asarray(LENGTHS)
    while (place < 14).any():
        positions = place[:, None] + jnp.arange(width)[None]
        valid = positions < 14
        held = jnp.minimum(positions, 13)
        fed = [jnp.take_along_axis(rows, held, axis=1) for rows in (tokens, following)]
        found, draft, cache = run(False, *fed, positions, valid, cache)
        for row, t in np.argwhere(valid):
            np.testing.assert_allclose(found[row, t], logits[row, positions[row, t]], rtol=0, atol=1e-5)
            np.testing.assert_allclose(draft[row, t], second[row, positions[row, t]], rtol=0, atol=1e-5)
        place = place + width


@pytest.mark.parametrize("model", ["yarn"], indirect=True)
def test_a_place_can_be_written_again(model):
    config, params, (logits, _), tokens = model

    @partial(jax.jit, static_argnums=3)
    def run(tokens, place, cache, fresh):
        decoder = Decoder(config).bind(params)
        positions = place + jnp.arange(tokens.shape[1])[None]
        valid = jnp.ones(tokens.shape, bool)
        hidden, cache = decoder.cached(decoder.embed(tokens), positions, valid, cache, fresh=fresh)
        return decoder.logits(hidden), cache

    cache = LatentCache(tuple(jnp.zeros((4, PAGE, 11)) for _ in range(2)), jnp.arange(4)[None])
    _, cache = run(tokens[:1, :6], 0, cache, True)
    _, cache = run(jnp.stack([tokens[:1, 6], (tokens[:1, 7] + 1) % 40], axis=1), 6, cache, False)  # a wrong guess
    found, cache = run(tokens[:1, 7:9], 7, cache, False)
    np.testing.assert_allclose(found[0], logits[0, 7:9], rtol=0, atol=1e-5)


def test_names_of_the_parameters_are_the_checkpoints(model):
    attention = model[1]["params"]["layers_1"]["self_attn"]
    queries = {"q_a_proj", "q_a_layernorm", "q_b_proj"} if model[0].q_lora_rank else {"q_proj"}
    assert attention.keys() == queries | {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
