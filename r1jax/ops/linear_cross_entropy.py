"""Linear layer and cross-entropy in one, in chunks of tokens: the logits of a large vocabulary are never held whole.

A chunk's gradient is formed while its logits are there (Wijmans et al. 2025, "Cut your losses in large-vocabulary
language models", without their sparsity): the backward pass only scales it. Chunks run along the time axis, so that a
batch that is spread over devices stays spread. Where the vocabulary is divided over devices too, each forms the logits
of its part, and they exchange a maximum and sums a token (Shoeybi et al. 2019, section 3).

Logits are read once: exp(logit - reference) is summed and written in the states' type in one pass. The products take it
as it is, and what turns it into a gradient is of a token and lies outside them: a factor, another number at its label,
and the same share of label smoothing for every word. The reference is the label's own logit, which is known before the
pass; a token with far larger logits than that is done again from the largest.
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
LARGE = 2.0**60
"""Sum of exp(logit - label's logit) above which a token is done again: all products with it are far from overflow."""


REFERENCE: str | None = None
"""What is subtracted from a token's logits: of its label, the highest, or the normaliser; None where to choose."""


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
            logits = _logits(chunk[0], weight)
            highest = _highest(logits, part)
            mean = part.sum(jnp.sum(logits, axis=-1)) / part.vocabulary if smoothing else 0.0
            powers = _powers_from(logits, highest, part, jnp.float32)
            return None, _losses(powers, _own(logits, chunk[1], part)[1], mean, smoothing, z_loss)

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
    floats = dequantize(weight, hidden.dtype) if isinstance(weight, Quantized) else weight

    def seen(x: Array) -> Array:
        return dequantize(_rows(x, weight), x.dtype) if isinstance(weight, Quantized) else x

    share = smoothing / part.vocabulary  # of the smoothed target, every word's
    words = jnp.sum(floats, axis=0, dtype=jnp.float32)[None, None] if smoothing else 0.0

    def one(carry: tuple[Array, Array], tokens: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        total, to_weight = carry
        x, y, w = tokens
        logits = _logits(x, weight)
        own, hit = _own(logits, y, part)
        powers = _powers(logits, hit, part, x.dtype)
        mean = part.sum(jnp.sum(seen(x).astype(jnp.float32) * words, axis=-1)) / part.vocabulary if smoothing else 0.0
        total = total + jnp.sum(_losses(powers, hit, mean, smoothing, z_loss) * w)
        steep = 1 + 2 * z_loss * (powers.reference + jnp.log(powers.total))
        steep = jnp.where(jnp.abs(steep) < 1e-6, 1e-6, steep) if z_loss else steep  # a divisor
        at_label = jnp.exp(hit - powers.reference) - (1 - smoothing) * powers.total / steep
        slope = _put(powers.terms, own, at_label)
        factor = (w * steep / powers.total)[..., None]
        to_hidden = jnp.einsum("btV,VD->btD", slope, floats, preferred_element_type=jnp.float32) * factor
        to_hidden = to_hidden - (share * w)[..., None] * words if smoothing else to_hidden
        if trained:
            scaled = (seen(x).astype(jnp.float32) * factor).astype(x.dtype)
            to_weight = to_weight + jnp.einsum("btV,btD->VD", slope, scaled, preferred_element_type=jnp.float32)
        return (total, to_weight), part.sum(to_hidden).astype(x.dtype)

    chunks = tuple(_chunks(x, chunk) for x in (hidden, labels, weights))
    to_weight = jnp.zeros(weight.shape if trained else (), jnp.float32)
    if trained and smoothing:
        states = jnp.sum(seen(hidden).astype(jnp.float32) * weights[..., None], axis=(0, 1))
        to_weight = to_weight - share * states[None]
    start = (jnp.zeros((), jnp.float32), to_weight)
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


class Powers(NamedTuple):
    """exp(logit - reference) of tokens."""

    terms: Float[Array, "b t v"]
    """Of a part of the vocabulary."""
    reference: Float[Array, "b t"]
    total: Float[Array, "b t"]
    """Sum over the whole vocabulary, of terms that are not rounded."""


def _powers(logits: Float[Array, "b t v"], hit: Float[Array, "b t"], part: Part, dtype: DTypeLike) -> Powers:
    """Powers that nothing overflows with: a label's number and the sum fit too."""
    way = REFERENCE or ("normaliser" if dtype == jnp.float16 else "highest" if part.axes else "label")
    if way == "label":

        def again(found: Powers) -> Powers:
            reference = jnp.where(found.total > LARGE, _highest(logits, part), found.reference)
            return _powers_from(logits, reference, part, dtype)

        first = _powers_from(logits, hit, part, dtype)
        return jax.lax.while_loop(lambda found: jnp.any(found.total > LARGE), again, first)
    reference = _highest(logits, part)
    if way == "normaliser":  # as numbers of fp16 ask: no term is above 1, and the sum is 1
        reference = reference + jnp.log(_powers_from(logits, reference, part, jnp.float32).total)
    return _powers_from(logits, reference, part, dtype)


def _powers_from(logits: Float[Array, "b t v"], reference: Float[Array, "b t"], part: Part, dtype: DTypeLike) -> Powers:
    terms = jnp.exp(logits - reference[..., None])
    return Powers(terms.astype(dtype), reference, part.sum(jnp.sum(terms, axis=-1)))


def _highest(logits: Float[Array, "b t v"], part: Part) -> Float[Array, "b t"]:
    """Largest logit of the whole vocabulary."""
    highest = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    return jax.lax.pmax(highest, part.axes) if part.axes else highest


def _own(
    logits: Float[Array, "b t v"], labels: Int[Array, "b t"], part: Part
) -> tuple[Int[Array, "b t"], Float[Array, "b t"]]:
    """Where the labels are in this part of the vocabulary, past its end where they are not; and their logits."""
    size = logits.shape[-1]
    own = labels - part.first(size)
    inside = (own >= 0) & (own < size)
    found = jnp.take_along_axis(logits, jnp.where(inside, own, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(inside, own, size), part.sum(jnp.where(inside, found, 0.0))


def _put(terms: Float[Array, "b t v"], own: Int[Array, "b t"], numbers: Float[Array, "b t"]) -> Float[Array, "b t v"]:
    """Terms with other numbers at the labels; in place, and no two in one place, so that the order is none."""
    batch, time = (jnp.arange(n) for n in own.shape)
    place = terms.at[batch[:, None], time[None], own]
    return place.set(numbers.astype(terms.dtype), mode="drop", unique_indices=True, indices_are_sorted=True)


def _losses(
    powers: Powers, hit: Float[Array, "b t"], mean: Float[Array, "b t"] | float, smoothing: float, z_loss: float
) -> Float[Array, "b t"]:
    """Of tokens, given the logits of their labels and the mean of all of theirs."""
    log_sum = jnp.log(powers.total)
    losses = log_sum - (1 - smoothing) * (hit - powers.reference)
    losses = losses - smoothing * (mean - powers.reference) if smoothing else losses
    return losses + z_loss * (powers.reference + log_sum) ** 2 if z_loss else losses


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
