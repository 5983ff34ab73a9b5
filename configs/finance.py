"""Card payments: streams of customer and terminal, numbers and notes read together; a probability of fraud.

    python train.py --config configs/finance.py            generated payments, about 4 minutes on 2 CPU cores
    python train.py --config configs/finance.py:smoke      the same in small, about a minute

On the 15,637 generated validation payments (343 frauds, seed 0, one training): recall at a false-positive rate of 0.3 %
.845 from all, .758 without the notes and .388 from the notes alone, where .929, .872 and .398 are attainable; AUPRC
.876, .795 and .421.

The public stream of the Fraud Detection Handbook, by path (docs/finance.md says what columns are read):

    python train.py --config configs/finance.py:handbook --data.path transactions.parquet --platform cuda

Three trainings on an H200, under five minutes each, in the week after what was learned from: AUPRC .796, .799 and .796,
recall at a false-positive rate of 0.3 % .773, .779 and .773 (LightGBM on the same features .792 and .768).
"""

from r1jax.config import (
    AlertConfig,
    Config,
    DataConfig,
    DecoderConfig,
    FinanceConfig,
    ModelConfig,
    SeriesConfig,
    TaskConfig,
    TrainConfig,
)
from r1jax.errors import UserError


def get_config(*, smoke: bool = False, handbook: bool = False) -> Config:
    """Returns the experiment; at most one variant can be chosen."""
    if smoke and handbook:
        raise UserError("configs/finance.py: smoke and handbook exclude each other; choose one.")
    if smoke:
        return _smoke()
    if handbook:
        return _handbook()
    return Config(
        name="finance",
        workdir="runs/finance",
        model=ModelConfig(
            modalities=("series", "table", "text"),
            decoder=_decoder(64, experts=48, dense=128),
            series=SeriesConfig(layers=1, bins=16, tokens=3),
            text_tokens=48,
            dropout=0.05,
        ),
        task=TaskConfig(
            name="finance",
            label_smoothing=0.0,
            modality_dropout=0.1,
            finance=FinanceConfig(
                events=32, negatives_kept=0.1, alerts=AlertConfig(per_day=50.0, step_up_per_day=150.0)
            ),
        ),
        train=TrainConfig(
            steps=500,
            batch_size=96,
            learning_rate=3e-3,
            warmup_steps=50,
            weight_decay=0.1,
            ema=0.98,
            eval_every=500,
            save_every=250,
        ),
    )


def _decoder(width: int, *, experts: int, dense: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=264,
        hidden_size=width,
        num_hidden_layers=2,
        q_lora_rank=width // 2,
        kv_lora_rank=width // 2,
        qk_nope_head_dim=12,
        intermediate_size=dense,
        moe_intermediate_size=experts,
        num_nextn_predict_layers=0,
    )


def _smoke() -> Config:
    return Config(
        name="finance-smoke",
        workdir="runs/finance-smoke",
        model=ModelConfig(
            modalities=("series", "table", "text"),
            decoder=_decoder(32, experts=32, dense=64),
            series=SeriesConfig(layers=1, bins=8, tokens=2),
            text_tokens=48,
        ),
        task=TaskConfig(
            name="finance",
            label_smoothing=0.0,
            modality_dropout=0.1,
            finance=FinanceConfig(
                events=16,
                negatives_kept=0.2,
                simulated_customers=100,
                simulated_days=90,
                alerts=AlertConfig(per_day=5.0, step_up_per_day=15.0),
            ),
        ),
        train=TrainConfig(steps=40, batch_size=32, warmup_steps=5, ema=0.9, log_every=5, eval_every=20, save_every=20),
    )


def _handbook() -> Config:
    return Config(
        name="fraud_handbook",
        workdir="runs/fraud_handbook",
        model=ModelConfig(
            modalities=("series", "table"),
            decoder=_decoder(128, experts=96, dense=256),
            series=SeriesConfig(layers=2, bins=24),
            dropout=0.1,
        ),
        task=TaskConfig(
            name="finance",
            label_smoothing=0.0,
            modality_dropout=0.0,
            finance=FinanceConfig(
                negatives_kept=0.25,
                train=("2018-05-08", "2018-08-25"),
                val=("2018-08-25", "2018-09-01"),
                test=("2018-09-01", "2018-10-01"),
            ),
        ),
        data=DataConfig(path="data/fraud_handbook", split="val"),
        train=TrainConfig(
            steps=3000,  # each payment is seen three times; the best checkpoint by the validation is kept
            batch_size=256,
            learning_rate=2e-3,
            warmup_steps=150,
            weight_decay=0.1,
            ema=0.99,
            eval_every=250,
            save_every=500,
        ),
    )
