"""Codes of a trained checkpoint's weights: to nearest, or by what the rounding does to outputs on calibration cases.

GPTQ (Frantar et al. 2022): the columns of a weight are rounded one after another, and what one loses the later ones
make good, as far as the inputs of a calibration set say that they can.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from r1jax.data.loader import Collate, padded_batches
from r1jax.data.source import Source
from r1jax.errors import UserError
from r1jax.models.quantized import Use, observing
from r1jax.models.r1 import R1
from r1jax.models.vision import neighbours
from r1jax.ops.quantize import BOUND, FLOOR, Quantized, block_length, dequantize
from r1jax.ops.quantized_dot import Scheme
from r1jax.serve.quantize_balance import better_balanced, powers_by_both, powers_by_inputs, served_error, with_span
from r1jax.tasks.task import Task
from r1jax.train.quantized import encode, nearest_codes, rows_of, schemes_of

DAMPING = 0.01
"""Added to the diagonal of the inputs' squares, as a share of their mean (section 3.3 of the paper)."""
SHARED = ("linear", "head", "convolution")
"""Roles whose rows all meet the same inputs."""
ROWS = 512
"""Rows of inputs, at most, on which roundings of inputs are compared."""


def calibration_batch(collate: Collate, source: Source, cases: int) -> dict[str, Any]:
    """The first cases of the training part, as one batch.

    Args:
      collate: Of the task.
      source: The training part.
      cases: How many, at most.

    Returns:
      A collated batch.

    Raises:
      UserError: There are none.
    """
    if len(source) == 0:
        raise UserError(f"{source.name} has no case in its training part, and without any nothing can be calibrated")
    return next(padded_batches(source, collate, batch_size=min(cases, len(source))))[1]


def contracted(use: Use) -> Float[Array, "R I"]:
    """The rows that meet a weight of one of the `SHARED` roles."""
    x = neighbours(use.inputs) if use.role == "convolution" else use.inputs
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


class Seen(NamedTuple):
    """What a weight whose rows share their inputs meets in the calibration cases."""

    square: Float[np.ndarray, "I I"]
    """X^T X of all rows."""
    largest: Float[np.ndarray, " I"]
    """Largest magnitude of each input in all rows."""
    rows: Float[np.ndarray, "R I"]
    """Rows at even distances."""


