"""Building blocks that decoder and encoders share."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.models.initial import normal
from r1jax.models.lora import Lora
from r1jax.models.quantized import parameter, rounded_product, scheme_for
from r1jax.models.remat import Remat, attention, kept
from r1jax.ops.axes import constrain, gathered
from r1jax.ops.hashed_bits import hashed_bits
from r1jax.ops.norm import rms_norm
from r1jax.ops.quantize import Quantized
from r1jax.ops.quantized_dot import Gated, rounded


class Linear(nn.Module):
    """x W^T (+ b): the weight is [out, in] as in the checkpoint, fp32 in memory, `dtype` in the product."""

    features: int
    dtype: DTypeLike
    bias: bool = False
    init_std: float | None = None
    """Standard deviation of the initial weight; None is 1 / sqrt(in)."""
    lora: Lora = Lora()

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"], gated: Gated | None = None) -> Float[Array, "*B O"]:
        """X W^T; `gated` is what x is the product of, if it is."""
        width = x.shape[-1]
        std = width**-0.5 if self.init_std is None else self.init_std
        weight, x = parameter(self, "weight", normal(std), (self.features, width)), x.astype(self.dtype)
        scheme = scheme_for((*self.path, "weight"), "linear", (self.features, width), x)
        if scheme is None:
            weight = gathered(weight.astype(self.dtype), (*self.path, "weight"))
            y = kept(jnp.einsum("...I,OI->...O", x, weight))
        else:
            gated = None if self.lora.rank else gated  # of which x itself is multiplied too
            y = kept(rounded_product(self, x, weight, scheme, "weight", gated))
        if self.lora.rank:
            a = self.param("lora_a", normal(width**-0.5), (self.lora.rank, width), jnp.float32)
            b = self.param("lora_b", nn.initializers.zeros, (self.features, self.lora.rank), jnp.float32)
            a, b = (gathered(w.astype(self.dtype), (*self.path, name)) for w, name in ((a, "lora_a"), (b, "lora_b")))
            low = jnp.einsum("...I,RI->...R", x, a)
            y = y + self.lora.scale * jnp.einsum("...R,OR->...O", low, b)
        if self.bias:
            offset = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + jnp.broadcast_to(offset.astype(self.dtype), y.shape)
        return y

    def factor(self) -> Float[Array, "O I"] | Quantized:
        """The weight for a product in another order that can take codes: those, where nothing is added to them."""
        weight = self.get_variable("params", "weight")
        if isinstance(weight, Quantized) and not self.lora.rank:
            return weight
        return self.matrix()

    def matrix(self) -> Float[Array, "O I"]:
        """The weight in the product's dtype, for a product in another order; `__call__` makes it."""
        weight = self.get_variable("params", "weight")
        scheme = scheme_for((*self.path, "weight"), "linear", weight.shape)
        weight = weight.astype(self.dtype) if scheme is None else rounded(weight, scheme, self.dtype)
        if self.lora.rank:
            a, b = (self.get_variable("params", name).astype(self.dtype) for name in ("lora_a", "lora_b"))
            weight = weight + self.lora.scale * (b @ a)
        return weight


class Dropout(nn.Module):
    """Zeroes a share of the numbers of each case and scales up the rest (Srivastava et al. 2014).

    What is zeroed depends on the key, the module and the case's index in the batch: not on how the batch is divided.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "B *rest"], cases: Int[Array, " B"] | None) -> Float[Array, "B *rest"]:
        if cases is None or not self.rate:
            return x
        dropped = hashed_bits(self.make_rng("dropout"), cases, x.shape[1:]) < jnp.uint32(self.rate * 2**32)
        return jnp.where(dropped, 0, x / (1 - self.rate))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 (Zhang and Sennrich 2019)."""

    eps: float = 1e-6
    first_axis: int = -1
    """rms is over this axis and all after it."""

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return rms_norm(x, weight, self.eps, self.first_axis)


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate x) * up x)."""

    width: int
    dtype: DTypeLike
    init_std: float | None = None
    lora: Lora = Lora()

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        def linear(name: str, features: int) -> Linear:
            return Linear(features, self.dtype, init_std=self.init_std, lora=self.lora, name=name)

        factors = Gated(linear("gate_proj", self.width)(x), linear("up_proj", self.width)(x))
        names = ("batch", *[None] * (x.ndim - 3), "length", "hidden") if x.ndim > 2 else ("batch", "hidden")
        return linear("down_proj", x.shape[-1])(constrain(factors.product(), *names), factors)


class EncoderLayer(nn.Module):
    """Pre-norm bidirectional transformer layer of the encoders."""

    num_heads: int
    dtype: DTypeLike
    dropout: float = 0.0
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B M D"], cases: Int[Array, " B"] | None = None, valid: Bool[Array, "B M"] | None = None
    ) -> Float[Array, "B M D"]:
        batch, cells, width = x.shape
        drop = Dropout(self.dropout)
        qkv = Linear(3 * width, self.dtype, name="qkv_proj")(RMSNorm(name="attention_norm")(x))
        q, k, v = jnp.split(qkv.reshape(batch, cells, 3 * self.num_heads, -1), 3, axis=2)
        mixed = attention(self.remat)(q, k, v, valid, scale=q.shape[-1] ** -0.5, causal=False)
        x = x + drop(Linear(width, self.dtype, name="o_proj")(mixed.reshape(batch, cells, width)), cases)
        return x + drop(MLP(2 * width, self.dtype, name="mlp")(RMSNorm(name="mlp_norm")(x)), cases)
