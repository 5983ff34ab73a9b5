"""One run in one folder: its lock, its checkpoints, the signals that end it, and where it goes on from."""

import fcntl
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from r1jax.config import Config
from r1jax.data.order import VERSION
from r1jax.data.pipeline import Pipeline, changed, original, parts
from r1jax.data.source import Source
from r1jax.errors import UserError
from r1jax.fields import to_dict, to_json
from r1jax.models.ngrams import RARITY
from r1jax.models.r1 import R1
from r1jax.parallel.agree import from_first, is_first
from r1jax.parallel.mesh import shard_tree
from r1jax.parallel.stages import into_stages, stages_on
from r1jax.tasks.task import Task
from r1jax.train.checkpoint import abstract_like
from r1jax.train.checkpoints import CheckpointFolder, check_same_run
from r1jax.train.goodput import Clock
from r1jax.train.guard import JUMPS
from r1jax.train.history import History
from r1jax.train.provenance import environment, provenance
from r1jax.train.quantized import holds_codes
from r1jax.train.rarity import with_known, with_rarity
from r1jax.train.saver import Saver
from r1jax.train.start import RECORD, made_of_codes, start_from
from r1jax.train.step import Batch, TrainState, check_offload, encode_frozen, init_state, state_shardings
from r1jax.train.wandb_run import import_wandb
from r1jax.train.watch import Watch

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to save and leave; SIGUSR1 is how batch systems announce the end (SLURM's `--signal=USR1@120`)."""

RECORDS = ("config.json", "metrics.jsonl", JUMPS)
"""Files of a run folder that decide how the run goes on, beside its checkpoints."""


class Run(NamedTuple):
    """An open run folder."""

    workdir: Path
    """The folder itself; in a process that is not the first, a copy of the records that its way depends on."""
    checkpoints: CheckpointFolder
    stop: list[int]
    """The signals that asked to stop, once there were some; the first is the reason."""
    history: History
    watch: Watch
    saver: Saver
    clock: Clock


@contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Locks the run folder, watches over the run, and turns signals into a wish to stop after the step.

    However the run is left, a checkpoint that is being written is finished, and the history says what happened. Of
    several processes only process 0 writes the folder: each of the others keeps a copy of its own that is thrown away.

    Args:
      config: Names the folder and the time that is a hang.

    Yields:
      The run.

    Raises:
      UserError: Another process trains in this folder, it cannot be written, or what logs its figures is not installed.
    """
    workdir = Path(config.workdir)
    checkpoints = CheckpointFolder(workdir / "checkpoints", config.train.keep)
    with ExitStack() as stack:
        from_first(lambda: _take(config, checkpoints, stack))
        records = from_first(lambda: _records(workdir))
        if not is_first():
            workdir = Path(stack.enter_context(TemporaryDirectory(prefix="r1jax-", ignore_cleanup_errors=True)))
            for name, text in records.items():
                (workdir / name).write_text(text)
        history = History(workdir)
        watch = Watch(workdir, history, config.train.hang_timeout)
        run = Run(workdir, checkpoints, [], history, watch, Saver(checkpoints, watch), Clock(workdir))
        try:
            with _stopping(run.stop), _recorded(run, config.train.steps):
                yield run
        finally:
            watch.close()


def _take(config: Config, checkpoints: CheckpointFolder, stack: ExitStack) -> None:
    """Makes the run folder and locks it until the stack is closed, and removes what killed writers left."""
    if config.train.wandb is not None:
        import_wandb(config.train.wandb)  # or the step would be compiled first
    workdir = Path(config.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((workdir / ".lock").open("w"))
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written ({error.strerror}): choose another --workdir") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in {workdir}: wait for it or choose another --workdir") from None
    checkpoints.clear_drafts()


def _records(workdir: Path) -> dict[str, str]:
    """What a process must know of the run folder to go the same way as process 0."""
    return {name: (workdir / name).read_text() for name in RECORDS if (workdir / name).exists()}


@contextmanager
def _stopping(stop: list[int]) -> Iterator[None]:
    """Collects signals; a second Ctrl-C or SIGTERM means now, but SIGTERM after SIGUSR1 is only its reminder."""
    received: list[int] = []  # by this process; what another one was told, it may be told too, a moment later

    def ask_to_stop(number: int, _: Any) -> None:
        if number != signal.SIGUSR1 and (number in received or (received and number == signal.SIGINT)):
            raise KeyboardInterrupt
        received.append(number)
        stop.append(number)

    before = {s: signal.signal(s, ask_to_stop) for s in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _recorded(run: Run, steps: int) -> Iterator[None]:
    """Finishes the last save, then tells the history how the run was left."""
    try:
        try:
            yield
        finally:
            unsaid = run.saver.close()
            if unsaid is not None:
                print(f"error: {unsaid}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        run.history.note("interrupted", step=run.watch.step)
        raise
    except BaseException as error:
        told = str(error) or type(error).__name__
        run.history.note("failed", step=run.watch.step, kind=type(error).__name__, message=told[:2000])
        raise
    if run.stop and run.watch.step < steps:
        run.history.note("stopped", step=run.watch.step, signal=signal.Signals(run.stop[0]).name)
    else:
        run.history.note("ended", step=run.watch.step)


def restore_or_init(
    config: Config, run: Run, model: R1, task: Task, mesh: Mesh, source: Source, batch: Batch
) -> tuple[TrainState, list[str]]:
    """The state of the newest sound checkpoint, or a fresh one, with the weights of `train.init` where that is set.

    Args:
      config: The experiment.
      run: Its folder.
      model: The model.
      task: The task.
      mesh: Devices.
      source: Training cases; the run must have been started on the same.
      batch: Any collated batch (shapes).

    Returns:
      The state on the mesh, and lines to print about where it came from.

    Raises:
      UserError: The folder's run had another config or other data, no checkpoint of it is sound, or nothing of
        `train.init` fits.
    """
    run.watch.enter("reading the checkpoint")
    abstract = jax.eval_shape(lambda: init_state(config, model, task, batch))
    where, stages = shard_tree(mesh, abstract), stages_on(mesh, config.mesh, config.model.decoder)
    with run.watch.left_to_another(not is_first()):  # process 0 alone sums up the files
        step, said = from_first(lambda: _choose(config, run, source, task.pipeline))
        if step is not None:
            newest = run.checkpoints.at(step)
            from_first(lambda: newest.verify(seen=run.watch.beat))
    if step is not None:
        state = newest.load(abstract_like(abstract, where))
        if step < config.train.steps:  # else there is nothing to be done, and the folder stays as it is
            _begin(config, run, source, task.pipeline, step, str(newest.path))
        return _settled(into_stages(state, mesh, stages), config, mesh), said
    stored = run.workdir / "config.json"
    if not stored.exists() or stored.read_text() != to_json(config):  # else it went back to its very start
        (run.workdir / JUMPS).unlink(missing_ok=True)
    stored.write_text(to_json(config))
    (run.workdir / RECORD).unlink(missing_ok=True)
    _begin(config, run, source, task.pipeline, 0, None)
    # Floats that a run starts from are rounded by its rules; codes, and fresh weights, are taken as they come.
    rounds = config.train.init is not None and holds_codes(config) and not made_of_codes(config.train.init)
    made = replace(config, model=replace(config.model, quant=())) if rounds else config
    place = shard_tree(mesh, jax.eval_shape(lambda: init_state(made, model, task, batch))) if rounds else where
    fresh = jax.jit(lambda: init_state(made, model, task, batch), out_shardings=place)()
    fresh = with_rarity(fresh, config, task, source, run.watch.beat)
    if config.train.init:
        measured = fresh.params.get("ngrams", {}).get(RARITY)
        fresh, said = start_from(config.train.init, fresh, config.model, run.workdir)
        if measured is not None and not config.model.lora_rank:
            fresh = with_known(fresh, measured)
    if rounds:
        fresh = jax.jit(lambda state: encode_frozen(state, model, task, batch), out_shardings=where)(fresh)
    return _settled(into_stages(fresh, mesh, stages), config, mesh), said


def _settled(state: TrainState, config: Config, mesh: Mesh) -> TrainState:
    """The state where the run keeps it."""
    if config.train.moments_on == "device":
        return state
    check_offload(config, mesh.local_devices[0])
    return jax.device_put(state, state_shardings(config, mesh, state))


def _choose(config: Config, run: Run, source: Source, pipeline: Pipeline) -> tuple[int | None, list[str]]:
    """Looks for the checkpoint to go on from, and sets damaged ones aside.

    Returns:
      Its step, None to start anew, and lines to print.

    Raises:
      UserError: As `restore_or_init`.
    """
    sound, damaged = run.checkpoints.verify(run.watch.beat)
    if damaged and not sound:
        raise UserError(
            f"{damaged[0][1]}; none of the {len(damaged)} in {run.workdir} is sound: delete them to start anew"
        )
    if not sound:
        return None, []
    newest = sound[0]
    check_same_run(newest.config(), config, run.workdir)
    trained_on = newest.meta()["data"]
    if trained_on["fingerprint"] != original(source).fingerprint:
        raise UserError(
            f"{run.workdir} was trained on {trained_on['name']!r}, but the data is now {source.name!r} with other "
            "content: choose another --workdir"
        )
    # Before there were versions of the order there were no preprocessors either.
    ordered = newest.meta().get("order", {"version": 0})["version"]
    if ordered != VERSION:
        raise UserError(
            f"{run.workdir} was trained with version {ordered} of the order of cases, this is {VERSION}: use the "
            "r1jax that started it, or choose another --workdir"
        )
    other = changed(newest.meta()["preprocess"], pipeline.provenance())
    if other:
        raise UserError(f"{run.workdir}: {other[0]}: bring that code back, or choose another --workdir")
    said = [f"skipped: {error}; it is now {run.checkpoints.set_aside(bad)}" for bad, error in damaged]
    return newest.step, [*said, f"goes on from {newest.path}"]


def _begin(config: Config, run: Run, source: Source, pipeline: Pipeline, step: int, resumed: str | None) -> None:
    """Puts a start on record, with everything that it may differ in from the starts before."""
    made = describe(source, pipeline)
    told = {"step": step, "steps": config.train.steps, "resumed_from": resumed}
    told |= {"devices": jax.device_count(), "processes": jax.process_count()}
    run.history.start(**told, **made, environment=environment(), config=to_dict(config))
    run.watch.enter("compiling", step)


def describe(source: Source, pipeline: Pipeline) -> dict[str, Any]:
    """What a checkpoint says about its making: data, preprocessors, versions, command, revision."""
    data: dict[str, Any] = {"name": source.name, "fingerprint": original(source).fingerprint}
    if len(parts(source)) > 1:
        data["mixed"] = [part.fingerprint for part in parts(source)]
    return {"data": data, "preprocess": pipeline.provenance()} | provenance()


def trained_fingerprints(meta: dict[str, Any]) -> frozenset[str]:
    """Fingerprints of the data of a checkpoint.

    Args:
      meta: Of the checkpoint.

    Returns:
      That of the whole, and of each part where it was mixed.
    """
    return frozenset([meta["data"]["fingerprint"], *meta["data"].get("mixed", ())])
