"""Multi-head latent attention (DeepSeek-V2, section 2.1; DeepSeek-V3, section 2.1.1)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.config import DecoderConfig
from r1jax.models.layers import Linear, RMSNorm
from r1jax.models.lora import Lora
from r1jax.models.remat import Remat, attention, kept
from r1jax.ops.axes import gathered
from r1jax.ops.latent_attention import PagedLatents, latent_attention, write_latents
from r1jax.ops.rope import apply_rope, inverse_frequencies, softmax_scale, yarn_magnitude
from r1jax.ops.sequence_attention import length_axes, sequence_attention

LATENT_NORM_EPS = 1e-6  # Hugging Face keeps this whatever rms_norm_eps says


class MLA(nn.Module):
    """Attention through a low-rank latent of keys and values, with a rotary key that all heads share."""

    config: DecoderConfig
    dtype: DTypeLike
    lora: Lora = Lora()
    remat: Remat = "none"
    prefix: bool = False
    """In every row, the tokens that exist come first: then causality hides the others from them."""

    def setup(self) -> None:
        c = self.config
        heads, key_width = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim

        def linear(features: int) -> Linear:
            return Linear(features, self.dtype, init_std=c.initializer_range, lora=self.lora)

        if c.q_lora_rank:
            self.q_a_proj, self.q_a_layernorm = linear(c.q_lora_rank), RMSNorm(LATENT_NORM_EPS)
            self.q_b_proj = linear(heads * key_width)
        else:
            self.q_proj = linear(heads * key_width)
        self.kv_a_proj_with_mqa = linear(c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(LATENT_NORM_EPS)
        self.kv_b_proj = linear(heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = linear(c.hidden_size)
        self.scale = softmax_scale(key_width, c.rope_scaling)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], valid: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Causal attention within x, keys and values expanded."""
        hidden = None if self.prefix else valid
        return self._expanded(*self._queries(x, positions), *self._latents(x, positions), hidden)

    def cached(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        cache: PagedLatents,
        *,
        fresh: bool,
    ) -> tuple[Float[Array, "B T D"], PagedLatents]:
        """Causal attention to the cache and within x; x is in the returned cache.

        Args:
          x: Hidden states of the next tokens of each row.
          positions: Their places in the row, from 0.
          valid: Tokens that exist; others are neither written nor seen.
          cache: What came before.
          fresh: Nothing came before: x is the whole row, what exists of it comes first, and attention is that of
            `__call__`.

        Returns:
          The mixed states and the cache.
        """
        q_nope, q_rope = self._queries(x, positions)
        latent, k_rope = self._latents(x, positions)
        cache = write_latents(cache, jnp.concatenate([latent, k_rope], axis=-1), positions, valid)
        if fresh:
            return self._expanded(q_nope, q_rope, latent, k_rope, None), cache
        kv_b = self.kv_b_proj.factor()
        mixed = latent_attention(q_nope, q_rope, kv_b, cache, positions, valid, scale=self.scale)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1)), cache

    def _queries(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N Hk"], Float[Array, "B T N H"]]:
        """Queries of all heads, without position and turned."""
        c = self.config
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if c.q_lora_rank else self.q_proj(x)
        q_nope, q_rope = jnp.split(q.reshape(*x.shape[:2], c.num_attention_heads, -1), [c.qk_nope_head_dim], axis=-1)
        return q_nope, self._turn(q_rope, positions)

    def _latents(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T R"], Float[Array, "B T H"]]:
        """What the cache keeps of each token: the normed latent and the turned key that all heads share."""
        latent, k_rope = jnp.split(self.kv_a_proj_with_mqa(x), [self.config.kv_lora_rank], axis=-1)
        return self.kv_a_layernorm(latent), self._turn(k_rope[:, :, None, :], positions)[:, :, 0]

    def _turn(self, part: Float[Array, "B T N H"], positions: Int[Array, "B T"]) -> Float[Array, "B T N H"]:
        """Rotary embedding, in half layout."""
        c, yarn = self.config, self.config.rope_scaling
        frequencies = inverse_frequencies(c.qk_rope_head_dim, c.rope_theta, yarn)
        magnitude = yarn_magnitude(yarn.factor, yarn.mscale) / yarn_magnitude(yarn.factor, yarn.mscale_all_dim)
        return apply_rope(part, positions, frequencies, interleave=c.rope_interleave, magnitude=magnitude)

    def _expanded(
        self,
        q_nope: Float[Array, "B T N Hk"],
        q_rope: Float[Array, "B T N H"],
        latent: Float[Array, "B T R"],
        k_rope: Float[Array, "B T H"],
        valid: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """Attention of tokens to each other with the keys and values of every head."""
        if length_axes(q_nope.shape[1]):
            return self._over_devices(q_nope, q_rope, latent, k_rope, valid)
        kv = self.kv_b_proj(latent).reshape(*q_nope.shape[:3], -1)
        k_nope, v = jnp.split(kv, [self.config.qk_nope_head_dim], axis=-1)
        shared = jnp.broadcast_to(k_rope[:, :, None, :], q_rope.shape)
        q, k = jnp.concatenate([q_nope, q_rope], axis=-1), jnp.concatenate([k_nope, shared], axis=-1)
        mixed = attention(self.remat)(q, k, v, valid, scale=self.scale, causal=True)
        return self.o_proj(mixed.reshape(*mixed.shape[:2], -1))

    def _over_devices(
        self,
        q_nope: Float[Array, "B T N Hk"],
        q_rope: Float[Array, "B T N H"],
        latent: Float[Array, "B T R"],
        k_rope: Float[Array, "B T H"],
        valid: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """The same where the tokens lie on different devices."""
        weight = gathered(self.kv_b_proj.matrix(), (*self.path, "kv_b_proj", "weight"))
        kv_b = weight.reshape(self.config.num_attention_heads, -1, self.config.kv_lora_rank)
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        mixed = kept(sequence_attention(q, latent, k_rope, kv_b, valid, scale=self.scale))
        return self.o_proj(mixed.reshape(*mixed.shape[:2], -1))
