"""The chunked loss against all logits at once, against float64 and against optax; and that it stays small."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.ops import linear_cross_entropy as module
from r1jax.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, token_losses
from r1jax.ops.losses import cross_entropy
from r1jax.ops.quantized_dot import Ruled, Scheme, quantized_dot, weight_codes


def draw(batch=3, length=7, width=5, vocabulary=11, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((batch, length, width)), dtype)
    weight = jnp.asarray(rng.standard_normal((vocabulary, width)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, vocabulary, (batch, length)), jnp.int32)
    weights = rng.integers(0, 3, (batch, length)).astype(np.float32) / 2
    weights[:, -1], weights[0] = 0.0, 1.0
    return hidden, weight, labels, jnp.asarray(weights)


def close(got, expected, tolerance):
    """Largest difference, relative to the largest number."""
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def value_and_grad(loss, hidden, weight, labels, weights, *settings):
    return jax.jit(jax.value_and_grad(lambda h, w: loss(h, w, labels, weights, *settings), argnums=(0, 1)))(
        hidden, weight
    )


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.2, 1e-2)])
@pytest.mark.parametrize("chunk", [1, 9, 15, 1000])  # 1, 3, 4 and all 7 time steps: 3 and 4 do not divide 7
def test_equals_the_reference(smoothing, z_loss, chunk):
    arrays = draw()
    value, gradients = value_and_grad(linear_cross_entropy, *arrays, smoothing, z_loss, chunk)
    expected, slopes = value_and_grad(linear_cross_entropy_reference, *arrays, smoothing, z_loss)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, slope in zip(gradients, slopes, strict=True):
        assert got.dtype == slope.dtype
        close(got, slope, 1e-6)


def test_equals_the_formula_in_float64():
    hidden, weight, labels, weights = draw()
    h, w, c = (np.asarray(x, np.float64) for x in (hidden, weight, weights))
    logits = h @ w.T
    z = np.log(np.exp(logits).sum(-1))
    target = 0.9 * np.eye(11)[np.asarray(labels)] + 0.1 / 11
    losses = z - (target * logits).sum(-1) + 0.01 * z**2
    slope = (np.exp(logits - z[..., None]) * (1 + 0.02 * z[..., None]) - target) * c[..., None]
    value, (to_hidden, to_weight) = value_and_grad(linear_cross_entropy, hidden, weight, labels, weights, 0.1, 0.01, 6)
    np.testing.assert_allclose(value, (losses * c).sum(), rtol=1e-6)
    close(to_hidden, slope @ w, 2e-6)
    close(to_weight, np.einsum("btv,btd->vd", slope, h), 2e-6)


def test_each_token_equals_optax():
    hidden, weight, labels, _ = draw()
    expected = optax.softmax_cross_entropy_with_integer_labels(jnp.einsum("btD,VD->btV", hidden, weight), labels)
    np.testing.assert_allclose(token_losses(hidden, weight, labels, chunk=6), expected, rtol=1e-5, atol=1e-6)


def test_value_without_gradient_is_the_same():
    arrays = draw()
    expected = linear_cross_entropy_reference(*arrays, 0.1, 0.01)
    np.testing.assert_allclose(linear_cross_entropy(*arrays, 0.1, 0.01, 9), expected, rtol=1e-6)


def test_without_weight_nothing_counts():
    hidden, weight, labels, _ = draw()
    value, gradients = value_and_grad(linear_cross_entropy, hidden, weight, labels, jnp.zeros((3, 7)), 0.1, 0.1, 6)
    assert value == 0 and not any(np.any(g) for g in gradients)


def test_tokens_without_weight_do_not_matter():
    hidden, weight, labels, weights = draw()
    moved = jnp.where(weights[..., None] == 0, 100 * hidden, hidden)
    (value, gradients), (again, others) = (
        value_and_grad(linear_cross_entropy, x, weight, labels, weights, 0.1, 0.0, 6) for x in (hidden, moved)
    )
    assert value == again
    np.testing.assert_array_equal(gradients[1], others[1])
    assert not np.asarray(gradients[0])[np.asarray(weights) == 0].any()


def test_bf16_states():
    arrays = draw(4, 16, 32, 64, jnp.bfloat16)
    value, gradients = value_and_grad(linear_cross_entropy, *arrays, 0.1, 1e-3, 24)
    exact, slopes = value_and_grad(linear_cross_entropy, arrays[0].astype(jnp.float32), *arrays[1:], 0.1, 1e-3, 24)
    assert value.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(value, exact, rtol=5e-3)
    for got, slope in zip(gradients, slopes, strict=True):
        error = np.linalg.norm(np.asarray(got, np.float32) - slope) / np.linalg.norm(slope)
        assert error < 2e-2


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-3)])
def test_logits_far_above_the_labels_are_no_trouble(smoothing, z_loss):
    hidden, weight, labels, weights = draw()
    hidden = hidden.at[0].multiply(60.0)  # of a few tokens only: exp(logit - label's logit) is past fp32 there
    logits = np.einsum("btD,VD->btV", hidden, weight)
    above = logits.max(-1) - np.take_along_axis(logits, np.asarray(labels)[..., None], -1)[..., 0]
    assert above[0].max() > 100 > 40 > above[1:].max()
    value, gradients = value_and_grad(linear_cross_entropy, hidden, weight, labels, weights, smoothing, z_loss, 6)
    expected, slopes = value_and_grad(
        linear_cross_entropy_reference, hidden, weight, labels, weights, smoothing, z_loss
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, slope in zip(gradients, slopes, strict=True):
        close(got, slope, 1e-5)
        close(got[1:], slope[1:], 1e-5)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_numbers_that_are_none_end_in_none(broken):
    hidden, *others = draw()
    value, gradients = value_and_grad(linear_cross_entropy, hidden.at[0, 0, 0].set(broken), *others, 0.1, 1e-3, 6)
    assert np.isnan(value) and np.isnan(gradients[1]).any()


def test_a_z_loss_that_cancels_the_slope_of_the_normaliser():
    _, weight, labels, weights = draw()
    hidden, z_loss = jnp.zeros((3, 7, 5)), -0.5 / np.log(11)  # 1 + 2 z_loss log 11 = 0, up to rounding
    value, gradients = value_and_grad(linear_cross_entropy, hidden, weight, labels, weights, 0.1, z_loss, 6)
    expected, slopes = value_and_grad(linear_cross_entropy_reference, hidden, weight, labels, weights, 0.1, z_loss)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, slope in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(got, slope, atol=1e-5)


@pytest.mark.parametrize("reference", ["label", "highest", "normaliser"])
def test_whatever_is_subtracted_from_logits_gives_the_same(reference, monkeypatch):
    monkeypatch.setattr(module, "REFERENCE", reference)
    arrays = draw(vocabulary=12)
    value, gradients = value_and_grad(linear_cross_entropy, *arrays, 0.2, 1e-2, 9)
    expected, slopes = value_and_grad(linear_cross_entropy_reference, *arrays, 0.2, 1e-2)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, slope in zip(gradients, slopes, strict=True):
        close(got, slope, 1e-6)


def test_fp16_states_stay_in_their_range():
    hidden, weight, labels, weights = draw(2, 8, 16, 70_000, jnp.float16)
    hidden = (hidden * 0.001).at[0].multiply(5000)  # sums over the vocabulary are past fp16, and so are some powers
    value, gradients = value_and_grad(linear_cross_entropy, hidden, weight, labels, weights, 0.0, 0.0, 8)
    exact, slopes = value_and_grad(linear_cross_entropy, hidden.astype(jnp.float32), weight, labels, weights, 0.0, 0.0)
    np.testing.assert_allclose(value, exact, rtol=5e-3)
    for got, slope in zip(gradients, slopes, strict=True):
        assert np.linalg.norm(np.asarray(got, np.float32) - slope) < 2e-2 * np.linalg.norm(slope)


def test_scale_of_the_loss_reaches_the_gradients():
    arrays = draw()
    _, once = value_and_grad(linear_cross_entropy, *arrays)
    _, thrice = value_and_grad(lambda *a: 3 * linear_cross_entropy(*a), *arrays)
    for a, b in zip(once, thrice, strict=True):
        np.testing.assert_allclose(3 * a, b, rtol=1e-6)


def sizes(jaxpr):
    """Numbers in every array of a program, those of its loops included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from sizes(getattr(inner, "jaxpr", inner))


