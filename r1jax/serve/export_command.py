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
from r1jax.config import Config, Count, MeshConfig, ModelConfig, Positive
from r1jax.data.filesystem import is_remote
from r1jax.disk import sha256
from r1jax.edge.artefact import CARD, TEXTS
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import make_mesh
from r1jax.parallel.platform import start_platform
from r1jax.serve import export_iree, export_jax, export_litert
from r1jax.serve.evaluate import restore_served, same_path, scoring_config
from r1jax.serve.export_card import describe_export, describe_ports, write_card
from r1jax.serve.export_codes import OwnCodes, activations_line, code_sizes, for_device, in_groups, own_codes
from r1jax.serve.export_device import find_converter, run_model
from r1jax.serve.export_finance import FinanceExport
from r1jax.serve.export_gate import FP16, FP32, HALF, INT8, ROUNDED, Subset, agreement_lines, compare
from r1jax.serve.export_graph import Exported, Limits
from r1jax.serve.export_medical import MedicalExport
from r1jax.serve.export_rounding import CALIBRATION, CHECKED, RoundingCases, round_weights
from r1jax.serve.quantize_report import MOST
from r1jax.tasks.catalog import TASKS
from r1jax.tasks.task import Task
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.checkpoints import find_checkpoint
from r1jax.train.evaluation import Evaluator
from r1jax.train.quantized import in_four_bits

HELP = """\
r1jax export CHECKPOINT --output DIR: the model of a medical or a finance run with its preprocessing, calibration and
operating thresholds as one file that runs without r1jax, beside a card that says what it reads. Before anything is left
in DIR, the exported model must say what the checkpoint says, on cases of --data (docs/export.md).

Examples:
  r1jax export runs/medical --output exported
  r1jax export runs/medical --to litert --weights fp16 --install --output edge
  r1jax export runs/medical --to iree --install --target-triple aarch64-linux-gnu --output edge-arm
  r1jax export runs/medical-int8 --output exported       # of r1jax quantize: its codes, and what they compute
  r1jax export runs/finance --to litert --install --alerts-per-day 50 --output edge
"""
EXPORTS = {"medical": MedicalExport, "finance": FinanceExport}
"""What is exported of a checkpoint, by the name of its task."""
TOOLS = {"litert": export_litert.TOOL, "iree": export_iree.TOOL}
"""What makes the file of a device, by the target."""
REFUSED = {"float": "by another --to", "fp16": "without --weights", "int8": "by --weights fp16"}
"""What may agree where the weights as they were stored did not."""


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """What `r1jax export` is told."""

    checkpoint: str
    """Run folder, its checkpoints folder, or one checkpoint."""
    output: str
    """Folder to write; it must not exist, or be empty."""
    to: Literal["jax", "litert", "iree"] = "jax"
    """jax: a program for CPU and CUDA, any batch, run by JAX; litert: for a device, one case at a time, run by LiteRT
    and reported by a script beside it; iree: likewise, compiled for a CPU and run by IREE, which takes loops, sorts and
    ragged products of experts as they are."""
    weights: Literal["float", "fp16", "int8"] = "float"
    """Of litert, how they are stored: as fp32; as fp16, which is half of it and nearly the same model; or as int8, but
    fp16 where that matters most to calls and int4 where it hardly matters (some minutes, docs/export.md). Codes of
    the checkpoint stay as they are; this is of its other weights."""
    converter: str | None = None
    """Python of an environment that has the LiteRT converter or the IREE compiler; none takes that which --install
    makes."""
    install: bool = False
    """Makes the converter's environment, by venv and pip, where it is missing (600 MB)."""
    target_cpu: str | None = None
    """Of iree, the CPU that the program is for, as LLVM names it (generic, x86-64-v3, cortex-a76); none takes x86-64-v3
    or, for ARM, generic, which runs on every CPU of its architecture."""
    target_triple: str | None = None
    """Of iree, the machine that the program is for, if it is another than this one, as aarch64-linux-gnu."""
    data: EvalData = field(default_factory=EvalData)
    cases: Count = 400
    """Cases that the exported model is compared on."""
    alerts_per_day: Positive | None = None
    """Of finance: alerts a day that can be looked at; none takes the checkpoint's `task.finance.alerts`."""