def inputs_seen(model: R1, task: Task, params: Any, batch: dict[str, Any]) -> dict[str, Seen]:
    """The inputs of each weight whose rows share them.

    Args:
      model: Of floats.
      task: Prepares the batch.
      params: Weights.
      batch: A collated batch.

    Returns:
      fp32 by the weight's name.
    """

    def run(params: Any, batch: dict[str, Any]) -> dict[str, Seen]:
        found: dict[str, Seen] = {}

        def note(use: Use) -> None:
            if use.inputs is not None and use.role in SHARED:
                x = contracted(use)
                seen = Seen(x.T @ x, jnp.max(jnp.abs(x), axis=0), x[:: -(-len(x) // ROWS)])
                if use.name in found:  # a weight that is used twice
                    before = found[use.name]
                    seen = Seen(before.square + seen.square, jnp.maximum(before.largest, seen.largest), before.rows)
                found[use.name] = seen

        with observing(note):
            model.apply({"params": params}, task.prepare(batch)[0], language=task.language)
        return found

    return jax.device_get(jax.jit(run)(params, batch))


def choose_codes(
    params: Any, uses: list[Use], seen: dict[str, Seen], *, static: bool = False, balance: bool = True
) -> dict[str, Quantized]:
    """Codes of every ruled weight; within `rounding_by`.

    Args:
      params: Weights.
      uses: What they are.
      seen: From `inputs_seen`; weights that are not in it are rounded to nearest.
      static: Whether inputs that are rounded have one scale for all rows, as far as their weight is in `seen`.
      balance: Whether inputs may be balanced, which takes a byte a column.

    Returns:
      Codes by name; for each weight those of the roundings that change outputs least.
    """
    codes = nearest_codes(params, uses)
    for name, (use, scheme) in schemes_of(uses).items():
        if name not in seen or scheme.weights == "affine8" or (scheme.weights != "int4" and not scheme.activations):
            continue
        weight = np.asarray(rows_of(_leaf(params, name), use), np.float64)
        # The loss multiplies the language head in parts, with neither balance nor span.
        fit = use.role != "head"
        codes[name] = best_codes(weight, seen[name], scheme, static=static and fit, balance=balance and fit)
    return codes


def best_codes(
    weight: np.ndarray, seen: Seen, scheme: Scheme, *, static: bool = False, balance: bool = True
) -> Quantized:
    """The codes that change a weight's outputs least: to nearest and by GPTQ, with and without balance.

    Args:
      weight: [O, I].
      seen: Its inputs.
      scheme: How both are rounded.
      static: As in `choose_codes`.
      balance: As there.

    Returns:
      Codes.
    """
    rows = jnp.asarray(seen.rows)
    exact = jnp.asarray(np.asarray(seen.rows, np.float64) @ weight.T, jnp.float32)

    def error(codes: Quantized) -> float:
        if scheme.activations is None:
            return output_error(weight, codes, seen.square)
        return float(served_error(scheme, rows, codes, exact))

    def made(power: np.ndarray | None) -> Quantized:
        wide = weight if power is None else weight * power
        found = [encode(jnp.asarray(wide, jnp.float32), scheme)]
        if scheme.weights == "int4":
            square = seen.square if power is None else seen.square / np.outer(power, power)
            found.append(gptq(wide, square, found[0]))
        if power is not None:
            found = [codes._replace(balance=jnp.asarray(power[None], jnp.bfloat16)) for codes in found]
        if static and scheme.activations:
            found = [with_span(codes, seen.largest, error) for codes in found]
        return min(found, key=error)

    rms = np.sqrt(np.diag(seen.square))
    choices = powers_by_inputs(rms) if scheme.activations is None else powers_by_both(seen.largest, weight)
    return better_balanced(made(None), [made(power) for power in choices] if balance else [], error)


def output_error(weight: np.ndarray, codes: Quantized, square: np.ndarray) -> float:
    """Sum of the squared changes of a weight's outputs over the calibration set: tr(d X^T X d^T)."""
    change = weight - np.asarray(dequantize(codes), np.float64)
    return float(np.sum((change @ square) * change))


def gptq(weight: np.ndarray, square: np.ndarray, like: Quantized) -> Quantized:
    """Rounds a weight column by column to int4.

    Args:
      weight: [O, I].
      square: X^T X.
      like: Codes to nearest, for the length of a block.

    Returns:
      Codes of the same form.
    """
    length = weight.shape[1]
    step = block_length(length, like.scale.shape[1])
    factor = passing_on(square)
    rest, values, scales = weight.copy(), np.zeros(weight.shape), np.zeros(like.scale.shape, np.float32)
    for i in range(length):
        if i % step == 0:
            largest = np.abs(rest[:, i : i + step]).max(axis=1) / BOUND["int4"]
            scales[:, i // step] = np.maximum(largest, FLOOR).astype(jnp.bfloat16).astype(np.float32)
        scale = scales[:, i // step].astype(np.float64)
        values[:, i] = np.clip(np.round(rest[:, i] / scale), -BOUND["int4"], BOUND["int4"])
        lost = (rest[:, i] - values[:, i] * scale) / factor[i, i]
        rest[:, i:] -= np.outer(lost, factor[i, i:])
    return Quantized(jnp.asarray(values, jnp.int8), jnp.asarray(scales, jnp.bfloat16))


def passing_on(square: Float[np.ndarray, "I I"]) -> Float[np.ndarray, "I I"]:
    """How GPTQ passes errors on: row i says what later columns make good of a column's, upper triangular.

    Args:
      square: X^T X of the inputs.

    Returns:
      The Cholesky factor of the damped inverse.
    """
    hessian, length = np.array(square, np.float64), len(square)
    hessian[np.diag_indices(length)] += DAMPING * max(np.trace(hessian) / length, 1e-12)
    return np.linalg.cholesky(np.linalg.inv(hessian)).T


def _leaf(tree: Any, name: str) -> Any:
    for part in name.split("/"):
        tree = tree[part]
    return tree
