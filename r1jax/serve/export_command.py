"""The command `r1jax export`: a checkpoint in, a model that runs without r1jax out."""

import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.arguments import EvalArguments, EvalData
from r1jax.cli import load_arguments
from r1jax.config import Config, Count, MeshConfig, ModelConfig
from r1jax.disk import sha256
from r1jax.edge.artefact import TEXTS
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import make_mesh
from r1jax.parallel.platform import start_platform
from r1jax.serve import export_jax, export_litert
from r1jax.serve.evaluate import restore_served, scoring_config
from r1jax.serve.export_card import describe_export, describe_ports, write_card
from r1jax.serve.export_gate import FP32, HALF, INT8, Limits, Subset, agreement_lines, compare
from r1jax.serve.export_graph import exported_graph, ports
from r1jax.serve.export_texts import report_texts
from r1jax.serve.scored import Points, Scored, frozen_points, score
from r1jax.tasks.catalog import TASKS
from r1jax.tasks.medical.batch import PICTURES
from r1jax.tasks.medical.modes import shown_modes
from r1jax.tasks.medical.task import Medical
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.checkpoints import find_checkpoint
from r1jax.train.evaluation import Evaluator

HELP = """\
r1jax export CHECKPOINT --output DIR: the model of a medical run with its preprocessing and its operating thresholds as
one file that runs without r1jax, beside a card that says what it reads. Before anything is left in DIR, the exported
model must say what the checkpoint says, on cases of --data (docs/export.md).

Examples:
  r1jax export runs/medical --output exported
  r1jax export runs/medical --to litert --int8 --install --output edge
"""


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """What `r1jax export` is told."""

    checkpoint: str
    """Run folder, its checkpoints folder, or one checkpoint."""
    output: str
    """Folder to write; it must not exist, or be empty."""
    to: Literal["jax", "litert"] = "jax"
    """jax: a program for CPU and CUDA, any batch, run by JAX; litert: for a device, one case at a time, run by LiteRT
    and reported by a script beside it."""
    int8: bool = False
    """Of litert: weights of products and convolutions as int8."""
    converter: str | None = None
    """Python of an environment that has the LiteRT converter; none takes that which --install makes."""
    install: bool = False
    """Makes the converter's environment, by venv and pip, where it is missing (600 MB)."""
    data: EvalData = field(default_factory=EvalData)
    cases: Count = 400
    """Cases that the exported model is compared on."""


class Opened(NamedTuple):
    """A checkpoint with all that its export needs."""

    checkpoint: Checkpoint
    config: Config
    """With unrolled, unrounded layers of fp32 where the target needs it, and the data that is compared on."""
    task: Medical
    model: R1
    params: Any
    scored: Scored
    """What the checkpoint says of the cases, in its own precision."""
    points: Points


def export(words: list[str]) -> int:
    """Runs `r1jax export`.

    Args:
      words: After the command's name.

    Returns:
      The exit code.

    Raises:
      UserError: The checkpoint cannot be exported, a tool is missing, or the result does not agree with the checkpoint.
    """
    asked = load_arguments(ExportArguments, words, "r1jax export", HELP, ("checkpoint",))
    edge, output = asked.to == "litert", Path(asked.output)
    if asked.int8 and not edge:
        raise UserError("--int8 is of --to litert: add that, or leave --int8 out")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already: name a new folder, or remove it")
    checkpoint = find_checkpoint(Path(asked.checkpoint), "checkpoint")
    converter = export_litert.find_converter(asked.converter, asked.install) if edge else None
    opened = open_checkpoint(checkpoint, asked)
    with draft_folder(output) as folder:
        agreement = write(folder, opened, asked, converter)
        print("\n".join(agreement_lines(agreement)))
        if not agreement["agrees"]:
            raise UserError(
                f"the exported model does not say what {checkpoint.path} says (table above), so nothing was written "
                f"to {output}: export {'without --int8' if asked.int8 else 'by another --to'}"
            )
    for file in sorted(output.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    return 0


def open_checkpoint(checkpoint: Checkpoint, asked: ExportArguments) -> Opened:
    """Reads a checkpoint and has it predict the cases that the export is compared on.

    Args:
      checkpoint: The checkpoint.
      asked: The command line.

    Returns:
      All of it, in memory.

    Raises:
      UserError: It is damaged, of another task, preprocesses cases by plug-ins, or does what the target cannot.
    """
    checkpoint.verify()
    if checkpoint.quantized:
        raise UserError(f"{checkpoint.path} is quantized: export what it was made from")
    checkpoint.refuse_codes()
    config = scoring_config(checkpoint, EvalArguments(checkpoint=asked.checkpoint, data=asked.data))
    if config.task.name != "medical":
        raise UserError(f"{checkpoint.path} is of the {config.task.name} task: only medical checkpoints are exported")
    if config.data.preprocess:
        raise UserError(
            f"{checkpoint.path} reads cases through data.preprocess {config.data.preprocess!r}, which runs on the host "
            "and would be missing in the exported model: train without it to export"
        )
    buckets = config.model.text_ngrams if "text" in config.model.modalities else 0
    if buckets and asked.to == "litert":
        raise UserError(
            f"{checkpoint.path} has model.text_ngrams {buckets}, whose hashes LiteRT's converter refuses: export it by "
            "--to jax, or train without it"
        )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    print(f"{checkpoint.path}: {start_platform('cpu')}", file=sys.stderr)
    task, mesh = TASKS[config.task.name](config), make_mesh(MeshConfig(), jax.devices()[:1])
    network = R1(config.model, task.heads)
    source = Subset(task.source(config.data.split), asked.cases)
    params = restore_served(checkpoint, config, network, task, mesh, source)
    validation = checkpoint.meta()["validation"]
    scored = score(Evaluator(network, task, mesh), task, params, source, validation, batch_size=32)
    reads = config.model.modalities
    points = frozen_points(validation, task, shown_modes(reads, reads))
    weights = jax.tree.map(np.asarray, params)
    if asked.to == "litert":  # an edge device has neither bf16 nor loops, and its converter rounds by itself
        plain = dataclasses.replace(config.model, precision="fp32", scan_layers=False, quant=())
        config = dataclasses.replace(config, model=plain)
        task = TASKS[config.task.name](config)
        network = R1(plain, task.heads)
        weights = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x, weights)
    return Opened(checkpoint, config, task, network, weights, scored, points)


