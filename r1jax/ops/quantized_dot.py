"""Products of quantized numbers: int8 x int8 summed in int32, or fp8 x fp8 in fp32, and straight-through gradients.

What trains is what serves: the forward pass is the same function whether the codes of a weight were stored or are made
from it anew. Backward, rounding counts as the identity (Bengio et al. 2013): gradients are those of the product of what
the codes stand for. Both operands contract along their last axis, which a GPU multiplies half as fast again.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from r1jax.ops.hashed_bits import hashed_bits
from r1jax.ops.quantize import BOUND, TYPE, Kind, Quantized, block_length, block_of, dequantize, magnitudes, quantize
from r1jax.ops.self_test import agrees, target
from r1jax.ops.weight_only import weight_only_dot

LONGEST = 2**17
"""Products of int8 that are summed in one int32: 127^2 times as many stay below 2^31."""
TRIED = (1088, 3904)
"""Rows and columns of the product by which a kernel is tried: its last tiles overhang, and there are more of them than
an H100 has multiprocessors, so that some form two."""


class Scheme(NamedTuple):
    """In what a product's operands are rounded."""

    weights: Kind
    activations: Literal["int8", "fp8"] | None = None
    """None multiplies floats with what the weight's codes stand for."""
    gradients: Literal["int8"] | None = None
    """Whether the backward pass multiplies int8 too, its gradients rounded stochastically."""
    block: int | None = None
    """Numbers of a row that share a scale; None is the whole row."""
    running: bool = False
    """Whether the module of the weight keeps one range of all inputs, as training has seen them."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "key"], meta_fields=["scheme"])
@dataclass(frozen=True)
class Ruled:
    """A weight that is multiplied elsewhere, and the scheme of that product."""

    weight: Any
    """Floats or codes."""
    scheme: Scheme
    key: Any = None
    """Of the stochastic rounding of its gradients."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.weight.shape


class Gated(NamedTuple):
    """Both factors of SwiGLU's inner half, silu(gate) * up, in place of it."""

    gate: Float[Array, "*B I"]
    up: Float[Array, "*B I"]

    def product(self) -> Float[Array, "*B I"]:
        """What they stand for."""
        return jax.nn.silu(self.gate) * self.up


def weight_codes(weight: Float[Array, "*E O I"] | Quantized, scheme: Scheme) -> Quantized:
    """The codes of a weight, with scales as they are stored; those that are stored are taken as they are."""
    if isinstance(weight, Quantized):
        return weight
    return quantize(jax.lax.stop_gradient(weight), scheme.weights, block=scheme.block, scale_dtype=jnp.bfloat16)


def input_codes(x: Float[Array, "*B I"], kind: Literal["int8", "fp8"], weight: Quantized) -> Quantized:
    """Inputs in the numbers that meet a weight's codes.

    Args:
      x: Rows.
      kind: What they become.
      weight: Its blocks, balance and span count; without a span each row has a scale of its own.

    Returns:
      Codes.
    """
    if weight.balance is not None:
        # By powers of two, so that nothing is lost in floats.
        x = x.astype(jnp.float32) / jnp.broadcast_to(weight.balance[0].astype(jnp.float32), x.shape)
    return quantize(x, kind, block=block_of(weight), span=weight.span)


def rounded(weight: Float[Array, "*O I"] | Quantized, scheme: Scheme, dtype: DTypeLike) -> Float[Array, "*O I"]:
    """What the codes of a weight stand for; its gradient goes straight through.

    Args:
      weight: Floats, or codes.
      scheme: How floats are rounded.
      dtype: Of the result.

    Returns:
      Floats.
    """
    if isinstance(weight, Quantized):
        return dequantize(weight, dtype)
    return straight_through(weight, weight_codes(weight, scheme)).astype(dtype)


@jax.custom_vjp
def straight_through(x: Float[Array, "*shape"], codes: Quantized) -> Float[Array, "*shape"]:
    """What codes stand for, as if x had not been rounded to them."""
    return dequantize(codes, x.dtype)


