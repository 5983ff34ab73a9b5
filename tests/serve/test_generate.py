"""Generation against the training forward, against itself in other batches, and speculation against the plain loop."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.arguments import GenerationSettings
from r1jax.config import DecoderConfig, YarnConfig
from r1jax.errors import UserError
from r1jax.models.decoder import Decoder
from r1jax.ops.self_test import target
from r1jax.serve import generate
from r1jax.serve.generate import Generator, cast_matrices
from r1jax.serve.prompts import lay_out
from r1jax.serve.rounds import read_prompt

CONFIG = DecoderConfig(
    vocab_size=5,  # so that MTP guesses right now and then
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=7,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    intermediate_size=24,
    moe_intermediate_size=8,
    rope_scaling=YarnConfig(factor=8.0, original_max_position_embeddings=32),
)
GREEDY = GenerationSettings(max_new_tokens=10, page_size=4)
RANDOM = replace(GREEDY, temperature=1.0, top_k=4, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
PENALISED = replace(GREEDY, stop_tokens=(3, 1), repetition_penalty=1.4)
PROMPTS = [[1, 2, 3, 4, 0], [4], [2, 2, 1, 0, 3, 3, 3, 1, 2]]


def forward(decoder, tokens):
    """Next-token logits and MTP's of whole rows."""
    positions, valid = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape), jnp.ones(tokens.shape, bool)
    hidden, _ = decoder(decoder.embed(tokens), positions, valid)
    states, _ = decoder.predict_second(hidden, jnp.roll(tokens, -1, axis=1), positions, valid)
    return decoder.logits(hidden), decoder.logits(states)


