"""Multi-head latent attention (DeepSeek-V2, section 2.1; DeepSeek-V3, section 2.1.1)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.config import DecoderConfig
from r1jax.models.layers import Linear, RMSNorm
from r1jax.models.lora import Lora
from r1jax.ops.attention import dot_product_attention
from r1jax.ops.rope import apply_rope, inverse_frequencies, softmax_scale, yarn_magnitude

LATENT_NORM_EPS = 1e-6  # Hugging Face keeps this whatever rms_norm_eps says


class MLA(nn.Module):
    """Attention through a low-rank latent of keys and values, with a rotary key that all heads share."""

    config: DecoderConfig
    dtype: DTypeLike
    lora: Lora = Lora()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], valid: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        c = self.config
        batch, length, width = x.shape
        heads, nope, rope = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim

        def linear(name: str, features: int) -> Linear:
            return Linear(features, self.dtype, init_std=c.initializer_range, lora=self.lora, name=name)

        if c.q_lora_rank:
            latent = RMSNorm(LATENT_NORM_EPS, name="q_a_layernorm")(linear("q_a_proj", c.q_lora_rank)(x))
            q = linear("q_b_proj", heads * (nope + rope))(latent)
        else:
            q = linear("q_proj", heads * (nope + rope))(x)
        q = q.reshape(batch, length, heads, nope + rope)

        compressed = linear("kv_a_proj_with_mqa", c.kv_lora_rank + rope)(x)
        latent, k_rope = jnp.split(compressed, [c.kv_lora_rank], axis=-1)
        latent = RMSNorm(LATENT_NORM_EPS, name="kv_a_layernorm")(latent)
        kv = linear("kv_b_proj", heads * (nope + c.v_head_dim))(latent)
        k_nope, v = jnp.split(kv.reshape(batch, length, heads, -1), [nope], axis=-1)

        yarn = c.rope_scaling
        frequencies = inverse_frequencies(rope, c.rope_theta, yarn)
        magnitude = yarn_magnitude(yarn.factor, yarn.mscale) / yarn_magnitude(yarn.factor, yarn.mscale_all_dim)

        def turn(part: Float[Array, "B T H R"]) -> Float[Array, "B T H R"]:
            return apply_rope(part, positions, frequencies, interleave=c.rope_interleave, magnitude=magnitude)

        q = jnp.concatenate([q[..., :nope], turn(q[..., nope:])], axis=-1)
        shared = jnp.broadcast_to(turn(k_rope[:, :, None, :]), (batch, length, heads, rope))
        k = jnp.concatenate([k_nope, shared], axis=-1)
        mixed = dot_product_attention(q, k, v, scale=softmax_scale(nope + rope, yarn), causal=True, valid=valid)
        return linear("o_proj", width)(mixed.reshape(batch, length, -1))
