"""One run in one folder: its lock, its checkpoints, the signals that end it, and where it goes on from."""

import fcntl
import importlib.metadata
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from r1jax import __version__
from r1jax.config import Config
from r1jax.data.order import VERSION
from r1jax.data.pipeline import Pipeline, changed, original
from r1jax.data.source import Source
from r1jax.errors import UserError
from r1jax.fields import to_json
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import shard_tree
from r1jax.tasks.task import Task
from r1jax.train.checkpoints import CheckpointFolder, abstract_like, check_same_run
from r1jax.train.goodput import Clock
from r1jax.train.start import RECORD, start_from
from r1jax.train.step import Batch, TrainState, init_state

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Run(NamedTuple):
    """An open run folder."""

    workdir: Path
    checkpoints: CheckpointFolder
    stop: list[int]
    """The signal that asked to stop, once there was one."""
    clock: Clock


@contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Locks the run folder and turns SIGINT and SIGTERM into a wish to stop after the step.

    Args:
      config: Names the folder.

    Yields:
      The run.

    Raises:
      UserError: Another process trains in this folder, or it cannot be written.
    """
    workdir = Path(config.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written ({error.strerror}): choose another --workdir") from error
    stop: list[int] = []
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {workdir}: wait for it or choose another --workdir"
            ) from None
        run = Run(workdir, CheckpointFolder(workdir / "checkpoints"), stop, Clock(workdir))
        run.checkpoints.clear_drafts()

        def ask_to_stop(number: int, _: Any) -> None:
            if stop:  # a second Ctrl-C means now
                raise KeyboardInterrupt
            stop.append(number)

        before = {s: signal.signal(s, ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield run
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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
    abstract = jax.eval_shape(lambda: init_state(config, model, task, batch))
    where = shard_tree(mesh, abstract)
    sound, damaged = [], []
    for checkpoint in reversed(run.checkpoints.all()):
        try:
            checkpoint.verify()
            sound.append(checkpoint)
        except UserError as error:
            damaged.append((checkpoint, error))
    if damaged and not sound:
        raise UserError(
            f"{damaged[0][1]}; none of the {len(damaged)} in {run.workdir} is sound: delete them to start anew"
        )
    if sound:
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
        other = changed(newest.meta()["preprocess"], task.pipeline.provenance())
        if other:
            raise UserError(f"{run.workdir}: {other[0]}: bring that code back, or choose another --workdir")
        said = [f"skipped: {error}; it is now {run.checkpoints.set_aside(bad)}" for bad, error in damaged]
        return newest.restore(abstract_like(abstract, where)), [*said, f"goes on from {newest.path}"]
    (run.workdir / "config.json").write_text(to_json(config))
    (run.workdir / RECORD).unlink(missing_ok=True)
    fresh = jax.jit(lambda: init_state(config, model, task, batch), out_shardings=where)()
    return start_from(config.train.init, fresh, config.model, run.workdir) if config.train.init else (fresh, [])


def describe(source: Source, pipeline: Pipeline) -> dict[str, Any]:
    """What a checkpoint says about its making: data, preprocessors, versions, command, revision."""
    data = {"name": source.name, "fingerprint": original(source).fingerprint}
    return {"data": data, "preprocess": pipeline.provenance()} | provenance()


def provenance() -> dict[str, Any]:
    """What any checkpoint says about its making: versions, device, command, revision."""
    try:
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
        revision = git.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = "unknown"
    return {
        "versions": {
            "r1jax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "device": jax.devices()[0].device_kind,
        "command": sys.argv,
        "git": revision,
    }
