"""Fraud scores of r1jax beside gradient boosting, on the same payments and the same information.

    python benchmarks/fraud.py --data DIR/transactions.parquet --output benchmarks/results/fraud.json --seeds 3

All learn from the training period of configs/finance.py:handbook, with the same genuine payments left out, and are
judged on every payment of `--split`. The peer is LightGBM, on the handbook's fifteen features, which the model's table
has too, and with the summaries of `fraud_summaries.py` beside them, since the model also sees both streams of events;
its settings and number of trees were chosen on an earlier week. No step is chosen: the figures are those of the last
checkpoint's averaged weights, and the scores of all seeds are averaged as the peer's are. Words after `--` are
overrides of train.py.
"""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment, predict, train_run  # noqa: E402
from benchmarks.fraud_summaries import summaries  # noqa: E402
from r1jax.cli import load_config  # noqa: E402
from r1jax.data.transaction_cases import TransactionCases  # noqa: E402
from r1jax.data.transactions import DAY  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.tasks.finance import metrics as f  # noqa: E402
from r1jax.tasks.intervals import Draw, figure_text  # noqa: E402

BOOSTING = {
    "objective": "binary",
    "num_leaves": 63,
    "learning_rate": 0.05,
    "min_child_samples": 60,
    "lambda_l2": 10.0,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "feature_fraction": 0.8,
    "verbose": -1,
}
TREES = 222
PEER_SEEDS = 2
FIGURES = ("auprc", "auroc", *(f"recall {rate:g}" for rate in f.RATES), "precision 0.003", "value_recall 0.003")


def boosted(train: np.ndarray, label: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Scores of LightGBM, the mean of its seeds.

    Args:
      train: Numbers of the payments to learn from, a row each.
      label: 1 is fraud.
      judged: The same of those to score.

    Returns:
      One score a payment.
    """
    import lightgbm

    models = [
        lightgbm.train(BOOSTING | {"seed": seed}, lightgbm.Dataset(train, label), TREES) for seed in range(PEER_SEEDS)
    ]
    return np.mean([model.predict(judged) for model in models], axis=0)


def peers(train: TransactionCases, judged: TransactionCases) -> dict[str, np.ndarray]:
    """Scores of both forms of the peer.

    Args:
      train: Payments to learn from.
      judged: Payments to score, of the same stream.

    Returns:
      By name, one score a payment.
    """
    label, features = train.table.fraud[train.rows], train.history.features
    told = np.concatenate([features, summaries(train.table, train.history.delay)], axis=1)
    return {
        f"LightGBM, {numbers.shape[1]} features": boosted(numbers[train.rows], label, numbers[judged.rows])
        for numbers in (features, told)
    }


def judge(scores: dict[str, np.ndarray], judged: TransactionCases, resamples: int) -> dict[str, dict]:
    """Figures of every scorer, and what the model gains over each other one, on the same resampled days.

    Args:
      scores: By scorer; "r1jax" is the model.
      judged: The payments.
      resamples: Of days.

    Returns:
      By scorer: figures with 95 % intervals, under "gain" those of the differences.
    """
    fraud, amount = judged.table.fraud[judged.rows] == 1, judged.table.amount[judged.rows]
    draw = Draw(resamples, 0, judged.table.seconds[judged.rows] // DAY)

    def measured(score: np.ndarray) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
            ranking = f.rank_fraud(fraud, score.astype(np.float64), amount, weights)
            found = {"auprc": ranking.counts.average_precision(), "auroc": ranking.counts.auc()}
            for rate in f.RATES:
                at = ranking.at_rate(rate)
                found |= {f"{name} {rate:g}": getattr(at, name) for name in ("recall", "precision", "value_recall")}
            return {name: found[name] for name in FIGURES}

        return statistics

    def gain_over(other: np.ndarray) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
            ours, theirs = measured(scores["r1jax"])(weights), measured(other)(weights)
            return {figure: ours[figure] - theirs[figure] for figure in FIGURES}

        return statistics

    result = {}
    for name, score in scores.items():
        result[name] = {"figures": draw.figures(measured(score), len(fraud))}
        if name != "r1jax" and "r1jax" in scores:
            result[name]["gain"] = draw.figures(gain_over(score), len(fraud))
    return result


def table(report: dict) -> str:
    """Figures of the scorers as Markdown."""
    titles = {"auprc": "AUPRC", "auroc": "AUROC", "recall 0.003": "recall at FPR 0.3 %"}
    titles |= {"recall 0.01": "recall at FPR 1 %", "value_recall 0.003": "of the amount"}
    head = f"| scorer | {' | '.join(titles.values())} |"
    lines = [head, "|---" * (1 + len(titles)) + "|"]
    for name, scorer in report["scorers"].items():
        cells = [_cell(scorer["figures"][key]) for key in titles]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    data = report["data"]
    lines.append(f"\n{data['payments']} payments of {data['split']}, {data['frauds']} frauds; 95 % of resampled days.")
    return "\n".join(lines)


def _cell(figure: dict) -> str:
    value, interval = figure_text(figure, "1")
    return f"{value} ({interval.replace(' to ', '-')})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="transactions.parquet of fraud_handbook; else what the config names")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--config", default="configs/finance.py:handbook")
    parser.add_argument("--split", default="val", choices=("val", "test"), help="period that is judged")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of r1jax; 0 judges the peers alone")
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--workdir", default="runs/benchmark-fraud")
    parser.add_argument("--resume", action="store_true", help="keep the trainings that have finished in --workdir")
    parser.add_argument("overrides", nargs="*", help="overrides of train.py, after --")
    args = parser.parse_args()
    words = ["--config", args.config, *(("--data.path", args.data) if args.data else ()), *args.overrides]
    ours, runs = [], []
    for seed in range(args.seeds):
        run = train_run([*words, "--seed", str(seed)], Path(args.workdir) / f"seed{seed}", args.resume)
        found, _, _ = predict(run.checkpoint, args.split, 1024)
        ours.append(found["fraud"])
        runs.append({"seed": seed, "seconds": run.seconds, "payments_per_second": run.examples_per_second})
    config = load_config(words).config
    task = TASKS[config.task.name](config)
    train, judged = task.source("train"), task.source(args.split)
    scores = {"r1jax": np.mean(ours, axis=0)} if ours else {}
    scores |= peers(train, judged)
    labels = judged.table.fraud[judged.rows]
    data = {"split": args.split, "payments": len(judged), "frauds": int(labels.sum()), "learned_from": len(train)}
    result = jax_environment(args) | {"data": data, "runs": runs}
    result["versions"]["lightgbm"] = importlib.metadata.version("lightgbm")
    result["scorers"] = judge(scores, judged, args.resamples)
    for seed, score in enumerate(ours):
        runs[seed]["figures"] = judge({"r1jax": score}, judged, 1)["r1jax"]["figures"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
