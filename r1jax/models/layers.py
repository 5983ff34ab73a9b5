"""Building blocks that decoder and encoders share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from r1jax.ops.attention import dot_product_attention


class Linear(nn.Module):
    """x W^T (+ b): the weight is [out, in] as in the checkpoint, fp32 in memory, `dtype` in the product."""

    features: int
    dtype: DTypeLike
    bias: bool = False
    init_std: float | None = None
    """Standard deviation of the initial weight; None is 1 / sqrt(in)."""

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        width = x.shape[-1]
        std = width**-0.5 if self.init_std is None else self.init_std
        weight = self.param("weight", nn.initializers.normal(std), (self.features, width), jnp.float32)
        y = jnp.einsum("...I,OI->...O", x.astype(self.dtype), weight.astype(self.dtype))
        if self.bias:
            offset = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + jnp.broadcast_to(offset.astype(self.dtype), y.shape)
        return y

    def matrix(self) -> Float[Array, "O I"]:
        """The weight in the product's dtype, for a product in another order; `__call__` makes it."""
        return self.get_variable("params", "weight").astype(self.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in fp32 (Zhang and Sennrich 2019)."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return (wide * jnp.broadcast_to(weight.astype(jnp.float32), wide.shape)).astype(x.dtype)


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate x) * up x)."""

    width: int
    dtype: DTypeLike
    init_std: float | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        def linear(name: str, features: int) -> Linear:
            return Linear(features, self.dtype, init_std=self.init_std, name=name)

        hidden = nn.silu(linear("gate_proj", self.width)(x)) * linear("up_proj", self.width)(x)
        return linear("down_proj", x.shape[-1])(hidden)


class EncoderLayer(nn.Module):
    """Pre-norm bidirectional transformer layer of the encoders."""

    num_heads: int
    dtype: DTypeLike
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "B M D"], *, train: bool, valid: Bool[Array, "B M"] | None = None
    ) -> Float[Array, "B M D"]:
        batch, cells, width = x.shape
        drop = nn.Dropout(self.dropout, deterministic=not train)
        qkv = Linear(3 * width, self.dtype, name="qkv_proj")(RMSNorm(name="attention_norm")(x))
        q, k, v = jnp.split(qkv.reshape(batch, cells, 3 * self.num_heads, -1), 3, axis=2)
        mixed = dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, causal=False, valid=valid)
        x = x + drop(Linear(width, self.dtype, name="o_proj")(mixed.reshape(batch, cells, width)))
        return x + drop(MLP(2 * width, self.dtype, name="mlp")(RMSNorm(name="mlp_norm")(x)))
