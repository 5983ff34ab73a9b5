"""A small DeepSeek-V3 as a language model: generated text, or your own by `--data.path` (docs/language.md).

python train.py --config configs/language.py                        generated text, minutes on 2 CPU cores
python train.py --config configs/language.py:smoke                  the same in small, seconds
python train.py --config configs/language.py --data.path my_texts   a file or a folder of .txt or .jsonl
python train.py --config configs/language.py:init=DIR --data.path my_texts     from the weights of a checkpoint
python train.py --config configs/language.py:deepseek_v3 --mesh.... --dry-run   the published 671 B, to be planned on a
                                                                    laptop: docs/parallel.md says for which devices
"""

from dataclasses import replace
from pathlib import Path

from r1jax.config import Config, DataConfig, DecoderConfig, ModelConfig, TaskConfig, TrainConfig
from r1jax.errors import UserError
from r1jax.train.checkpoints import find_checkpoint

DEEPSEEK_V3 = DecoderConfig(
    vocab_size=129280,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    first_k_dense_replace=3,
)
"""As its published config.json has it."""


def get_config(*, smoke: bool = False, deepseek_v3: bool = False, init: str = "") -> Config:
    """Returns the experiment; `init` names a checkpoint whose decoder's shapes and weights are taken."""
    if deepseek_v3 and (smoke or init):
        raise UserError("configs/language.py: deepseek_v3 goes with neither smoke nor init; leave one out")
    config = Config(
        name="language",
        workdir="runs/language",
        model=ModelConfig(
            modalities=("text",),
            decoder=DecoderConfig(
                vocab_size=264,
                hidden_size=64,
                num_hidden_layers=2,
                q_lora_rank=32,
                kv_lora_rank=24,
                intermediate_size=192,
                moe_intermediate_size=48,
            ),
            text_tokens=128,
            dropout=0.0,
        ),
        task=TaskConfig(name="language", label_smoothing=0.0, mtp_until=10 / 14.8, z_loss=1e-4),
        data=DataConfig(train_cases=16384, val_cases=256, test_cases=512),
        train=TrainConfig(
            steps=800,
            batch_size=16,
            learning_rate=5e-3,
            final_learning_rate=1e-4,
            weight_decay=0.1,
            router_bias_until=14.3 / 14.8,
            eval_every=400,
            save_every=200,
        ),
    )
    if smoke:
        config = _smoke(config)
    if deepseek_v3:
        config = _deepseek_v3(config)
    if init:
        decoder = find_checkpoint(Path(init), "init").config().model.decoder
        config = replace(
            config,
            name="language-from-checkpoint",
            workdir=f"runs/{Path(init).name}-language",
            model=replace(config.model, decoder=decoder),
            train=replace(config.train, init=init, learning_rate=1e-4, final_learning_rate=1e-5),
        )
    return config


def _smoke(config: Config) -> Config:
    decoder = replace(
        config.model.decoder,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        intermediate_size=64,
        moe_intermediate_size=32,
    )
    return replace(
        config,
        name="language-smoke",
        workdir="runs/language-smoke",
        model=replace(config.model, decoder=decoder, text_tokens=32),
        data=DataConfig(train_cases=256, val_cases=32, test_cases=64),
        train=replace(
            config.train, steps=20, batch_size=8, warmup_steps=5, ema=0.9, log_every=5, eval_every=10, save_every=10
        ),
    )


def _deepseek_v3(config: Config) -> Config:
    """671 B parameters in sequences of 4096, moments in bf16 (DeepSeek-V3, section 3.3.3); without an average."""
    return replace(
        config,
        name="deepseek-v3",
        workdir="runs/deepseek-v3",
        model=replace(
            config.model, decoder=DEEPSEEK_V3, text_tokens=4096, precision="bf16", remat="full", scan_layers=True
        ),
        data=DataConfig(train_cases=512, val_cases=8, test_cases=8),
        train=replace(
            config.train,
            batch_size=512,
            learning_rate=2.2e-4,
            final_learning_rate=2.2e-5,
            warmup_steps=2000,
            steps=100000,
            moments="bfloat16",
            ema=0.0,
        ),
    )