def params_of(config, seed=0):
    """Random weights, norms and biases about 1."""
    rng, tokens = np.random.default_rng(seed), jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), tokens, method=forward))["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(leaf.ndim == 1, 0.3, leaf.shape), jnp.float32), shapes)


@jax.jit
def whole(params, tokens):
    return Decoder(CONFIG).apply({"params": params}, tokens, method=forward)


def row_logits(params, prompt, answer):
    """Logits that chose each token of an answer, and MTP's guess of each token after its first, by the full forward."""
    row = np.zeros((1, 24), np.int32)
    row[0, : len(prompt) + len(answer)] = [*prompt, *answer]
    logits, second = (np.asarray(part)[0] for part in whole(params, jnp.asarray(row)))
    first = len(prompt) - 1
    return logits[first : first + len(answer)], second[first : first + len(answer) - 1].argmax(-1)


@pytest.fixture(scope="module")
def generator():
    return Generator(CONFIG, params_of(CONFIG))


@pytest.fixture(scope="module")
def greedy(generator):
    return generator.generate(PROMPTS, GREEDY)


@pytest.fixture(scope="module")
def drawn(generator):
    return generator.generate(PROMPTS, RANDOM, seed=3)


def test_greedy_tokens_are_those_of_the_full_forward(generator, greedy):
    for prompt, answer, length in zip(PROMPTS, greedy.tokens.tolist(), greedy.lengths, strict=True):
        assert length == 10
        assert row_logits(generator.params, prompt, answer)[0].argmax(-1).tolist() == answer
    assert np.isnan(greedy.acceptance)


@pytest.mark.parametrize("name", ["greedy", "drawn"])
def test_logprobs_are_those_of_the_training_forward(generator, name, request):
    result = request.getfixturevalue(name)
    assert result.logprobs.dtype == np.float32
    for prompt, answer, found in zip(PROMPTS, result.tokens.tolist(), result.logprobs, strict=True):
        logits = np.float64(row_logits(generator.params, prompt, answer)[0])
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(found, logprobs[np.arange(10), answer], rtol=0, atol=1e-5)


def test_padding_on_the_left_changes_nothing(generator, greedy):
    width = max(map(len, PROMPTS))
    tokens, mask = np.full((3, width), 4), np.zeros((3, width), int)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    padded = generator.generate(tokens, GREEDY, attention_mask=mask)
    for found, expected in zip(padded, greedy, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_row_does_not_depend_on_its_neighbours(generator, drawn):
    assert len({tuple(row) for row in drawn.tokens.tolist()}) == 3
    alone = generator.generate(PROMPTS[1:2], RANDOM, seed=3, rows=[1])
    np.testing.assert_array_equal(alone.tokens[0], drawn.tokens[1])
    np.testing.assert_allclose(alone.logprobs[0], drawn.logprobs[1], rtol=0, atol=2e-6)
    other = generator.generate(PROMPTS, RANDOM, seed=4)
    assert (other.tokens != drawn.tokens).any()


def test_streamed_pieces_are_the_answer(generator):
    settings = replace(PENALISED, speculate=True)
    result = generator.generate(PROMPTS, settings, seed=3)
    for rounds in (1, 4):
        rows = [[] for _ in PROMPTS]
        for piece in generator.stream(PROMPTS, settings, seed=3, rounds=rounds):
            assert list(map(len, piece.logprobs)) == list(map(len, piece.tokens))
            for row, new in zip(rows, piece.tokens, strict=True):
                assert len(new) <= rounds * (1 + settings.speculate)
                row += new
        assert rows == [t[:n].tolist() for t, n in zip(result.tokens, result.lengths, strict=True)]
        np.testing.assert_array_equal(piece.accepted, result.accepted)


def test_rows_end_at_their_stop_tokens(generator, greedy):
    stops = (int(greedy.tokens[0, 4]), int(greedy.tokens[2, 2]))
    result = generator.generate(PROMPTS, replace(GREEDY, stop_tokens=stops))
    for row in range(3):
        answer = greedy.tokens[row].tolist()
        length = next((i + 1 for i, token in enumerate(answer) if token in stops), 10)
        assert result.lengths[row] == length
        assert result.tokens[row].tolist() == answer[:length] + [0] * (10 - length)
        assert not np.any(result.logprobs[row, length:])


@pytest.mark.parametrize("settings", [GREEDY, PENALISED], ids=["greedy", "penalised"])
def test_speculation_changes_no_token(settings):
    accepted = drafted = 0
    for seed in range(10):
        generator = Generator(CONFIG, params_of(CONFIG, seed))
        plain = generator.generate(PROMPTS, settings)
        faster = generator.generate(PROMPTS, replace(settings, speculate=True))
        np.testing.assert_array_equal(faster.tokens, plain.tokens)
        np.testing.assert_array_equal(faster.lengths, plain.lengths)
        np.testing.assert_allclose(faster.logprobs, plain.logprobs, rtol=0, atol=1e-5)
        if settings.repetition_penalty == 1:
            check_counts(generator.params, faster)
        accepted, drafted = accepted + faster.accepted.sum(), drafted + faster.drafted.sum()
    assert 0 < accepted < drafted


def check_counts(params, result):
    """Goes through the rounds by hand, with MTP's guesses from the full forward."""
    for row, prompt in enumerate(PROMPTS):
        answer = result.tokens[row, : result.lengths[row]].tolist()
        guesses = row_logits(params, prompt, answer)[1]
        at = accepted = drafted = 0
        while at < len(answer) - 1:
            drafted += 1
            right = guesses[at] == answer[at + 1]
            accepted += right
            at += 1 + right
        assert (drafted, accepted) == (result.drafted[row], result.accepted[row])


def test_perfect_guesses_are_all_accepted():
    config = replace(CONFIG, vocab_size=1)
    result = Generator(config, params_of(config)).generate([[0, 0], [0]], replace(GREEDY, speculate=True))
    assert result.acceptance == 1.0
    assert result.drafted.tolist() == [5, 5]  # the first token, four rounds of two, and one of which one is left


def test_rows_take_no_more_pages_than_they_need(generator):
    batch, pages = lay_out(PROMPTS, None, None, CONFIG, GREEDY)
    assert pages == 4 + 3 + 5  # ceil((5 + 10) / 4), ceil((1 + 10) / 4), ceil((9 + 10) / 4)
    used = [batch.table[row, : -(-(len(prompt) + 10) // 4)].tolist() for row, prompt in enumerate(PROMPTS)]
    assert sorted(sum(used, [])) == list(range(pages))
    for dtype, size in ((jnp.float32, 4), (jnp.bfloat16, 2)):
        model = Decoder(CONFIG, dtype)
        for settings, layers in ((GREEDY, 2), (replace(GREEDY, speculate=True), 3)):
            shape = jax.eval_shape(
                lambda batch, key, model=model, settings=settings: read_prompt(
                    model, settings, pages, generator.params, batch, key
                ),
                batch,
                jax.random.key(0),
            )
            held = sum(pool.size * pool.dtype.itemsize for pool in shape.cache.pages)
            assert held / (pages * 4) == layers * (7 + 4) * size  # bytes a token


def test_bfloat16_keeps_the_router_in_fp32(generator):
    params = cast_matrices(generator.params, jnp.bfloat16)
    assert params["layers_1"]["mlp"]["gate"]["weight"].dtype == jnp.float32
    assert params["layers_1"]["mlp"]["experts"]["down_proj"].dtype == params["embed_tokens"].dtype == jnp.bfloat16
    result = Generator(CONFIG, generator.params, dtype=jnp.bfloat16).generate(PROMPTS, GREEDY)
    assert np.isfinite(result.logprobs).all() and result.logprobs.dtype == np.float32


@pytest.mark.parametrize(
    ("prompts", "change", "words"),
    [
        ([], {}, "prompts is empty"),
        ([[1], []], {}, "row 1 has no token"),
        ([[1], [2, 5]], {}, "row 1 holds the token 5, but vocab_size is 5"),
        ([[1]], {"speculate": True, "temperature": 0.5}, "temperature is 0.5"),
        ([[1]], {"stop_tokens": (7,)}, "stop_tokens holds 7"),
    ],
)
def test_bad_input_is_named(generator, prompts, change, words):
    with pytest.raises(UserError, match=words):
        generator.generate(prompts, replace(GREEDY, **change))


def test_adapters_are_refused():
    with pytest.raises(UserError, match="merge them first"):
        Generator(CONFIG, {"lm_head": {"lora_a": np.zeros((1, 2), np.float32)}})


def test_speculation_needs_mtp():
    with pytest.raises(UserError, match="num_nextn_predict_layers is 0"):
        lay_out([[1]], None, None, replace(CONFIG, num_nextn_predict_layers=0), replace(GREEDY, speculate=True))


def test_mask_and_rows_must_fit(generator):
    with pytest.raises(UserError, match="attention_mask has shape"):
        generator.generate(np.ones((1, 3), int), GREEDY, attention_mask=np.ones((1, 2), int))
    with pytest.raises(UserError, match="lists of unequal lengths; pad both to one array"):
        generator.generate([[1, 2], [3]], GREEDY, attention_mask=np.ones((2, 2), int))
    with pytest.raises(UserError, match="rows has 2 numbers"):
        generator.generate([[1]], GREEDY, rows=[0, 1])


def test_kernels_are_those_of_the_device_that_holds_the_weights(monkeypatch):
    """A CPU's program has none of a GPU's, though JAX would take the GPU."""
    cpu, found = jax.devices()[3], []
    elsewhere = Generator(CONFIG, jax.device_put(params_of(CONFIG), cpu))

    def traced(*arguments):
        found.append(target())
        raise InterruptedError

    for name, answer in (("_generate", elsewhere.generate), ("_start", lambda *a: next(elsewhere.stream(*a)))):
        monkeypatch.setattr(generate, name, traced)
        with pytest.raises(InterruptedError):
            answer([[1]], GREEDY)
    assert found == [cpu, cpu] and target() == jax.devices()[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fp32_is_never_multiplied_in_tf32(monkeypatch, dtype):
    """Every program carries the precision that a GPU needs to be told; in bf16 the router alone does."""
    programs = {}

    def record(run, name, *arguments):
        programs[name] = run.lower(*arguments).as_text()
        return run(*arguments)

    for name in ("_generate", "_start", "_advance"):
        monkeypatch.setattr(generate, name, partial(record, getattr(generate, name), name))
    exact, settings = Generator(CONFIG, params_of(CONFIG), dtype=dtype), replace(GREEDY, max_new_tokens=2)
    exact.generate(PROMPTS, settings)
    list(exact.stream(PROMPTS, settings))
    assert programs.keys() == {"_generate", "_start", "_advance"}
    for name, text in programs.items():
        products = [line for line in text.splitlines() if "dot_general" in line]
        told = ["HIGHEST, HIGHEST" in line for line in products]
        assert len(told) > 10
        assert all(told) if dtype == jnp.float32 else 0 < sum(told) < len(told) / 2, name
