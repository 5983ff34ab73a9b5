"""Cross-validates r1jax on the seven ratings of lidc_3d_134, on the folds of `lidc_baselines.py`, beside its best.

    python benchmarks/lidc.py --data DIR --baselines benchmarks/results/lidc_baselines.json \
        --output benchmarks/results/lidc.json

The runs start from the weights that `train.init` names, by default those of the default run, runs/medical: train it
first. Words after `--` are overrides of train.py (`--train.init None` starts from scratch). Nothing is chosen on a
held-out fold: its predictions are those of the last checkpoint's averaged weights. Predictions of the held-out folds
are pooled, figures taken over all cases; the rating is the median of the predicted distribution, the score its expected
value. The headline is the mean over the model seeds on fold seed 0, its interval the bootstrap over cases of that mean.
An ensemble (mean of the seeds' probabilities) is a row of its own. `--fold-seeds` cuts the folds anew, as `--seeds` of
lidc_baselines.py does.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment, predict, train_run  # noqa: E402
from benchmarks.lidc_baselines import CONSTANTS, FOLDS, RATINGS, best, statistics, texture_class  # noqa: E402
from r1jax.cli import load_config  # noqa: E402
from r1jax.data.folder import FolderCases  # noqa: E402
from r1jax.errors import UserError, run_main  # noqa: E402
from r1jax.fields import to_dict  # noqa: E402
from r1jax.tasks.metrics import bootstrap  # noqa: E402

Chances = dict[str, np.ndarray]
"""Probabilities [n, levels] of each rating."""
Figures = Callable[[np.ndarray], dict[str, np.ndarray]]


# ---- training -------------------------------------------------------------------------------------------------------


def command(args: argparse.Namespace, fold_seed: int, seed: int, fold: int) -> list[str]:
    """Command line of train.py; only the last step is validated and saved, unless an override says otherwise."""
    words = ["--config", "configs/medical.py:lidc_3d", "--data.path", str(args.data)]
    steps = str(load_config([*words, *args.overrides]).config.train.steps)
    words += ["--train.eval_every", steps, "--train.save_every", steps, *args.overrides]
    words += ["--seed", str(seed), "--data.seed", str(fold_seed)]
    return [*words, "--data.fold", str(fold), "--data.folds", str(args.folds)]


def cross_validate(args: argparse.Namespace, fold_seed: int, seed: int, case_id: list[str]) -> tuple[Chances, list]:
    """Pooled predictions of the held-out folds in the order of `case_id`, and what each fold took."""
    row = {case: index for index, case in enumerate(case_id)}
    pooled: Chances = {}
    times, held_out = np.zeros(len(case_id), int), []
    for fold in range(args.folds):
        folder = args.workdir / f"folds{args.folds}-{fold_seed}" / f"seed{seed}-fold{fold}"
        run = train_run(command(args, fold_seed, seed, fold), folder, args.resume)
        found, _, ids = predict(run.checkpoint, "val", run.checkpoint.config().train.batch_size)
        rows = [row[case] for case in ids]
        times[rows] += 1
        for name in RATINGS:
            pooled.setdefault(name, np.zeros((len(case_id), found[name].shape[1])))[rows] = found[name]
        key = {"fold_seed": fold_seed, "seed": seed, "fold": fold, "held_out": len(rows)}
        held_out.append(key | {"seconds": run.seconds, "cases_per_second": run.examples_per_second})
    assert (times == 1).all(), "each case is held out once"
    return pooled, held_out


# ---- figures --------------------------------------------------------------------------------------------------------


def read(chance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Median rating, expected rating and most likely texture class, as lidc_baselines.py reads a classifier."""
    levels = np.arange(1, chance.shape[1] + 1)
    median = levels[(chance.cumsum(1) >= 0.5 - 1e-9).argmax(1)]
    return median.astype(float), chance @ levels, (chance @ np.eye(3)[texture_class(levels)]).argmax(1)


def mean_of(computes: list[Figures]) -> Figures:
    """Mean over the seeds of each figure, on the same resamples."""

    def compute(weights: np.ndarray) -> dict[str, np.ndarray]:
        found = [one(weights) for one in computes]
        return {figure: np.mean([row[figure] for row in found], axis=0) for figure in found[0]}

    return compute


def plain(compute: Figures, cases: int) -> dict[str, float]:
    return {figure: float(value[0]) for figure, value in compute(np.ones((1, cases))).items()}


def spread(rows: list[dict[str, float]]) -> dict[str, dict]:
    """Mean and sample standard deviation of each figure; None for that of a single row."""
    values = {figure: np.array([row[figure] for row in rows]) for figure in rows[0]}
    return {k: {"mean": v.mean(), "sd": v.std(ddof=1) if len(v) > 1 else None} for k, v in values.items()}


