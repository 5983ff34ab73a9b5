"""Linear layer and cross-entropy in one, in chunks of tokens: the logits of a large vocabulary are never held whole.

A chunk's gradient is formed while its logits are there (Wijmans et al. 2025, "Cut your losses in large-vocabulary
language models", without their sparsity): the backward pass only scales it. Chunks run along the time axis, so that a
batch that is spread over devices stays spread. Where the vocabulary is divided over devices too, each forms the logits
of its part, and they exchange a maximum and sums a token (Shoeybi et al. 2019, section 3).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from r1jax.ops.axes import Placement, axes_of, gather_dimensions, placement, spread
from r1jax.ops.losses import cross_entropy
from r1jax.ops.quantize import Quantized, block_of, dequantize, quantize
from r1jax.ops.quantized_dot import Ruled, Scheme, multiply, weight_codes
from r1jax.ops.self_test import target

HEAD = ("lm_head", "weight")
"""End of the weight's path in the parameter tree, which says where it is kept."""
CHUNK, CHUNK_ON_GPU = 1024, 2048
"""Tokens whose logits are held at once, at most; with more, the weight's gradient is read and written less often."""


class Part(NamedTuple):
    """The part of the vocabulary whose logits a device forms."""

    vocabulary: int
    """Tokens in all."""
    axes: tuple[str, ...] = ()
    """Mesh axes along which it is divided; none on one device."""

    def first(self, size: int) -> Int[Array, ""] | int:
        """First token of a part of so many."""
        return jax.lax.axis_index(self.axes) * size if self.axes else 0

    def sum(self, x: Array) -> Array:
        """Sum over the parts."""
        return jax.lax.psum(x, self.axes) if self.axes else x


class Lies(NamedTuple):
    """Where on a mesh the arguments are."""

    states: PartitionSpec
    tokens: PartitionSpec
    weight: PartitionSpec
    apart: tuple[tuple[str, ...], ...]
    """Mesh axes over which each dimension of the weight is gathered."""
    part: Part

    @staticmethod
    def on(where: Placement, hidden: Array, weight: Array | Ruled) -> "Lies":
        """The places on a mesh."""
        names = ("vocabulary", None)
        kept, apart = where.kept(weight.shape, names, HEAD)
        part = Part(weight.shape[0], axes_of(where.spec(names, weight.shape)[0]))
        tokens = where.spec(("batch", "length"), hidden.shape[:2])
        return Lies(PartitionSpec(*tokens, None), tokens, kept, apart, part)

    def sum_over_tokens(self, x: Array) -> Array:
        """Sum over the devices that have different tokens."""
        axes = tuple(axis for dimension in self.tokens for axis in axes_of(dimension))
        return jax.lax.psum(x, axes) if axes else x

    def sum_where_kept(self, to_weight: Array) -> Array:
        """The same for a gradient of the weight, of which each device keeps its part."""
        over = tuple(axis for dimension in self.tokens for axis in axes_of(dimension))
        apart = tuple(axis for axes in self.apart for axis in axes)
        for dimension, axes in enumerate(self.apart):
            if axes:
                to_weight = jax.lax.psum_scatter(to_weight, axes, scatter_dimension=dimension, tiled=True)
        for axis in apart:
            to_weight = to_weight if axis in over else to_weight / jax.lax.axis_size(axis)  # they had the same tokens
        rest = tuple(axis for axis in over if axis not in apart)
        return jax.lax.psum(to_weight, rest) if rest else to_weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"] | Ruled,
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """Weighted sum over tokens of the cross-entropy of softmax(hidden weight^T), in nats and fp32.

    Args:
      hidden: States, fp32 or bf16; products are formed in this type and summed in fp32.
      weight: Language head, [out, in]; where it is ruled, logits are products of rounded numbers, and the gradients
        those of what these stand for, straight through. Stored codes are not trained and take no gradient.
      labels: Tokens to predict; where the weight is 0, any valid index.
      weights: Of each token, not negative; no gradient flows to them. About 1 at most in fp16, whose gradients are
        formed with these weights: a mean is a sum that is divided afterwards.
      smoothing: Label smoothing, as in `cross_entropy`.
      z_loss: Factor of the squared log normaliser (Chowdhery et al. 2022, section 5).
      chunk: Tokens whose logits are held at once, at most, in whole time steps of the batch; None leaves it to the
        device.

    Returns:
      Scalar.
    """
    return jnp.sum(token_losses(hidden, weight, labels, smoothing, z_loss, chunk) * weights)


