"""A decoder with every part, and rows of several lengths, for the tests of its cache."""

from r1jax.config import DecoderConfig, YarnConfig

CONFIG = DecoderConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=7,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_experts_per_tok=3,
    rope_scaling=YarnConfig(factor=8.0, original_max_position_embeddings=32),
)
PAGE, LENGTHS = 4, (7, 11, 3)
