"""What a compiler makes of the loop of rounds, and that strides of rounds are the rounds one by one."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.arguments import GenerationSettings
from r1jax.config import DecoderConfig
from r1jax.models import decoding
from r1jax.models.decoder import Decoder, LatentCache
from r1jax.models.served import fused, unfused
from r1jax.ops.decode_layers import decode_layers_reference
from r1jax.ops.quantize import dequantize, quantize
from r1jax.serve import generate, rounds
from r1jax.serve.generate import Generator
from r1jax.serve.prompts import lay_out
from r1jax.serve.rounds import STRIDE, State, narrow_until, run_rounds, stride_of
from tests.serve import test_generate
from tests.serve.test_generate import GREEDY, PROMPTS, params_of

CONFIG = replace(test_generate.CONFIG, first_k_dense_replace=test_generate.CONFIG.num_hidden_layers)
LONG = replace(GREEDY, max_new_tokens=3 * STRIDE)
MODEL = Decoder(CONFIG)


@pytest.fixture(scope="module")
def served():
    return fused(params_of(CONFIG), CONFIG, jnp.float32)


@pytest.fixture
def strides(monkeypatch):
    """Has rounds come in strides, or one by one, as the device may be; layers are run one by one in any case."""

    def choose(on):
        monkeypatch.setattr(rounds, "layers_together", lambda *_: ([], []) if on else None)

    return choose


def begin(served, settings, prompts=PROMPTS[:1]):
    batch, pages = lay_out(prompts, None, None, CONFIG, settings)
    return generate._start(MODEL, (), settings, pages, served, batch, jax.random.key(3))


def advance(settings, served, state, most):
    """`run_rounds`, compiled anew for this number."""
    return jax.jit(lambda served, state: run_rounds(MODEL, settings, served, state, most))(served, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def advance_any(on, settings, served, state, most):
    """`run_rounds`, compiled once for all numbers, which only the caller knows; `on` is what `strides` has chosen."""
    return run_rounds(MODEL, settings, served, state, most)


def same(a, b):
    a, b = (state._replace(key=jax.random.key_data(state.key)) for state in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def loops(text):
    """How often each loop of a compiled program runs, None where that is not known before."""
    lines = [line for line in text.splitlines() if " while(" in line]
    counts = [re.search(r'"known_trip_count":{"n":"(\d+)"}', line) for line in lines]
    return [count and int(count[1]) for count in counts]


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


@pytest.mark.parametrize("on", [False, True], ids=["one_by_one", "strides"])
def test_the_cache_is_written_in_place(strides, on):
    """A loop that copied it would move all of it for each token."""
    strides(on)
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


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("most", [1, STRIDE - 1, STRIDE, STRIDE + 3, 2 * STRIDE, 5 * STRIDE])
def test_strides_are_the_rounds_that_are_asked_for(served, strides, most, traced):
    settings = replace(LONG, temperature=1.0)
    state = begin(served, settings)
    strides(False)
    plain = advance_any(False, settings, served, state, most)
    strides(True)
    found = advance_any(True, settings, served, state, most) if traced else advance(settings, served, state, most)
    same(found, plain)
    assert found.count[0] == min(1 + most, LONG.max_new_tokens)


@pytest.mark.parametrize(
    ("size", "change"),
    [
        (1, {}),
        (1, {"temperature": 1.0, "top_k": 4, "top_p": 0.95, "min_p": 0.01}),
        (1, {"repetition_penalty": 1.4, "stop_tokens": (3, 1)}),
        (3, {"temperature": 1.0, "repetition_penalty": 1.1, "stop_tokens": (3,)}),
        (3, {"speculate": True}),
        (3, {"cache": "int8"}),
    ],
    ids=["greedy", "drawn", "penalised", "drawn_until", "speculating", "codes"],
)
def test_rounds_go_on_from_where_strides_end(served, strides, size, change):
    """A stride's last rounds, which are not asked for, leave what the next rounds read."""
    settings, ends = replace(LONG, **change), []
    for on in (False, True):
        strides(on)
        half = advance_any(on, settings, served, begin(served, settings, PROMPTS[:size]), STRIDE + 2)
        ends.append((half, advance_any(on, settings, served, half, LONG.max_new_tokens)))
    for plain, found in zip(*ends, strict=True):
        same(found, plain)
    assert found.done.all()
    stops = np.isin(np.asarray(found.tokens)[np.arange(size), np.asarray(found.count) - 1], settings.stop_tokens)
    assert ((found.count == LONG.max_new_tokens) | stops).all() and stops.any() == bool(settings.stop_tokens)


