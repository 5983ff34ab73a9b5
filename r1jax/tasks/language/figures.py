"""Figures of the language task from the outcomes of its sequences."""

import math

import numpy as np
from jaxtyping import Float

from r1jax.tasks.metrics import Estimate, bootstrap
from r1jax.tasks.task import Figures

LOAD = "load."


def language_figures(found: dict[str, np.ndarray], size: Float[np.ndarray, " B"]) -> Figures:
    """Figures over all sequences together.

    Args:
      found: Outcomes of the sequences (`Language.outcomes`).
      size: UTF-8 bytes of each sequence.

    Returns:
      "loss" and "mtp_loss" in nats a token, "bits_per_byte", "perplexity", "tokens"; for each mixture layer in order,
      the MTP module's last, "violation.<layer>" (largest load over the mean, minus 1) and "load.<layer>", a list of the
      tokens that chose each expert.
    """
    total = {name: float(np.sum(x, dtype=np.float64)) for name, x in found.items() if not name.startswith(LOAD)}
    loss = total["nats"] / max(total["tokens"], 1.0)
    figures: Figures = {
        "loss": loss,
        "bits_per_byte": total["nats"] / math.log(2) / max(float(np.sum(size, dtype=np.float64)), 1.0),
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": total["tokens"],
    }
    if "mtp_nats" in total:
        figures["mtp_loss"] = total["mtp_nats"] / max(total["mtp_tokens"], 1.0)
    for name, load in found.items():
        if name.startswith(LOAD):
            load = np.sum(load, axis=0, dtype=np.float64)
            figures[f"violation.{name.removeprefix(LOAD)}"] = float(load.max() / max(load.mean(), 1e-9) - 1)
            figures[name] = load.tolist()
    return figures


def language_intervals(
    found: dict[str, np.ndarray], size: Float[np.ndarray, " B"], *, resamples: int, seed: int = 0
) -> dict[str, Estimate]:
    """Bootstrap intervals of the losses; whole sequences are drawn.

    Args:
      found: Outcomes of the sequences.
      size: UTF-8 bytes of each sequence.
      resamples: Bootstrap resamples.
      seed: Of the resamples.

    Returns:
      "loss", "bits_per_byte", "perplexity" and, with MTP, "mtp_loss", each with its 95 % interval.
    """
    wide = {name: x.astype(np.float64) for name, x in found.items() if not name.startswith(LOAD)}

    def statistics(weights: Float[np.ndarray, "R n"]) -> dict[str, Float[np.ndarray, " R"]]:
        nats = weights @ wide["nats"]
        loss = nats / np.maximum(weights @ wide["tokens"], 1.0)
        bits = nats / math.log(2) / np.maximum(weights @ size.astype(np.float64), 1.0)
        figures = {"loss": loss, "bits_per_byte": bits, "perplexity": np.exp(np.minimum(loss, 700.0))}
        if "mtp_nats" in wide:
            figures["mtp_loss"] = weights @ wide["mtp_nats"] / np.maximum(weights @ wide["mtp_tokens"], 1.0)
        return figures

    return bootstrap(statistics, len(size), resamples=resamples, seed=seed)


def closing_lines(figures: Figures, entropy: float | None, seen: int) -> str:
    """The figures as a run's closing table shows them.

    Args:
      figures: From `language_figures`.
      entropy: Nats a token that nobody can get below, where that is known.
      seen: Tokens of training.

    Returns:
      One line a figure.
    """
    rows = [("loss", f"{figures['loss']:.4f} nats/token")]
    if entropy is not None:
        rows.append(("best attainable", f"{entropy:.4f} nats/token, the entropy of the generator"))
    rows += [("bits/byte", f"{figures['bits_per_byte']:.4f}"), ("perplexity", f"{figures['perplexity']:.3f}")]
    if "mtp_loss" in figures:
        rows.append(("loss of MTP", f"{figures['mtp_loss']:.4f} nats/token, of the token after next"))
    worst = [value for name, value in figures.items() if name.startswith("violation.")]
    if worst:
        rows.append(("experts", f"the busiest has {max(worst):.0%} more than the mean of its layer"))
    rows.append(("tokens seen", f"{seen:,}"))
    return "\n".join(f"  {name:<17}{value}" for name, value in rows)
