"""The loop: step, log, evaluate, save; and the table that closes a run."""

import functools
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from r1jax.config import Config
from r1jax.data.cache_counters import CacheCounters, line, total
from r1jax.data.loader import Share, training_batches
from r1jax.data.order import describe_order, open_order
from r1jax.data.source import Source
from r1jax.data.tokenizer_files import read_files
from r1jax.data.workers import Batches
from r1jax.errors import UserError
from r1jax.parallel.mesh import batch_sharding
from r1jax.tasks.task import Task
from r1jax.telemetry import Load, Telemetry
from r1jax.train.evaluation import Evaluator
from r1jax.train.flops import work_of
from r1jax.train.guard import PATIENCE, Guard, RollBack, batch_after, read_jumps
from r1jax.train.memory import out_of_memory
from r1jax.train.peak import peak_flops
from r1jax.train.plan import example_batch
from r1jax.train.profile import Profiler
from r1jax.train.run import Run, describe
from r1jax.train.start import start_record
from r1jax.train.step import TrainState

NORM = jax.jit(optax.tree.norm)


def served(state: TrainState, config: Config) -> Any:
    """The weights that are evaluated: the average, or the raw ones where averaging is off."""
    return state.ema if config.train.ema else state.params


def fit(
    config: Config,
    run: Run,
    task: Task,
    mesh: Mesh,
    evaluator: Evaluator,
    step: Any,
    state: TrainState,
    source: Source,
    validation: Source,
) -> TrainState:
    """Trains until the last step or a signal; a killed process loses at most `save_every` steps.

    Args:
      config: The experiment.
      run: Its open folder.
      task: Collation and score.
      mesh: Devices.
      evaluator: Compiled forward pass.
      step: Compiled training step; it takes over the memory of the state.
      state: Where to start.
      source: Training cases.
      validation: Cases that choose the best checkpoint and set the operating points.

    Returns:
      The last state; every point at which it left has been saved.

    Raises:
      RollBack: Many steps in a row were refused.
      UserError: A weight is no finite number any more, or the disk is full.
    """
    t, start, jumps = config.train, int(state.step), read_jumps(run.workdir)
    if start == t.steps:
        return state
    load = step_load(config, task, mesh, source)
    telemetry = Telemetry(run.workdir, steps=t.steps, start=start, batch_size=t.batch_size, load=load, clock=run.clock)
    profiler = Profiler(config.profile, run.workdir, start)
    guard = Guard(run.workdir, t.spike_factor, start)
    batches = open_batches(config, task, source, batch_after(start, jumps))
    place = placing(mesh)
    made = describe(source, task.pipeline) | start_record(run.workdir)
    # Read before the first step, as the task has read them: what they lie in may go.
    tokenizer = {} if config.data.tokenizer is None else read_files(Path(config.data.tokenizer))
    note = ""

    def save(done: int, validated: dict[str, Any] | None) -> None:
        where = {"next_batch": batch_after(done, jumps), **describe_order(source, t.batch_size, config.data)}
        meta = {"step": done, "validation": validated, "order": where, **made}
        useful = run.clock.useful
        published = lambda: run.clock.mark(done, useful, [c.step for c in run.checkpoints.all()])  # noqa: E731
        run.saver.save(done, state, config, meta, tokenizer, say=telemetry.say, then=published)

    def cached() -> CacheCounters:
        """What the cache did here, where validation reads too, and in the workers."""
        here = getattr(source, "counters", dict)()
        return total([here, batches.counters()] if config.data.workers else [here])

    try:
        for done in range(start + 1, t.steps + 1):
            run.saver.check()
            run.watch.enter("waiting for data", done - 1)
            if done - 1 > start and any(jump.step == done - 1 for jump in jumps):  # made when a later one was damaged
                batches.close()
                batches = open_batches(config, task, source, batch_after(done - 1, jumps))
            with telemetry.waiting():
                batch = next(batches)
            run.watch.enter("step")
            if profiler.begins(done):
                jax.block_until_ready(state)
                with telemetry.aside(done - 1):
                    profiler.start()
            try:
                state, metrics = step(state, place(batch), guard.limit)
            except jax.errors.JaxRuntimeError as error:
                # What was reached shall not be done again; after another error, nobody knows what the state is worth.
                lost = done - 1 == start or any(x.is_deleted() for x in jax.tree.leaves(state))
                if out_of_memory(error) and not lost:
                    save(done - 1, None)
                raise
            guard.note(metrics["refused"])
            if profiler.ends(done):
                jax.block_until_ready(metrics)
                with telemetry.aside(done):
                    telemetry.say(profiler.stop())
            evaluates = done % t.eval_every == 0 or done == t.steps
            if evaluates or done % t.log_every == 0 or done % t.save_every == 0:
                refused = guard.settle()
                if refused:
                    telemetry.say(f"step {done}: {refused} of the last steps refused, {guard.reason(metrics)}")
                if guard.streak >= PATIENCE:
                    raise RollBack(done, guard.reason(metrics))
                check_finite(done, state.params, run)
            if done % t.log_every == 0 or done == t.steps:
                figures = {k: float(v) for k, v in jax.device_get(metrics).items()}
                guard.log(figures)
                note = f"loss {figures['loss']:.3f}"
                figures |= telemetry.rates() | cached().figures("cache.")
                telemetry.log(done, {k: v for k, v in figures.items() if math.isfinite(v)})  # JSON has no other
            telemetry.advance(done, note)
            run.watch.enter("step", done)
            if evaluates:
                run.watch.enter("evaluation")
                with telemetry.aside(done):
                    validated = validate(config, task, evaluator, served(state, config), validation)
                    reached = validated["figures"]
                    telemetry.log(
                        done, {f"validation.{mode}.{k}": v for mode, found in reached.items() for k, v in found.items()}
                    )
                    telemetry.say(f"step {done}: validation {task.headline(next(iter(reached.values())))}")
                    if not guard.streak or done == t.steps:  # to go back to what lies before the first refused step
                        save(done, validated)
            elif done % t.save_every == 0 and not guard.streak:
                with telemetry.aside(done):
                    save(done, None)
            if run.stop:
                check_finite(done, state.params, run)
                with telemetry.aside(done):
                    save(done, None)
                    run.saver.wait()
                name = signal.Signals(run.stop[0]).name
                telemetry.say(f"{name}: saved at step {done}; the same command goes on from there")
                break
        run.saver.wait()
        if profiler.missed(int(state.step)):
            telemetry.say(f"no trace: the run ended before step {profiler.first} (--profile.start, --profile.steps)")
        if config.data.cache.url is not None and cached().lookups:
            telemetry.say(line(cached()))
    finally:
        batches.close()
        if profiler.running:
            telemetry.say(profiler.stop())
        telemetry.close()
    return state


