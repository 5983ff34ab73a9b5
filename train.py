"""Trains an experiment: `python train.py --config configs/medical.py` (`--help` lists every field)."""

from r1jax.huge_pages import start_with_huge_pages

if __name__ == "__main__":
    start_with_huge_pages()  # before JAX is imported, which takes seconds

from dataclasses import replace

from r1jax.cli import Invocation, load_config
from r1jax.config import LaunchConfig
from r1jax.data.cache import cache_remarks
from r1jax.errors import run_main
from r1jax.models.r1 import R1
from r1jax.parallel.agree import is_first, say
from r1jax.parallel.launch import launched
from r1jax.parallel.mesh import check_batch, check_model, make_mesh, planned_mesh
from r1jax.parallel.platform import start_platform
from r1jax.parallel.stages import schedule_on
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
    with launched(invocation.config.launch):
        return run_experiment(invocation)


def run_experiment(invocation: Invocation) -> int:
    """Plans or trains, in one process or as one of several."""
    config = with_tokenizer(replace(invocation.config, launch=LaunchConfig()))  # how it was started is not the run
    platform = start_platform(config.platform)
    say(f"{config.name}: {platform}")
    if invocation.mode == "show":
        table = show_mesh(config, TASKS[config.task.name])
        if is_first():
            print(table)
        return 0
    mesh = planned_mesh(config.mesh) if invocation.mode == "dry-run" else make_mesh(config.mesh)
    check_model(mesh.shape, config.model)
    task = TASKS[config.task.name](config)
    source, validation = task.source("train"), task.source("val")
    asked = config.train
    config = settle_batch(config, mesh, task, source, say)
    check_batch(mesh, config.train.batch_size, config.train.accumulation)
    schedule_on(mesh, config)  # refuses what no pipeline can divide
    model = R1(config.model, task.heads)
    about = f"data: {source.name}, {len(source)} {task.unit}; validation {len(validation)}"
    say("\n".join([about, *cache_remarks(config), *task.remarks(source)]))
    batch = example_batch(source, task, config.train.batch_size)
    if invocation.mode == "dry-run":
        table = plan(config, model, task, mesh, batch)
        if is_first():
            print(table)
        return 0
    with open_run(config) as run:
        if AUTO in (asked.batch_size, asked.accumulation) and is_first():
            keep(config, mesh)
        train(config, run, model, task, mesh, source, validation, batch)
        if run.stop and not any(kept.step == config.train.steps for kept in run.checkpoints.all()):
            return 128 + run.stop[0]
        if is_first():
            print(closing_table(run, task, validation))
    return 0


if __name__ == "__main__":
    run_main(main)