straight_through.defvjp(lambda x, codes: (dequantize(codes, x.dtype), None), lambda _, gradient: (gradient, None))


def quantized_dot(
    x: Float[Array, "*B I"],
    weight: Float[Array, "O I"] | Quantized,
    scheme: Scheme,
    *,
    codes: Quantized | None = None,
    key: PRNGKeyArray | None = None,
    gated: Gated | None = None,
) -> Float[Array, "*B O"]:
    """X w^T of rounded numbers.

    Args:
      x: Rows; each is rounded with a scale of its own.
      weight: Floats to be rounded, or codes.
      scheme: How.
      codes: Those of the floats, where they are known already.
      key: Of the stochastic rounding of gradients, if the scheme rounds them.
      gated: What x is the product of, if it is: a kernel may form and round it at once, and x is then not computed.

    Returns:
      Array of x's dtype; its gradients are straight through.
    """
    codes = weight_codes(weight, scheme) if codes is None else codes
    trained = None if isinstance(weight, Quantized) else weight
    if scheme.activations is None:
        return _weight_only(x, trained, codes)
    if codes.values.dtype == jnp.float32:  # a device compares no numbers of six dimensions
        flat = x.reshape(-1, x.shape[-1])
        return _product(_by_compiler, scheme, flat, trained, codes, key).reshape(*x.shape[:-1], -1)
    on_kernel = _on_hopper(x, codes) and _hopper_agrees(scheme.activations)
    if on_kernel and gated is not None and _takes_factors(codes) and _hopper_agrees(scheme.activations, gated=True):
        return _product(_by_kernel, scheme, gated, trained, codes, key)
    return _product(_by_kernel if on_kernel else _by_compiler, scheme, x, trained, codes, key)


def ranged_dot(
    x: Float[Array, "*B I"],
    weight: Float[Array, "O I"],
    scheme: Scheme,
    span: Float[Array, ""],
    *,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "*B O"]:
    """X w^T of rounded numbers, all inputs in one range that is learned from them.

    Args:
      x: Rows; what is beyond the range is clipped.
      weight: Floats to be rounded.
      scheme: How; its activations are rounded.
      span: The range, fp32; of 0, which is none yet, each block has its own. Its "gradient" is the largest magnitude of
        x, and not a slope: who differentiates lets the range follow it (Jacob et al. 2018, section 3.1).
      key: As in `quantized_dot`.

    Returns:
      Array of x's dtype.
    """
    codes, x = weight_codes(weight, scheme), _watched(x, span)
    each = magnitudes(x, block_of(codes))
    spans = jax.lax.stop_gradient(jnp.where(span > 0, span, each))
    return quantized_dot(x, weight, scheme, codes=codes._replace(span=spans), key=key)


@jax.custom_vjp
def _watched(x: Array, span: Array) -> Array:
    """The inputs; gradients stop at those beyond the range, which move no output: they are clipped to one number."""
    return x


def _watched_forward(x: Array, span: Array) -> tuple[Array, tuple[Array, Array]]:
    inside = (jnp.abs(x.astype(jnp.float32)) <= span) | (span <= 0)
    return x, (inside, jnp.max(magnitudes(x, None)))


def _watched_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    inside, largest = saved
    # Clipped codes hide what is not finite; 0 times it is NaN, by which the step is refused.
    return jnp.where(inside, gradient, (0 * largest).astype(gradient.dtype)), largest


_watched.defvjp(_watched_forward, _watched_backward)


@jax.custom_vjp
def _weight_only(x: Array, weight: Array | None, codes: Quantized) -> Array:
    """The product of floats with codes; the weight that they were made from takes its gradient."""
    return weight_only_dot(x, codes)


def _weight_only_forward(
    x: Array, weight: Array | None, codes: Quantized
) -> tuple[Array, tuple[Array, Array | None, Quantized]]:
    return weight_only_dot(x, codes), (x, None if weight is None else jnp.zeros((), weight.dtype), codes)


