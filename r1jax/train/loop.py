"""The loop: step, log, evaluate, save.

What a step has found is read once the next one is on its way, so that the devices never wait for the host. By which
steps that is depends on their numbers alone.
"""

import math
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from r1jax.config import Config
from r1jax.data.cache_counters import CacheCounters, line, total
from r1jax.data.loader import Share, training_batches
from r1jax.data.order import describe_order, open_order
from r1jax.data.source import Source
from r1jax.data.tokenizer_files import read_files
from r1jax.data.workers import Batches
from r1jax.errors import UserError
from r1jax.parallel.agree import Vote, is_first, place_share, share_of
from r1jax.parallel.stages import out_of_stages, stages_on
from r1jax.tasks.task import Task
from r1jax.telemetry import Load, Telemetry
from r1jax.train.evaluation import Evaluator
from r1jax.train.flops import work_of
from r1jax.train.guard import PATIENCE, Guard, RollBack, batch_after, float_steps, in_force, looks, read_jumps
from r1jax.train.memory import out_of_memory
from r1jax.train.peak import peak_flops
from r1jax.train.plan import example_batch
from r1jax.train.profile import Profiler
from r1jax.train.quantized import without_codes
from r1jax.train.run import Run, describe
from r1jax.train.start import start_record
from r1jax.train.step import TrainState
from r1jax.train.wandb_run import WandbRun

NORM = jax.jit(lambda params: optax.tree.norm(without_codes(params)))
SHORT = 20.0
"""Seconds of training of which it is not said that they waited for data."""
MANY = 16
"""Processes that read, beyond which none are advised."""


class Unread(NamedTuple):
    """What a step and those before it have left on the devices, on its way to the host."""

    step: int
    """Steps done."""
    limit: np.float32
    """Of the step's loss."""
    names: list[str]
    numbers: jax.Array
    """Metrics of the step, in the order of their names, and the norm of the weights after it."""
    refused: list[jax.Array]
    """A flag of each step since the last that was read."""


def in_one(params: Any, metrics: dict[str, jax.Array]) -> Float[Array, " numbers"]:
    """Metrics in the order of their names, and the norm of the weights: one copy to the host instead of a hundred."""
    numbers = (metrics[name].astype(jnp.float32) for name in sorted(metrics))
    return jnp.stack([*numbers, optax.tree.norm(without_codes(params))])


def served(state: TrainState, config: Config) -> Any:
    """The weights that are evaluated: the average, or the raw ones where averaging is off."""
    return state.ema if config.train.ema else state.params


