"""Trains r1jax on luna16_fpr_2d with several seeds and puts it beside the peers of `luna16_peers.py`.

    python benchmarks/luna16_peers.py --data DIR --output benchmarks/results/luna16_peers.json
    python benchmarks/luna16.py --data DIR --peers benchmarks/results/luna16_peers.json \
        --output benchmarks/results/luna16.json --jobs 5

Each seed has a process of its own; `--jobs` of them share the device, and each is written as soon as it is there. Words
after `--` are overrides of train.py. No epoch is chosen: the figures are those of the last checkpoint's averaged
weights, on the validation part (scan-disjoint from the training part), for one view and for the mean of eight.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.children import run_at_once, tell  # noqa: E402
from benchmarks.common import jax_environment, predict, train_run  # noqa: E402
from benchmarks.luna16_peers import figures, summarise, table  # noqa: E402
from r1jax.errors import run_main  # noqa: E402


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
    parser.add_argument("--jobs", type=int, default=1, help="seeds side by side on each device")
    parser.add_argument("--devices", type=int, default=1, help="GPUs over which they are spread")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that each may take")
    parser.add_argument("--workdir", default="runs/benchmark-luna16")
    parser.add_argument("--resume", action="store_true", help="keep the seeds that --output already holds")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="overrides of train.py, after --")
    args = parser.parse_args()
    child = vars(args).pop("child")
    if child is not None:
        del sys.argv[1:3]  # the command that is told is the parent's
        with contextlib.redirect_stdout(sys.stderr):  # a pipe that is read at the end holds no long run's words
            told = {"run": run_seed(child, args), "environment": jax_environment(args)}
        tell(told)
        return
    peers = json.loads(args.peers.read_text())["models"] if args.peers else {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    runs: list[dict] = []
    models = peers
    if args.resume and args.output.exists():
        models = json.loads(args.output.read_text())["models"] | peers
        runs = models["r1jax"]["runs"]
    left = sorted(set(range(args.seeds)) - {run["seed"] for run in runs})
    commands = {str(seed): [__file__, "--child", str(seed), *sys.argv[1:]] for seed in left}
    failed = []
    for seed, told in run_at_once(commands, jobs=args.jobs, timeout=args.timeout, devices=args.devices):
        if "error" in told:
            print(f"seed {seed}: {told['error']}", flush=True)
            failed.append(seed)
            continue
        runs = sorted([*runs, told["run"]], key=lambda run: run["seed"])
        result = told["environment"]
        ours = {"settings": {"overrides": result["arguments"]["overrides"]}, "runs": runs}
        models = {"r1jax": ours | {"summary": summarise(ours)}} | peers
        args.output.write_text(json.dumps(result | {"models": models}, indent=1))
        print(f"seed {seed}: {told['run']}", flush=True)
    print(table(models))
    if failed:
        sys.exit(f"without seed {', '.join(failed)} (above): --resume trains what is left")


if __name__ == "__main__":
    run_main(lambda _: main())
