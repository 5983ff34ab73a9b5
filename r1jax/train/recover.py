"""A run from its start or newest checkpoint to its end, over what it recovers from by itself."""

import jax
from jax.sharding import Mesh

from r1jax.config import Config
from r1jax.data.source import Source
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.parallel.agree import from_first, say
from r1jax.tasks.task import Task
from r1jax.train.eager import eager_step
from r1jax.train.evaluation import Evaluator
from r1jax.train.guard import RETRIES, RollBack, jump, read_jumps, way_back
from r1jax.train.loop import Loop
from r1jax.train.memory import in_more_parts, out_of_memory
from r1jax.train.run import Run, restore_or_init
from r1jax.train.step import Batch, check_quant, compile_step


def train(
    config: Config, run: Run, model: R1, task: Task, mesh: Mesh, source: Source, validation: Source, batch: Batch
) -> None:
    """Trains until the last step or a signal; goes back where steps are refused, and divides a batch that does not fit.

    Args:
      config: The experiment.
      run: Its open folder.
      model: The model.
      task: The task.
      mesh: Devices.
      source: Training cases.
      validation: Cases that choose the best checkpoint and set the operating points.
      batch: Any collated batch (shapes).

    Raises:
      UserError: The folder does not fit the config, the disk is full, going back did not help, or several processes
        shall do what only one can.
    """
    if config.debug.eager and jax.process_count() > 1:
        raise UserError("debug.eager is True, but it looks at numbers of one process: add --launch.processes 1")
    if config.debug.eager and mesh.shape.get("pipe", 1) > 1:
        raise UserError(f"debug.eager is True, but mesh.pipe is {mesh.shape['pipe']}: it must be 1 then")
    if config.debug.eager:
        check_quant(model, task, batch, mesh.local_devices[0])  # else `compile_step` does
    step, evaluator = None, Evaluator(model, task, mesh, run.watch.beat)
    while True:
        run.saver.wait()  # what it writes is what to go on from, and then it removes older ones
        state, said = restore_or_init(config, run, model, task, mesh, source, batch)
        say("\n".join([*said, "compiling the step"] if step is None else said))
        if step is None and config.debug.eager:
            step = eager_step(config, model, task, batch)
        elif step is None:
            step = compile_step(config, model, task, mesh, batch)
        try:
            Loop(config, run, task, mesh, evaluator, step, state, source, validation).fit()
            return
        except RollBack as seen:
            note = roll_back(run, seen.step, seen.reason)
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            if run.watch.phase != "step":  # more parts would change nothing
                raise UserError(_no_room(run.watch.phase, run.watch.step, config)) from error
            config, step = in_more_parts(config, mesh), None
            if jax.process_count() > 1:  # the others wait in the step, and cannot be told
                raise UserError(
                    f"out of memory: run the same command again, for {config.train.accumulation} parts of the batch"
                ) from None
            note = f"out of memory: the batch is computed in {config.train.accumulation} parts from now on"
            run.history.note("out of memory", step=run.watch.step, accumulation=config.train.accumulation)
        del state  # or two of them would lie in memory
        say(note)


def _no_room(phase: str, step: int, config: Config) -> str:
    """Says what helps where the step has enough memory, but something else has not."""
    smaller = f"a train.batch_size below {config.train.batch_size}"
    if phase != "evaluation":
        smaller = "mesh.pipe 1, which needs no copy on the devices"
    return (
        f"out of memory after step {step}, in: {phase}, of which more parts of the batch take as much: choose "
        f"{smaller}, a smaller model or more devices (--mesh.fsdp); what was saved is untouched"
    )


def roll_back(run: Run, step: int, reason: str) -> str:
    """Has the run go on from its newest checkpoint, or from an older one where that was in vain, with other batches.

    Args:
      run: The run.
      step: Steps done.
      reason: Why they were refused.

    Returns:
      What to tell the user.

    Raises:
      UserError: All checkpoints were gone back to so often that the data cannot be what is wrong.
    """
    run.saver.wait()
    back = from_first(lambda: _leave_later(run, step, reason))
    jump(run.workdir, back, step, reason)
    run.history.note("rolled back", step=step, to=back, reason=reason)
    left = read_jumps(run.workdir)[-1].batches
    return f"step {step}: many steps refused ({reason}): back to step {back}, without the {left} batches since"


def _leave_later(run: Run, step: int, reason: str) -> int:
    """Chooses the checkpoint to go back to, and sets aside those after it; returns its steps."""
    kept, jumps = run.checkpoints.kept(), read_jumps(run.workdir)
    steps = [checkpoint.step for checkpoint in kept] or [0]
    back = way_back(steps, jumps)
    if back is None:
        tried = " and ".join(map(str, steps))
        raise UserError(
            f"step {step}: {reason}, also after {RETRIES} rollbacks to step {tried} that each left out the batches "
            "between; the checkpoints are untouched: lower train.learning_rate in another --workdir (or raise "
            "train.spike_factor, 0 switches it off, if losses of this task do jump so)"
        )
    # Before the jump is written down: a run that is killed in between comes here again, wherever it starts from.
    for later in (checkpoint for checkpoint in run.checkpoints.all() if checkpoint.step > back):
        run.checkpoints.set_aside(later, "left")
    return back
