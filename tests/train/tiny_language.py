"""A language model as small as can be, with everything of the schedule within its six steps."""

from r1jax.config import Config, DataConfig, DecoderConfig, ModelConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    decoder = DecoderConfig(
        vocab_size=260,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        moe_intermediate_size=8,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
    )
    return Config(
        name="tiny-language",
        workdir="nowhere",
        model=ModelConfig(modalities=("text",), decoder=decoder, text_tokens=12, dropout=0.1),
        task=TaskConfig(name="language", label_smoothing=0.0, mtp_until=0.5),
        data=DataConfig(train_cases=32, val_cases=10, test_cases=8),
        train=TrainConfig(
            steps=6,
            batch_size=4,
            learning_rate=1e-2,
            warmup_steps=1,
            ema=0.9,
            router_bias_until=0.5,
            log_every=1,
            eval_every=3,
            save_every=2,
        ),
    )
