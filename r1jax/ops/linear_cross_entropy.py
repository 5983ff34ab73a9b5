"""Linear layer and cross-entropy in one, in chunks of tokens: the logits of a large vocabulary are never held whole.

A chunk's gradient is formed while its logits are there (Wijmans et al. 2025, "Cut your losses in large-vocabulary
language models", without their sparsity): the backward pass only scales it. Chunks run along the time axis, so that a
batch that is spread over devices stays spread.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from r1jax.ops.losses import cross_entropy
from r1jax.ops.self_test import target

CHUNK, CHUNK_ON_GPU = 1024, 2048
"""Tokens whose logits are held at once; with more, the weight's gradient is read and written less often."""
HIGHEST = 1e30
"""Sum of exponentials above which they are formed anew, lest products with them overflow."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """Weighted sum over tokens of the cross-entropy of softmax(hidden weight^T), in nats and fp32.

    Args:
      hidden: States, fp32 or bf16; products are formed in this type and summed in fp32.
      weight: Language head, [out, in].
      labels: Tokens to predict; where the weight is 0, any valid index.
      weights: Of each token, not negative; no gradient flows to them. About 1 at most in fp16, whose gradients are
        formed with these weights: a mean is a sum that is divided afterwards.
      smoothing: Label smoothing, as in `cross_entropy`.
      z_loss: Factor of the squared log normaliser (Chowdhery et al. 2022, section 5).
      chunk: Tokens whose logits are held at once, rounded to whole time steps of the batch; None leaves it to the
        device.

    Returns:
      Scalar.
    """
    return jnp.sum(token_losses(hidden, weight, labels, smoothing, z_loss, chunk) * weights)


def token_losses(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """The losses that `linear_cross_entropy` sums; meant for scoring, its gradient would hold every logit."""
    weight = weight.astype(hidden.dtype)

    def one(_: None, part: tuple[Array, Array]) -> tuple[None, Array]:
        return None, _losses(_logits(part[0], weight), part[1], smoothing, z_loss)[0]

    losses = jax.lax.scan(one, None, (_chunks(hidden, chunk), _chunks(labels, chunk)))[1]
    return _whole(losses, hidden.shape[1])


def _forward(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: float,
    z_loss: float,
    chunk: int | None,
) -> tuple[Float[Array, ""], tuple[Array, Array]]:
    way = _forward_relative if _on_gpu() and hidden.dtype == jnp.bfloat16 else _forward_normalised
    return way(hidden, weight, labels, weights, smoothing, z_loss, chunk)


def _forward_normalised(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: float,
    z_loss: float,
    chunk: int | None,
) -> tuple[Float[Array, ""], tuple[Array, Array]]:
    """Slopes from probabilities, for every device and type."""
    narrow = weight.astype(hidden.dtype)

    def one(carry: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        total, to_weight = carry
        x, y, w = part
        logits = _logits(x, narrow)
        losses, normaliser = _losses(logits, y, smoothing, z_loss)
        target = (1 - smoothing) * jax.nn.one_hot(y, logits.shape[-1]) + smoothing / logits.shape[-1]
        slope = jnp.exp(logits - normaliser[..., None]) * (1 + 2 * z_loss * normaliser)[..., None] - target
        slope = (slope * w[..., None]).astype(x.dtype)
        to_hidden = jnp.einsum("btV,VD->btD", slope, narrow, preferred_element_type=jnp.float32)
        to_weight = to_weight + jnp.einsum("btV,btD->VD", slope, x, preferred_element_type=jnp.float32)
        total = total + jnp.sum(losses * w)
        return (total, to_weight), to_hidden.astype(x.dtype)

    parts = tuple(_chunks(x, chunk) for x in (hidden, labels, weights))
    start = (jnp.zeros((), jnp.float32), jnp.zeros(weight.shape, jnp.float32))
    (total, to_weight), to_hidden = jax.lax.scan(one, start, parts)
    return total, (_whole(to_hidden, hidden.shape[1]), to_weight.astype(weight.dtype))


def _forward_relative(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: float,
    z_loss: float,
    chunk: int | None,
) -> tuple[Float[Array, ""], tuple[Array, Array]]:
    """The same for a GPU and bf16, where logits take longer to read than to compute with: they are read once.

    Exponentials are taken relative to the label's, so that the normaliser need not be known before; it multiplies what
    is narrow, after the product to the hidden states and before that to the weight. What smoothing takes from every
    class alike is of rank one and left out of the large array.
    """
    narrow, even = weight.astype(hidden.dtype), smoothing / weight.shape[0]
    everywhere = even * jnp.sum(narrow, axis=0, dtype=jnp.float32)

    def one(carry: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        total, to_weight = carry
        x, y, w = part
        relative, losses, factor = _relative_slopes(_logits(x, narrow), y, smoothing, z_loss, x.dtype)
        scaled = (x.astype(jnp.float32) * (factor * w)[..., None]).astype(x.dtype)
        to_weight = to_weight + jnp.einsum("btV,btD->VD", relative, scaled, preferred_element_type=jnp.float32)
        to_hidden = jnp.einsum("btV,VD->btD", relative, narrow, preferred_element_type=jnp.float32)
        to_hidden = (to_hidden * factor[..., None] - everywhere[None, None]) * w[..., None]
        return (total + jnp.sum(losses * w), to_weight), to_hidden.astype(x.dtype)

    parts = tuple(_chunks(x, chunk) for x in (hidden, labels, weights))
    pulled = jnp.einsum("btD,bt->D", hidden, (-even * weights).astype(hidden.dtype), preferred_element_type=jnp.float32)
    start = (jnp.zeros((), jnp.float32), jnp.broadcast_to(pulled[None], weight.shape))
    (total, to_weight), to_hidden = jax.lax.scan(one, start, parts)
    return total, (_whole(to_hidden, hidden.shape[1]), to_weight.astype(weight.dtype))


def _relative_slopes(
    logits: Float[Array, "B t V"], labels: Int[Array, "B t"], smoothing: float, z_loss: float, dtype: DTypeLike
) -> tuple[Float[Array, "B t V"], Float[Array, "B t"], Float[Array, "B t"]]:
    """Slopes of the losses by the logits but for a factor of each token and what smoothing takes from every class.

    Returns:
      slopes in `dtype` (with fp32's range), losses, factors.
    """

    def exponentials(reference: Float[Array, "B t"]) -> tuple[Array, Array, Array]:
        found = jnp.exp(logits - reference[..., None])
        return found.astype(dtype), jnp.sum(found, axis=-1), reference

    def overflows(found: tuple[Array, Array, Array]) -> Array:
        return jnp.any(found[1] >= HIGHEST)  # of NaN, this is false

    right = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    # A loop that ends before its first turn costs nothing, while a condition would copy what is kept.
    again = lambda _: exponentials(jnp.max(logits, axis=-1))  # noqa: E731
    found, total, reference = jax.lax.while_loop(overflows, again, exponentials(right))
    normaliser = reference + jnp.log(total)
    rise = 1 + 2 * z_loss * normaliser
    losses = normaliser - (1 - smoothing) * right + z_loss * normaliser**2
    if smoothing:
        losses = losses - smoothing * jnp.mean(logits, axis=-1)
    own = jnp.exp(right - reference) - (1 - smoothing) * total / rise  # rounded after the difference is taken
    row, time = (jnp.arange(n) for n in labels.shape)
    found = found.at[row[:, None], time[None], labels].set(own.astype(dtype), unique_indices=True)
    return found, losses, rise / total


def _backward(
    smoothing: float, z_loss: float, chunk: int | None, saved: tuple[Array, Array], scale: Float[Array, ""]
) -> tuple[Array, Array, None, None]:
    del smoothing, z_loss, chunk
    return (*((x.astype(jnp.float32) * scale).astype(x.dtype) for x in saved), None, None)


linear_cross_entropy.defvjp(_forward, _backward)


def linear_cross_entropy_reference(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """`linear_cross_entropy` with all logits at once."""
    logits = _logits(hidden, weight.astype(hidden.dtype))
    losses = cross_entropy(logits, labels, smoothing=smoothing) + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(losses * weights)


def _logits(x: Float[Array, "B t D"], weight: Float[Array, "V D"]) -> Float[Array, "B t V"]:
    return jnp.einsum("btD,VD->btV", x, weight, preferred_element_type=jnp.float32)


def _losses(
    logits: Float[Array, "B t V"], labels: Int[Array, "B t"], smoothing: float, z_loss: float
) -> tuple[Float[Array, "B t"], Float[Array, "B t"]]:
    """Losses of tokens and their log normalisers; log-probabilities are not written."""
    normaliser = _normaliser_in_one_pass(logits) if _on_gpu() else jax.nn.logsumexp(logits, axis=-1)
    losses = normaliser - (1 - smoothing) * jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    if smoothing:
        losses = losses - smoothing * jnp.mean(logits, axis=-1)
    return losses + z_loss * normaliser**2, normaliser


def _normaliser_in_one_pass(logits: Float[Array, "B t V"]) -> Float[Array, "B t"]:
    """Normaliser by maximum and sum that are kept together (Milakov & Gimelshein 2018): a GPU takes long to read."""

    def join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        shrink, first = jnp.exp(-jnp.abs(a[0] - b[0])), a[0] >= b[0]
        return jnp.maximum(a[0], b[0]), jnp.where(first, a[1] + b[1] * shrink, a[1] * shrink + b[1])

    lowest, none = jnp.finfo(jnp.float32).min, jnp.float32(0)
    start = (jnp.float32(lowest), none)
    highest, total = jax.lax.reduce((logits, jnp.ones_like(logits)), start, join, (2,))
    return highest + jnp.log(total)


def _on_gpu() -> bool:
    return target().platform == "gpu"


def _chunks(x: Array, chunk: int | None) -> Array:
    """[B, T, ...] as [chunks, B, t, ...]; zeros fill the last one, and zero is the weight of what they add."""
    batch, length, *rest = x.shape
    chunk = chunk or (CHUNK_ON_GPU if _on_gpu() else CHUNK)
    step = min(max(1, chunk // batch), length)
    count = -(-length // step)
    x = jnp.pad(x, [(0, 0), (0, count * step - length), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(x.reshape(batch, count, step, *rest), 1, 0)


def _whole(x: Array, length: int) -> Array:
    """Undoes `_chunks`."""
    count, batch, step, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(batch, count * step, *rest)[:, :length]
