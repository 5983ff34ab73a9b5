"""Trains r1jax on luna16_fpr_2d with several seeds and puts it beside the peers of `luna16_peers.py`.

    python benchmarks/luna16_peers.py --data DIR --output benchmarks/results/luna16_peers.json
    python benchmarks/luna16.py --data DIR --peers benchmarks/results/luna16_peers.json \
        --output benchmarks/results/luna16.json

Words after `--` are overrides of train.py. No epoch is chosen: the figures are those of the last checkpoint's averaged
weights, on the validation part (scan-disjoint from the training part), for one view and for the mean of eight.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from benchmarks.luna16_peers import environment, figures, summarise, table  # noqa: E402
from r1jax.models.r1 import R1  # noqa: E402
from r1jax.parallel.mesh import make_mesh, shard_tree  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.train.checkpoints import CheckpointFolder, abstract_like  # noqa: E402
from r1jax.train.evaluation import Evaluator  # noqa: E402
from r1jax.train.loop import served  # noqa: E402
from r1jax.train.plan import example_batch  # noqa: E402
from r1jax.train.step import init_state  # noqa: E402


def run_seed(seed: int, args: argparse.Namespace) -> dict:
    """Trains one seed through train.py and scores its last checkpoint."""
    workdir = Path(args.workdir) / f"seed{seed}"
    shutil.rmtree(workdir, ignore_errors=True)
    began = time.perf_counter()
    command = ["--config", "configs/medical.py:luna16_fpr_2d", "--data.path", args.data, "--workdir", str(workdir)]
    code = train.main([*command, "--seed", str(seed), "--data.seed", str(seed), *args.overrides])
    seconds = time.perf_counter() - began
    assert code == 0, f"train.py ended with {code}"
    checkpoint = CheckpointFolder(workdir / "checkpoints").all()[-1]
    rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = [row["examples_per_second"] for row in rows if "examples_per_second" in row]
    return {
        "seed": seed,
        "seconds": seconds,
        "images_per_second": float(np.median(rates)),
        "views": {str(views): score(checkpoint, views, args.data) for views in (1, 8)},
    }


def score(checkpoint, views: int, path: str) -> dict[str, float]:
    """Figures of a checkpoint on the validation part."""
    config = checkpoint.config()
    config = dataclasses.replace(
        config, task=dataclasses.replace(config.task, views=views), data=dataclasses.replace(config.data, path=path)
    )
    task, mesh = TASKS[config.task.name](config), make_mesh(config.mesh)
    model, source = R1(config.model, task.heads), task.source("val")
    batch = example_batch(source, task, config.train.batch_size)
    abstract = jax.eval_shape(lambda: init_state(config, model, task, batch))
    state = checkpoint.restore(abstract_like(abstract, shard_tree(mesh, abstract)))
    found, targets, _ = Evaluator(model, task, mesh).predict(served(state, config), source, batch_size=256)
    return figures(targets["nodule_present"], found["both"]["nodule_present"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder luna16_fpr_2d")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--peers", type=Path, help="JSON of luna16_peers.py, to print beside")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workdir", default="runs/benchmark-luna16")
    parser.add_argument("overrides", nargs="*", help="overrides of train.py, after --")
    args = parser.parse_args()
    ours = {"settings": {"overrides": args.overrides}, "runs": [run_seed(seed, args) for seed in range(args.seeds)]}
    ours["summary"] = summarise(ours)
    models = {"r1jax": ours}
    if args.peers:
        models |= json.loads(args.peers.read_text())["models"]
    args.device = "cpu"  # torch need not look for its own
    result = environment(args)
    result["hardware"] = f"{jax.devices()[0].device_kind}, {result['hardware']}"
    result["versions"]["jax"] = jax.__version__
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result | {"models": models}, indent=1))
    print(table(models))


if __name__ == "__main__":
    main()
