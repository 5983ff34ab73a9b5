"""Trains r1jax on luna16_fpr_2d with several seeds and puts it beside the peers of `luna16_peers.py`.

    python benchmarks/luna16_peers.py --data DIR --output benchmarks/results/luna16_peers.json
    python benchmarks/luna16.py --data DIR --peers benchmarks/results/luna16_peers.json \
        --output benchmarks/results/luna16.json

Words after `--` are overrides of train.py. No epoch is chosen: the figures are those of the last checkpoint's averaged
weights, on the validation part (scan-disjoint from the training part), for one view and for the mean of eight.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment, predict, train_run  # noqa: E402
from benchmarks.luna16_peers import figures, summarise, table  # noqa: E402


def run_seed(seed: int, args: argparse.Namespace) -> dict:
    """Trains one seed and scores its last checkpoint."""
    words = ["--config", "configs/medical.py:luna16_fpr_2d", "--data.path", args.data]
    words += ["--seed", str(seed), "--data.seed", str(seed), *args.overrides]
    run = train_run(words, Path(args.workdir) / f"seed{seed}")
    result = {"seed": seed, "seconds": run.seconds, "images_per_second": run.examples_per_second, "views": {}}
    for views in (1, 8):
        found, targets, _ = predict(run.checkpoint, "val", 256, views)
        result["views"][str(views)] = figures(targets["nodule_present"], found["nodule_present"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder luna16_fpr_2d")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--peers", type=Path, help="JSON of luna16_peers.py, to print beside")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workdir", default="runs/benchmark-luna16")
    parser.add_argument("--resume", action="store_true", help="keep the seeds that --output already holds")
    parser.add_argument("overrides", nargs="*", help="overrides of train.py, after --")
    args = parser.parse_args()
    peers = json.loads(args.peers.read_text())["models"] if args.peers else {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    runs: list[dict] = []
    models = peers
    if args.resume and args.output.exists():
        models = json.loads(args.output.read_text())["models"] | peers
        runs = models["r1jax"]["runs"]
    for seed in range(len(runs), args.seeds):
        runs.append(run_seed(seed, args))
        result = jax_environment(args)  # after a run: it starts JAX, and the run chooses its platform
        ours = {"settings": {"overrides": result["arguments"]["overrides"]}, "runs": runs}
        models = {"r1jax": ours | {"summary": summarise(ours)}} | peers
        args.output.write_text(json.dumps(result | {"models": models}, indent=1))
    print(table(models))


if __name__ == "__main__":
    main()
