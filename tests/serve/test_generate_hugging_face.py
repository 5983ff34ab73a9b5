"""Greedy tokens and cache against Hugging Face: stored arrays of a tiny checkpoint, and `generate` where installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.arguments import GenerationSettings
from r1jax.hf.load import load_params, read_config
from r1jax.serve.generate import Generator
from r1jax.serve.prompts import lay_out
from r1jax.serve.rounds import read_prompt
from tests.hf import reference

SETTINGS = GenerationSettings(max_new_tokens=12, page_size=8)


@pytest.fixture(scope="module", params=["v3", "v3_noqlora"])
def stored(request, shared_data):
    """A generator with a stored checkpoint, and the reference arrays beside it."""
    folder = shared_data.parent / "hf_reference" / request.param
    if not folder.is_dir():
        pytest.skip(f"no reference checkpoint {folder}")
    config = read_config(folder)
    return Generator(config, load_params(folder, config)), np.load(folder / "reference.npz")


def test_greedy_tokens_are_the_stored_ones(stored):
    generator, expected = stored
    prompts = expected["input_ids"]
    result = generator.generate(prompts, SETTINGS)
    np.testing.assert_array_equal(result.tokens, expected["greedy"][:, prompts.shape[1] :])


def test_cache_holds_the_stored_latents_and_rotary_keys(stored):
    generator, expected = stored
    config = generator.model.config
    batch, pages = lay_out(expected["input_ids"], None, None, config, SETTINGS)
    run = jax.jit(
        lambda batch: read_prompt(generator.model, SETTINGS, pages, generator.params, batch, jax.random.key(0))
    )
    state = run(batch)
    for layer, pool in enumerate(state.cache.pages):
        rows = np.asarray(pool)[batch.table].reshape(2, -1, pool.shape[-1])[:, : expected["input_ids"].shape[1]]
        latent, k_rope = np.split(rows, [config.kv_lora_rank], axis=-1)
        np.testing.assert_allclose(latent, expected[f"cache_k_{layer}"][:, 0], rtol=0, atol=5e-6)
        np.testing.assert_allclose(k_rope, expected[f"cache_v_{layer}"][:, 0], rtol=0, atol=5e-6)


def test_left_padded_logits_are_the_stored_ones(stored):
    generator, expected = stored
    tokens, pad = expected["input_ids"], 3
    padded = np.pad(tokens, ((0, 0), (pad, 0)))
    mask = np.pad(np.ones_like(tokens), ((0, 0), (pad, 0)))
    result = generator.generate(padded, SETTINGS, attention_mask=mask)
    np.testing.assert_array_equal(result.tokens, expected["greedy"][:, tokens.shape[1] :])
    logits = jnp.asarray(expected["leftpad_logits"][:, -1])  # the first token of an answer shows them
    best = jax.nn.log_softmax(logits, axis=-1).max(-1)
    np.testing.assert_allclose(result.logprobs[:, 0], best, rtol=0, atol=5e-6)


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """A random model of Hugging Face and a generator with its weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=128,
        num_nextn_predict_layers=0,
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    reference.randomise(model, 1)  # biases of the routers too, which Hugging Face leaves at zero
    folder = tmp_path_factory.mktemp("peer")
    model.save_pretrained(folder)
    decoder = read_config(folder)
    return model, Generator(decoder, load_params(folder, decoder))


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_tokens_are_those_of_transformers(peer, penalty):
    torch = pytest.importorskip("torch")
    model, generator = peer
    tokens = np.random.default_rng(0).integers(2, 60, (3, 9))
    mask = np.ones_like(tokens)
    if penalty == 1:  # Hugging Face would also penalise the padding
        mask[0, :5] = mask[2, :2] = 0
    with torch.no_grad():
        expected = model.generate(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=7,
            pad_token_id=0,
        ).numpy()[:, 9:]
    settings = GenerationSettings(max_new_tokens=12, page_size=8, repetition_penalty=penalty, stop_tokens=(7,))
    result = generator.generate(tokens, settings, attention_mask=mask)
    assert len({tuple(row) for row in expected.tolist()}) == 3
    np.testing.assert_array_equal(result.tokens[:, : expected.shape[1]], expected)
