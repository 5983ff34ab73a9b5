"""Trains an experiment: `python train.py --config configs/medical.py` (`--help` lists every field)."""

import sys

from r1jax.cli import load_config
from r1jax.errors import run_main
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import check_batch, check_model, make_mesh, planned_mesh
from r1jax.parallel.platform import start_platform
from r1jax.tasks.catalog import TASKS
from r1jax.train.closing import closing_table
from r1jax.train.memory import AUTO, keep, settle_batch
from r1jax.train.plan import example_batch, plan, show_mesh
from r1jax.train.recover import train
from r1jax.train.run import open_run
from r1jax.train.start import with_tokenizer


def main(arguments: list[str]) -> int:
    """Runs the experiment that the command line names; the same command again goes on where it stopped."""
    invocation = load_config(arguments)
    config = with_tokenizer(invocation.config)
    print(f"{config.name}: {start_platform(config.platform)}", file=sys.stderr)
    asked, make_task = config.train, TASKS[config.task.name]
    if invocation.mode == "show":
        print(show_mesh(config, make_task))
        return 0
    mesh = planned_mesh(config.mesh) if invocation.mode == "dry-run" else make_mesh(config.mesh)
    check_model(mesh.shape, config.model)
    config = settle_batch(config, mesh, make_task, lambda line: print(line, file=sys.stderr))
    check_batch(mesh, config.train.batch_size, config.train.accumulation)
    task = make_task(config)
    model = R1(config.model, task.heads)
    source, validation = task.source("train"), task.source("val")
    about = f"data: {source.name}, {len(source)} {task.unit}; validation {len(validation)}"
    print("\n".join([about, *task.remarks(source)]), file=sys.stderr)
    batch = example_batch(source, task, config.train.batch_size)
    if invocation.mode == "dry-run":
        print(plan(config, model, task, mesh, batch))
        return 0
    with open_run(config) as run:
        if AUTO in (asked.batch_size, asked.accumulation):
            keep(config, mesh)
        train(config, run, model, task, mesh, source, validation, batch)
        if run.stop and run.checkpoints.all()[-1].step < config.train.steps:
            return 128 + run.stop[0]
        print(closing_table(run, task, validation))
    return 0


if __name__ == "__main__":
    run_main(main)