def _weight_only_backward(saved: tuple[Array, Array | None, Quantized], g: Array) -> tuple[Array, Array | None, None]:
    x, like, codes = saved
    rows = tuple(range(g.ndim - 1))
    to_w = None if like is None else jnp.tensordot(g, x, (rows, rows)).astype(like.dtype)
    return jnp.einsum("...O,OI->...I", g, dequantize(codes, g.dtype)), to_w, None


_weight_only.defvjp(_weight_only_forward, _weight_only_backward)


Way = Callable[[Array | Gated, Literal["int8", "fp8"], Quantized], tuple[Quantized, Array]]
"""Inputs, what they are rounded to and a weight -> their codes, and the product of both in the dtype of the inputs."""


def _by_compiler(x: Array | Gated, kind: Literal["int8", "fp8"], codes: Quantized) -> tuple[Quantized, Array]:
    """The way of whatever compiles the program."""
    x = x.product() if isinstance(x, Gated) else x
    narrow = input_codes(x, kind, codes)
    return narrow, multiply(narrow, codes).astype(x.dtype)


def _by_kernel(x: Array | Gated, kind: Literal["int8", "fp8"], codes: Quantized) -> tuple[Quantized, Array]:
    """The kernels for Hopper; under vmap the way of the compiler."""
    from r1jax.ops import quantized_dot_hopper as kernels
    from r1jax.ops import row_codes_hopper as rounding

    @jax.custom_batching.custom_vmap
    def run(x: Array | Gated, codes: Quantized) -> tuple[Quantized, Array]:
        like = x.gate if isinstance(x, Gated) else x
        flat = [part.reshape(-1, part.shape[-1]) for part in jax.tree.leaves(x)]
        if isinstance(x, Gated) or (_by_row(codes) and rounding.fits_row(x.shape[-1])):
            values, scale = (rounding.gated_codes if isinstance(x, Gated) else rounding.row_codes)(*flat, kind)
            narrow = Quantized(values.reshape(like.shape), scale.reshape(*like.shape[:-1], 1))
        else:
            narrow = input_codes(x, kind, codes)
        scales = narrow.scale.reshape(-1), codes.scale[:, 0]
        y = kernels.scaled_product(narrow.values.reshape(flat[0].shape), codes.values, *scales, like.dtype)
        return narrow, y.reshape(*like.shape[:-1], -1)

    @run.def_vmap
    def batched(size: int, which: Any, x: Array | Gated, codes: Quantized) -> tuple[Any, Any]:
        axes = jax.tree.map(lambda one: 0 if one else None, tuple(which))
        found = jax.vmap(lambda x, codes: _by_compiler(x, kind, codes), axes, axis_size=size)(x, codes)
        return found, jax.tree.map(lambda _: True, found)

    return run(x, codes)


def _by_row(codes: Quantized) -> bool:
    """Whether each row of a weight's inputs is rounded by a scale of its own, as it is."""
    return codes.balance is None and codes.span is None


def _takes_factors(codes: Quantized) -> bool:
    """Whether there is a kernel that rounds the inputs of a weight while it forms them."""
    from r1jax.ops import row_codes_hopper as rounding

    return _by_row(codes) and rounding.fits_row(codes.shape[1])


