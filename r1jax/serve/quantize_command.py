"""The command `r1jax quantize`: a trained checkpoint in, a sealed quantized one and a report of what it cost out."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from r1jax.arguments import EvalArguments, EvalData
from r1jax.cli import load_arguments
from r1jax.config import Config, Count, MeshConfig, Platform, Share
from r1jax.data.tokenizer_files import read_files
from r1jax.errors import UserError
from r1jax.models.quantized import Use, check_rules, rounding_by
from r1jax.models.r1 import R1
from r1jax.parallel.mesh import make_mesh
from r1jax.parallel.platform import start_platform
from r1jax.serve.evaluate import restore_served, scoring_config
from r1jax.serve.quantize_budget import budget_table, options, rules_of, within_budget
from r1jax.serve.quantize_report import Effect, effect, layer_errors, score_of, sizes, table, verdict, write_report
from r1jax.serve.quantize_weights import calibration_batch, choose_codes, inputs_seen
from r1jax.tasks.catalog import TASKS
from r1jax.tasks.task import Task
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.checkpoints import find_checkpoint, write_sealed
from r1jax.train.evaluation import Evaluator
from r1jax.train.quantized import FOLDER, schemes_of, with_codes, write_codes
from r1jax.train.ranges import split_ranges, with_ranges
from r1jax.train.step import weights_of

HELP = """\
r1jax quantize CHECKPOINT --output DIR: rounds the weights of a checkpoint, and has its products multiplied in few bits
where --to says so. DIR is a checkpoint that eval.py reads; DIR/report/ says what was lost, weight by weight.

Examples:
  r1jax quantize runs/medical --to int8 --output runs/medical-int8
  r1jax quantize runs/medical --to int4 --output runs/medical-int4
  r1jax quantize runs/medical --to int8 --activations static --output runs/medical-static
  r1jax quantize runs/medical --to int8 --balance False --output runs/base    # for adapters to be trained on
  r1jax quantize runs/medical --budget 0.2 --output runs/medical-mixed    # bits by what each weight does to outputs
  r1jax quantize runs/medical-qat --output runs/medical-qat-int8      # as it was trained, with its ranges
"""


@dataclass(frozen=True)
class QuantizeArguments:
    """What `r1jax quantize` is told."""

    checkpoint: str
    """Run folder, its checkpoints folder, one checkpoint, or what `r1jax hf import` has written."""
    output: str
    """Folder of the quantized checkpoint; it must not exist."""
    to: Literal["int8", "int4", "fp8", "int8_weights"] | None = None
    """int8, fp8: weights and activations; int4, int8_weights: weights alone; none takes the checkpoint's own
    model.quant, or what --budget chooses."""
    budget: Share | None = None
    """Share of the size in fp32 that the weights may take: each weight stays a float or becomes int8 or int4, weights
    alone, by how much rounding it changes the model's outputs for the calibration cases."""
    activations: Literal["token", "static"] = "token"
    """Scale of rounded inputs: each token's own, or one for all, from the calibration cases; with --to int8 or fp8."""
    balance: bool = True
    """Whether inputs may be balanced; adapters (--train.init with model.lora_rank) take only codes without."""
    data: EvalData = dataclasses.field(default_factory=EvalData)
    calibration: Count = 32
    """Cases of the training part by whose inputs weights are rounded and balanced, and errors measured."""
    batch_size: Count = 64
    resamples: Count = 200
    """Bootstrap resamples of the change of the score."""
    platform: Platform = "auto"
    """cuda refuses to start without a GPU instead of falling back to the CPU."""


