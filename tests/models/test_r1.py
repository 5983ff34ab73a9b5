"""The whole model: a hidden modality leaves no trace, queries see everything, shapes, precision."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import DecoderConfig, ModelConfig, TableConfig, VisionConfig
from r1jax.models.decoder import Decoder
from r1jax.models.r1 import R1, Inputs

HEADS = (("nodule_present", 1), ("center_mm", 3), ("texture", 5))
CONFIG = ModelConfig(
    modalities=("volume", "image", "table", "text"),
    decoder=DecoderConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        intermediate_size=16,
        moe_intermediate_size=8,
        initializer_range=0.3,
    ),
    volume=VisionConfig(size=(8, 8, 8), stem_stride=4, widths=(8,), blocks=(1,), layers=0),
    image=VisionConfig(size=(8, 8), stem_stride=4, widths=(8,), blocks=(1,), layers=0),
    table=TableConfig(layers=0, frequencies=2),
    text_tokens=6,
    dropout=0.3,
)


def draw_inputs(batch=2):
    rng = np.random.default_rng(0)
    every = jnp.ones(batch, bool)
    return Inputs(
        volume=jnp.asarray(rng.standard_normal((batch, 8, 8, 8)), jnp.float32),
        volume_spacing=jnp.ones((batch, 3)),
        has_volume=every,
        image=jnp.asarray(rng.standard_normal((batch, 8, 8)), jnp.float32),
        image_spacing=jnp.ones((batch, 2)),
        has_image=every,
        table=jnp.asarray(rng.standard_normal((batch, 3)), jnp.float32),
        has_table=every,
        text=jnp.asarray(rng.integers(0, 16, (batch, 6)), jnp.int32),
        text_valid=jnp.ones((batch, 6), bool),
    )


@pytest.fixture(scope="module")
def model():
    """Inputs, parameters and the compiled model."""
    inputs, module, rng = draw_inputs(), R1(CONFIG, HEADS), np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), inputs, language=True))["params"]
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape) / s.shape[-1] ** 0.5 + (s.ndim == 1), jnp.float32), shapes
    )
    return inputs, params, jax.jit(lambda params, inputs: module.apply({"params": params}, inputs, language=True))


def difference(a, b):
    """Largest difference of any head, of each case."""
    return np.max([np.abs(np.asarray(a.heads[n] - b.heads[n])).max(axis=1) for n in a.heads], axis=0)


def test_shapes(model):
    inputs, params, apply = model
    out = apply(params, inputs)
    assert {name: x.shape for name, x in out.heads.items()} == {name: (2, width) for name, width in HEADS}
    assert all(x.dtype == jnp.float32 for x in (*out.heads.values(), out.text_logits, out.mtp_logits))
    assert out.text_logits.shape == (2, 6, 16) and out.mtp_logits.shape == (2, 5, 16)
    assert len(out.router) == 2  # one mixture layer and MTP's
    tokens = 2 * (8 + 4 + 3 + 6 + len(HEADS))
    assert float(out.router[0].load.sum()) == tokens * CONFIG.decoder.num_experts_per_tok
    assert float(out.router[1].load.sum()) == 2 * 5 * CONFIG.decoder.num_experts_per_tok


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ("has_volume", {"volume": 9.0, "volume_spacing": 3.0}),
        ("has_image", {"image": 9.0, "image_spacing": 3.0}),
        ("has_table", {"table": 9.0}),
        ("text_valid", {"text": 1}),
    ],
)
def test_hidden_modality_leaves_no_trace(model, flag, changed):
    """Case 0 hides it, case 1 does not: only case 1 answers to its content."""
    inputs, params, apply = model
    hidden = inputs._replace(**{flag: getattr(inputs, flag).at[0].set(False)})
    other = hidden._replace(**{name: (getattr(hidden, name) + by) % 16 for name, by in changed.items()})
    moved = difference(apply(params, hidden), apply(params, other))
    assert moved[0] < 1e-6 and moved[1] > 1e-3, moved


def test_hiding_equals_absence(model):
    """A model without the modality, with the same weights, says the same."""
    inputs, params, apply = model
    gone = inputs._replace(has_volume=jnp.zeros(2, bool), has_table=jnp.zeros(2, bool))
    small = R1(replace(CONFIG, modalities=("image", "text")), HEADS)
    kept = {name: p for name, p in params.items() if name not in ("volume", "table")}
    fields = ("image", "image_spacing", "has_image", "text", "text_valid")
    absent = Inputs(**{name: getattr(inputs, name) for name in fields})
    alone = jax.jit(lambda: small.apply({"params": kept}, absent, language=True))()
    out = apply(params, gone)
    assert difference(out, alone).max() < 2e-6
    np.testing.assert_allclose(out.text_logits, alone.text_logits, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(out.router[0].load, alone.router[0].load)


def test_padding_of_the_text_leaves_no_trace(model):
    inputs, params, apply = model
    short = inputs._replace(text_valid=inputs.text_valid.at[:, 4:].set(False))
    cut = Inputs(*short)._replace(text=short.text[:, :4], text_valid=short.text_valid[:, :4])
    out, alone = apply(params, short), apply(params, cut)
    assert difference(out, alone).max() < 2e-6
    np.testing.assert_allclose(out.text_logits[:, :4], alone.text_logits, rtol=0, atol=2e-6)
    np.testing.assert_allclose(out.mtp_logits[:, :3], alone.mtp_logits, rtol=0, atol=2e-6)


def test_bytes_that_are_merged_are_read_and_padding_leaves_no_trace():
    inputs, module = draw_inputs(), R1(replace(CONFIG, text_merge=3), HEADS)
    params = module.init(jax.random.key(0), inputs)["params"]
    apply = jax.jit(lambda inputs: module.apply({"params": params}, inputs))
    out = apply(inputs)
    for place in range(6):
        text = inputs.text.at[:, place].set((inputs.text[:, place] + 1) % 16)
        assert difference(apply(inputs._replace(text=text)), out).min() > 1e-5, place
    short = inputs._replace(text_valid=inputs.text_valid.at[:, 2:].set(False))  # of the second token nothing exists
    cut = short._replace(text=short.text[:, :3], text_valid=short.text_valid[:, :3])
    wider = lambda x: jnp.pad(x, ((0, 0), (0, 3)))  # noqa: E731
    longer = short._replace(text=wider(short.text), text_valid=wider(short.text_valid))
    for other in (cut, longer, short._replace(text=short.text.at[:, 2:].set(7))):
        assert difference(apply(short), apply(other)).max() < 2e-6
    with pytest.raises(ValueError, match="model.text_merge is 3: no byte of the text has a state of its own"):
        module.apply({"params": params}, inputs, language=True)


def test_every_query_sees_every_modality(model):
    """The gradient of each head reaches every number that was read, and each token of the text moves it."""
    inputs, params, apply = model
    read = {name: getattr(inputs, name) for name in ("volume", "image", "table")}

    @jax.jit
    @jax.grad
    def sensitivity(read, weights):
        heads = apply(params, inputs._replace(**read)).heads
        return sum(w * jnp.sum(heads[name]) for w, (name, _) in zip(weights, HEADS, strict=True))

    for weights, (head, _) in zip(jnp.eye(len(HEADS)), HEADS, strict=True):
        for name, gradient in sensitivity(read, weights).items():
            assert (np.asarray(gradient) != 0).mean() > 0.99, (head, name)
    before = apply(params, inputs).heads
    for place in range(6):
        text = inputs.text.at[:, place].set((inputs.text[:, place] + 1) % 16)
        after = apply(params, inputs._replace(text=text)).heads
        assert all(np.abs(np.asarray(after[head] - before[head])).max() > 1e-5 for head, _ in HEADS), place


def test_text_does_not_see_what_follows(model):
    inputs, params, apply = model
    other = inputs._replace(text=inputs.text.at[:, 4].set((inputs.text[:, 4] + 1) % 16))
    first, second = apply(params, inputs), apply(params, other)
    np.testing.assert_allclose(first.text_logits[:, :4], second.text_logits[:, :4], rtol=0, atol=1e-6)
    # MTP at place i has read token i + 1
    np.testing.assert_allclose(first.mtp_logits[:, :3], second.mtp_logits[:, :3], rtol=0, atol=1e-6)
    assert np.abs(np.asarray(first.mtp_logits - second.mtp_logits))[:, 3].max() > 1e-3
    assert np.abs(np.asarray(first.text_logits - second.text_logits))[:, 4].max() > 1e-3


def test_dropout_is_on_only_in_training(model):
    inputs, params, apply = model
    train = jax.jit(
        lambda seed: R1(CONFIG, HEADS).apply(
            {"params": params}, inputs, cases=jnp.arange(len(inputs.text)), rngs={"dropout": jax.random.key(seed)}
        )
    )
    assert difference(apply(params, inputs), apply(params, inputs)).max() == 0
    assert difference(train(0), train(0)).max() == 0
    assert difference(train(0), train(1)).min() > 1e-2


def test_language_is_computed_only_where_asked_for(model):
    inputs, params, apply = model
    quiet = jax.jit(lambda: R1(CONFIG, HEADS).apply({"params": params}, inputs))()
    assert quiet.text_logits is None and quiet.mtp_logits is None and len(quiet.router) == 1
    assert difference(quiet, apply(params, inputs)).max() < 2e-6


def test_bf16_is_close_to_fp32(model):
    """All experts take part, so that rounding cannot flip a choice; see the note on near ties in DeepSeek-V3."""
    inputs, params, _ = model
    decoder = replace(CONFIG.decoder, n_group=1, topk_group=1, num_experts_per_tok=8, num_nextn_predict_layers=0)
    outs = []
    for precision in ("fp32", "bf16"):
        module = R1(replace(CONFIG, decoder=decoder, precision=precision), HEADS)
        outs.append(jax.jit(lambda m=module: m.apply({"params": params}, inputs, language=True))())
    exact, rough = outs
    assert rough.text_logits.dtype == jnp.float32
    for a, b in [*((exact.heads[n], rough.heads[n]) for n, _ in HEADS), (exact.text_logits, rough.text_logits)]:
        a, b = np.asarray(a), np.asarray(b)
        error = np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2))
        assert 0 < error < 0.06, error


def test_text_alone_is_the_decoder(model):
    """Without heads and other modalities nothing but the decoder is there, and it says what it says by itself."""
    inputs, params, _ = model
    text = Inputs(text=inputs.text, text_valid=inputs.text_valid.at[1, 4:].set(False))
    config = replace(CONFIG, modalities=("text",))
    module, decoder = R1(config, ()), Decoder(CONFIG.decoder)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), text, language=True))["params"]
    assert shapes.keys() == {"decoder"}
    assert jax.tree.map(lambda x: x.shape, shapes["decoder"]) == jax.tree.map(lambda x: x.shape, params["decoder"])

    @jax.jit
    def by_itself(params):
        def run(decoder):
            positions = jnp.minimum(jnp.arange(6)[None], jnp.asarray([[5], [3]]))
            hidden, router = decoder(decoder.embed(text.text), positions, text.text_valid)
            return decoder.logits(hidden), router

        return nn.apply(run, decoder)({"params": params})

    out = jax.jit(lambda p: module.apply({"params": {"decoder": p}}, text, language=True))(params["decoder"])
    logits, router = by_itself(params["decoder"])
    there = np.asarray(text.text_valid)
    np.testing.assert_allclose(out.text_logits[there], logits[there], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(out.router[0].load, router[0].load)
    np.testing.assert_array_equal(out.router[0].sequence_load.sum(axis=0), router[0].load)
    assert out.heads == {} and out.where is None and len(out.router) == 2
