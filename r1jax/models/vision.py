"""Convolutional encoder of 2-D images and CT sub-volumes, ending in tokens of decoder width.

It first says where to look, a score for each cell, and then describes what is there.

A sub-volume is convolved in plane and then through plane, R(2+1)D (Tran et al. 2018): CT is sampled differently
along z, the two steps cost 12 C^2 a voxel instead of 27 C^2, and in-plane convolutions are fast on CPU and GPU.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from r1jax.config import VisionConfig
from r1jax.models.initial import normal
from r1jax.models.layers import EncoderLayer, Linear, RMSNorm
from r1jax.models.quantized import added, parameter, rounded_product, scheme_for
from r1jax.models.remat import Remat, block, kept
from r1jax.ops.apart import held_apart
from r1jax.ops.axes import constrain, gathered
from r1jax.ops.quantize import Quantized


class Encoded(NamedTuple):
    """What an encoder says of a batch of pictures."""

    tokens: Float[Array, "B M D"]
    """One token for each block of `merge`^rank cells of the last stage."""
    summary: Float[Array, "B D"]
    where: Float[Array, "B *grid"]
    """Logit of each cell of the last stage: the finding's centre lies in it."""


class PlaneConv(nn.Module):
    """3x3 convolution over the last two spatial axes; leading axes are batch."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*B Y X C"]) -> Float[Array, "*B Y X F"]:
        shape = (3, 3, x.shape[-1], self.features)
        weight = parameter(self, "weight", nn.initializers.he_normal(), shape)
        # A plane is never divided: the partitioner of jax 0.10.2 then doubles gradients before a convolution.
        flat = constrain(x.reshape(-1, *x.shape[-3:]).astype(self.dtype), "batch", None, None, None)
        scheme = scheme_for((*self.path, "weight"), "convolution", shape, flat)
        if scheme is None:
            weight = gathered(weight.astype(self.dtype), (*self.path, "weight"))
            dims = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(flat, weight, (1, 1), "SAME", dimension_numbers=dims)
        else:
            rows = weight if isinstance(weight, Quantized) else kernel_rows(weight)
            y = rounded_product(self, neighbours(flat), rows, scheme, "weight")
        return constrain(kept(y), "batch", None, None, None).reshape(*x.shape[:-1], self.features)


def neighbours(x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X K"]:
    """The 3x3 neighbours of each place, side by side, zeros beyond the edge: a convolution as a product of rows."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1)


def kernel_rows(weight: Float[Array, "3 3 C F"]) -> Float[Array, "F K"]:
    """The kernel of a `PlaneConv` as the rows that meet `neighbours`."""
    return weight.transpose(3, 0, 1, 2).reshape(weight.shape[-1], -1)


class ThroughConv(nn.Module):
    """3-tap convolution along z, as one matmul over the joined neighbours."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B Z Y X C"]) -> Float[Array, "B Z Y X F"]:
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        taps = [padded[:, i : i + x.shape[1]] for i in range(3)]
        return Linear(self.features, self.dtype, init_std=(2 / (3 * x.shape[-1])) ** 0.5)(jnp.concatenate(taps, -1))


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): both in plane for images, in plane then through plane for volumes."""

    dtype: DTypeLike
    norm: Literal["cell", "picture"] = "cell"

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        width, first_axis = x.shape[-1], {"cell": -1, "picture": 1}[self.norm]
        second = ThroughConv if x.ndim == 5 else PlaneConv
        y = RMSNorm(first_axis=first_axis, name="first_norm")(x)
        y = PlaneConv(width, self.dtype, name="first")(nn.silu(y))
        y = RMSNorm(first_axis=first_axis, name="second_norm")(y)
        return x + second(width, self.dtype, name="second")(nn.silu(y))


def space_to_depth(x: Float[Array, "..."], stride: int) -> Float[Array, "..."]:
    """Moves each stride^rank cell block of [B, *space, C] into channels: [B, *space/stride, stride^rank C]."""
    batch, *space, channels = x.shape
    split = [n for size in space for n in (size // stride, stride)]
    rank = len(space)
    x = x.reshape(batch, *split, channels)
    x = x.transpose(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    return x.reshape(batch, *[size // stride for size in space], stride**rank * channels)


class VisionEncoder(nn.Module):
    """Stem, residual stages with patch merging between them, bidirectional layers, projection to decoder width."""

    config: VisionConfig
    features: int
    dtype: DTypeLike = jnp.float32
    dropout: float = 0.0
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *space"], spacing: Float[Array, "B rank"], *, cases: Int[Array, " B"] | None = None
    ) -> Encoded:
        """Encodes a batch.

        Args:
          x: Windowed intensities, about -1..1, of the configured size.
          spacing: Edge lengths of a voxel in mm; sizes in mm cannot be read from voxels alone.
          cases: Index of each case in the batch, for dropout; None leaves it out.

        Returns:
          Tokens, summary, and where the finding is.
        """
        c = self.config
        x = constrain(space_to_depth(x[..., None], c.stem_stride), "batch", *[None] * (x.ndim))
        for stage, (width, blocks) in enumerate(zip(c.widths, c.blocks, strict=True)):
            if stage:
                x = space_to_depth(x, 2)
            x = Linear(width, self.dtype, name=f"merge_{stage}")(x)
            for i in range(blocks):
                residual = ResidualBlock(self.dtype, c.norm, name=f"stage_{stage}_block_{i}")
                x = block(ResidualBlock.__call__, self.remat)(residual, x)
        grid = x.shape[1:-1]
        x = RMSNorm(name="norm")(x.reshape(x.shape[0], -1, x.shape[-1]))
        place = added(self, "position", parameter(self, "position", normal(0.02), x.shape[1:]), self.dtype)
        size = Linear(x.shape[-1], self.dtype, bias=True, name="spacing")(jnp.log(spacing))
        x = x + jnp.broadcast_to(place[None], x.shape) + jnp.broadcast_to(size[:, None], x.shape)
        for i in range(c.layers):
            layer = EncoderLayer(c.num_attention_heads, self.dtype, self.dropout, self.remat, name=f"layers_{i}")
            x = block(EncoderLayer.__call__, self.remat)(layer, x, cases)
        x = RMSNorm(name="final_norm")(x)
        where = Linear(1, jnp.float32, bias=True, name="where")(x)[..., 0]
        looked_at = jnp.einsum("BM,BMC->BC", nn.softmax(where, axis=-1).astype(x.dtype), x)
        # The maximum tells whether something is anywhere, the mean how much of it there is. It is picked by index:
        # the gradient of jnp.max compares values, and is 0/0 where the compiler computes them twice and differently.
        highest = jnp.take_along_axis(x, jnp.argmax(x, axis=1, keepdims=True), axis=1)[:, 0]
        pooled = jnp.concatenate(held_apart(looked_at, highest, jnp.mean(x, axis=1)), axis=-1)
        summary = Linear(self.features, self.dtype, name="summary")(pooled)
        cells = space_to_depth(x.reshape(x.shape[0], *grid, -1), c.merge)
        tokens = Linear(self.features, self.dtype, name="projection")(cells)
        return Encoded(tokens.reshape(x.shape[0], -1, self.features), summary, where.reshape(-1, *grid))