def write(folder: Path, opened: Opened, asked: ExportArguments, converter: Path | None) -> dict[str, Any]:
    """Writes the model, the card and, for a device, what reports need; then runs what was written.

    Args:
      folder: An empty folder.
      opened: The checkpoint.
      asked: The command line.
      converter: Python of the LiteRT converter, for litert.

    Returns:
      The agreement; if it does agree, the card holds it too.
    """
    sizes = {name: _size(opened, name) for name in PICTURES if name in opened.config.model.modalities}
    wanted = ports(opened.task, sizes)
    graph = exported_graph(opened.task, opened.model, opened.params, opened.points)
    run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    if converter is None:
        largest, outputs = export_jax.write_model(folder, graph, wanted)
        made = {"file": export_jax.MODEL, "platforms": list(export_jax.PLATFORMS), "batch": f"1 to {largest}"}
        versions, kind = {"jax": jax.__version__}, "exported"
        run = export_jax.read_model(folder)
    else:
        versions, outputs = export_litert.write_model(folder, graph, wanted, int8=asked.int8, converter=converter)
        (folder / TEXTS).write_text(json.dumps(report_texts(), ensure_ascii=False, indent=1) + "\n", "utf-8")
        made = {"file": export_litert.MODEL, "batch": "1", "precision": "int8 weights" if asked.int8 else "fp32"}
        kind = "edge, int8 weights" if asked.int8 else "edge"
        run = functools.partial(export_litert.run_model, folder, converter=converter)
    card = describe_export(opened.checkpoint, opened.config, opened.points, kind, versions)
    card |= {"to": asked.to, **made, **describe_ports(wanted, outputs)}
    card["sha256"] = {file.name: sha256(file) for file in sorted(folder.iterdir())}
    write_card(folder, card)
    scored = dataclasses.replace(opened.scored, frozen=opened.points | opened.scored.frozen)
    agreement = compare(run, wanted, scored, limits_of(opened.checkpoint.config().model, asked))
    if agreement["agrees"]:
        write_card(folder, card | {"agreement": agreement})
    return agreement


def limits_of(trained: ModelConfig, asked: ExportArguments) -> Limits:
    """How far the exported model may be from the checkpoint, by what rounds numbers in one of them alone or otherwise.

    Args:
      trained: The checkpoint's own model.
      asked: The command line.

    Returns:
      The limits.
    """
    if asked.int8 or (asked.to == "litert" and trained.quant):
        return INT8
    return FP32 if trained.precision == "fp32" else HALF


def _size(opened: Opened, name: str) -> tuple[int, ...]:
    """Voxels of a picture as the cases have them; where they have none, as the model reads them."""
    given = {item.name: item.shape for item in opened.scored.source.schema.fields}
    return tuple(given.get(name, getattr(opened.config.model, name).size))


@contextmanager
def draft_folder(output: Path) -> Iterator[Path]:
    """Gives a folder beside the output that takes its place once the block is done, and is dropped if the block fails.

    Args:
      output: Where the result shall be; not there, or an empty folder.

    Yields:
      The folder to write into.

    Raises:
      UserError: The disk does not take it.
    """
    draft = output.absolute().with_name(f".{output.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        yield draft
        draft.rename(output.absolute())
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