def test_no_array_holds_all_logits():
    batch, length, width, vocabulary, chunk = 2, 512, 8, 4096, 64
    arrays = draw(batch, length, width, vocabulary)

    def gradient(loss, *settings):
        return jax.grad(lambda h, w: loss(h, w, *arrays[2:], *settings), argnums=(0, 1))

    every = batch * length * vocabulary
    lean, full = gradient(linear_cross_entropy, 0.0, 0.0, chunk), gradient(linear_cross_entropy_reference)
    assert max(sizes(jax.make_jaxpr(full)(*arrays[:2]).jaxpr)) == every
    assert max(sizes(jax.make_jaxpr(lean)(*arrays[:2]).jaxpr)) == chunk * vocabulary
    memory = [jax.jit(f).lower(*arrays[:2]).compile().memory_analysis().temp_size_in_bytes for f in (lean, full)]
    assert memory[0] < 8 * 4 * chunk * vocabulary < 4 * every <= memory[1]
    scored = lambda h, w: token_losses(h, w, arrays[2], chunk=chunk)  # noqa: E731
    assert max(sizes(jax.make_jaxpr(scored)(*arrays[:2]).jaxpr)) == chunk * vocabulary


@pytest.mark.parametrize(
    ("batch", "length", "platform", "parts"), [(4, 8192, "gpu", 16), (4, 8192, "cpu", 32), (1, 3073, "gpu", 2)]
)
def test_chunks_are_as_equal_as_can_be(monkeypatch, batch, length, platform, parts):
    monkeypatch.setattr(module, "target", lambda: types.SimpleNamespace(platform=platform))
    count, _, step = jax.eval_shape(lambda x: module._chunks(x, None), jnp.zeros((batch, length))).shape
    assert count == parts and 0 <= count * step - length < count


@pytest.mark.parametrize("scheme", [Scheme("int8", "int8"), Scheme("int8"), Scheme("fp8", "fp8")], ids=str)
def test_a_ruled_head_multiplies_rounded_numbers_and_passes_gradients_straight_through(scheme):
    hidden, weight, labels, weights = draw(width=16)

    def ruled(h, w, labels, weights):
        return linear_cross_entropy(h, Ruled(w, scheme), labels, weights, 0.1, 1e-2, 6)

    def all_at_once(h, w, labels, weights):
        logits = quantized_dot(h, w, scheme)
        losses = cross_entropy(logits, labels, smoothing=0.1) + 1e-2 * jax.nn.logsumexp(logits, axis=-1) ** 2
        return jnp.sum(losses * weights)

    value, gradients = value_and_grad(ruled, hidden, weight, labels, weights)
    expected, slopes = value_and_grad(all_at_once, hidden, weight, labels, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, slope in zip(gradients, slopes, strict=True):
        close(got, slope, 2e-6)
    scored = token_losses(hidden, Ruled(weight_codes(weight, scheme), scheme), labels, 0.1, 1e-2)
    np.testing.assert_allclose(jnp.sum(scored * weights), value, rtol=1e-6)
