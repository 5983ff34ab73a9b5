"""Multi-head latent attention: absorbed form in float64, causality, and which parameters there are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import DecoderConfig, YarnConfig
from r1jax.models.attention import MLA

CONFIG = DecoderConfig(
    hidden_size=12,
    num_attention_heads=3,
    q_lora_rank=10,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    rms_norm_eps=0.1,
    rope_scaling=YarnConfig(factor=4.0, original_max_position_embeddings=32),
)


def make(config, length=6):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, length, config.hidden_size)), jnp.float32)
    positions, valid = jnp.arange(length)[None], jnp.ones((1, length), bool)
    module = MLA(config, jnp.float32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, positions, valid))["params"]
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape) / s.shape[-1] ** 0.5 + (s.ndim == 1), jnp.float32), shapes
    )
    apply = jax.jit(lambda params, x, positions, valid: module.apply({"params": params}, x, positions, valid))
    return apply, params, x, positions, valid


def test_parameters_are_those_of_the_checkpoint():
    params = make(CONFIG)[1]
    shapes = {name: leaf["weight"].shape for name, leaf in params.items()}
    assert shapes == {
        "q_a_proj": (10, 12),
        "q_a_layernorm": (10,),
        "q_b_proj": (3 * 10, 10),
        "kv_a_proj_with_mqa": (8 + 4, 12),
        "kv_a_layernorm": (8,),
        "kv_b_proj": (3 * 11, 8),
        "o_proj": (12, 15),
    }
    direct = make(replace(CONFIG, q_lora_rank=None))[1]
    assert direct.keys() == {"q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}


def test_absorbed_form_gives_the_same():
    """Scores and sums in the latent space, as decoding does it; keys and values are never expanded."""
    apply, params, x, positions, valid = make(CONFIG)
    p = {name: np.asarray(leaf["weight"], np.float64) for name, leaf in params.items()}
    x64, heads = np.asarray(x[0], np.float64), 3

    def norm(y, weight):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * weight

    plain = 1e4 ** (-np.arange(0, 4, 2) / 4)
    ends = [4 * np.log(32 / (2 * np.pi * r)) / (2 * np.log(1e4)) for r in (32, 1)]
    ramp = np.clip((np.arange(2) - max(np.floor(ends[0]), 0)) / (np.ceil(ends[1]) - max(np.floor(ends[0]), 0)), 0, 1)
    angle = np.arange(len(x64))[:, None] * (plain / 4 * ramp + plain * (1 - ramp))

    def turn(y):  # [T, ..., 4] in interleaved pairs
        z = (y[..., 0::2] + 1j * y[..., 1::2]) * np.exp(1j * angle).reshape(len(x64), *[1] * (y.ndim - 2), 2)
        return np.concatenate([z.real, z.imag], -1)

    q = (norm(x64 @ p["q_a_proj"].T, p["q_a_layernorm"]) @ p["q_b_proj"].T).reshape(-1, heads, 10)
    compressed = x64 @ p["kv_a_proj_with_mqa"].T
    latent, k_rope = norm(compressed[:, :8], p["kv_a_layernorm"]), turn(compressed[:, 8:])
    up = p["kv_b_proj"].reshape(heads, 11, 8)
    absorbed = np.einsum("thn,hnr->thr", q[..., :6], up[:, :6])
    scores = np.einsum("thr,sr->hts", absorbed, latent) + np.einsum("thr,sr->hts", turn(q[..., 6:]), k_rope)
    scores = scores * (0.1 * np.log(4) + 1) ** 2 / np.sqrt(10)
    scores[:, ~np.tri(len(x64), dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("htr,hvr->thv", np.einsum("hts,sr->htr", weights, latent), up[:, 6:])
    expected = out.reshape(len(x64), -1) @ p["o_proj"].T
    np.testing.assert_allclose(apply(params, x, positions, valid)[0], expected, rtol=0, atol=1e-5)


def test_only_distances_between_positions_matter():
    apply, params, x, positions, valid = make(CONFIG)
    near, far = apply(params, x, positions, valid), apply(params, x, positions + 37, valid)
    np.testing.assert_allclose(near, far, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(near - apply(params, x, positions * 3, valid))).max() > 1e-3


@pytest.mark.parametrize("hidden", [[0, 1], [2], [0, 5]])
def test_tokens_that_are_not_valid_are_not_seen(hidden):
    apply, params, x, positions, _ = make(CONFIG)
    valid = jnp.ones((1, 6), bool).at[0, jnp.asarray(hidden)].set(False)
    changed = x.at[0, jnp.asarray(hidden)].add(3.0)
    first, second = apply(params, x, positions, valid), apply(params, changed, positions, valid)
    seen = np.setdiff1d(np.arange(6), hidden)
    np.testing.assert_allclose(np.asarray(first)[:, seen], np.asarray(second)[:, seen], rtol=0, atol=1e-6)
    assert np.isfinite(first).all()


def test_padding_at_the_end_needs_no_mask():
    """Causality hides it: without a mask, tokens that exist have the same values and gradients."""
    masked, params, x, positions, _ = make(CONFIG)
    valid = jnp.arange(6)[None] < 4
    plain = MLA(CONFIG, jnp.float32, prefix=True)

    def loss(run, x):
        return jnp.sum(jnp.where(valid[..., None], jnp.sin(run(x)), 0))

    runs = (
        lambda x: masked(params, x, positions, valid),
        lambda x: plain.apply({"params": params}, x, positions, valid),
    )
    with_mask, without = (jax.value_and_grad(lambda x, r=run: loss(r, x))(x) for run in runs)
    np.testing.assert_allclose(without[0], with_mask[0], rtol=1e-5)
    np.testing.assert_allclose(without[1], with_mask[1], rtol=0, atol=1e-5)
    assert np.asarray(without[1])[0, :4].any() and not np.asarray(without[1])[0, 4:].any()