def _on_hopper(x: Float[Array, "*B I"], codes: Quantized) -> bool:
    """Whether the kernels take such a product, and no compiler would have to divide it among devices."""
    device = target()
    if device.platform != "gpu" or device.compute_capability != "9.0" or not (0, 11) <= jax.__version_info__ < (0, 12):
        return False
    from r1jax.ops import quantized_dot_hopper as kernels

    mesh = jax.sharding.get_abstract_mesh()
    whole = jax.device_count() == 1 or (not mesh.empty and mesh.are_all_axes_manual)
    plain = x.dtype == jnp.bfloat16 and codes.values.dtype in (jnp.int8, jnp.float8_e4m3fn) and block_of(codes) is None
    return whole and plain and codes.shape[1] <= LONGEST and kernels.fits(x.size // codes.shape[1], *codes.shape)


@functools.cache
def _hopper_agrees(kind: Literal["int8", "fp8"], gated: bool = False) -> bool:
    """Tries the kernels on this device, with inputs or with the factors of these."""
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((TRIED[0], 1024)).astype(jnp.bfloat16) for _ in range(1 + gated)]
    # NumPy's: JAX's own would become part of the program that is being traced.
    values = np.clip(np.round(rng.standard_normal((TRIED[1], 1024)) * 40), -BOUND[kind], BOUND[kind])
    codes = Quantized(values.astype(TYPE[kind]), rng.uniform(0.5, 2, (TRIED[1], 1)).astype(jnp.bfloat16))
    exact = codes.values.astype(np.float32) * codes.scale.astype(np.float32)

    def fast(*x: Array) -> Array:
        inputs = Gated(*x) if gated else x[0]
        return _product(_by_kernel, Scheme(kind, kind), inputs, None, jax.tree.map(jnp.asarray, codes), None)

    def slow(*x: Array) -> Array:
        inputs = Gated(*x).product() if gated else x[0]
        return straight_through(inputs, quantize(inputs, kind)) @ jnp.asarray(exact).T

    return agrees(f"the kernel of {kind} products{' after SwiGLU' if gated else ''}", fast, slow, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    way: Way, scheme: Scheme, x: Array | Gated, weight: Array | None, codes: Quantized, key: Array | None
) -> Array:
    """The product with codes; the weight that they were made from takes its gradient."""
    return _forward(way, scheme, x, weight, codes, key)[0]


def _forward(
    way: Way, scheme: Scheme, x: Array | Gated, weight: Array | None, codes: Quantized, key: Array | None
) -> tuple[Array, tuple[Gated | None, tuple[Quantized, Any, Quantized, Any, Array | None]]]:
    narrow, y = way(x, scheme.activations, codes)
    like = None if weight is None else jnp.zeros((), weight.dtype)
    return y, (x if isinstance(x, Gated) else None, (narrow, jnp.zeros((), y.dtype), codes, like, key))


def _product_backward(
    way: Way,
    scheme: Scheme,
    saved: tuple[Gated | None, tuple[Quantized, Any, Quantized, Any, Array | None]],
    gradient: Array,
) -> tuple[Array | Gated, Array | None, None, None]:
    factors, rest = saved
    to_x, *others = product_gradients(scheme, rest, gradient)
    if factors is not None:
        [to_x] = jax.vjp(Gated.product, factors)[1](to_x)
    return to_x, *others


def product_gradients(
    scheme: Scheme, saved: tuple[Quantized, Any, Quantized, Any, Array | None], gradient: Array
) -> tuple[Array, Array | None, None, None]:
    """Backward pass of a product of codes.

    Args:
      scheme: How operands are rounded.
      saved: Codes of the inputs, an empty array of their floats' dtype, the weight's codes, one of its floats' dtype
        (None where it is not trained), and the key of stochastic rounding.
      gradient: Of the product.

    Returns:
      Gradients of the inputs and of the weight, and None for its codes and the key.
    """
    x, x_like, codes, w_like, key = saved
    g = gradient.reshape(-1, gradient.shape[-1]).astype(jnp.float32)
    flat = jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), x)
    if scheme.gradients is None or key is None or codes.balance is not None:  # a served model needs no key
        kept = gradient.dtype  # of the activations, as in a product of floats
        to_x = jnp.einsum("RO,OI->RI", g.astype(kept), dequantize(codes, kept))
        to_w = None if w_like is None else jnp.einsum("RO,RI->OI", g.astype(kept), dequantize(flat, kept))
    else:
        to_x, to_w = _narrow_gradients(g, flat, codes, key)
    to_w = None if w_like is None else to_w.astype(w_like.dtype)
    return to_x.astype(x_like.dtype).reshape(x.values.shape), to_w, None, None


_product.defvjp(_forward, _product_backward)


