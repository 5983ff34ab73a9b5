"""Compares settings of r1jax on luna16_fpr_2d by parts of its training part: nothing is chosen on the validation part.

    python benchmarks/luna16_folds.py --data DIR --output benchmarks/results/luna16_folds.json --jobs 3 --devices 4 \\
        --variants model.image.norm=cell model.image.norm=picture densenet121

The training part is cut into four blocks of candidate rows, which are in the order of the scans: at most one scan lies
on each border. A variant is trained on three blocks, in a process of its own, and judged on the fourth, by its averaged
weights after the last step and the mean of eight views. It is named by the overrides of train.py that make it, or by a
network of luna16_peers.py, which is trained as DenseNet-121 was best there. The first is what the others are held
against. Each result is written as soon as it is there.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.children import compare, variant_options  # noqa: E402
from benchmarks.luna16_peers import FIGURES, NETWORKS, figures  # noqa: E402
from benchmarks.luna16_peers import main as train_peer  # noqa: E402
from r1jax.errors import UserError, run_main  # noqa: E402

BLOCKS, BATCH = 4, 128
PEER = ["--learning-rates", "1e-3", "--stems", "stride4", "--seeds", "1", "--views", "8"]
"""Settings of luna16_peers.py: those that it found best for DenseNet-121."""


def cut(folder: Path, block: int, into: Path) -> Path:
    """Writes the training part with one block of scans marked as validation.

    Args:
      folder: luna16_fpr_2d.
      block: Which of the blocks.
      into: The new folder.

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
    into.mkdir(parents=True, exist_ok=True)
    np.savez(into / path.name, **arrays)
    return into


def train_variant(name: str, block: int, args: argparse.Namespace) -> dict:
    """Trains a variant beside one block and scores that; in a process of its own."""
    folder = Path(args.workdir) / f"{name.replace(' ', '-')}-{block}"
    data = cut(Path(args.data), block, folder / "data")
    told = _peer(name, data, folder, args) if name in NETWORKS else _ours(name, data, folder, args)
    return told | {"run": {"variant": name, "block": block} | told["run"]}


def _peer(name: str, data: Path, folder: Path, args: argparse.Namespace) -> dict:
    output = folder / "peer.json"
    train_peer(["--data", str(data), "--models", name, "--epochs", str(args.epochs), "--output", str(output), *PEER])
    told = json.loads(output.read_text())
    (run,) = told["models"][name]["runs"]
    found = {"seconds": run["seconds"], "figures": run["views"]["8"]}
    return {"run": found, "environment": {key: told[key] for key in ("command", "hardware", "versions")}}


def _ours(name: str, data: Path, folder: Path, args: argparse.Namespace) -> dict:
    from benchmarks.common import jax_environment, predict, train_run
    from r1jax.data.folder import FolderCases

    steps = args.epochs * (len(FolderCases.open(data, "train")) // BATCH)
    words = ["--config", "configs/medical.py:luna16_fpr_2d", "--data.path", str(data)]
    words += ["--train.steps", str(steps), "--train.warmup_steps", str(max(1, steps // 30))]
    words += ["--train.eval_every", str(steps), "--train.save_every", str(steps), "--train.batch_size", str(BATCH)]
    run = train_run([*words, *(f"--{word}" for word in name.split()), *args.overrides], folder / "run")
    found, targets, _ = predict(run.checkpoint, "val", 256, 8)
    judged = figures(targets["nodule_present"], found["nodule_present"])
    return {"run": {"seconds": run.seconds, "figures": judged}, "environment": jax_environment(args)}


def table(runs: list[dict]) -> str:
    """Mean of each variant over its blocks, and its gain over the first on the blocks that both have."""
    lines = ["| variant | blocks | AUC | AP | sens at spec .973 | gain in AUC | gain in AP |", "|---|" + "---|" * 6]
    by_name: dict[str, dict[int, dict]] = {}
    for run in runs:
        by_name.setdefault(run["variant"], {})[run["block"]] = run["figures"]
    first = next(iter(by_name.values()))
    for name, blocks in by_name.items():
        cells = [name, str(len(blocks))]
        cells += [f"{np.mean([found[figure] for found in blocks.values()]):.4f}" for figure in FIGURES[:3]]
        for figure in FIGURES[:2]:
            gains = [blocks[i][figure] - first[i][figure] for i in sorted(blocks.keys() & first.keys())]
            told = blocks is not first and len(gains) > 1
            cells.append(f"{np.mean(gains):+.4f} ± {np.std(gains, ddof=1) / len(gains) ** 0.5:.4f}" if told else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def check(args: argparse.Namespace) -> None:
    """Refuses a folder without the set."""
    if not any(Path(args.data).glob("*.npz")):
        raise UserError(f"--data is {args.data}, but no .npz lies there; name the folder luna16_fpr_2d")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder luna16_fpr_2d")
    variant_options(parser, "overrides, as 'a.b=1 c=2', or a network's name")
    parser.add_argument("--blocks", type=int, nargs="+", choices=range(BLOCKS), default=list(range(BLOCKS)))
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--workdir", default="runs/benchmark-luna16-folds")
    args = parser.parse_args()
    compare(args, __file__, "block", args.blocks, train_variant, lambda report: table(report["runs"]), check)


if __name__ == "__main__":
    run_main(lambda _: main())
