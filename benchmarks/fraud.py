"""Fraud scores of r1jax beside gradient boosting, on the same payments and the same information.

    python benchmarks/fraud.py --data DIR --output benchmarks/results/fraud.json

All learn from the training period of configs/finance.py:handbook, with the same genuine payments left out, and are
judged on every payment of `--split`; `--score LATER.parquet` also judges them on a later file, with DIR as its history.
The peer is LightGBM, on the handbook's fifteen features and on all that the model's table holds; its settings and
number of trees were chosen on an earlier week. No step is chosen: the figures are those of the last checkpoint's
averaged weights, and the scores of all seeds are averaged as the peer's are. The JSON is written after the peers and
after each training; `--resume` takes what has finished in `--workdir` as it is, so that processes side by side on one
GPU can each train one of the `--seeds`, and a last one joins them:

    for s in 0 1 2; do python benchmarks/fraud.py --data DIR --seeds $s --output $s.json & done; wait
    python benchmarks/fraud.py --data DIR --resume --output benchmarks/results/fraud.json

(with XLA_PYTHON_CLIENT_MEM_FRACTION=.2). Words after `--` are overrides of train.py.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment, predict, train_run  # noqa: E402
from r1jax.cli import load_config  # noqa: E402
from r1jax.config import Config  # noqa: E402
from r1jax.data.transaction_cases import TransactionCases  # noqa: E402
from r1jax.data.transaction_history import HANDBOOK  # noqa: E402
from r1jax.data.transactions import DAY  # noqa: E402
from r1jax.parallel.platform import start_platform  # noqa: E402
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


def boosted(train: np.ndarray, label: np.ndarray, judged: list[np.ndarray]) -> list[np.ndarray]:
    """Scores of LightGBM, the mean of its seeds.

    Args:
      train: Numbers of the payments to learn from, a row each.
      label: 1 is fraud.
      judged: The same of those to score, period by period.

    Returns:
      Of each period, one score a payment.
    """
    import lightgbm

    models = [
        lightgbm.train(BOOSTING | {"seed": seed}, lightgbm.Dataset(train, label), TREES) for seed in range(PEER_SEEDS)
    ]
    return [np.mean([model.predict(numbers) for model in models], axis=0) for numbers in judged]


class Period(NamedTuple):
    """Payments that are judged."""

    name: str
    split: str
    config: Config
    """What reads them."""
    cases: TransactionCases


def peers(train: TransactionCases, periods: list[Period]) -> list[dict[str, np.ndarray]]:
    """Scores of both forms of the peer.

    Args:
      train: Payments to learn from.
      periods: What to score.

    Returns:
      Of each period, by name, one score a payment.
    """
    label, features = train.table.fraud[train.rows], train.history.features[train.rows]
    found: list[dict[str, np.ndarray]] = [{} for _ in periods]
    for columns in (len(HANDBOOK), features.shape[1]):
        judged = [period.cases.history.features[period.cases.rows, :columns] for period in periods]
        for scores, score in zip(found, boosted(features[:, :columns], label, judged), strict=True):
            scores[f"LightGBM, {columns} features"] = score
    return found


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

    def measured(score: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        ranking = f.rank_fraud(fraud, score.astype(np.float64), amount, weights)
        found = {"auprc": ranking.counts.average_precision(), "auroc": ranking.counts.auc()}
        for rate in f.RATES:
            at = ranking.at_rate(rate)
            found |= {f"{name} {rate:g}": getattr(at, name) for name in ("recall", "precision", "value_recall")}
        return found

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = {name: measured(score, weights) for name, score in scores.items()}
        told = {f"{name}/figures/{key}": found[name][key] for name in scores for key in FIGURES}
        for name in set(scores) - {"r1jax"} if "r1jax" in scores else ():
            told |= {f"{name}/gain/{key}": found["r1jax"][key] - found[name][key] for key in FIGURES}
        return told

    drawn = Draw(resamples, 0, judged.table.seconds[judged.rows] // DAY).figures(statistics, len(fraud))
    result: dict[str, dict] = {name: {} for name in scores}
    for path, figure in drawn.items():
        name, kind, key = path.split("/")
        result[name].setdefault(kind, {})[key] = figure
    return result


def judged_on(period: Period, scores: dict[str, np.ndarray], learned_from: int, resamples: int) -> dict:
    """What is told of a period: how many payments, and the figures of the scorers."""
    labels = period.cases.table.fraud[period.cases.rows]
    data = {"split": period.name, "payments": len(period.cases), "frauds": int(labels.sum())}
    return {"data": data | {"learned_from": learned_from}, "scorers": judge(scores, period.cases, resamples)}


def table(report: dict) -> str:
    """Figures of the scorers as Markdown, of the period and, where there is one, of the later file."""
    titles = {"auprc": "AUPRC", "auroc": "AUROC", "recall 0.003": "recall at FPR 0.3 %"}
    titles |= {"recall 0.01": "recall at FPR 1 %", "value_recall 0.003": "of the amount"}
    lines = []
    for told in (report, *([report["later"]] if "later" in report else [])):
        lines += ["", f"| scorer | {' | '.join(titles.values())} |", "|---" * (1 + len(titles)) + "|"]
        for name, scorer in told["scorers"].items():
            cells = [_cell(scorer["figures"][key]) for key in titles]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        data = told["data"]
        lines += [
            "",
            f"{data['payments']} payments of {data['split']}, {data['frauds']} frauds; 95 % of resampled days.",
        ]
    return "\n".join(lines[1:])


def _cell(figure: dict) -> str:
    value, interval = figure_text(figure, "1")
    return f"{value} ({interval.replace(' to ', '-')})"


def _periods(words: list[str], split: str, later: str | None) -> tuple[TransactionCases, list[Period]]:
    """Payments to learn from, and those that are judged."""
    config = load_config(words).config
    task = TASKS[config.task.name](config)
    periods = [Period(split, split, config, task.source(split))]
    if later:
        if config.data.path is None:
            raise SystemExit("--score needs --data: a later file continues the one that was learned from")
        history = (*config.task.finance.history, config.data.path)
        after = load_config([*words, "--data.path", later, "--task.finance.history", *history]).config
        periods.append(Period("the later file", "all", after, TASKS[after.task.name](after).source("all")))
    return task.source("train"), periods


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder or file of fraud_handbook; else what the config names")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--config", default="configs/finance.py:handbook")
    parser.add_argument("--split", default="val", choices=("val", "test"), help="period that is judged")
    parser.add_argument("--score", metavar="LATER", help="later file with labels, that is judged too")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of the trainings; none: peers alone")
    parser.add_argument("--resamples", type=int, default=500)
    parser.add_argument("--workdir", default="runs/benchmark-fraud")
    parser.add_argument("--resume", action="store_true", help="keep the trainings that have finished in --workdir")
    parser.add_argument("overrides", nargs="*", help="overrides of train.py, after --")
    args = parser.parse_args()
    words = ["--config", args.config, *(("--data.path", args.data) if args.data else ()), *args.overrides]
    began = time.perf_counter()
    start_platform(load_config(words).config.platform)
    train, periods = _periods(words, args.split, args.score)
    scores = peers(train, periods)
    ours: list[list[np.ndarray]] = [[] for _ in periods]
    runs: list[dict] = []

    def write() -> None:
        told = [judged_on(*pair, len(train), args.resamples) for pair in zip(periods, scores, strict=True)]
        result = jax_environment(args) | told[0] | {"runs": runs}
        result |= {"later": told[1]} if args.score else {}
        result["versions"]["lightgbm"] = importlib.metadata.version("lightgbm")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        draft = args.output.with_suffix(".part")
        draft.write_text(json.dumps(result, indent=1) + "\n")
        draft.replace(args.output)  # so that what stands there is whole, whenever the run is cut off
        print(f"{table(result)}\n{time.perf_counter() - began:.0f} s, {len(runs)} trainings\n", flush=True)

    write()
    for seed in args.seeds:
        run = train_run([*words, "--seed", str(seed)], Path(args.workdir) / f"seed{seed}", args.resume)
        runs.append({"seed": seed, "seconds": run.seconds, "payments_per_second": run.examples_per_second})
        for i, period in enumerate(periods):
            ours[i].append(predict(run.checkpoint, period.split, 1024, config=period.config)[0]["fraud"])
            scores[i] = {"r1jax": np.mean(ours[i], axis=0)} | {k: v for k, v in scores[i].items() if k != "r1jax"}
            alone = judge({"r1jax": ours[i][-1]}, period.cases, 1)["r1jax"]["figures"]
            runs[-1]["figures" if i == 0 else "later"] = {name: figure["value"] for name, figure in alone.items()}
        write()


if __name__ == "__main__":
    main()