def judge(name: str, truth: np.ndarray, predicted: dict[int, list[np.ndarray]], resamples: int) -> dict:
    """Figures of one rating.

    Args:
      name: The rating.
      truth: The reader's [n].
      predicted: For each fold seed the pooled probabilities [n, levels] of each model seed.
      resamples: Of the bootstrap.
    """
    computes = {cut: [statistics(name, truth, *read(one)) for one in seeds] for cut, seeds in predicted.items()}
    per_cut = [plain(mean_of(seeds), len(truth)) for seeds in computes.values()]
    joined = statistics(name, truth, *read(np.mean(predicted[0], axis=0)))

    def interval(compute: Figures) -> dict[str, dict]:
        return {k: v._asdict() for k, v in bootstrap(compute, len(truth), resamples=resamples).items()}

    return {
        "mean_over_seeds": interval(mean_of(computes[0])),
        "seeds": spread([plain(one, len(truth)) for one in computes[0]]),
        "fold_seeds": spread(per_cut),
        "ensemble": interval(joined) if len(computes[0]) > 1 else None,
    }


def comparison(baselines: dict) -> dict:
    """Best image baseline and best constant of each rating and figure."""
    picked: dict = {}
    for rating, kinds in baselines["results"].items():
        image = kinds["image"]
        learned = {name: row for name, row in image.items() if name not in CONSTANTS}
        constant = {name: image[name] for name in CONSTANTS}
        picked[rating] = {}
        for figure in image["median"]["seed_0"]:
            named = {kind: best(rows, figure) for kind, rows in (("image", learned), ("constant", constant))}
            picked[rating][figure] = {kind: {"name": name} | value for kind, (name, value) in named.items()}
    return picked


# ---- report ---------------------------------------------------------------------------------------------------------


def table(report: dict) -> str:
    """r1jax beside the best baseline of each figure, which was chosen after the fact."""
    seeds, cuts, beside = report["seeds"], report["fold_seeds"], report.get("baselines")
    head = ["rating", "figure", f"r1jax, mean of {seeds} seeds (95 % interval)", "sd of seeds"]
    head += [f"{cuts} cuts into folds: mean ± sd"] * (cuts > 1) + [f"ensemble of {seeds} seeds"] * (seeds > 1)
    head += ["best image baseline (95 % interval)", "best constant"] * bool(beside)

    def ranged(value: dict) -> str:
        return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"

    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for rating, found in report["results"].items():
        for figure, value in found["mean_over_seeds"].items():
            sd, cut = found["seeds"][figure]["sd"], found["fold_seeds"][figure]
            cells = [rating, figure, ranged(value), "" if sd is None else f"{sd:.3f}"]
            if cuts > 1:
                cells.append(f"{cut['mean']:.3f} ± {cut['sd']:.3f}")
            if seeds > 1:
                cells.append(ranged(found["ensemble"][figure]))
            if beside:
                image, constant = beside[rating][figure]["image"], beside[rating][figure]["constant"]
                cells += [f"{ranged(image)} {image['name']}", f"{constant['value']:.3f} {constant['name']}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rounded(values: dict) -> dict:
    return json.loads(json.dumps(values), parse_float=lambda number: round(float(number), 4))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder lidc_3d_134")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--baselines", type=Path, help="JSON of lidc_baselines.py, to print beside")
    parser.add_argument("--seeds", type=int, default=5, help="of the model: weights, dropout, augmentation")
    parser.add_argument("--fold-seeds", type=int, default=1, help="cuts into folds; 0 is the headline")
    parser.add_argument("--folds", type=int, default=FOLDS)
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmark-lidc"))
    parser.add_argument("--resume", action="store_true", help="keep the runs that finished in --workdir")
    parser.add_argument("overrides", nargs="*", help="overrides of train.py, after --")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    source = FolderCases.open(args.data)
    batch = source.read_batch(np.arange(len(source)))
    beside = json.loads(args.baselines.read_text()) if args.baselines else None
    for field, mine in (("folds", args.folds), ("fingerprint", source.fingerprint)):
        if beside and beside[field] != mine:
            raise UserError(f"{args.baselines} has {field} {beside[field]}, not {mine}: run lidc_baselines.py on these")
    predicted: dict[int, list[Chances]] = {}
    runs: list[dict] = []
    for cut in range(args.fold_seeds):
        for seed in range(args.seeds):
            pooled, told = cross_validate(args, cut, seed, batch["case_id"])
            predicted.setdefault(cut, []).append(pooled)
            runs += told
    results = {}
    for name in RATINGS:
        chances = {cut: [one[name] for one in seeds] for cut, seeds in predicted.items()}
        results[name] = judge(name, batch[f"target.{name}"].astype(np.float64), chances, args.resamples)
    config = to_dict(load_config(command(args, 0, 0, 0)).config)
    config["data"]["path"] = args.data.resolve().name
    report = jax_environment(args) | {
        "seconds": round(sum(run["seconds"] for run in runs), 1),
        "folds": args.folds,
        "fold_seeds": args.fold_seeds,
        "seeds": args.seeds,
        "resamples": args.resamples,
        "cases": len(source),
        "fingerprint": source.fingerprint,
        "config": config,
        "results": rounded(results),
        "baselines": comparison(beside) if beside else None,
        "runs": rounded(runs),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    run_main(main)
