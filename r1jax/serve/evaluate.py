"""What the evaluation of any task does: the checkpoint's config and weights, and where its results come from."""

import dataclasses
import itertools
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax import __version__
from r1jax.arguments import EvalArguments
from r1jax.config import CacheConfig, Config, TaskConfig
from r1jax.data.filesystem import is_remote
from r1jax.data.folder import folder_fingerprint
from r1jax.data.source import Source
from r1jax.data.tokenizer_files import check_bytes, check_same
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import shard_tree
from r1jax.tasks.envelope import Provenance, one_line
from r1jax.tasks.task import Task
from r1jax.train.checkpoint import Checkpoint, abstract_like
from r1jax.train.loop import served
from r1jax.train.plan import example_batch
from r1jax.train.quantized import FOLDER, is_codes, read_codes
from r1jax.train.run import describe, trained_fingerprints
from r1jax.train.step import init_state


class Evaluation(NamedTuple):
    """What is being evaluated, and for whom."""

    arguments: EvalArguments
    checkpoint: Checkpoint
    config: Config
    """The checkpoint's own, with the data that is scored."""
    task: Task
    model: R1
    mesh: Mesh
    began: float
    """`time.perf_counter()` at the start."""

    @property
    def synthetic(self) -> bool:
        """Whether the cases are generated."""
        return self.config.data.path is None

    @property
    def output(self) -> Path:
        """Folder of the results."""
        if self.arguments.output is not None:
            return Path(self.arguments.output).absolute()
        return _run_folder(self.checkpoint) / "eval"


def scoring_config(checkpoint: Checkpoint, arguments: EvalArguments) -> Config:
    """The checkpoint's config, with the data that the command line names.

    Args:
      checkpoint: The checkpoint.
      arguments: What eval.py was told.

    Returns:
      The config; `data` is what is to be scored.

    Raises:
      UserError: The folder that the checkpoint was trained on is not here and no other was named, the tokenizer cannot
        be that of the weights, or the checkpoint is of another version.
    """
    try:
        config = checkpoint.config()
    except UserError as error:
        version = checkpoint.meta()["versions"]["r1jax"]
        raise UserError(
            f"{str(error).rstrip('.')}: the checkpoint was written by r1jax {version}, this is {__version__}; "
            "use the revision that its meta.json names, or train again"
        ) from None
    data, chosen, imported = config.data, arguments.data, checkpoint.imported
    if chosen.path is None and imported:
        raise UserError(
            f"{checkpoint.path} is an import, which brings no data of its own: name the text to score by --data.path"
        )
    if chosen.path is None and data.path is not None and not (is_remote(data.path) or Path(data.path).exists()):
        raise UserError(
            f"the checkpoint was trained on the folder {data.path}, which is not here: give the folder of the cases "
            "to score with --data.path"
        )
    split = chosen.split or data.split
    if chosen.path is not None and chosen.split is None:
        trained_here = same_path(data.path, chosen.path)
        if config.task.name == "medical" and not imported:
            trained_here |= folder_fingerprint(chosen.path) in trained_fingerprints(checkpoint.meta())
        split = data.split if trained_here else "all"
        how = "trained on" if trained_here else "not trained on"
        print(
            f"--data.split was not given: {split!r} is scored, as the checkpoint was {how} {chosen.path}",
            file=sys.stderr,
        )
    tokenizer = _tokenizer(checkpoint, config, chosen.tokenizer)
    # Every case is read once, so the training's cache is of no use here, and its server may be out of reach. One folder
    # is scored: what training mixed with it was not what the checkpoint was chosen by.
    path = chosen.path or data.path
    data = dataclasses.replace(
        data, path=path, mix=(), weights=(), split=split, tokenizer=tokenizer, cache=CacheConfig()
    )
    return dataclasses.replace(config, data=data, task=scoring_task(config, arguments))


