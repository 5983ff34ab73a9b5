"""Lung nodules: a CT sub-volume (or a slice) read together with the patient's record; findings, malignancy, report.

    python train.py --config configs/medical.py                  generated cases, minutes on 2 CPU cores
    python train.py --config configs/medical.py:smoke            the same in small, about a minute

On 2048 generated test cases (seed 0, one training, 95 % bootstrap intervals): presence AUC .987 (.983 to .990);
malignancy AUC .889 (.873 to .907) from image and record, .768 from the image and .763 from the record alone, where
.932, .801 and .780 are attainable: 90.1 % (86.2 to 94.2) of the way from chance to the ceiling. On the 8192 validation
cases by which settings were chosen it is 91.4 % (three trainings, standard deviation .4): see
benchmarks/medical_settings.py.

Without a volume, with --model.lora_rank, or to learn the text (--task.text_weight): add --train.muon and --train.rules
without a value, and --model.text_merge 1 for the text.

Real data, by path (docs/data.md says how a folder looks):

    python train.py --config configs/medical.py:luna16_fpr_2d --data.path DIR    nodule candidates, one slice each
    python train.py --config configs/medical.py:lidc_3d --data.path DIR          reader's ratings of nodules in 3-D

lidc_3d starts from the weights of the default run, runs/medical: train it first.
"""

from r1jax.config import (
    Config,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    TaskConfig,
    TrainConfig,
    VisionConfig,
)
from r1jax.errors import UserError


def get_config(*, smoke: bool = False, luna16_fpr_2d: bool = False, lidc_3d: bool = False) -> Config:
    """Returns the experiment; at most one variant can be chosen."""
    if smoke + luna16_fpr_2d + lidc_3d > 1:
        raise UserError("configs/medical.py: smoke, luna16_fpr_2d and lidc_3d exclude each other; choose one.")
    if smoke:
        return _smoke()
    if luna16_fpr_2d:
        return _luna16_fpr_2d()
    if lidc_3d:
        return _lidc_3d()
    return Config(
        model=_model(),
        task=TaskConfig(modality_dropout=0.05, text_weight=0.0),  # the language loss would take half the time
        data=DataConfig(train_cases=25920),  # seen twice, an outcome would be learned by heart
        train=TrainConfig(
            steps=810,
            learning_rate=3e-3,
            decoder_rate=0.3,
            muon=("^volume/",),
            rules=("^volume/=3",),
            weight_decay=0.3,
            eval_every=405,
            warmup_steps=30,
        ),
    )


def _model(dropout: float = 0.0) -> ModelConfig:
    """Encoders and decoder of the default run, which reads each case once and needs no dropout."""
    return ModelConfig(
        decoder=DecoderConfig(
            vocab_size=264,
            hidden_size=64,
            num_hidden_layers=2,
            q_lora_rank=32,
            kv_lora_rank=24,
            qk_nope_head_dim=12,
            intermediate_size=160,
            moe_intermediate_size=48,
        ),
        volume=VisionConfig(widths=(8, 32, 64), merge=2),
        text_tokens=88,
        text_merge=8,
        dropout=dropout,
    )


def _smoke() -> Config:
    return Config(
        name="medical-smoke",
        workdir="runs/medical-smoke",
        model=ModelConfig(
            decoder=DecoderConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                q_lora_rank=16,
                kv_lora_rank=16,
                intermediate_size=64,
                moe_intermediate_size=32,
            ),
            volume=VisionConfig(widths=(8, 16, 32)),
        ),
        data=DataConfig(train_cases=128, val_cases=32, test_cases=64),
        train=TrainConfig(steps=20, batch_size=8, warmup_steps=5, ema=0.9, log_every=5, eval_every=10, save_every=10),
    )


def _luna16_fpr_2d() -> Config:
    return Config(
        name="luna16_fpr_2d",
        workdir="runs/luna16_fpr_2d",
        model=ModelConfig(
            modalities=("image",),
            image=VisionConfig(
                size=(48, 48), stem_stride=1, widths=(48, 96, 192, 384), blocks=(2, 2, 4, 2), norm="picture"
            ),
            dropout=0.2,
            precision="bf16",
        ),
        task=TaskConfig(
            fields=("nodule_present",),
            modality_dropout=0.0,
            augment="affine",
            views=8,
            text_weight=0.0,
            label_smoothing=0.1,
        ),
        data=DataConfig(path="data/luna16_fpr_2d", split="val"),
        train=TrainConfig(
            steps=5280,  # 120 epochs
            batch_size=128,
            learning_rate=5e-4,
            final_learning_rate=6e-6,
            warmup_steps=176,
            weight_decay=0.3,
            ema=0.999,
            eval_every=660,
            save_every=660,
        ),
    )


def _lidc_3d() -> Config:
    return Config(
        name="lidc_3d",
        workdir="runs/lidc_3d",
        model=_model(dropout=0.2),  # every shape as in the default run, from whose weights this one starts
        task=TaskConfig(modality_dropout=0.0, augment="affine", views=8, text_weight=0.0, label_smoothing=0.1),
        data=DataConfig(path="data/lidc_3d_134", split="val"),
        train=TrainConfig(
            init="runs/medical",
            steps=160,
            batch_size=16,
            learning_rate=1e-3,
            final_learning_rate=1e-5,
            decoder_rate=0.3,
            warmup_steps=16,
            weight_decay=0.3,
            ema=0.98,
            eval_every=80,
            save_every=80,
        ),
    )
