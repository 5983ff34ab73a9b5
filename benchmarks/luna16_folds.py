"""Compares settings of r1jax on luna16_fpr_2d by parts of its training part: nothing is chosen on the validation part.

    python benchmarks/luna16_folds.py --data DIR --output benchmarks/results/luna16_folds.json --jobs 5

The training part is cut into four blocks of candidate rows, which are in the order of the scans: at most one scan lies
on each border. A variant is trained on three blocks, in a process of its own, and judged on the fourth, by its last
averaged weights and the mean of eight views (which are the same view to a symmetric encoder). Gains over the plain
encoder have the standard error of a paired bootstrap over the cases. Each result is written as soon as it is there;
words after `--` are overrides of train.py for all variants.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.children import run_at_once, tell  # noqa: E402
from benchmarks.luna16_peers import figures  # noqa: E402

BLOCKS = 4
SYMMETRIC = "--model.image.symmetric=true"
COARSE = (
    *(SYMMETRIC, "--model.image.stem_stride=2"),
    *("--model.image.widths", "128", "256", "512"),
    *("--model.image.blocks", "2", "4", "2"),
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "symmetric": (SYMMETRIC,),
    "symmetric x1.5": (SYMMETRIC, "--model.image.widths", "72", "144", "288", "576"),
    "symmetric coarse": COARSE,
    "symmetric coarse, skipped": (*COARSE, "--model.image.skipped=0.1"),
    "symmetric, rate x2": (SYMMETRIC, "--train.learning_rate=1e-3", "--train.final_learning_rate=1e-5"),
    "symmetric x2": (SYMMETRIC, "--model.image.widths", "96", "192", "384", "768"),
    "plain, skipped": ("--model.image.skipped=0.1",),
}
"""Overrides of each variant; coarse reads the image at half its resolution, with more kernels."""
GAINS = ("auc", "average_precision", "log_loss")
RESAMPLES = 300


def cut(folder: Path, block: int, into: Path) -> Path:
    """Writes the training part with one block of scans marked as validation.

    Args:
      folder: luna16_fpr_2d.
      block: Which of the blocks.
      into: Where the new folder goes.

    Returns:
      The new folder.
    """
    (path,) = folder.glob("*.npz")
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    train = np.flatnonzero(arrays["split"] == 0)
    arrays = {name: values[train] for name, values in arrays.items()}
    place = np.argsort(np.argsort(arrays["candidate_row"], kind="stable"), kind="stable")
    arrays["split"] = (place * BLOCKS // len(train) == block).astype(np.int8)
    target = into / f"block{block}"
    target.mkdir(parents=True, exist_ok=True)
    np.savez(target / path.name, **arrays)
    return target


def judge(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Figures of probabilities."""
    likely = np.clip(np.where(labels > 0, scores, 1 - scores), 1e-7, 1)
    return figures(labels, scores) | {"log_loss": float(-np.log(likely).mean())}