def quantize_checkpoint(words: list[str]) -> int:
    """Runs `r1jax quantize`.

    Args:
      words: After the command's name.

    Returns:
      The exit code.

    Raises:
      UserError: The checkpoint, its data or the output will not do.
    """
    asked = load_arguments(QuantizeArguments, words, "r1jax quantize", HELP, positional=("checkpoint",))
    output, checkpoint = Path(asked.output), find_checkpoint(Path(asked.checkpoint), "CHECKPOINT")
    config = quantized_config(checkpoint, asked)
    if output.exists():
        raise UserError(f"--output {output} exists already: choose another name")
    print(f"{checkpoint.path}: {start_platform(asked.platform)}", file=sys.stderr)
    mesh, task = make_mesh(MeshConfig()), TASKS[config.task.name](config)
    task.pipeline.restore(checkpoint.meta().get("preprocess", {"steps": [], "statistics": {}}))
    floats = R1(dataclasses.replace(config.model, quant=()), task.heads)
    trained = R1(dataclasses.replace(config.model, quant=checkpoint.config().model.quant), task.heads)
    train, validation = task.source("train"), task.source("val")
    batch = calibration_batch(task.collate, train, asked.calibration)
    ranges, params = split_ranges(restore_served(checkpoint, config, trained, task, mesh, train))
    uses = weights_of(floats, task, batch)
    budget: dict[str, Any] = {}
    if asked.budget is not None:
        quant, budget = _rules_by_budget(floats, task, params, uses, batch, asked.budget)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, quant=quant))
    narrow = R1(config.model, task.heads)
    check_rules(config.model.quant, [use.name for use in uses], jax.devices()[0])
    with rounding_by(config.model.quant):
        chosen = schemes_of(uses)
        if not chosen:
            raise UserError(
                f"{checkpoint.path}: by model.quant every weight stays a float: say by --to what to make, or give a "
                "smaller --budget"
            )
        # A checkpoint that was trained with its own rules is stored as it was trained.
        kept = asked.to is None and not budget
        seen = {} if kept else inputs_seen(floats, task, params, batch)
        static = asked.activations == "static"
        codes = choose_codes(params, uses, seen, static=static, balance=asked.balance and not budget)
        codes = with_ranges(codes, ranges) if kept else codes
    rounded = with_codes(params, codes)
    kinds = {name: scheme.weights for name, (_, scheme) in chosen.items()}
    _write(output, rounded, kinds, checkpoint, dataclasses.replace(checkpoint.config(), model=config.model))
    layers = layer_errors(floats, task, params, batch, chosen, codes)
    found = sizes(output, params, layers, chosen, narrow, task, batch)
    called = verdict("mixed" if budget else asked.to or ", ".join(config.model.quant), found)
    measured = _effect(task, mesh, (floats, params), (narrow, rounded), validation, asked)
    write_report(output / "report", layers, found, called, measured, budget)
    print(table(layers, found, called, measured))
    print(f"report    {output / 'report'}")
    return 0


def _rules_by_budget(
    floats: R1, task: Task, params: Any, uses: list[Use], batch: dict[str, Any], share: float
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The rules by which the model fits a share of its size, and how they were found, for the report; prints both."""
    found = options(floats, task, params, uses, batch)
    chosen = within_budget(found, sum(x.size for x in jax.tree.leaves(params)), share)
    print(budget_table(found, chosen) + "\n")
    weights = {
        name: {"chosen": option.rule, "options": [other._asdict() for other in found[name]]}
        for name, option in chosen.items()
    }
    return rules_of(chosen), {"share": share, "weights": weights}


def quantized_config(checkpoint: Checkpoint, asked: QuantizeArguments) -> Config:
    """The config by which a checkpoint is quantized and measured.

    Args:
      checkpoint: Where from.
      asked: What the command was told.

    Returns:
      The checkpoint's own config with the rules, and the data that is named.

    Raises:
      UserError: It is quantized already, or nothing says to what, or two things do.
    """
    if asked.to and asked.budget is not None:
        raise UserError(f"--budget chooses the types of weights, and --to {asked.to} says them: give one of the two")
    if asked.activations == "static" and asked.to not in ("int8", "fp8"):
        raise UserError("--activations static is for inputs that are rounded: add --to int8 or --to fp8")
    if checkpoint.quantized:
        raise UserError(f"{checkpoint.path} is quantized already: give the checkpoint that it was made from")
    checkpoint.refuse_codes()
    data = dataclasses.replace(asked.data, split=asked.data.split or "val")
    config = scoring_config(checkpoint, EvalArguments(checkpoint=asked.checkpoint, data=data))
    quant = config.model.quant if asked.to is None else (asked.to,)
    if not quant and asked.budget is None:
        raise UserError(f"{checkpoint.path} was trained with floats: say by --to what it shall be, for example int8")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, quant=quant, scan_layers=False))


def _write(output: Path, params: Any, kinds: dict[str, str], checkpoint: Checkpoint, config: Config) -> None:
    """Seals the codes with the config that they are served by, and with what is known of the checkpoint."""
    made = checkpoint.meta() | {"step": checkpoint.step, "quantized_from": checkpoint.digest()}
    tokenizer = checkpoint.tokenizer()
    files = {} if tokenizer is None else read_files(tokenizer)
    try:
        write_sealed(output, params, config, made, files, lambda draft: write_codes(draft / FOLDER, params, kinds))
    except OSError as error:
        raise UserError(
            f"--output {output} could not be written ({error.strerror or error}): make room or choose another place"
        ) from error


def _effect(
    task: Task,
    mesh: Any,
    before: tuple[R1, Any],
    after: tuple[R1, Any],
    validation: Any,
    asked: QuantizeArguments,
) -> Effect | None:
    """The score on the validation cases of the float weights and of the codes, each by its own model."""
    mode, scored, targets = next(iter(task.modes())), [], {}
    for model, params in (before, after):
        predicted, targets, _ = Evaluator(model, task, mesh).predict(
            params, validation, batch_size=asked.batch_size, modes=(mode,)
        )
        scored.append(predicted[mode])
    return effect(score_of(task), scored[0], scored[1], targets, asked.resamples)