def _narrow_gradients(
    g: Float[Array, "R O"], x: Quantized, codes: Quantized, key: PRNGKeyArray
) -> tuple[Float[Array, "R I"], Float[Array, "O I"]]:
    """Both gradients as int8 products: scales along the contracted axis join the gradient before it is rounded."""
    first, second = jax.random.split(key)
    by_row = g * codes.scale.astype(jnp.float32).T
    by_output = (g * x.scale).T
    bits = [hashed_bits(k, jnp.arange(len(part)), part.shape[1:]) for k, part in ((first, by_row), (second, by_output))]
    by_row, by_output = (quantize(p, "int8", bits=b) for p, b in zip((by_row, by_output), bits, strict=True))
    to_x = _contract(by_row.values, codes.values.astype(jnp.int8)) * by_row.scale
    to_w = _contract(by_output.values, x.values) * by_output.scale
    return to_x, to_w


def _contract(a: Int[Array, "M R"], b: Int[Array, "R N"]) -> Float[Array, "M N"]:
    """A b in fp32; an int32 holds the sum of `LONGEST` products, and not that of a batch of any size."""
    dims = (((1,), (0,)), ((), ()))
    return sum(
        jax.lax.dot_general(a[:, i : i + LONGEST], b[i : i + LONGEST], dims, preferred_element_type=jnp.int32).astype(
            jnp.float32
        )
        for i in range(0, len(b), LONGEST)
    )


def multiply(x: Quantized, w: Quantized) -> Float[Array, "*B O"]:
    """X w^T of codes, in fp32: narrow products, wide sums, then the scales.

    Args:
      x: [*B, I], symmetric.
      w: [O, I], symmetric, with as many blocks. Integers that are held in fp32 are multiplied and summed so, for what
        multiplies no others; below 2^24 these sums are the same.

    Returns:
      What the codes' product stands for.

    Raises:
      ValueError: More numbers share a scale than an int32 can sum.
    """
    if w.values.dtype == jnp.float32:
        a, b = x.values.astype(jnp.float32), w.values
    else:
        a, b = (v if v.dtype == jnp.float8_e4m3fn else v.astype(jnp.int8) for v in (x.values, w.values))
    wide = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    count, length = w.scale.shape[-1], a.shape[-1]
    if wide == jnp.int32 and block_length(length, count) > LONGEST:
        raise ValueError(f"{block_length(length, count)} products overflow an int32: take blocks of at most {LONGEST}")
    if count == 1:
        dims = (((a.ndim - 1,), (1,)), ((), ()))
        y = jax.lax.dot_general(a, b, dims, preferred_element_type=wide).astype(jnp.float32)
        return y * jnp.broadcast_to(x.scale, y.shape) * jnp.broadcast_to(_flat(w.scale), y.shape)
    step = block_of(w)
    a, b = (jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, count * step - length)]) for v in (a, b))
    a, b = (v.reshape(*v.shape[:-1], count, step) for v in (a, b))
    dims = (((a.ndim - 1,), (2,)), ((a.ndim - 2,), (1,)))
    y = jax.lax.dot_general(a, b, dims, preferred_element_type=wide).astype(jnp.float32)  # [blocks, *B, O]
    return jnp.einsum("n...O,...n,On->...O", y, x.scale, w.scale.astype(jnp.float32))


def _flat(scale: Float[Array, "O 1"]) -> Float[Array, " O"]:
    return scale[:, 0].astype(jnp.float32)


def quantized_dot_reference(
    x: tuple[np.ndarray, np.ndarray], w: tuple[np.ndarray, np.ndarray]
) -> Float[np.ndarray, "R O"]:
    """`multiply` of integers and scales in float64, block by block.

    Args:
      x: Integers [R, I] and scales [R, blocks].
      w: Integers [O, I] and scales [O, blocks].

    Returns:
      The product of what they stand for.
    """
    total, step = np.zeros((len(x[0]), len(w[0]))), block_length(x[0].shape[1], x[1].shape[1])
    for i in range(x[1].shape[1]):
        part = slice(i * step, (i + 1) * step)
        sums = x[0][:, part].astype(np.float64) @ w[0][:, part].astype(np.float64).T
        total += sums * np.outer(x[1][:, i], w[1][:, i])
    return total
