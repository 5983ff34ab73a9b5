"""What a compiler makes of the loop of rounds."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.arguments import GenerationSettings
from r1jax.config import DecoderConfig
from r1jax.models.decoder import Decoder, LatentCache
from r1jax.models.served import fused
from r1jax.ops.quantize import dequantize, quantize
from r1jax.serve.rounds import State, narrow_until, run_rounds


def test_codes_are_widened_within_the_loop_and_not_before_it():
    """Before it, the floats of all weights would lie beside their codes for as long as an answer takes."""
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((96, 96)), jnp.float32)
    params = {"codes": quantize(weight, "int8"), "floats": jnp.ones(96)}

    def run(params, x):
        def body(carry):
            held = narrow_until(carry[0], params)
            return carry[0] + 1, jnp.tanh(dequantize(held["codes"]) @ carry[1] + held["floats"])

        return jax.lax.while_loop(lambda carry: carry[0] < 5, body, (jnp.int32(0), x))[1]

    compiled = jax.jit(run).lower(params, jnp.ones(96)).compile()
    entry = re.search(r"^ENTRY.*?^}", compiled.as_text(), re.DOTALL | re.MULTILINE)[0]
    assert "s8[96,96]" in entry and "f32[96,96]" not in entry
    expected = np.ones(96)
    for _ in range(5):
        expected = np.tanh(np.asarray(dequantize(params["codes"]), np.float64) @ expected + 1)
    np.testing.assert_allclose(compiled(params, jnp.ones(96)), expected, rtol=0, atol=1e-4)


def test_the_cache_is_written_in_place():
    """A loop that copied it would move all of it for each token."""
    config, settings, pages = DecoderConfig(num_nextn_predict_layers=0), GenerationSettings(4, page_size=64), 512
    model, none = Decoder(config), jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), method=_reads)["params"]
    )
    pool = jax.ShapeDtypeStruct((pages, 64, config.kv_lora_rank + config.qk_rope_head_dim), jnp.float32)
    state = State(
        cache=LatentCache((pool,) * config.num_hidden_layers, jax.ShapeDtypeStruct((1, pages), jnp.int32)),
        length=none,
        feed=jax.ShapeDtypeStruct((1, 1), jnp.int32),
        tokens=jax.ShapeDtypeStruct((1, 4), jnp.int32),
        logprobs=jax.ShapeDtypeStruct((1, 4), jnp.float32),
        count=none,
        done=jax.ShapeDtypeStruct((1,), bool),
        seen=None,
        drafted=none,
        accepted=none,
        key=jax.eval_shape(lambda: jax.random.key(0)),
        rows=none,
    )
    served = jax.eval_shape(lambda params: fused(params, config, jnp.float32), params)
    run = jax.jit(lambda params, state: run_rounds(model, settings, params, state, 4), donate_argnums=1)
    memory = run.lower(served, state).compile().memory_analysis()
    size = 4 * pool.size
    assert memory.alias_size_in_bytes > config.num_hidden_layers * size and memory.temp_size_in_bytes < size / 4


def _reads(decoder, tokens):
    positions, valid = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape), jnp.ones(tokens.shape, bool)
    return decoder.logits(decoder(decoder.embed(tokens), positions, valid)[0])