def scoring_task(config: Config, arguments: EvalArguments) -> TaskConfig:
    """The task with what only its scoring is told: the budget of alerts, and earlier transactions as history.

    Args:
      config: Of the checkpoint.
      arguments: What eval.py was told.

    Returns:
      The checkpoint's task with the given budget and, for another file of transactions, the trained one behind its own
      history as history.

    Raises:
      UserError: A budget of alerts was given for a task that raises none.
    """
    task, budget, later = config.task, arguments.alerts_per_day, arguments.data.path
    if task.name != "finance":
        if budget is not None:
            raise UserError(f"--alerts-per-day {budget:g}: the {task.name} task raises no alerts; leave it out")
        return task
    finance, trained = task.finance, config.data.path
    if budget is not None:
        step_up = max(budget, finance.alerts.step_up_per_day)
        alerts = dataclasses.replace(finance.alerts, per_day=budget, step_up_per_day=step_up, false_positive_rate=None)
        finance = dataclasses.replace(finance, alerts=alerts)
    if later is not None and not same_path(later, trained):
        finance = dataclasses.replace(finance, history=_history((*finance.history, trained), later))
    return dataclasses.replace(task, finance=finance)


def _history(files: tuple[str | None, ...], later: str) -> tuple[str, ...]:
    """Those of the files that lie before a later one without a gap; None is generated data, which is before nothing."""
    before = tuple(itertools.takewhile(lambda path: not same_path(path, later), files))
    kept = tuple(itertools.takewhile(lambda path: path and (is_remote(path) or Path(path).exists()), before[::-1]))
    if len(kept) < len(before):
        gone = before[-1 - len(kept)]
        why = f"{gone}, which the checkpoint was trained on or with, is not here"
        why = "the checkpoint was trained on generated data" if gone is None else why
        told = f"the history of {later} begins with {kept[-1]}" if kept else f"the first of {later} have no history"
        print(f"warning: {why}: {told}", file=sys.stderr)
    return kept[::-1]


def same_path(one: str | None, other: str | None) -> bool:
    """Whether two of `data.path` mean the same data; None is generated data."""
    if one is None or other is None:
        return one is other
    return Path(one).resolve() == Path(other).resolve()


def _tokenizer(checkpoint: Checkpoint, config: Config, given: str | None) -> str | None:
    """The tokenizer of the weights; one that is given must be the same, or that of an import which was made without."""
    if config.task.name != "language":
        if given is not None:
            raise UserError(f"--data.tokenizer {given}: the {config.task.name} task reads text as bytes; leave it out")
        return None
    own, imported = checkpoint.tokenizer(), checkpoint.imported
    if given is None:
        if own is None and imported:
            size = config.model.decoder.vocab_size
            check_bytes(size, str(checkpoint.path), "name the model's own tokenizer by --data.tokenizer")
        return None if own is None else str(own)
    if own is not None or not imported:
        check_same(Path(given), own, "--data.tokenizer")
    return given


def restore_served(checkpoint: Checkpoint, config: Config, model: R1, task: Task, mesh: Mesh, source: Source) -> Any:
    """The weights that a checkpoint serves.

    Args:
      checkpoint: Where from.
      config: Its config.
      model: The model of that config.
      task: The task of that config.
      mesh: Devices.
      source: Any cases of the config's modalities; only their shapes matter.

    Returns:
      Parameters on the mesh.

    Raises:
      UserError: The checkpoint is damaged, or its arrays are not those of its config.
    """
    if checkpoint.quantized:
        checkpoint.verify()
        params, _ = read_codes(checkpoint.path / FOLDER)
        return jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    batch = example_batch(source, task, 1)
    abstract = jax.eval_shape(lambda: init_state(config, model, task, batch))
    group = "ema" if served(abstract, config) is abstract.ema else "params"
    wanted = {group: getattr(abstract, group)}
    checkpoint.verify()
    _check_arrays(checkpoint, wanted)
    return checkpoint.read(abstract_like(wanted, shard_tree(mesh, wanted)))[group]


def _check_arrays(checkpoint: Checkpoint, wanted: dict[str, Any]) -> None:
    """Compares the shapes of the weights on disk with those that the config gives; the message names the array."""
    held = checkpoint.stored()
    stored, wanted = _shapes({group: held.get(group) for group in wanted}), _shapes(wanted)
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            raise UserError(
                f"checkpoint {checkpoint.path} does not fit its own config.json: the array {name} is "
                f"{stored.get(name, 'absent')} there and {wanted.get(name, 'absent')} by the config; it was written "
                "with another config or another version of r1jax: use the revision that its meta.json names"
            )


