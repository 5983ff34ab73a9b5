"""Convolutions of square images that share each kernel among its eight orientations (Cohen and Welling 2016).

Channels are [orientation x kernel]: in each place, what every kernel says in all eight turned and mirrored forms. Turn
or mirror the image, and the same numbers come out at the turned places with the orientations exchanged; their mean and
their largest do not change at all. So what is learned of a nodule in one orientation holds in the other seven, with an
eighth of the weights, at the cost of ordinary convolutions of the same width.

An orientation is "swap the axes or not, then mirror along x or not, then along y or not", three bits of its number.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from r1jax.config import VisionConfig
from r1jax.models.layers import Dropout
from r1jax.models.remat import Remat, block, kept
from r1jax.ops.axes import constrain, gathered
from r1jax.ops.norm import rms_norm

ORIENTATIONS = 8


def eight_kernels(base: Float[Array, "K K O C F"]) -> Float[Array, "K K I G"]:
    """All orientations of kernels, for inputs that have orientations themselves or none.

    Args:
      base: Kernels in one orientation; O is 8, or 1 where the input has no orientations.

    Returns:
      Kernels from O x C channels to 8 x F.
    """
    size, _, incoming, channels, features = base.shape
    bits = (2, 2, 2) if incoming == ORIENTATIONS else (1, 1, 1)
    x = base.reshape(size, size, *bits, channels, features)  # [y, x; mirrored along y, along x, swapped; C, F]
    # What an orientation does to the plane it does to the orientations of the input too: a mirror exchanges those that
    # are mirrored and not, a swap the two mirrors as well. Each step doubles the kernels.
    swapped = jnp.flip(x.transpose(1, 0, 3, 2, 4, 5, 6), 4)
    x = jnp.stack([x, swapped], axis=-2)
    x = jnp.stack([x, jnp.flip(x, (1, 3))], axis=-3)
    x = jnp.stack([x, jnp.flip(x, (0, 2))], axis=-4)
    return x.reshape(size, size, incoming * channels, ORIENTATIONS * features)


def over_orientations(x: Float[Array, "B N N C"]) -> Float[Array, "B N N C"]:
    """The mean over the eight orientations of the planes."""
    x = (x + jnp.swapaxes(x, 1, 2)) / 2
    x = (x + jnp.flip(x, 2)) / 2
    return (x + jnp.flip(x, 1)) / 2


class SymmetricConv(nn.Module):
    """A convolution of all orientations of its kernels."""

    features: int
    """Of the output, all orientations together."""
    dtype: DTypeLike
    window: int = 3
    stride: int = 1
    margin: int = 1
    """Zeros around the image."""
    lifts: bool = False
    """Whether the input has no orientations."""
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B N N C"]) -> Float[Array, "B M M F"]:
        incoming = 1 if self.lifts else ORIENTATIONS
        channels, features = x.shape[-1] // incoming, self.features // ORIENTATIONS
        shape = (self.window, self.window, incoming * channels, features)
        weight = self.param("weight", nn.initializers.he_normal(), shape, jnp.float32)
        weight = gathered(weight.astype(self.dtype), (*self.path, "weight")).astype(jnp.float32)
        weight = eight_kernels(weight.reshape(self.window, self.window, incoming, channels, features))
        weight = weight.astype(self.dtype)  # only now, so that the eight gradients of a kernel are summed in fp32
        # A plane is never divided, as in `PlaneConv`.
        x = constrain(x.astype(self.dtype), "batch", None, None, None)
        strides, margins, dims = (self.stride,) * 2, ((self.margin,) * 2,) * 2, ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, weight, strides, margins, dimension_numbers=dims)
        if self.bias:
            offset = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
            y = y + jnp.broadcast_to(jnp.tile(offset.astype(self.dtype), ORIENTATIONS), y.shape)
        return constrain(kept(y), "batch", None, None, None)


class SymmetricNorm(nn.Module):
    """RMSNorm over all channels, with the same weight for every orientation."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1] // ORIENTATIONS,), jnp.float32)
        return rms_norm(x, jnp.tile(weight, ORIENTATIONS), self.eps)


class SymmetricBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), as `ResidualBlock` of an image."""

    dtype: DTypeLike
    skipped: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "B N N C"], cases: Int[Array, " B"] | None) -> Float[Array, "B N N C"]:
        width = x.shape[-1]
        y = SymmetricConv(width, self.dtype, name="first")(nn.silu(SymmetricNorm(name="first_norm")(x)))
        y = SymmetricConv(width, self.dtype, name="second")(nn.silu(SymmetricNorm(name="second_norm")(y)))
        return x + Skipped(self.skipped, name="skip")(y, cases)


class Skipped(nn.Module):
    """Leaves a residual block out of a share of the cases while training (stochastic depth, Huang et al. 2016)."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."], cases: Int[Array, " B"] | None) -> Float[Array, "B ..."]:
        each = jnp.ones((x.shape[0], *[1] * (x.ndim - 1)), x.dtype)
        return x * jnp.broadcast_to(Dropout(self.rate)(each, cases), x.shape)


class SymmetricStages(nn.Module):
    """Stem, residual stages with strided convolutions between them, and what all orientations of a place say."""

    config: VisionConfig
    dtype: DTypeLike
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x: Float[Array, "B N N"], cases: Int[Array, " B"] | None) -> Float[Array, "B M M F"]:
        """Reads square images.

        Args:
          x: Intensities.
          cases: As `VisionEncoder` takes them.

        Returns:
          The cells of the last stage: mean and maximum of each kernel over its orientations.
        """
        c = self.config
        x = x[..., None]
        for stage, (width, blocks) in enumerate(zip(c.widths, c.blocks, strict=True)):
            if stage:
                x = SymmetricConv(width, self.dtype, 2, 2, 0, name=f"merge_{stage}")(x)
            else:
                # Each cell with a margin and a bias: the norms that follow would take a lone number's size away.
                window = c.stem_stride + 2
                x = SymmetricConv(width, self.dtype, window, c.stem_stride, 1, True, True, name="stem")(x)
            for i in range(blocks):
                residual = SymmetricBlock(self.dtype, c.skipped, name=f"stage_{stage}_block_{i}")
                x = block(SymmetricBlock.__call__, self.remat)(residual, x, cases)
        x = SymmetricNorm(name="norm")(x)
        x = x.reshape(*x.shape[:-1], ORIENTATIONS, -1)
        # Picked by index, for the reason that `VisionEncoder` gives.
        picked = jax.nn.one_hot(jnp.argmax(x, axis=-2), ORIENTATIONS, axis=-2, dtype=x.dtype)
        highest = jnp.sum(picked * x, axis=-2)
        return jnp.concatenate([jnp.mean(x, axis=-2), highest], axis=-1)
