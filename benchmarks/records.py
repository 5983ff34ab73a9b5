"""The records task beside the strongest simple models, on the same records of the same parts.

    python benchmarks/records.py --data DIR --output benchmarks/results/records.json --seeds 3 --folds 10

DIR holds uci_default, fpb and stocknet as docs/records.md names their files. Missed payments are judged on a fold of
five beside LightGBM, stocks on August and September 2015, and on four earlier periods, beside logistic regression and
LightGBM, and sentences on the folds of ten together beside TF-IDF with a linear SVM, which learns from the file alone
and again from all that `task.agreement` lets the model learn from. No step is chosen: the probabilities are those of
the last checkpoint as eval.py writes them, averaged over the seeds as LightGBM's are. The JSON is written after each
set. Words after `--` are overrides of train.py.
"""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval as scoring  # noqa: E402
from benchmarks.common import jax_environment, train_run  # noqa: E402
from benchmarks.records_peers import boosted, stock_peers, svm  # noqa: E402
from r1jax.cli import load_config  # noqa: E402
from r1jax.data.pipeline import original  # noqa: E402
from r1jax.data.records import RecordCases  # noqa: E402
from r1jax.data.stock_files import EARLIER  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.tasks.intervals import Draw, figure_text  # noqa: E402
from r1jax.tasks.records.figures import statistics  # noqa: E402
from r1jax.tasks.records.task import KINDS  # noqa: E402


class Set(NamedTuple):
    """A data set, where it lies, and what stands beside the model."""

    variant: str
    """Of configs/records.py."""
    path: str
    """Below `--data`."""
    peers: Callable[[RecordCases, RecordCases], dict[str, np.ndarray]]
    shown: tuple[str, ...]
    """Figures of the table."""
    folded: bool = False
    """Whether every fold is judged once, or one part alone."""
    words: tuple[str, ...] = ()
    """Further words of train.py."""


SETS = {
    "uci_default": Set("", "uci_default/uci_default.parquet", boosted, ("auroc", "auprc", "ks", "brier")),
    "fpb 50Agree": Set(":sentiment", "fpb/Sentences_50Agree.txt", svm, ("accuracy", "macro_f1"), folded=True),
    "fpb AllAgree": Set(":sentiment", "fpb/Sentences_AllAgree.txt", svm, ("accuracy", "macro_f1"), folded=True),
    "stocknet": Set(":stocks", "stocknet", stock_peers, ("auroc", "auprc", "ks", "brier")),
} | {
    f"stocknet from {start[:7]}": Set(
        ":stocks", "stocknet", stock_peers, ("auroc", "auprc", "ks", "brier"), words=("--data.fold", str(fold))
    )
    for fold, start in enumerate(EARLIER[:-1])
}
OURS = {"both": "r1jax", "numbers": "r1jax, numbers alone", "text": "r1jax, text alone"}


class Judged(NamedTuple):
    """A part that was scored."""

    label: np.ndarray
    groups: np.ndarray | None
    """Day of each record; None where records are independent."""
    scores: dict[str, np.ndarray]
    """By scorer, the probability of each class."""
    seeds: list[np.ndarray]
    """What each training of the model says alone."""
    runs: list[dict[str, Any]]


def judge_part(words: list[str], chosen: Set, args: argparse.Namespace, folder: Path) -> Judged:
    """Trains and scores on one part.

    Args:
      words: Command line of train.py without seed and folder.
      chosen: The set.
      args: Of this script.
      folder: For the runs.

    Returns:
      What the model and its peers say.
    """
    runs, told = [], []
    for seed in range(args.seeds):
        workdir = folder / f"seed{seed}"
        run = train_run([*words, "--seed", str(seed)], workdir, args.resume)
        if code := scoring.main(["--checkpoint", str(workdir), "--resamples", "1", "--batch-size", "256"]):
            raise SystemExit(code)
        told.append(
            _probabilities(workdir / "eval/scores.parquet", KINDS[run.checkpoint.config().task.records].classes)
        )
        runs.append({"folder": folder.name, "seed": seed, "seconds": run.seconds})
    config = load_config(words).config
    task = TASKS[config.task.name](config)
    train, judged = (original(task.source(split)) for split in ("train", "val"))  # peers read the sentences as they are
    scores = {OURS[mode]: np.mean([one[mode] for one in told], axis=0) for mode in told[0]} if told else {}
    scores |= chosen.peers(train, judged)
    days, rows = judged.records.day, judged.rows
    groups = None if days is None else days[rows]
    return Judged(judged.records.label[rows], groups, scores, [one["both"] for one in told], runs)