class Loop:
    """What a run holds while it trains; each method is one of the things that happen at a step."""

    def __init__(
        self,
        config: Config,
        run: Run,
        task: Task,
        mesh: Mesh,
        evaluator: Evaluator,
        step: Any,
        state: TrainState,
        source: Source,
        validation: Source,
    ) -> None:
        """Opens nothing yet.

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
        """
        self.config, self.run, self.task, self.mesh, self.evaluator = config, run, task, mesh, evaluator
        self.step, self.state, self.source, self.validation = step, state, source, validation
        self.start, self.jumps = int(state.step), read_jumps(run.workdir)
        self.profiler = Profiler(config.profile, run.workdir, self.start)
        self.guard = Guard(run.workdir, config.train.spike_factor, self.start, float_steps(config.train))
        self.vote = Vote(mesh)
        self.stages = stages_on(mesh, config.mesh, config.model.decoder)
        self.in_one = jax.jit(in_one, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self.unread: Unread | None = None
        self.note = ""

    def fit(self) -> TrainState:
        """Trains until the last step or a signal; a killed process loses at most `save_every` steps.

        Returns:
          The last state; every point at which it left has been saved.

        Raises:
          RollBack: Many steps in a row were refused.
          UserError: A weight is no finite number any more, or the disk is full.
        """
        last = self.config.train.steps
        if self.start == last:
            return self.state
        self.open()
        try:
            for done in range(self.start + 1, last + 1):
                self.take_step(done, self.next_batch(done))
                self.evaluate_or_save(done)
                if self.shall_stop():
                    self.leave(done)
                    break
            self.finish()
        finally:
            self.close()
        return self.state

    def open(self) -> None:
        """Opens telemetry and data, which changes the run folder."""
        config, run, t = self.config, self.run, self.config.train
        self.telemetry = Telemetry(
            run.workdir,
            steps=t.steps,
            start=self.start,
            batch_size=t.batch_size,
            load=step_load(config, self.task, self.mesh, self.source),
            clock=run.clock,
            remote=WandbRun(run.workdir, config, t.wandb) if t.wandb is not None and is_first() else None,
        )
        self.batches = open_batches(config, self.task, self.mesh, self.source, batch_after(self.start, self.jumps))
        self.made = describe(self.source, self.task.pipeline) | start_record(run.workdir)
        # Read before the first step, as the task has read them: what they lie in may go.
        self.tokenizer = {} if config.data.tokenizer is None else read_files(Path(config.data.tokenizer))

    def next_batch(self, done: int) -> dict[str, Any]:
        """Waits for the batch of step `done`, and says if a save has failed meanwhile."""
        self.run.saver.check()
        self.run.watch.enter("waiting for data", done - 1)
        if done - 1 > self.start and any(jump.step == done - 1 for jump in in_force(self.jumps)):
            # The run once went back to this step, but that checkpoint was damaged, so that it started from one before.
            self.batches.close()
            self.batches = open_batches(
                self.config, self.task, self.mesh, self.source, batch_after(done - 1, self.jumps)
            )
        with self.telemetry.waiting():
            return next(self.batches)

    def take_step(self, done: int, batch: dict[str, Any]) -> None:
        """Has the devices do step `done`, and reads what the one before has found; traces the step where it shall be.

        Raises:
          RollBack: As `read`.
          UserError: As `read`.
        """
        self.run.watch.enter("step")
        if self.profiler.begins(done):
            self.read()
            jax.block_until_ready(self.state)
            with self.telemetry.aside(done - 1):
                self.profiler.start()
        limit = self.guard.limit(done)
        try:
            self.state, metrics = self.step(self.state, placed(self.mesh, batch, self.config), limit)
        except jax.errors.JaxRuntimeError as error:
            if out_of_memory(error):  # after another error, nobody knows what the state is worth
                self.rescue(done - 1)
            raise
        self.guard.note(metrics["refused"])
        self.read()
        if self.logs(done) or self.evaluates(done) or self.saves(done):
            numbers = self.in_one(self.state.params, metrics)
            self.unread = Unread(done, limit, sorted(metrics), numbers, self.guard.take())
            for array in (numbers, *self.unread.refused):
                array.copy_to_host_async()
        if self.profiler.ends(done):
            jax.block_until_ready(metrics)
            self.read()
            with self.telemetry.aside(done):
                self.telemetry.say(self.profiler.stop())
        self.telemetry.advance(done, self.note)
        self.run.watch.enter("step", done)

    def rescue(self, done: int) -> None:
        """Saves what was reached before a step ran out of memory, so that it is not done again, where that can be."""
        lost = done == self.start or any(x.is_deleted() for x in jax.tree.leaves(self.state))
        if lost or jax.process_count() > 1 or self.amid_refused():  # several would have to save together
            return
        try:
            self.save(done, None)
        except jax.errors.JaxRuntimeError as error:  # no room for the copy of a pipeline's layers either
            if not out_of_memory(error):
                raise
        self.run.watch.enter("step")

    def amid_refused(self) -> bool:
        """Waits for every step that was begun, and tells whether the last of them was refused.

        Raises:
          RollBack: As `read`.
          UserError: As `read`.
        """
        self.read()
        self.guard.settle(jax.device_get(self.guard.take()))
        return self.guard.streak > 0

    def logs(self, done: int) -> bool:
        """Whether a row of figures is due after this step."""
        return done % self.config.train.log_every == 0 or done == self.config.train.steps

    def evaluates(self, done: int) -> bool:
        """Whether the weights are scored after this step."""
        return done % self.config.train.eval_every == 0 or done == self.config.train.steps

    def saves(self, done: int) -> bool:
        """Whether the state is saved after this step, be it scored or not."""
        return done % self.config.train.save_every == 0

    def read(self) -> None:
        """Waits for the step that was last to be read, if it has not been, judges it and writes its row.

        Raises:
          RollBack: Many steps in a row were refused.
          UserError: A weight is no finite number any more.
        """
        if self.unread is None:
            return
        (step, limit, names, *left), self.unread = self.unread, None
        numbers, flags = jax.device_get(left)
        *metrics, norm = numbers.tolist()
        figures, refused = dict(zip(names, metrics, strict=True)), self.guard.settle(flags)
        if refused:
            self.telemetry.say(f"step {step}: {refused} of the last steps refused, {looks(figures, limit)}")
        if self.guard.streak >= PATIENCE:
            raise RollBack(step, looks(figures, limit))
        check_finite(step, norm, self.run)
        if self.logs(step):
            self.guard.log(step, figures)
            self.note = f"loss {figures['loss']:.3f}"
            figures |= self.telemetry.rates(step) | self.cached().figures("cache.")
            self.telemetry.log(step, {k: v for k, v in figures.items() if math.isfinite(v)})  # JSON has no other

    def evaluate_or_save(self, done: int) -> None:
        """Scores and saves where that is due; amid refused steps it saves nothing, to go back to what lies before.

        Raises:
          RollBack: As `read`.
          UserError: As `read`, or a save has failed.
        """
        if not (self.evaluates(done) or self.saves(done)):
            return
        self.read()
        if self.evaluates(done):
            self.run.watch.enter("evaluation")
            with self.telemetry.aside(done):
                validated = self.evaluate(done)
                if not self.guard.streak or done == self.config.train.steps:
                    self.save(done, validated)
        elif not self.guard.streak:
            with self.telemetry.aside(done):
                self.save(done, None)

    def evaluate(self, done: int) -> dict[str, Any]:
        """Scores the weights on the validation cases, and logs and says what was found."""
        weights = out_of_stages(served(self.state, self.config), self.mesh, self.stages)
        validated = validate(self.config, self.task, self.evaluator, weights, self.validation)
        reached = validated["figures"]
        figures = {f"validation.{mode}.{k}": v for mode, found in reached.items() for k, v in found.items()}
        self.telemetry.log(done, figures)
        self.telemetry.say(f"step {done}: validation {self.task.headline(next(iter(reached.values())))}")
        return validated

    def save(self, done: int, validated: dict[str, Any] | None) -> None:
        """Has the state written, with all that the run needs to go on from it."""
        run, useful = self.run, self.run.clock.useful
        order = describe_order(self.source, self.config.train.batch_size, self.config.data)
        where = {"next_batch": batch_after(done, self.jumps), **order}
        meta = {"step": done, "validation": validated, "order": where, **self.made}
        # It holds the run alone: with the loop it would keep the state's memory.
        published = lambda: run.clock.mark(done, useful, [c.step for c in run.checkpoints.all()])  # noqa: E731
        run.watch.enter("copying the state")
        state = out_of_stages(self.state, self.mesh, self.stages)
        run.saver.save(done, state, self.config, meta, self.tokenizer, say=self.telemetry.say, then=published)

    def shall_stop(self) -> bool:
        """Whether a signal has asked any process to stop; all of them learn it at the same step."""
        told = self.vote.cast(self.run.stop[0] if self.run.stop else 0)
        if told and not self.run.stop:
            self.run.stop.append(told)
        return bool(told)

    def leave(self, done: int) -> None:
        """Saves after a signal, unless amid refused steps, and says so."""
        name = signal.Signals(self.run.stop[0]).name
        refused = self.amid_refused()
        check_finite(done, float(NORM(self.state.params)), self.run)
        if refused and done < self.config.train.steps:
            told = "is being refused, so nothing is saved; the same command goes on from the last checkpoint"
            self.telemetry.say(f"{name}: step {done} {told}")
            return
        with self.telemetry.aside(done):
            self.save(done, None)
            self.run.saver.wait()
        self.telemetry.say(f"{name}: saved at step {done}; the same command goes on from there")

    def cached(self) -> CacheCounters:
        """What the cache did here, where validation reads too, and in the workers."""
        here = getattr(self.source, "counters", dict)()
        return total([here, self.batches.counters()] if self.config.data.workers else [here])

    def finish(self) -> None:
        """Waits for the last save, and says what is left to say."""
        self.run.saver.wait()
        if self.profiler.missed(int(self.state.step)):
            flags = "(--profile.start, --profile.steps)"
            self.telemetry.say(f"no trace: the run ended before step {self.profiler.first} {flags}")
        if self.config.data.cache.url is not None and self.cached().lookups:
            self.telemetry.say(line(self.cached()))
        if jax.default_backend() != "cpu" and jax.process_count() == 1:  # on a CPU, the step has the cores
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            if told := slow_data(self.telemetry.starved, self.telemetry.rated, self.config.data.workers, cores):
                self.telemetry.say(told)

    def close(self) -> None:
        """Ends the data's threads and processes, a trace that is being made, and the telemetry."""
        self.batches.close()
        if self.profiler.running:
            self.telemetry.say(self.profiler.stop())
        self.telemetry.close()


def slow_data(waited: float, seconds: float, workers: int, cores: int) -> str | None:
    """What to say where the loop mostly waited for batches, and more processes could read them.

    Args:
      waited: Seconds in which it did.
      seconds: In which it trained.
      workers: Processes that read; 0 does it in the training process.
      cores: That this process may use.

    Returns:
      A line; None after a short run, where data was quick enough, or where half of the cores or `MANY` read already.
    """
    readers, more = max(1, workers), min(cores, MANY)
    if seconds < SHORT or waited < seconds / 2 or 2 * readers >= more:
        return None
    return (
        f"the loop waited for data {waited / seconds:.0%} of the time, with {readers} of {cores} cores to read it: "
        f"--data.workers {more} may be faster (docs/data.md)"
    )


def step_load(config: Config, task: Task, mesh: Mesh, source: Source) -> Load:
    """What a step asks of the devices, for telemetry."""
    work = work_of(config.model, task, example_batch(source, task, config.train.batch_size))
    dtype = "float32" if config.model.precision == "fp32" else "bfloat16"
    rates = [peak_flops(device.device_kind, dtype) for device in mesh.devices.flat]
    known = [rate for rate in rates if rate is not None]
    return Load(work.tokens, work.flops, sum(known) if len(known) == len(rates) else None)


def placed(mesh: Mesh, batch: dict[str, Any], config: Config) -> dict[str, Any]:
    """The batch as the step takes it; each of several processes brings its part of the whole."""
    if jax.process_count() == 1:  # the step takes NumPy arrays as they are, in a tenth of the time of placing them
        return batch
    return jax.tree.map(lambda part: place_share(mesh, part, config.train.batch_size), batch)


def open_batches(config: Config, task: Task, mesh: Mesh, source: Source, start: int) -> Batches:
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
        share=Share(*share_of(mesh, config.train.batch_size)),
    )


def check_finite(done: int, norm: float, run: Run) -> None:
    """Ends a run whose weights are broken, before it scores or saves what cannot recover.

    Args:
      done: Steps done.
      norm: Of the weights after them.
      run: Its folder, whose checkpoints stay as they are.

    Raises:
      UserError: A weight is NaN or infinite.
    """
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