def train_variant(name: str, block: int, args: argparse.Namespace) -> dict:
    """Trains a variant beside one block and scores that; in a process of its own."""
    from benchmarks.common import jax_environment, predict, train_run

    workdir = Path(args.workdir) / f"{name.replace(' ', '-').replace(',', '')}-{block}"
    data = cut(Path(args.data), block, workdir.parent / "data" / workdir.name)
    words = ["--config", "configs/medical.py:luna16_fpr_2d", "--data.path", str(data), "--seed", str(args.seed)]
    words += ["--data.seed", str(args.seed), "--train.steps", str(args.steps)]
    words += ["--train.warmup_steps", str(max(1, args.steps // 30))]
    words += ["--train.eval_every", str(args.steps), "--train.save_every", str(args.steps)]
    words += [*VARIANTS[name], *args.overrides]
    run = train_run(words, workdir)
    found, targets, ids = predict(run.checkpoint, "val", 256, 1 if SYMMETRIC in VARIANTS[name] else 8)
    order = np.argsort(ids)
    labels, scores = targets["nodule_present"][order], found["nodule_present"][order]
    told = {"variant": name, "block": block, "seconds": run.seconds, "images_per_second": run.examples_per_second}
    told |= {"figures": judge(labels, scores), "labels": labels.astype(int).tolist()}
    return {"run": told | {"scores": np.round(scores.astype(float), 6).tolist()}, "environment": jax_environment(args)}


def gains(runs: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """What each variant gains over the first of all, mean over the blocks that both have, with its standard error."""
    rng, first = np.random.default_rng(0), next(iter(VARIANTS))
    found: dict[str, dict[str, dict[str, float]]] = {}
    base = {run["block"]: run for run in runs if run["variant"] == first}
    for name in dict.fromkeys(run["variant"] for run in runs if run["variant"] != first):
        pairs = [(run, base[run["block"]]) for run in runs if run["variant"] == name and run["block"] in base]
        if not pairs:
            continue
        drawn: dict[str, list[np.ndarray]] = {figure: [] for figure in GAINS}
        for run, other in pairs:
            labels = np.array(run["labels"])
            both = [np.array(one["scores"]) for one in (run, other)]
            rows = [np.arange(len(labels)), *rng.integers(0, len(labels), (RESAMPLES, len(labels)))]
            judged = [[judge(labels[row], scores[row]) for scores in both] for row in rows]
            for figure in GAINS:
                drawn[figure].append(np.array([ours[figure] - theirs[figure] for ours, theirs in judged]))
        means = {figure: np.mean(values, axis=0) for figure, values in drawn.items()}
        found[name] = {k: {"value": float(v[0]), "error": float(v[1:].std(ddof=1))} for k, v in means.items()}
    return found


def table(report: dict) -> str:
    """Figures of each variant, mean over its blocks, and gains over the plain encoder."""
    lines = ["| variant | blocks | AUC | AP | log loss | gain in AUC | gain in AP | images/s |", "|---|" + "---|" * 7]
    for name in dict.fromkeys(run["variant"] for run in report["runs"]):
        runs = [run for run in report["runs"] if run["variant"] == name]
        mean = {figure: np.mean([run["figures"][figure] for run in runs]) for figure in GAINS}
        gain = report["gains"].get(name)
        more = [f"{gain[k]['value']:+.4f} ± {gain[k]['error']:.4f}" if gain else "" for k in GAINS[:2]]
        speed = np.mean([run["images_per_second"] for run in runs])
        cells = [name, str(len(runs)), *(f"{mean[k]:.4f}" for k in GAINS), *more, f"{speed:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder luna16_fpr_2d")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:5])
    parser.add_argument("--blocks", type=int, nargs="+", choices=range(BLOCKS), default=[0])
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side on one device")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that each may take")
    parser.add_argument("--workdir", default="runs/benchmark-luna16-folds")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --output already holds")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="overrides of train.py, after --")
    args = parser.parse_args()
    if child := vars(args).pop("child"):
        del sys.argv[1:4]  # the command that is told is the parent's
        tell(train_variant(child[0], int(child[1]), args))
        return
    began = time.perf_counter()
    report: dict = {"runs": [], "gains": {}}
    if args.resume and args.output.exists():
        report = json.loads(args.output.read_text())
    runs: list[dict] = report["runs"]
    had = {(run["variant"], run["block"]) for run in runs}
    left = [(name, block) for block in args.blocks for name in args.variants if (name, block) not in had]
    commands = {f"{n}, block {b}": [__file__, "--child", n, str(b), *sys.argv[1:]] for n, b in left}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name, told in run_at_once(commands, jobs=args.jobs, timeout=args.timeout):
        if "error" in told:
            print(f"{name}: {told['error']}", flush=True)
            continue
        runs.append(told["run"])
        runs.sort(key=lambda run: (list(VARIANTS).index(run["variant"]), run["block"]))
        report = told["environment"] | {"seconds": time.perf_counter() - began, "runs": runs, "gains": {}}
        args.output.write_text(json.dumps(report))
        print(f"{name}: {told['run']['figures']} after {report['seconds']:.0f} s", flush=True)
    report["gains"] = gains(runs)
    args.output.write_text(json.dumps(report))
    print(table(report))


if __name__ == "__main__":
    main()
