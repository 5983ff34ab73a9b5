"""Losses against closed forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops.linear_cross_entropy import linear_cross_entropy
from r1jax.ops.losses import binary_cross_entropy, cross_entropy, huber, weighted_mean


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_equals_closed_form(smoothing):
    rng = np.random.default_rng(0)
    logits = (5 * rng.standard_normal((4, 3, 7))).astype(np.float32)
    labels = rng.integers(0, 7, (4, 3)).astype(np.int32)
    target = (1 - smoothing) * np.eye(7)[labels] + smoothing / 7
    log_probs = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    loss, gradient = jax.value_and_grad(lambda x: cross_entropy(x, jnp.asarray(labels), smoothing=smoothing).sum())(
        jnp.asarray(logits)
    )
    each = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing=smoothing)
    np.testing.assert_allclose(each, -(target * log_probs).sum(-1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(loss, -(target * log_probs).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.exp(log_probs) - target, rtol=0, atol=1e-6)


def test_each_case_can_be_smoothed_by_its_own_share():
    logits, labels = jnp.asarray([[0.3, -1.2, 2.0], [2.0, 0.5, -1.0]]), jnp.asarray([1, 0])
    each = cross_entropy(logits, labels, smoothing=jnp.asarray([0.0, 0.3]))
    for row, smoothing in enumerate((0.0, 0.3)):
        np.testing.assert_allclose(each[row], cross_entropy(logits, labels, smoothing=smoothing)[row], rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_equals_closed_form(smoothing):
    logits = np.array([-30.0, -3.0, -0.1, 0.0, 0.4, 5.0, 30.0], np.float32)
    for label in (0.0, 1.0):
        target = (1 - smoothing) * label + smoothing / 2
        p = 1 / (1 + np.exp(-logits.astype(np.float64)))
        q = 1 / (1 + np.exp(logits.astype(np.float64)))  # 1 - p without cancellation
        labels = jnp.full(logits.shape, label)
        loss = binary_cross_entropy(jnp.asarray(logits), labels, smoothing=smoothing)
        np.testing.assert_allclose(loss, -target * np.log(p) - (1 - target) * np.log(q), rtol=1e-6, atol=1e-6)
        gradient = jax.grad(lambda x, y=labels: binary_cross_entropy(x, y, smoothing=smoothing).sum())
        np.testing.assert_allclose(gradient(jnp.asarray(logits)), p - target, rtol=0, atol=1e-6)


def test_smoothed_losses_agree_on_two_classes():
    logits = jnp.asarray([[0.3, -1.2], [2.0, 0.5]])
    labels = jnp.asarray([1, 0])
    two = cross_entropy(logits, labels, smoothing=0.2)
    one = binary_cross_entropy(logits[:, 1] - logits[:, 0], labels.astype(jnp.float32), smoothing=0.2)
    np.testing.assert_allclose(two, one, rtol=1e-6)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite(size):
    logits = jnp.asarray([[size, 0.0, -size]])
    for loss in (
        lambda x: cross_entropy(x, jnp.asarray([1]), smoothing=0.1).sum(),
        lambda x: binary_cross_entropy(x, jnp.ones((1, 3)), smoothing=0.1).sum(),
    ):
        value, gradient = jax.value_and_grad(loss)(logits)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bf16_logits_are_widened():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((5, 9)), jnp.bfloat16)
    labels = jnp.arange(5)
    loss = cross_entropy(logits, labels)
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, cross_entropy(logits.astype(jnp.float32), labels))
    assert binary_cross_entropy(logits[:, 0], jnp.ones(5)).dtype == jnp.float32


def test_huber():
    error = jnp.asarray([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0])
    np.testing.assert_allclose(huber(error), [2.5, 0.5, 0.125, 0, 0.03125, 0.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(huber(error, 2.0), [4.0, 0.5, 0.125, 0, 0.03125, 0.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(huber))(error), np.clip(error, -1, 1), rtol=1e-6)


def test_weighted_mean():
    values = jnp.asarray([1.0, 2.0, 6.0])
    assert weighted_mean(values, jnp.asarray([1.0, 1.0, 0.0])) == 1.5
    assert weighted_mean(values, jnp.ones(3)) == 3.0
    value, gradient = jax.value_and_grad(weighted_mean)(values, jnp.zeros(3))
    assert value == 0 and not np.any(gradient)


def test_smoothing_and_z_loss_are_exact():
    """Means over thousands of tokens, against float64: smoothing of both tasks, and z-loss, to 1e-7."""
    rng = np.random.default_rng(0)
    count, size, smoothing, z_loss = 4096, 50, 0.1, 1e-2
    hidden, head = (rng.standard_normal(n).astype(np.float32) for n in ((1, count, 16), (size, 16)))
    labels = rng.integers(0, size, (1, count)).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(jnp.einsum("btD,VD->btV", hidden, head))  # what the loss is given
        got = (
            linear_cross_entropy(
                *map(jnp.asarray, (hidden, head, labels)), jnp.ones((1, count)), smoothing, z_loss, count
            )
            / count
        )
    z = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    target = (1 - smoothing) * np.eye(size)[labels] + smoothing / size
    expected = (z - (target * logits).sum(-1) + z_loss * z**2).mean()
    np.testing.assert_allclose(got, expected, rtol=1e-7)

    known = rng.integers(0, 2, count).astype(np.float32)
    raw = logits[0, :, 0]
    smooth = (1 - smoothing) * known.astype(np.float64) + smoothing / 2
    binary = (np.log1p(np.exp(raw.astype(np.float64))) - smooth * raw).mean()
    np.testing.assert_allclose(
        jnp.mean(binary_cross_entropy(jnp.asarray(raw), jnp.asarray(known), smoothing=smoothing)), binary, rtol=1e-7
    )
    rating = (z - (target * logits).sum(-1)).mean()
    np.testing.assert_allclose(
        jnp.mean(cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing=smoothing)), rating, rtol=1e-7
    )
