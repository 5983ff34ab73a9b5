"""Figures of a language checkpoint, with intervals, as metrics.json."""

import json
import time
from pathlib import Path
from typing import Any

from r1jax.data.source import Source
from r1jax.errors import UserError
from r1jax.serve.evaluate import Evaluation, origin
from r1jax.serve.progress import progress
from r1jax.serve.scored import Watched
from r1jax.tasks.language.figures import language_figures, language_intervals
from r1jax.train.evaluation import Evaluator

FIGURES = {
    "loss": "nats/token",
    "bits_per_byte": "bits/byte",
    "perplexity": "perplexity",
    "mtp_loss": "nats/token of the token after next (MTP)",
}


def score_text(run: Evaluation, evaluator: Evaluator, params: Any, source: Source, folder: Path) -> str:
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
    seen = len(source) if source.fingerprint == run.checkpoint.meta()["data"]["fingerprint"] else 0
    warnings = [f"these {seen} sequences were seen in training"] if seen else []
    if not seen and run.config.data.split == "val":
        warnings.append("these sequences chose the checkpoint: the figures are somewhat optimistic")
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
    metrics["provenance"]["seconds"]["total"] = round(time.perf_counter() - run.began, 1)
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n", "utf-8")
    lines = [
        f"  {estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f}) {FIGURES[name]}"
        for name, estimate in intervals.items()
    ]
    lines += [] if entropy is None else [f"  {entropy:.4f} nats/token are the best attainable"]
    head = f"{source.name}: {len(source)} sequences, 95 % intervals over sequences"
    return "\n".join([head, *lines, *(f"warning: {w}" for w in warnings), f"figures  {run.output / 'metrics.json'}"])
