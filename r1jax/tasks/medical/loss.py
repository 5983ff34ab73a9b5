"""Losses and predictions of the findings; an unknown target (NaN) weighs nothing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax.config import TaskConfig
from r1jax.models.r1 import Inputs, Output
from r1jax.ops.losses import binary_cross_entropy, cross_entropy, huber, weighted_mean
from r1jax.tasks.language.loss import mtp_weight, text_losses, token_counts
from r1jax.tasks.medical.schema import FINDING

WEIGHTS = {"binary": 1.0, "rating": 0.5, "length": 1.0, "vector": 1.0, "where": 0.5}
CENTER_UNIT_MM = 10.0
"""Unit in which offsets are learned, and lengths as the log of their ratio to it: errors are then of order one."""


def finding_loss(
    name: str, raw: Float[Array, "B _"], target: Float[Array, "B ..."], smoothing: float
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Loss of one finding for each case, and 1 where its target is known."""
    known = jnp.where(jnp.isnan(target), 1.0, target)
    match FINDING[name].kind:
        case "binary":
            loss = binary_cross_entropy(raw[:, 0], known, smoothing=smoothing)
        case "rating":
            loss = cross_entropy(raw, known.astype(jnp.int32) - 1, smoothing=smoothing)
        case "length":
            loss = huber(raw[:, 0] - jnp.log(known / CENTER_UNIT_MM))
        case "vector":
            loss = jnp.mean(huber(raw - known / CENTER_UNIT_MM), axis=-1)
    return loss, known_cases(target)


def known_cases(target: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """1 where every number of a target is known, else 0."""
    unknown = jnp.any(jnp.isnan(target).reshape(target.shape[0], -1), axis=-1)
    return 1.0 - unknown.astype(jnp.float32)


def located_cases(center_mm: Float[Array, "B 3"], present: Float[Array, " B"]) -> Float[Array, " B"]:
    """1 where it is known whether and where there is a nodule, else 0."""
    return ((present == 0) | (known_cases(center_mm) > 0)).astype(jnp.float32)


def location_loss(
    where: Float[Array, "B z y x"],
    center_mm: Float[Array, "B 3"],
    present: Float[Array, " B"],
    spacing: Float[Array, "B 3"],
    size: tuple[int, ...],
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Cross-entropy of each cell against its share of the nodule's centre, summed over the cells.

    A nodule's centre is shared among the eight cells around it by trilinear weights; without a nodule every cell is 0.

    Args:
      where: Logit of each cell.
      center_mm: Offset of the centre from the middle of the volume; NaN where unknown or absent.
      present: 1, 0, or NaN where unknown.
      spacing: mm a voxel.
      size: Voxels of the volume.

    Returns:
      Loss of each case, and 1 where it is known whether and where there is a nodule.
    """
    absent, located = present == 0, ~jnp.any(jnp.isnan(center_mm), axis=-1)
    known = jnp.where(located[:, None], center_mm, 0.0)
    share = jnp.ones_like(where)
    for axis, (cells, voxels) in enumerate(zip(where.shape[1:], size, strict=True)):
        place = known[:, axis] / spacing[:, axis] * (cells / voxels) + (cells - 1) / 2
        weight = jnp.maximum(0.0, 1 - jnp.abs(place[:, None] - jnp.arange(cells, dtype=jnp.float32)[None]))
        share = share * jnp.expand_dims(weight, [a for a in (1, 2, 3) if a != axis + 1])
    share = jnp.where((located & ~absent)[:, None, None, None], share, 0.0)
    loss = jnp.sum(binary_cross_entropy(where, share), axis=(1, 2, 3))
    return loss, located_cases(center_mm, present)


def loss_weights(inputs: Inputs, targets: dict[str, Array]) -> dict[str, Float[Array, ""]]:
    """Over how much each mean of `total_loss` is taken: known targets, tokens, cases.

    Args:
      inputs: What the model reads.
      targets: Findings, NaN where unknown.

    Returns:
      Sums of weights; those of the parts of a batch add up to those of the batch.
    """
    weights = {name: jnp.sum(known_cases(target)) for name, target in targets.items()}
    if inputs.has_volume is not None and {"center_mm", "nodule_present"} <= targets.keys():
        located = located_cases(targets["center_mm"], targets["nodule_present"])
        weights["where"] = jnp.sum(located * inputs.has_volume.astype(jnp.float32))
    if inputs.text is not None:
        weights["text"], weights["mtp"] = token_counts(inputs.text, inputs.text_valid)
    return weights | {"balance": jnp.asarray(len(jax.tree.leaves((inputs, targets))[0]), jnp.float32)}


def total_loss(
    output: Output,
    inputs: Inputs,
    targets: dict[str, Array],
    config: TaskConfig,
    share: Float[Array, ""] | float = 0.0,
    weights: dict[str, Float[Array, ""]] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Weighted sum of all losses; those of the parts of a batch add up to that of the batch.

    Args:
      output: Of the model.
      inputs: What it read.
      targets: Findings, NaN where unknown.
      config: Weights and smoothing.
      share: Of the run that is done; the weight of MTP depends on it.
      weights: `loss_weights` of the whole batch; None where this is the whole.

    Returns:
      Scalar loss, and its parts before their weights.
    """
    total, parts, own = jnp.zeros(()), {}, loss_weights(inputs, targets)
    weights = weights or own
    for name, target in targets.items():
        loss, weight = finding_loss(name, output.heads[name], target, config.label_smoothing)
        parts[name] = weighted_mean(loss, weight, weights[name])
        total = total + WEIGHTS[FINDING[name].kind] * parts[name]
    if output.where is not None and {"center_mm", "nodule_present"} <= targets.keys():
        loss, weight = location_loss(
            output.where,
            targets["center_mm"],
            targets["nodule_present"],
            inputs.volume_spacing,
            inputs.volume.shape[1:],
        )
        parts["where"] = weighted_mean(loss, weight * inputs.has_volume.astype(jnp.float32), weights["where"])
        total = total + WEIGHTS["where"] * parts["where"]
    if output.text_states is not None:
        parts["text"], *second = text_losses(
            output, inputs.text, inputs.text_valid, totals=(weights["text"], weights["mtp"])
        )
        for loss in second:
            parts["text"] = parts["text"] + mtp_weight(config, share) * loss
        total = total + config.text_weight * parts["text"]
    if output.router:
        balance = jnp.mean(jnp.stack([stats.balance_loss for stats in output.router]))
        parts["balance"] = balance * (own["balance"] / weights["balance"])
        total = total + config.balance_weight * parts["balance"]
    return total, parts


def predictions(heads: dict[str, Float[Array, "B _"]]) -> dict[str, Array]:
    """Turns raw head outputs into what is reported.

    Args:
      heads: Raw outputs, a finding each.

    Returns:
      Probabilities [B] of binary findings, probabilities [B, levels] of ratings, mm for lengths [B] and vectors [B, 3].
    """
    result = {}
    for name, raw in heads.items():
        match FINDING[name].kind:
            case "binary":
                result[name] = jax.nn.sigmoid(raw[:, 0])
            case "rating":
                result[name] = jax.nn.softmax(raw, axis=-1)
            case "length":
                result[name] = CENTER_UNIT_MM * jnp.exp(raw[:, 0])
            case "vector":
                result[name] = CENTER_UNIT_MM * raw
    return result
