"""Trains configs/language.py on its generated text and puts the loss beside the entropy of the generator.

    python benchmarks/language.py --output benchmarks/results/language.json

Words after `--` are overrides of train.py. The validation loss is that of the last checkpoint's averaged weights.
Processor seconds count all threads of the process: on a busy machine they say more than the clock does.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment, train_run  # noqa: E402
from r1jax.tasks.language.task import MODE, Language  # noqa: E402


def run_seed(seed: int, args: argparse.Namespace) -> dict:
    """Trains one seed."""
    words = ["--config", args.config, "--seed", str(seed), "--data.seed", str(seed), *args.overrides]
    began = time.process_time()
    run = train_run(words, Path(args.workdir) / f"seed{seed}")
    spent, config = time.process_time() - began, run.checkpoint.config()
    figures = run.checkpoint.meta()["validation"]["figures"][MODE]
    return {
        "seed": seed,
        "steps": run.checkpoint.step,
        "tokens": run.checkpoint.step * config.train.batch_size * (config.model.text_tokens - 1),
        "seconds": run.seconds,
        "processor_seconds": spent,
        "entropy": Language(config).source("val").entropy,
        "figures": {name: x for name, x in figures.items() if not name.startswith("load.")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--config", default="configs/language.py")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workdir", default="runs/benchmark-language")
    parser.add_argument("overrides", nargs="*", help="overrides of train.py, after --")
    args = parser.parse_args()
    runs = []
    for seed in range(args.seeds):
        runs.append(run_seed(seed, args))
        args.output.write_text(json.dumps(jax_environment(args) | {"runs": runs}, indent=1) + "\n")
    for run in runs:
        loss, spent = run["figures"]["loss"], run["processor_seconds"]
        print(f"seed {run['seed']}: {loss:.4f} nats/token of {run['entropy']:.4f}, {spent:.0f} processor seconds")


if __name__ == "__main__":
    main()
