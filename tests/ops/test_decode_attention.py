"""The kernels of a step's attention, in JAX's own arithmetic, against the step without them and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops import decode_attention as module
from r1jax.ops import decode_attention_kernel, latent_attention_kernel
from r1jax.ops.decode_attention import LatentWeights, Turn, decode_attention_reference
from r1jax.ops.latent_attention import PagedLatents
from r1jax.ops.latent_attention_kernel import Tile, attend_pages, join, splits_of

HEADS, WIDE, ROPE, RANK, VALUE, PAGE = 16, 16, 32, 128, 32, 32
RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return jnp.asarray(RNG.standard_normal(shape) * scale, jnp.float32)


@pytest.mark.parametrize("rows", [3, 9], ids=["few", "many"])
def test_kernels_and_reference_agree_in_values_and_cache(rows):
    length, each = 2, 3  # with speculation a row feeds two tokens
    start = np.r_[0, 31, 61, RNG.integers(0, 90, rows - 3)][:, None]
    positions, valid = jnp.asarray(start + np.arange(length), jnp.int32), jnp.ones((rows, length), bool)
    valid = valid.at[1, 1].set(False).at[2].set(False)
    angle = normal(rows * length, ROPE // 2)
    arguments = (
        normal(rows * length, HEADS * (WIDE + ROPE) + 7),
        normal(rows * length, 5 + RANK + ROPE),
        LatentWeights(normal(HEADS, WIDE, RANK, scale=0.3), normal(HEADS, VALUE, RANK), normal(RANK)),
        PagedLatents(
            normal(rows * each, PAGE, RANK + ROPE), jnp.asarray(RNG.permutation(rows * each).reshape(rows, -1))
        ),
        *(positions, valid, Turn(jnp.cos(angle), jnp.sin(angle))),
    )
    (found, cache), (want, kept) = (
        jax.jit(lambda f=f, **way: f(*arguments, eps=0.1, scale=0.2, **way))()
        for f in (lambda *a, **way: module._on_kernels(*a, interpret=True, **way), decode_attention_reference)
    )
    there = np.asarray(valid).reshape(-1)
    np.testing.assert_allclose(found[there], want[there], rtol=0, atol=2e-4)
    np.testing.assert_allclose(cache.pages, kept.pages, rtol=0, atol=1e-5)


def test_every_split_takes_its_part_of_the_keys_and_reads_no_other_page():
    rows, each, tile = 3, 4, Tile(16, 16, 4, 1, 15)
    assert splits_of(rows, each * PAGE // 16, tile) == 5
    assert [splits_of(*sizes) for sizes in ((64, 257), (1, 18), (1, 257), (1, 4096), (500, 257))] == [6, 18, 32, 396, 1]
    q, rope, pages = normal(rows, 16, RANK), normal(rows, 16, ROPE), normal(rows * each, PAGE, RANK + ROPE)
    table = np.random.default_rng(1).permutation(rows * each).reshape(rows, each)
    limit = np.stack([np.full(16, 127), np.arange(16) + 40, np.full(16, -1)])
    keys = np.asarray(pages, np.float64)[table].reshape(rows, -1, RANK + ROPE)
    scores = 0.1 * np.einsum("bmc,bsc->bms", np.concatenate([q, rope], axis=-1), keys)
    weights = np.where(np.arange(each * PAGE) <= limit[..., None], np.exp(scores), 0)
    want = np.einsum("bms,bsr->bmr", weights, keys[..., :RANK]) / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    unread = table[1, 2:].tolist() + table[2].tolist()
    spoilt = pages.at[jnp.asarray(unread)].set(jnp.nan)
    arrays = (q, rope, spoilt, jnp.asarray(table, jnp.int32), jnp.asarray(limit, jnp.int32))
    parts = attend_pages(*arrays, scale=0.1, tile=tile, interpret=True)
    np.testing.assert_allclose(join(parts), want, rtol=0, atol=2e-5)


def test_parts_of_any_number_are_joined_before_they_leave_the_latent_space():
    for splits in (1, decode_attention_kernel.SPLITS + 4):
        total = 1 + np.abs(RNG.standard_normal((2, splits, 2 * HEADS)))
        total[1, :, 3] = 0  # a query that sees nothing
        mixed = normal(2, splits, 2 * HEADS, RANK) * (total > 0)[..., None].astype(np.float32)
        parts = latent_attention_kernel.Parts(mixed, normal(2, splits, 2 * HEADS), jnp.asarray(total, jnp.float32))
        values = normal(HEADS, VALUE, RANK)
        want = np.einsum("TNR,NHR->TNH", np.float64(join(parts)).reshape(4, HEADS, RANK), values).reshape(4, -1)
        found = decode_attention_kernel.expand(parts, values, jnp.float32, interpret=True)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-4)


def test_kernels_leave_widths_that_are_no_powers_of_two_or_that_a_program_cannot_hold():
    assert latent_attention_kernel.fits(16, 512, 64, 64)
    for shape in ((8, 512, 64, 64), (16, 512, 64, 48), (16, 384, 64, 64), (16, 512, 8, 64), (16, 2048, 64, 64)):
        assert not latent_attention_kernel.fits(*shape)
    sizes = decode_attention_kernel.Sizes(16, 128, 64, 512)
    assert decode_attention_kernel.fits(sizes, 128) and not decode_attention_kernel.fits(sizes, 96)
    assert not decode_attention_kernel.fits(sizes._replace(rank=64), 128)


def test_the_kernels_are_tried_while_a_program_is_traced(monkeypatch):
    monkeypatch.setattr(module, "_on_kernels", lambda *a, **way: _interpreted(*a, **way))
    found = []
    jax.make_jaxpr(lambda x: found.append(module._kernels_agree.__wrapped__()) or x)(1.0)
    assert found == [True]


_ON_KERNELS = module._on_kernels


def _interpreted(*arguments, **way):
    return _ON_KERNELS(*arguments, interpret=True, **way)
