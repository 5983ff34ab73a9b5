"""What rounding costs: the medical experiment in floats, quantized after training, and trained with rounded products.

    python benchmarks/quantization.py --output benchmarks/results/quantization.json --seeds 0 1 2 3 4     hours on a CPU
    python benchmarks/quantization.py --output q.json --tiny --cases 64                                   minutes

Every seed trains two runs of equal length, one of floats and one with `--quant int8`. The first is quantized to int8,
fp8 and int4 (to int4 by GPTQ on 32 training cases), the second by its own rules. All are scored on the same generated
test cases, none of which was trained on; each change is that against the run of floats of its seed, its interval from
resampling cases in pairs. The trained int8 model is another model, not the same one rounded: its change holds the
noise of training too. Sizes are those of whole checkpoint folders.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment, train_run  # noqa: E402
from r1jax.__main__ import dispatch  # noqa: E402
from r1jax.config import MeshConfig  # noqa: E402
from r1jax.models.r1 import R1  # noqa: E402
from r1jax.parallel.mesh import make_mesh  # noqa: E402
from r1jax.serve.evaluate import restore_served  # noqa: E402
from r1jax.serve.quantize_report import effect, score_of  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.train.checkpoints import Checkpoint, find_checkpoint  # noqa: E402
from r1jax.train.evaluation import Evaluator  # noqa: E402

PTQ = ("int8", "fp8", "int4")
TINY = ["--train.steps", "4", "--train.warmup_steps", "1", "--train.eval_every", "4", "--data.val_cases", "64"]


def predictions(checkpoint: Checkpoint, cases: int) -> tuple[Any, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The task, and outcomes and targets of generated test cases in the mode that shows all."""
    config = checkpoint.config()
    config = replace(config, data=replace(config.data, test_cases=cases))
    task, mesh = TASKS[config.task.name](config), make_mesh(MeshConfig())
    model, source, mode = R1(config.model, task.heads), task.source("test"), next(iter(task.modes()))
    params = restore_served(checkpoint, config, model, task, mesh, source)
    found, targets, _ = Evaluator(model, task, mesh).predict(params, source, batch_size=64, modes=(mode,))
    return task, found[mode], targets


def agreement(task: Any, a: dict[str, np.ndarray], b: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> float:
    """Share of the calls of binary findings that are the same, at the thresholds that the first model sets."""
    points = task.operating_points(a, targets)
    same = [(a[name] >= point["threshold"]) == (b[name] >= point["threshold"]) for name, point in points.items()]
    return float(np.mean(same))


def run_seed(seed: int, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains, quantizes and scores all variants of a seed.

    Args:
      seed: Of weights and data.
      asked: Command line.

    Returns:
      A row a variant.
    """
    work = Path(asked.work) / f"seed{seed}"
    words = ["--config", "configs/medical.py", "--seed", str(seed), *(TINY if asked.tiny else [])]
    floats = train_run(words, work / "float", resume=True)
    trained = train_run([*words, "--quant", "int8"], work / "qat", resume=True)
    sources = {f"PTQ {kind}": (floats.checkpoint.path, ["--to", kind]) for kind in PTQ}
    sources["QAT int8"] = (trained.checkpoint.path, [])
    task, before, targets = predictions(floats.checkpoint, asked.cases)
    rows = [{"seed": seed, "variant": "float", "score": task.score(task.figures(before, targets))}]
    for variant, (path, to) in sources.items():
        output = work / variant.replace(" ", "-")
        if not output.exists():
            dispatch(["quantize", str(path), *to, "--output", str(output), "--resamples", "20"])
        _, after, _ = predictions(find_checkpoint(output), asked.cases)
        found = effect(score_of(task), before, after, targets, asked.resamples)
        report = json.loads((output / "report" / "report.json").read_text())
        rows.append(
            {
                "seed": seed,
                "variant": variant,
                "score": found.after,
                "change": found.change,
                "low": found.low,
                "high": found.high,
                "agreement": agreement(task, before, after, targets),
                "smaller": report["sizes"]["fp32_bytes"] / report["sizes"]["file_bytes"],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, changes in points of the score."""
    lines = ["| seed | variant | score | change, points (95 %) | same calls | smaller |", "|---|---|---|---|---|---|"]
    for row in rows:
        rest = "| | |"
        if "change" in row:
            change, low, high = (100 * row[name] for name in ("change", "low", "high"))
            rest = f"{change:+.3f} ({low:+.3f} to {high:+.3f}) | {row['agreement']:.2%} | {row['smaller']:.2f}x |"
        lines.append(f"| {row['seed']} | {row['variant']} | {row['score']:.4f} | {rest}")
    return "\n".join(lines)


def main() -> None:
    """Runs all seeds and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file")
    parser.add_argument("--work", default="runs/quantization", help="folder of the runs; finished ones are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cases", type=int, default=12288, help="generated test cases")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--tiny", action="store_true", help="four steps, to see that it runs")
    asked = parser.parse_args()
    rows = [row for seed in asked.seeds for row in run_seed(seed, asked)]
    asked.overrides = []
    made = {"rows": rows} | jax_environment(asked)
    Path(asked.output).write_text(json.dumps(made, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