def token_losses(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"] | Ruled,
    labels: Int[Array, "B T"],
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """The losses that `linear_cross_entropy` sums; meant for scoring, its gradient would hold every logit."""

    def local(hidden: Array, weight: Array | Quantized, labels: Array, part: Part) -> Array:
        def one(_: None, chunk: tuple[Array, Array]) -> tuple[None, Array]:
            scores = _scores(chunk[0], weight, part)
            return None, _losses(scores, chunk[1], smoothing, z_loss, part)

        losses = jax.lax.scan(one, None, (_chunks(hidden, chunk), _chunks(labels, chunk)))[1]
        return _whole(losses, hidden.shape[1])

    narrow, scheme, where = *_narrow(weight, hidden.dtype), placement()
    if where is None:
        return local(hidden, _codes(narrow, scheme, hidden.dtype), labels, Part(weight.shape[0]))
    lies = Lies.on(where, hidden, weight)
    run = spread(
        lambda hidden, weight, labels: local(
            hidden, _codes(_gathered(weight, lies.apart), scheme, hidden.dtype), labels, lies.part
        ),
        (lies.states, lies.weight, lies.tokens),
        lies.tokens,
    )
    return run(hidden, narrow, labels)


def _forward(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"] | Ruled,
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: float,
    z_loss: float,
    chunk: int | None,
) -> tuple[Float[Array, ""], tuple[Array, Array | Ruled | None]]:
    (narrow, scheme), where = _narrow(weight, hidden.dtype), placement()
    trained = not isinstance(narrow, Quantized)
    settings = smoothing, z_loss, chunk, trained
    if where is None:
        total, to_hidden, to_weight = _slopes(
            hidden, _codes(narrow, scheme, hidden.dtype), labels, weights, *settings, Part(weight.shape[0])
        )
    else:
        lies = Lies.on(where, hidden, weight)

        def local(hidden: Array, weight: Array, labels: Array, weights: Array) -> tuple[Array, Array, Array]:
            weight = _codes(_gathered(weight, lies.apart), scheme, hidden.dtype)
            total, to_hidden, to_weight = _slopes(hidden, weight, labels, weights, *settings, lies.part)
            to_weight = lies.sum_where_kept(to_weight) if trained else to_weight
            return lies.sum_over_tokens(total), to_hidden, to_weight

        in_specs, out_specs = (
            (lies.states, lies.weight, lies.tokens, lies.tokens),
            (PartitionSpec(), lies.states, lies.weight if trained else PartitionSpec()),
        )
        total, to_hidden, to_weight = spread(local, in_specs, out_specs)(hidden, narrow, labels, weights)
    if scheme is None:
        return total, (to_hidden, to_weight.astype(weight.dtype))
    if not trained:
        return total, (to_hidden, None)
    return total, (to_hidden, Ruled(to_weight.astype(weight.weight.dtype), scheme))


def _slopes(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "v D"] | Quantized,
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: float,
    z_loss: float,
    chunk: int | None,
    trained: bool,
    part: Part,
) -> tuple[Float[Array, ""], Float[Array, "B T D"], Float[Array, "*v"]]:
    """Loss of the tokens of a device, its gradient by them, and by its part of the vocabulary; 0 if not trained."""
    size, floats = weight.shape[0], dequantize(weight, hidden.dtype) if isinstance(weight, Quantized) else weight

    def one(carry: tuple[Array, Array], tokens: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        total, to_weight = carry
        x, y, w = tokens
        scores = _scores(x, weight, part)
        own = y - part.first(size)
        target = (1 - smoothing) * jax.nn.one_hot(own, size, dtype=jnp.float32) + smoothing / part.vocabulary
        normaliser = scores.highest + scores.log_sum
        slope = jnp.exp(scores.logits - normaliser) * (1 + 2 * z_loss * normaliser) - target
        slope = (slope * w[..., None]).astype(x.dtype)
        to_hidden = part.sum(jnp.einsum("btV,VD->btD", slope, floats, preferred_element_type=jnp.float32))
        if trained:
            seen = dequantize(_rows(x, weight), x.dtype) if isinstance(weight, Quantized) else x
            to_weight = to_weight + jnp.einsum("btV,btD->VD", slope, seen, preferred_element_type=jnp.float32)
        total = total + jnp.sum(_losses(scores, y, smoothing, z_loss, part) * w)
        return (total, to_weight), to_hidden.astype(x.dtype)

    chunks = tuple(_chunks(x, chunk) for x in (hidden, labels, weights))
    start = (jnp.zeros((), jnp.float32), jnp.zeros(weight.shape if trained else (), jnp.float32))
    (total, to_weight), to_hidden = jax.lax.scan(one, start, chunks)
    return total, _whole(to_hidden, hidden.shape[1]), to_weight


def _backward(
    smoothing: float,
    z_loss: float,
    chunk: int | None,
    saved: tuple[Array, Array | Ruled | None],
    scale: Float[Array, ""],
) -> tuple[Array, Array | Ruled | None, None, None]:
    del smoothing, z_loss, chunk
    return (*jax.tree.map(lambda x: (x.astype(jnp.float32) * scale).astype(x.dtype), saved), None, None)


linear_cross_entropy.defvjp(_forward, _backward)


def linear_cross_entropy_reference(
    hidden: Float[Array, "B T D"],
    weight: Float[Array, "V D"] | Ruled,
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, ""]:
    """`linear_cross_entropy` with all logits at once."""
    logits = _logits(hidden, weight.astype(hidden.dtype))
    losses = cross_entropy(logits, labels, smoothing=smoothing) + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(losses * weights)


def _narrow(weight: Array | Ruled, dtype: DTypeLike) -> tuple[Array | Quantized, Scheme | None]:
    """The weight as it travels between devices, and its scheme; one that is to be rounded is not rounded before."""
    return (weight.weight, weight.scheme) if isinstance(weight, Ruled) else (weight.astype(dtype), None)


def _gathered(weight: Array | Quantized, apart: tuple[tuple[str, ...], ...]) -> Array | Quantized:
    """A device's part of the vocabulary, whole in the other dimension."""
    return jax.tree.map(lambda part: gather_dimensions(part, apart), weight)


def _codes(weight: Array | Quantized, scheme: Scheme | None, dtype: DTypeLike) -> Array | Quantized:
    """The weight as it is multiplied: codes where states are rounded too, otherwise floats."""
    if scheme is None:
        return weight
    codes = weight_codes(weight, scheme)
    return codes if scheme.activations else dequantize(codes, dtype)


def _rows(x: Float[Array, "b t D"], weight: Quantized) -> Quantized:
    """States in the numbers that meet the weight's codes."""
    kind = "fp8" if weight.values.dtype == jnp.float8_e4m3fn else "int8"
    return quantize(x, kind, block=block_of(weight))


def _logits(x: Float[Array, "b t D"], weight: Float[Array, "V D"] | Quantized) -> Float[Array, "b t V"]:
    if isinstance(weight, Quantized):
        return multiply(_rows(x, weight), weight)
    return jnp.einsum("btD,VD->btV", x, weight, preferred_element_type=jnp.float32)


class Scores(NamedTuple):
    """Logits of a part of the vocabulary beside what is known of all of it."""

    logits: Float[Array, "b t v"]
    highest: Float[Array, "b t 1"]
    """Largest logit of the whole vocabulary."""
    log_sum: Float[Array, "b t 1"]
    """Logarithm of the sum of exp(logit - highest) over the whole vocabulary."""


def _scores(x: Float[Array, "b t D"], weight: Float[Array, "v D"] | Quantized, part: Part) -> Scores:
    logits = _logits(x, weight)
    highest = jnp.max(jax.lax.stop_gradient(logits), axis=-1, keepdims=True)
    highest = jax.lax.pmax(highest, part.axes) if part.axes else highest
    total = part.sum(jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True))
    return Scores(logits, highest, jnp.log(total))