def _probabilities(path: Path, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """By mode, what eval.py wrote."""
    table = pq.read_table(path)
    modes = dict.fromkeys(name.partition(".")[0] for name in table.column_names if "." in name)
    return {mode: np.stack([table[f"{mode}.{name}"].to_numpy() for name in classes], axis=1) for mode in modes}


def judge_set(chosen: Set, args: argparse.Namespace, folder: Path) -> Judged:
    """Trains and scores on one set, of several folds together where they are asked for.

    Args:
      chosen: The set.
      args: Of this script.
      folder: For the runs.

    Returns:
      What the model and its peers say of all judged records.
    """
    words = ["--config", f"configs/records.py{chosen.variant}", "--data.path", str(Path(args.data) / chosen.path)]
    words += [*chosen.words, *args.overrides]
    if not chosen.folded:
        return judge_part(words, chosen, args, folder)
    parts = [
        judge_part([*words, "--data.folds", str(args.of), "--data.fold", str(fold)], chosen, args, folder / f"{fold}")
        for fold in range(args.folds)
    ]
    return Judged(
        np.concatenate([part.label for part in parts]),
        None,
        {name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores},
        [np.concatenate(alone) for alone in zip(*(part.seeds for part in parts), strict=True)],
        [run for part in parts for run in part.runs],
    )


def figures(judged: Judged, resamples: int) -> dict[str, Any]:
    """Figures of every scorer, and what the model gains over each other one on the same resamples.

    Args:
      judged: What was said.
      resamples: Of records, or of days.

    Returns:
      JSON: "scorers", by name "figures" and "gain"; "seeds", the figures of each training alone.
    """
    draw, n = Draw(resamples, 0, judged.groups), len(judged.label)
    found: dict[str, Any] = {}
    for name, score in judged.scores.items():
        own = statistics(judged.label, score)
        found[name] = {"figures": draw.figures(own, n)}
        if name != OURS["both"] and OURS["both"] in judged.scores:
            found[name]["gain"] = draw.figures(_gain(statistics(judged.label, judged.scores[OURS["both"]]), own), n)
    alone = [statistics(judged.label, score)(np.ones((1, n))) for score in judged.seeds]
    return {"scorers": found, "seeds": [{name: float(value[0]) for name, value in one.items()} for one in alone]}


def _gain(ours: Callable, theirs: Callable) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    def statistics_of(weights: np.ndarray) -> dict[str, np.ndarray]:
        one, other = ours(weights), theirs(weights)
        return {name: one[name] - other[name] for name in one}

    return statistics_of


def table(report: dict) -> str:
    """Figures of every set as Markdown."""
    lines = []
    for name, measured in report["sets"].items():
        shown = SETS[name].shown
        lines += [
            "",
            f"| {name} | {' | '.join(shown)} | gain of r1jax in {shown[0]} |",
            "|---" * (2 + len(shown)) + "|",
        ]
        for scorer, told in measured["scorers"].items():
            cells = [_cell(told["figures"][key]) for key in shown]
            gain = _cell(told["gain"][shown[0]]) if "gain" in told else ""
            lines.append(f"| {scorer} | {' | '.join(cells)} | {gain} |")
        alone = ", ".join(f"{seed[shown[0]]:.3f}" for seed in measured["seeds"])
        counts = ", ".join(f"{count} {kind}" for kind, count in measured["counts"].items())
        lines += ["", f"{counts}; {shown[0]} of each training alone: {alone or 'none was trained'}."]
    return "\n".join(lines[1:])


def _cell(figure: dict) -> str:
    value, interval = figure_text(figure, "1")
    return f"{value} ({interval})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each part; 0 judges the peers alone")
    parser.add_argument("--of", type=int, default=10, help="folds of the sentences")
    parser.add_argument("--folds", type=int, default=10, help="of them, how many are judged")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--workdir", default="runs/benchmark-records")
    parser.add_argument("--resume", action="store_true", help="keep the trainings that have finished in --workdir")
    parser.add_argument("overrides", nargs="*", help="overrides of train.py, after --")
    args = parser.parse_args()
    report: dict[str, Any] = {"sets": {}}
    for name in args.sets:
        judged = judge_set(SETS[name], args, Path(args.workdir) / name.replace(" ", "-"))
        kind = load_config(["--config", f"configs/records.py{SETS[name].variant}"]).config.task.records
        counts = np.bincount(judged.label, minlength=len(KINDS[kind].classes))
        told = {"counts": dict(zip(KINDS[kind].classes, counts.tolist(), strict=True)), "runs": judged.runs}
        report["sets"][name] = told | figures(judged, args.resamples)
        environment = jax_environment(args)
        versions = {one: importlib.metadata.version(one) for one in ("lightgbm", "scikit-learn")}
        environment["versions"] |= versions
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(environment | report, indent=1) + "\n")
        print(table({"sets": {name: report["sets"][name]}}), flush=True)


if __name__ == "__main__":
    main()
