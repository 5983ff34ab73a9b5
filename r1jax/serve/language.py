"""Figures of a language checkpoint, with intervals, as metrics.json."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from r1jax.data.packed import PackedText
from r1jax.errors import UserError
from r1jax.serve.evaluate import Evaluation, origin, write_metrics
from r1jax.serve.progress import progress
from r1jax.serve.scored import Watched
from r1jax.tasks.language.figures import language_figures, language_intervals
from r1jax.tasks.language.task import Language
from r1jax.train.evaluation import Evaluator

FIGURES = {
    "loss": "nats/token",
    "bits_per_byte": "bits/byte",
    "perplexity": "perplexity",
    "mtp_loss": "nats/token of the token after next (MTP)",
}


def score_text(run: Evaluation, evaluator: Evaluator, params: Any, source: PackedText, folder: Path) -> str:
    """Scores every sequence and writes metrics.json.

    Args:
      run: What is evaluated.
      evaluator: Compiled forward pass.
      params: Weights to serve.
      source: The sequences.
      folder: Where to; it must exist.

    Returns:
      Text to print.

    Raises:
      UserError: The loss is not finite.
    """
    with progress("sequences", len(source)) as steps:
        modes = tuple(run.task.modes())
        predicted, targets, _ = evaluator.predict(
            params, Watched(source, steps), batch_size=run.arguments.batch_size, modes=modes
        )
    found, size = predicted[modes[0]], targets["bytes"]
    figures = language_figures(found, size)
    if not abs(figures["loss"]) < float("inf"):
        raise UserError(f"the loss is {figures['loss']}: the weights are no finite numbers; use another checkpoint")
    seen, warnings = seen_in_training(run, source)
    intervals = language_intervals(found, size, resamples=run.arguments.resamples)
    entropy = getattr(source, "entropy", None)
    metrics = {
        "provenance": origin(run, source, seen),
        "warnings": warnings,
        "figures": {name: estimate._asdict() for name, estimate in intervals.items()},
        "best_attainable": {} if entropy is None else {"loss": entropy},
        "tokens": figures["tokens"],
        "experts": {name: value for name, value in figures.items() if name.startswith(("violation.", "load."))},
    }
    write_metrics(run, metrics, folder)
    lines = [
        f"  {estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f}) {FIGURES[name]}"
        for name, estimate in intervals.items()
    ]
    lines += [] if entropy is None else [f"  {entropy:.4f} nats/token are the best attainable"]
    head = f"{source.name}: {len(source)} sequences, 95 % intervals over sequences"
    return "\n".join([head, *lines, *(f"warning: {w}" for w in warnings), f"figures  {run.output / 'metrics.json'}"])


def seen_in_training(run: Evaluation, source: PackedText) -> tuple[int | None, list[str]]:
    """How many of the sequences hold text that the checkpoint was trained on.

    The text of training is looked for where it was, and in what is scored, which may be a copy; its fingerprint tells.

    Args:
      run: What is evaluated.
      source: The sequences.

    Returns:
      Their number, and what a reader of the figures must know; None where the text of training is unknown.
    """
    if run.checkpoint.imported:
        return None, []
    made, scored, trained = run.checkpoint.meta()["data"], run.config.data, run.checkpoint.config().data
    if scored.path is None or trained.path is None:
        seen, here = len(source) if source.fingerprint == made["fingerprint"] else 0, scored.path == trained.path
    else:
        texts = {path: _training_text(run, path) for path in dict.fromkeys((scored.path, trained.path))}
        same = [path for path, text in texts.items() if text is not None and text.fingerprint == made["fingerprint"]]
        if not same:
            told = f"the text of training ({made['name']}) is not here as it was: whether it is scored here is unknown"
            return None, [told]
        seen, here = source.holding(texts[same[0]]), scored.path in same
    warnings = []
    if seen:
        warnings.append(
            f"{seen} of these {len(source)} sequences hold text that was seen in training: the figures do not say how "
            "the model does on new text"
        )
    if here and scored.split in ("val", "all"):
        warnings.append("text of the part val chose the checkpoint: the figures are somewhat optimistic")
    return seen, warnings


def _training_text(run: Evaluation, path: str) -> PackedText | None:
    """The training part of a text; None where it has none or is gone."""
    data = replace(run.config.data, path=path)
    try:
        return Language(replace(run.config, data=data)).source("train")
    except UserError:
        return None