def _losses(
    scores: Scores, labels: Int[Array, "b t"], smoothing: float, z_loss: float, part: Part
) -> Float[Array, "b t"]:
    size = scores.logits.shape[-1]
    own = labels - part.first(size)
    inside = (own >= 0) & (own < size)
    found = jnp.take_along_axis(scores.logits, jnp.where(inside, own, 0)[..., None], axis=-1) - scores.highest
    hit = part.sum(jnp.where(inside, found[..., 0], 0.0))
    losses = scores.log_sum[..., 0] - (1 - smoothing) * hit
    if smoothing:
        losses = losses - smoothing / part.vocabulary * part.sum(jnp.sum(scores.logits - scores.highest, axis=-1))
    return losses + z_loss * (scores.highest + scores.log_sum)[..., 0] ** 2 if z_loss else losses


def _chunks(x: Array, chunk: int | None) -> Array:
    """[B, T, ...] as [chunks, B, t, ...] of as equal a length as can be.

    Zeros fill the last chunk, fewer than there are chunks; zero is the weight of what they add.
    """
    batch, length, *rest = x.shape
    chunk = chunk or (CHUNK_ON_GPU if target().platform == "gpu" else CHUNK)
    count = -(-length // max(1, chunk // batch))
    step = -(-length // count)
    x = jnp.pad(x, [(0, 0), (0, count * step - length), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(x.reshape(batch, count, step, *rest), 1, 0)


def _whole(x: Array, length: int) -> Array:
    """Undoes `_chunks`."""
    count, batch, step, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(batch, count * step, *rest)[:, :length]