def _shapes(tree: Any) -> dict[str, list[int]]:
    """Shape of each array by its place; fields of tuples are named as they are stored."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape") and not is_codes(x))
    keys = ("key", "name", "idx")
    return {
        ".".join(str(next(getattr(part, key) for key in keys if hasattr(part, key))) for part in path): list(leaf.shape)
        for path, leaf in leaves
    }


def origin(run: Evaluation, source: Source, seen: int | None) -> dict[str, Any]:
    """Where a result comes from.

    Args:
      run: What is evaluated.
      source: The cases.
      seen: How many of them the checkpoint was trained on; None where that is unknown.

    Returns:
      Checkpoint, data, versions and command; JSON as it stands.
    """
    made, here, data = run.checkpoint.meta(), describe(source, run.task.pipeline), run.config.data
    return {
        "name": run.config.name,
        "checkpoint": {
            "path": str(run.checkpoint.path.absolute().relative_to(_run_folder(run.checkpoint))),
            "step": run.checkpoint.step,
            "sha256": run.checkpoint.digest(),
        },
        "data": here["data"]
        | {
            "path": data.path,
            "split": data.split,
            "cases": len(source),
            "synthetic": run.synthetic,
            "seen_in_training": seen,
        },
        "trained_on": made.get("data"),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": here["versions"],
        "trained_with": made["versions"],
        "git": here["git"],
        "device": here["device"],
        "command": here["command"],
        "seconds": {"predictions_and_figures": round(time.perf_counter() - run.began, 1)},
    }


def _run_folder(checkpoint: Checkpoint) -> Path:
    """The folder that holds `checkpoints/`, or the one that a lone checkpoint lies in; an import is a folder itself."""
    if not checkpoint.path.name.isdigit():
        return checkpoint.path.absolute()
    parent = checkpoint.path.absolute().parent
    return parent.parent if parent.name == "checkpoints" else parent


def provenance_lines(metrics: dict[str, Any]) -> dict[str, str]:
    """The provenance as the page lists it."""
    made = metrics["provenance"]
    checkpoint, data = made["checkpoint"], made["data"]
    return {
        "Data": f"{data['name']} (split {data['split']}, {data['cases']} cases)",
        "Data fingerprint (SHA-256)": data["fingerprint"],
        "Trained on": f"{made['trained_on']['name']} ({made['trained_on']['fingerprint']})",
        "Checkpoint": f"{checkpoint['path']}, step {checkpoint['step']}",
        "Checkpoint (SHA-256)": checkpoint["sha256"],
        "Created": made["created"],
        "Device": made["device"],
        "Versions": ", ".join(f"{name} {version}" for name, version in made["versions"].items()),
        "Command": " ".join(made["command"]),
        "Revision": made["git"],
    }


def report_provenance(metrics: dict[str, Any]) -> Provenance:
    """The provenance as the structured reports state it.

    Args:
      metrics: What is written to metrics.json, with its "provenance".

    Returns:
      One for all reports of the evaluation.
    """
    made = metrics["provenance"]
    return Provenance(
        model=one_line(f"r1jax {made['name']}, step {made['checkpoint']['step']}"),
        r1jax_version=__version__,
        checkpoint_sha256=made["checkpoint"]["sha256"],
        data_name=one_line(made["data"]["name"]),
        data_fingerprint=made["data"]["fingerprint"],
        created=made["created"],
    )


def write_metrics(run: Evaluation, metrics: dict[str, Any], folder: Path) -> None:
    """Writes metrics.json, with the time that all of it took.

    Args:
      run: What is evaluated.
      metrics: JSON as it stands, with its "provenance".
      folder: Where to; it must exist.
    """
    metrics["provenance"]["seconds"]["total"] = round(time.perf_counter() - run.began, 1)
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n", "utf-8")


def shortest(path: Path) -> Path:
    """The path from the working directory where it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
