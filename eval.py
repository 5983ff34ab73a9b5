"""Scores a checkpoint: `python eval.py --checkpoint runs/medical` (`--help` lists every argument)."""

from r1jax.huge_pages import start_with_huge_pages

if __name__ == "__main__":
    start_with_huge_pages()  # before JAX is imported, which takes seconds

import sys
import time
from pathlib import Path

from r1jax.arguments import EvalArguments
from r1jax.cli import load_arguments
from r1jax.config import MeshConfig
from r1jax.errors import run_main
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import make_mesh
from r1jax.parallel.platform import start_platform
from r1jax.serve.evaluate import Evaluation, restore_served, scoring_config
from r1jax.serve.finance import score_transactions
from r1jax.serve.language import score_text
from r1jax.serve.medical import score_cases
from r1jax.serve.records import score_records
from r1jax.serve.result_folder import result_folder
from r1jax.tasks.catalog import TASKS
from r1jax.train.checkpoints import find_checkpoint
from r1jax.train.evaluation import Evaluator

RESULTS = {"medical": score_cases, "language": score_text, "finance": score_transactions, "records": score_records}
"""What scores a source and writes its results, by the name of the task."""
HELP = """\
Scores a checkpoint: metrics.json, one HTML page and a structured report of every case.

Examples:
  python eval.py --checkpoint runs/medical
  python eval.py --checkpoint runs/medical --data.path my_cases --data.split all --output my_results
  python eval.py --checkpoint runs/finance --data.path later.parquet --alerts-per-day 50
  python eval.py --checkpoint runs/v2-lite --data.path my_texts     # what `r1jax hf import` has written
"""


def main(arguments: list[str]) -> int:
    """Scores the checkpoint that the command line names, on its own data or on a folder of the same format."""
    began, asked = time.perf_counter(), load_arguments(EvalArguments, arguments, "eval.py", HELP)
    checkpoint = find_checkpoint(Path(asked.checkpoint))
    checkpoint.verify()
    config = scoring_config(checkpoint, asked)
    print(f"{checkpoint.path}: {start_platform(asked.platform)}", file=sys.stderr)
    mesh = make_mesh(MeshConfig())
    task = TASKS[config.task.name](config)
    for line in task.pipeline.restore(checkpoint.meta().get("preprocess", {"steps": [], "statistics": {}})):
        print(f"warning: {line}: the model was trained with other preprocessing", file=sys.stderr)
    model = R1(config.model, task.heads)
    source = task.source(config.data.split)
    print(f"data: {source.name}, {len(source)} {task.unit}", file=sys.stderr)
    run = Evaluation(asked, checkpoint, config, task, model, mesh, began)
    with result_folder(run.output) as folder:
        params = restore_served(checkpoint, config, model, task, mesh, source)
        evaluator = Evaluator(model, task, mesh)
        told = RESULTS[config.task.name](run, evaluator, params, source, folder)
    print(told)
    return 0


if __name__ == "__main__":
    run_main(main)
