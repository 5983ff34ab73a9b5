"""From a checkpoint to its results: metrics.json, one HTML page and a structured report of every case."""

import dataclasses
import functools
import json
import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax import __version__
from r1jax.config import CacheConfig, Config, EvalArguments
from r1jax.data.filesystem import is_remote
from r1jax.data.folder import folder_fingerprint
from r1jax.data.pipeline import original
from r1jax.data.source import Source
from r1jax.data.tokenizer_files import check_bytes, check_same
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import shard_tree
from r1jax.serve.case_reports import Reporter, write_report
from r1jax.serve.gallery import gallery
from r1jax.serve.page import write_page
from r1jax.serve.page_charts import Scores
from r1jax.serve.progress import progress
from r1jax.serve.saliency import explained_finding, saliency_maps
from r1jax.serve.scored import Scored, seen_in_training
from r1jax.tasks.medical.canonical import NOT_TEXT, Provenance
from r1jax.tasks.medical.evaluation import evaluate_modalities
from r1jax.tasks.medical.modes import best_attainable
from r1jax.tasks.medical.schema import FINDING
from r1jax.tasks.medical.summary import summary_lines
from r1jax.tasks.task import Task
from r1jax.train.checkpoints import Checkpoint, abstract_like
from r1jax.train.loop import served
from r1jax.train.plan import example_batch
from r1jax.train.quantized import FOLDER, read_codes
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
        trained_here = data.path is not None and Path(data.path).resolve() == Path(chosen.path).resolve()
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
    return dataclasses.replace(config, data=data)


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
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    keys = ("key", "name", "idx")
    return {
        ".".join(str(next(getattr(part, key) for key in keys if hasattr(part, key))) for part in path): list(leaf.shape)
        for path, leaf in leaves
    }


def measure(run: Evaluation, scored: Scored) -> dict[str, Any]:
    """Every figure of every finding and mode, and where all of it comes from.

    Args:
      run: What is evaluated.
      scored: Predictions.

    Returns:
      What `evaluate_modalities` gives, after "provenance" and "warnings"; JSON as it stands.
    """
    made, source = run.checkpoint.meta(), scored.source
    thresholds = {
        mode: {name: point.threshold for name, point in points.items()} for mode, points in scored.frozen.items()
    }
    figures = evaluate_modalities(
        scored.predicted,
        scored.targets,
        operating_points=thresholds,
        ceilings=best_attainable(source),
        groups=scored.groups,
        resamples=run.arguments.resamples,
    )
    seen = seen_in_training(source, run.task, trained_fingerprints(made))
    return {"provenance": origin(run, source, seen), "warnings": _warnings(run, scored, seen), **figures}


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


def write_results(run: Evaluation, scored: Scored, metrics: dict[str, Any], params: Any, folder: Path) -> None:
    """Writes the reports, the page and, last, metrics.json.

    Args:
      run: What is evaluated.
      scored: Predictions.
      metrics: From `measure`.
      params: Weights, for the saliency.
      folder: Where to; it must exist.

    Raises:
      UserError: A case cannot be reported; names it.
    """
    reporter = _reporter(run, scored, metrics)
    (folder / "reports").mkdir()
    with progress("reports", len(scored.ids)) as steps:
        for report in reporter.reports():
            write_report(folder / "reports", report)
            steps.advance()
    explained = explained_finding(run.task.fields)
    maps = functools.partial(saliency_maps, run.model, run.task, run.mesh, params, scored.source)
    write_page(
        folder / "index.html",
        title=f"{run.config.name}: {scored.source.name}",
        metrics=metrics,
        curves=_curves(scored),
        pictures=gallery(reporter, run.arguments.pictures, explained, maps),
        provenance=_provenance_lines(metrics),
        synthetic=run.synthetic,
    )
    metrics["provenance"]["seconds"]["total"] = round(time.perf_counter() - run.began, 1)
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n", "utf-8")


def _run_folder(checkpoint: Checkpoint) -> Path:
    """The folder that holds `checkpoints/`, or the one that a lone checkpoint lies in; an import is a folder itself."""
    if not checkpoint.path.name.isdigit():
        return checkpoint.path.absolute()
    parent = checkpoint.path.absolute().parent
    return parent.parent if parent.name == "checkpoints" else parent


def _reporter(run: Evaluation, scored: Scored, metrics: dict[str, Any]) -> Reporter:
    made = metrics["provenance"]
    return Reporter(
        scored=scored,
        provenance=Provenance(
            model=_one_line(f"r1jax {made['name']}, step {made['checkpoint']['step']}"),
            r1jax_version=__version__,
            checkpoint_sha256=made["checkpoint"]["sha256"],
            data_name=_one_line(made["data"]["name"]),
            data_fingerprint=made["data"]["fingerprint"],
            created=made["created"],
        ),
        synthetic=run.synthetic,
        language=run.arguments.language,
    )


def _one_line(text: str) -> str:
    return re.sub(f"[\t\n\r{NOT_TEXT}\ud800-\udfff]", " ", text)


def _curves(scored: Scored) -> list[Scores]:
    """Labels and probabilities of each binary finding and mode whose truth is known in some case."""
    curves = []
    for mode, predicted in scored.predicted.items():
        for name, probabilities in predicted.items():
            if FINDING[name].kind != "binary":
                continue
            known = ~np.isnan(scored.targets[name])
            if known.any():
                labels = scored.targets[name][known]
                curves.append(Scores(name, mode, labels, probabilities[known], scored.threshold(mode, name)))
    return curves


def _warnings(run: Evaluation, scored: Scored, seen: int) -> list[str]:
    """What a reader of the figures must know."""
    data, source = run.config.data, original(scored.source)
    made = run.checkpoint.meta()["data"]
    chosen_by = made.get("mixed", [made["fingerprint"]])[0]
    found = []
    if seen:
        found.append(
            f"{seen} of these {len(source)} cases were seen in training: the figures do not say how the model does on "
            "new cases"
        )
    elif data.split == "val" and (run.synthetic or source.fingerprint == chosen_by):
        found.append("these cases chose the checkpoint and its operating points: the figures are somewhat optimistic")
    unset = {name for mode in scored.points for name in scored.points[mode] if name not in scored.frozen[mode]}
    if unset:
        found.append(
            f"the checkpoint has no operating point of {', '.join(sorted(unset))}: it was set on the cases of this "
            "evaluation"
        )
    return found


def _provenance_lines(metrics: dict[str, Any]) -> dict[str, str]:
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


def closing_lines(run: Evaluation, metrics: dict[str, Any]) -> str:
    """The headline figures, and where the files are.

    Args:
      run: What was evaluated.
      metrics: From `measure`.

    Returns:
      Text to print.
    """
    made, output = metrics["provenance"], _shortest(run.output)
    return "\n".join(
        [
            f"{made['data']['name']}: {made['data']['cases']} cases, checkpoint of step {made['checkpoint']['step']}",
            "",
            *summary_lines(metrics),
            "",
            *(f"warning: {line}" for line in metrics["warnings"]),
            f"page     {output / 'index.html'}",
            f"figures  {output / 'metrics.json'}",
            f"reports  {output / 'reports'} ({made['data']['cases']} cases, JSON and XML)",
            f"time     {made['seconds']['total']:.0f} s",
        ]
    )


def _shortest(path: Path) -> Path:
    """The path from the working directory where it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
