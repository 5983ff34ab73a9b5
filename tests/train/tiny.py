"""An experiment as small as can be, with everything random in it: dropout, hidden modalities, augmentation."""

from r1jax.config import (
    Config,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    TableConfig,
    TaskConfig,
    TrainConfig,
    VisionConfig,
)


def get_config() -> Config:
    decoder = DecoderConfig(
        vocab_size=264,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        intermediate_size=16,
        moe_intermediate_size=8,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
    )
    return Config(
        name="tiny",
        workdir="nowhere",
        model=ModelConfig(
            decoder=decoder,
            volume=VisionConfig(size=(16, 16, 16), stem_stride=4, widths=(8,), blocks=(1,), layers=0),
            table=TableConfig(layers=0, frequencies=2),
            text_tokens=16,
            dropout=0.1,
        ),
        task=TaskConfig(fields=("nodule_present", "malignancy", "center_mm", "texture")),
        data=DataConfig(train_cases=32, val_cases=16, test_cases=16),
        train=TrainConfig(
            steps=24,
            batch_size=8,
            learning_rate=3e-3,
            warmup_steps=4,
            ema=0.9,
            log_every=1,
            eval_every=12,
            save_every=3,
        ),
    )