def step_load(config: Config, task: Task, mesh: Mesh, source: Source) -> Load:
    """What a step asks of the devices, for telemetry."""
    work = work_of(config.model, task, example_batch(source, task, config.train.batch_size))
    dtype = "float32" if config.model.precision == "fp32" else "bfloat16"
    rates = [peak_flops(device.device_kind, dtype) for device in mesh.devices.flat]
    known = [rate for rate in rates if rate is not None]
    return Load(work.tokens, work.flops, sum(known) if len(known) == len(rates) else None)


def placing(mesh: Mesh) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What is done to a batch before the step takes it; each of several processes brings its part of the whole."""
    if jax.process_count() == 1:  # the step takes NumPy arrays as they are, in a tenth of the time of placing them
        return lambda batch: batch
    place = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return lambda batch: jax.tree.map(place, batch)


def open_batches(config: Config, task: Task, source: Source, start: int) -> Batches:
    """Batches from number `start`, as the config orders and reads them; of several processes, each reads its part."""
    data = config.data
    return training_batches(
        source,
        task.collate,
        open_order(source, config.train.batch_size, data),
        start=start,
        threads=data.threads,
        workers=data.workers,
        ahead=data.ahead,
        share=Share(jax.process_index(), jax.process_count()),
    )


def check_finite(done: int, params: Any, run: Run) -> None:
    """Ends a run whose weights are broken, before it scores or saves what cannot recover.

    Args:
      done: Steps done.
      params: Weights after them.
      run: Its folder, whose checkpoints stay as they are.

    Raises:
      UserError: A weight is NaN or infinite.
    """
    norm = float(NORM(params))
    if not math.isfinite(norm):
        run.saver.settle()
        kept = run.checkpoints.all()
        raise UserError(
            f"step {done}: the norm of the weights is {norm}, so the training has diverged "
            f"({f'{kept[-1].path} is untouched' if kept else 'nothing was saved yet'}): "
            "lower train.learning_rate and choose another --workdir"
        )


def validate(config: Config, task: Task, evaluator: Evaluator, params: Any, validation: Source) -> dict[str, Any]:
    """Scores weights on the validation cases and sets the operating points.

    Returns:
      "score" (of the mode that shows all; None where nothing can be judged), "figures" and "operating_points" by mode,
      "cases" (how many there are); JSON-able.
    """
    predicted, targets, _ = evaluator.predict(
        params, validation, batch_size=config.train.batch_size, modes=tuple(task.modes())
    )
    figures = {mode: task.figures(found, targets) for mode, found in predicted.items()}
    points = {mode: task.operating_points(found, targets) for mode, found in predicted.items()}
    score = task.score(next(iter(figures.values())))
    return {"score": score, "figures": figures, "operating_points": points, "cases": len(validation)}