class Opened(NamedTuple):
    """A checkpoint with all that its export needs."""

    checkpoint: Checkpoint
    config: Config
    """With layers of fp32, unrolled and unrounded, where the target needs it, and the data that is compared on."""
    task: Task
    model: R1
    params: Any
    exported: Exported
    """With what the checkpoint says of the cases, in its own precision."""
    rounding: RoundingCases | None = None
    """Of --weights int8, where the checkpoint has no codes."""
    codes: OwnCodes | None = None
    """Of a checkpoint with `model.quant`; `params` are they, or for litert what they stand for."""


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
    tool, output = TOOLS.get(asked.to), Path(asked.output)
    if asked.weights != "float" and asked.to != "litert":
        raise UserError(f"--weights {asked.weights} is of --to litert: add that, or leave --weights out")
    if asked.to == "iree":
        target = export_iree.target_of(asked.target_triple, asked.target_cpu)  # refused before anything else is done
    elif asked.target_cpu is not None or asked.target_triple is not None:
        raise UserError("--target-cpu and --target-triple are of --to iree: add that, or leave them out")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already: name a new folder, or remove it")
    checkpoint = find_checkpoint(Path(asked.checkpoint), "checkpoint")
    converter = find_converter(tool, asked.converter, asked.install) if tool else None
    if asked.to == "iree":
        export_iree.check_target(target, converter)
    opened = open_checkpoint(checkpoint, asked)
    with draft_folder(output) as folder:
        agreement = write(folder, opened, asked, converter)
        print("\n".join(agreement_lines(agreement)))
        if not agreement["agrees"]:
            raise UserError(
                f"the exported model does not say what {checkpoint.path} says (table above), so nothing was written "
                f"to {output}: export {REFUSED[asked.weights]}"
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
    checkpoint.refuse_codes()
    told = EvalArguments(checkpoint=asked.checkpoint, data=asked.data, alerts_per_day=asked.alerts_per_day)
    config = scoring_config(checkpoint, told)
    if config.task.name not in EXPORTS:
        raise UserError(
            f"{checkpoint.path} is of the {config.task.name} task: only checkpoints of {' and '.join(EXPORTS)} are "
            "exported"
        )
    if config.data.preprocess:
        raise UserError(
            f"{checkpoint.path} reads cases through data.preprocess {config.data.preprocess!r}, which runs on the host "
            "and would be missing in the exported model: train without it to export"
        )
    buckets = config.model.text_ngrams if "text" in config.model.modalities else 0
    if buckets and asked.to == "litert":
        raise UserError(
            f"{checkpoint.path} has model.text_ngrams {buckets}, whose hashes LiteRT's converter refuses: export it by "
            "--to jax or iree, or train without it"
        )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
    print(f"{checkpoint.path}: {start_platform('cpu')}", file=sys.stderr)
    task, mesh = TASKS[config.task.name](config), make_mesh(MeshConfig(), jax.devices()[:1])
    network = R1(config.model, task.heads)
    export_of = EXPORTS[config.task.name]
    source = task.source(config.data.split)
    source = Subset(source, export_of.chosen(source, asked.cases))
    params = restore_served(checkpoint, config, network, task, mesh, source)
    codes = own_codes(config, task, params, source)
    if codes is not None and asked.to == "litert" and "fp8" in codes.activations:
        raise UserError(
            f"{checkpoint.path} rounds activations to fp8 (model.quant {' '.join(config.model.quant)}), which LiteRT "
            "has not: export it by --to jax"
        )
    evaluator = Evaluator(network, task, mesh)
    # Codes of its own are not chosen anew.
    rounds = asked.weights == "int8" and codes is None
    rounding = rounding_cases(checkpoint, evaluator, params, asked) if rounds else None
    exported = export_of(checkpoint, evaluator, params, source)
    config, params = exported_weights(config, params, codes, asked.to)
    task = TASKS[config.task.name](config)
    return Opened(checkpoint, config, task, R1(config.model, task.heads), params, exported, rounding, codes)


def exported_weights(
    config: Config, params: Any, codes: OwnCodes | None, to: Literal["jax", "litert", "iree"]
) -> tuple[Config, Any]:
    """Weights as the target holds them, and the config by which it computes.

    Args:
      config: Of the checkpoint.
      params: Weights to serve.
      codes: Of a checkpoint that has some.
      to: The target.

    Returns:
      The config, and NumPy arrays.
    """
    held, model = params, config.model
    if codes is not None and to != "litert":
        held = in_four_bits(codes.params, codes.kinds)
    elif codes is not None:
        held, quant = for_device(codes, model.quant)
        model = dataclasses.replace(model, quant=quant)
    if to == "jax":
        return config, jax.tree.map(np.asarray, held)
    # LiteRT has no loops, and bf16 is nothing that CPUs of devices compute in.
    model = dataclasses.replace(model, precision="fp32", scan_layers=model.scan_layers and to == "iree")
    held = jax.tree.map(lambda x: np.asarray(x, np.float32 if x.dtype == jnp.bfloat16 else None), held)
    return dataclasses.replace(config, model=model), held


def rounding_cases(checkpoint: Checkpoint, evaluator: Evaluator, params: Any, asked: ExportArguments) -> RoundingCases:
    """Training cases of the checkpoint's own data.

    Args:
      checkpoint: The checkpoint.
      evaluator: Compiled forward pass of its config.
      params: Weights to serve.
      asked: The command line.

    Returns:
      Cases to round by, and others with what the checkpoint says of them.

    Raises:
      UserError: They are not here, or those that the export is compared on are among them.
    """
    config, data = evaluator.task.config, checkpoint.config().data
    if config.data.split in ("train", "all") and same_path(config.data.path, data.path):
        raise UserError(
            f"--weights int8 rounds weights by training cases, and data.split is {config.data.split!r}: compare the "
            "export on others by --data.split test, or export by --weights fp16"
        )
    if data.path is not None and not (is_remote(data.path) or Path(data.path).exists()):
        raise UserError(
            f"--weights int8 rounds weights by training cases, and {data.path}, which {checkpoint.path} was trained "
            "on, is not here: bring it back, or export by --weights fp16"
        )
    # Not the config of --data.path, to which training cases may be history.
    own = EvalArguments(checkpoint=asked.checkpoint, alerts_per_day=asked.alerts_per_day)
    task, export_of = TASKS[config.task.name](scoring_config(checkpoint, own)), EXPORTS[config.task.name]
    source = task.source("train")
    rows = export_of.chosen(source, CALIBRATION + CHECKED)
    rounds_by = np.arange(len(rows)) % (1 + CHECKED // CALIBRATION) == 0
    if rounds_by.all():
        raise UserError(
            f"--weights int8 rounds weights by training cases, and {source.name} has {len(source)}: export by "
            "--weights fp16"
        )
    train, checked = Subset(source, rows[rounds_by]), Subset(source, rows[~rounds_by])
    return RoundingCases(train, export_of(checkpoint, evaluator, params, checked))


def write(folder: Path, opened: Opened, asked: ExportArguments, converter: Path | None) -> dict[str, Any]:
    """Writes the model, the card and, for a device, what reports need; then runs what was written.

    Args:
      folder: An empty folder.
      opened: The checkpoint.
      asked: The command line.
      converter: Python of the converter, for a device.

    Returns:
      The agreement; if it does agree, the card holds it too.
    """
    wanted, codes, trained = opened.exported.ports, opened.codes, opened.checkpoint.config().model
    params, kinds = (opened.params, {}) if opened.rounding is None else rounded_weights(opened, converter)
    graph = opened.exported.graph(opened.task, opened.model, params)
    run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    kind, stored = "exported" if asked.to == "jax" else "edge", dict[str, int]()
    if codes and asked.to != "litert":
        graph_of = functools.partial(opened.exported.graph, opened.task, opened.model)
        read = export_jax.weights_read(graph_of, codes.params, wanted)
        stored, kinds = code_sizes(codes, read), {name: x for name, x in codes.kinds.items() if name in read}
    if asked.to != "jax":
        (folder / TEXTS).write_text(json.dumps(opened.exported.texts(), ensure_ascii=False, indent=1) + "\n", "utf-8")
        run = functools.partial(run_model, folder, tool=TOOLS[asked.to], converter=converter)
    if asked.to == "jax":
        largest, outputs = export_jax.write_model(folder, graph, wanted)
        made = {"file": export_jax.MODEL, "platforms": list(export_jax.PLATFORMS), "batch": f"1 to {largest}"}
        versions, run = {"jax": jax.__version__}, export_jax.read_model(folder, largest)
    elif asked.to == "iree":
        target = export_iree.target_of(asked.target_triple, asked.target_cpu)
        compile_for = functools.partial(export_iree.write_model, folder, graph, wanted, converter=converter)
        versions, outputs = compile_for(target)
        made = {"file": export_iree.MODEL, "batch": "1", "precision": "fp32", "compiled_for": target.told}
        if target.elsewhere:  # it cannot be compared here: the same program is, compiled for this machine
            elsewhere = (folder / export_iree.MODEL).read_bytes()
            compile_for(export_iree.HERE)
            made["compared_on"] = export_iree.HERE.told
            print(f"compared as compiled for this machine; for {target.triple} it is compiled and not run")
    else:
        written = export_litert.write_model(
            folder,
            graph,
            wanted,
            narrow=asked.weights != "float",
            converter=converter,
            codes=in_groups(codes) if codes else None,
        )
        versions, outputs, stored, found = written
        kinds = {name: kind for name, kind in codes.kinds.items() if name in found} if codes else kinds
        made = {"file": export_litert.MODEL, "batch": "1", "precision": "fp32"}
        if asked.weights != "float":
            made["precision"] = f"{asked.weights} weights"
            kind += f", {asked.weights} weights"
    if stored:
        made["stored"] = {"bytes": stored, "weights": kinds}
        print(stored_line(asked.weights, stored))
    if codes is not None:
        made["quantized"] = {
            "rules": list(trained.quant),
            "activations": activations_line(codes, asked.to),
        }
        print(f"activations: {made['quantized']['activations']}")
    card = describe_export(opened.checkpoint, opened.config, opened.exported, kind, versions)
    card |= {"to": asked.to, **made, **describe_ports(wanted, outputs)}
    card["sha256"] = _sums(folder)
    write_card(folder, card)
    agreement = compare(run, opened.exported, limits_of(trained, codes, asked))
    if agreement["agrees"]:
        if "compared_on" in card:
            (folder / export_iree.MODEL).write_bytes(elsewhere)
            card["sha256"] = _sums(folder)
        write_card(folder, card | {"agreement": agreement})
    return agreement


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the card."""
    return {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.name != CARD}


def rounded_weights(opened: Opened, converter: Path) -> tuple[Any, dict[str, str]]:
    """The weights of --weights int8, of a checkpoint that has no codes.

    Args:
      opened: The checkpoint.
      converter: Python of the LiteRT converter.

    Returns:
      As in `RoundedWeights`.
    """
    checked, count = opened.rounding.checked, min(len(opened.rounding.train), CALIBRATION)
    print(f"rounding weights by {count} training cases", file=sys.stderr)
    graph = checked.graph(opened.task, opened.model, opened.params)
    constants = export_litert.read_constants(graph, checked.ports, converter)
    params, kinds, held = round_weights(opened.rounding, opened.task, opened.model, opened.params, constants)
    if not held["agrees"]:
        print(f"warning: no rounding agrees on cases of {held['data']['name']}; the last is taken", file=sys.stderr)
    return params, kinds


def stored_line(asked: str, stored: dict[str, int]) -> str:
    """How the weights of an edge file are stored.

    Args:
      asked: int8 or fp16.
      stored: Bytes by type.

    Returns:
      A line of text.

    Raises:
      UserError: int8 was asked for, and most of the bytes are not of that.
    """
    share = {name: size / sum(stored.values()) for name, size in stored.items()}
    if asked == "int8" and share["int8"] <= MOST:
        raise UserError(
            f"only {share['int8']:.1%} of the bytes of the weights are int8, so that the file cannot be called that: "
            "export by --weights fp16"
        )
    told = ", ".join(f"{part:.1%} {name}" for name, part in share.items() if part)
    return f"weights: {told} of {sum(stored.values()):,} bytes"


def limits_of(trained: ModelConfig, codes: OwnCodes | None, asked: ExportArguments) -> Limits:
    """How far the exported model may be from the checkpoint, by what rounds numbers in one of them alone or otherwise.

    Args:
      trained: The checkpoint's own model.
      codes: Its codes, if it has some.
      asked: The command line.

    Returns:
      The limits.
    """
    if asked.to != "jax" and codes is not None and codes.activations:
        return ROUNDED
    if asked.weights == "int8" and codes is None:
        return INT8
    if asked.weights != "float":
        return FP16
    return FP32 if trained.precision == "fp32" else HALF


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