def test_rows_that_have_ended_stay_as_they_are(served, strides):
    state = begin(served, LONG)
    ended = state._replace(done=~state.done)
    strides(True)
    same(advance(LONG, served, ended, STRIDE), ended)
    run = jax.jit(lambda state: rounds._round(MODEL, LONG, served, state, ~state.done))
    same(run(ended), ended)


def test_a_stride_is_a_loop_that_needs_no_answer_from_the_host(served, strides):
    state = begin(served, LONG)

    def found(rounds):
        return loops(generate._advance.lower(MODEL, (), LONG, served, state, rounds).compile().as_text())

    strides(False)
    assert found(2 * STRIDE) == [None]
    strides(True)
    generate._advance.clear_cache()  # so that it is traced again
    assert sorted(found(2 * STRIDE + 1), key=str) == [STRIDE, None]
    assert sorted(found(3), key=str) == [3, None]
    assert found(1) == [None]  # as an answer is streamed token by token


def test_pieces_of_any_number_of_rounds_are_the_answer(served, strides):
    settings = replace(LONG, max_new_tokens=3 * STRIDE - 2)  # other programs than those of other tests
    generator = Generator(CONFIG, params_of(CONFIG))
    strides(False)
    answer = generator.generate(PROMPTS[:1], settings).tokens[0].tolist()
    strides(True)
    for each in (1, 3, STRIDE + 2):
        pieces = [piece.tokens[0] for piece in generator.stream(PROMPTS[:1], settings, rounds=each)]
        assert sum(pieces, []) == answer and set(map(len, pieces[1:-1])) <= {each}


def test_rounds_are_one_by_one_where_each_reads_all_weights(served, strides):
    state = begin(served, LONG)
    assert stride_of(MODEL, served, state, STRIDE) == 1  # there is no such kernel on a CPU
    strides(True)
    assert stride_of(MODEL, unfused(served, CONFIG), state, STRIDE) == 1
    assert [stride_of(MODEL, served, state, n) for n in (1, 3, STRIDE + 1, jnp.int32(1))] == [1, 3, STRIDE, STRIDE]


def test_strides_are_taken_where_a_token_is_one_launch(served, monkeypatch):
    """And the kernel is told when there is no token."""
    state, asked, ends = begin(served, LONG), [], []

    def takes(*given):
        asked.append(jax.tree.map(lambda x: (x.shape, x.dtype) if hasattr(x, "shape") else x, given))
        return bool(ends)  # the second time

    monkeypatch.setattr(decoding, "takes_layers", takes)
    monkeypatch.setattr(decoding, "decode_layers", decode_layers_reference)
    for expected in ([None], [STRIDE, None]):
        asked.clear()
        run = jax.jit(lambda served, state: run_rounds(MODEL, LONG, served, state, STRIDE + 3))
        compiled = run.lower(served, state).compile()
        assert len(asked) > 1 and all(each == asked[0] for each in asked)
        assert sorted(loops(compiled.as_text()), key=str) == expected
        ends.append(compiled(served, state))
    np.testing.assert_array_equal(ends[0].tokens, ends[1].tokens)
    for plain, found in zip(ends[0].cache.pages, ends[1].cache.pages, strict=True):
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5)
        np.testing.assert_array_equal((found != 0).any(-1), (plain != 0).any(-1))


def _reads(decoder, tokens):
    positions, valid = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape), jnp.ones(tokens.shape, bool)
    return decoder.logits(decoder(decoder.embed(tokens), positions, valid)[0])
