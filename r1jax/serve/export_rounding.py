"""How the weights of an int8 edge file are stored, and their codes: chosen by what they do to the model's calls.

A device computes in fp32 and widens its weights, so that all that is lost is the rounding of weights. Here it is made
before the converter sees them: what leaves are fp32 numbers that become codes times one scale a channel, exactly, which
the converter's worker stores as such, while whatever is no such product stays fp16 (litert_worker.py). Most weights
become int8; what matters most stays fp16, and what hardly matters becomes int4.
"""

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from r1jax.data.source import Source
from r1jax.errors import UserError
from r1jax.models.moe import dense_mixtures
from r1jax.models.quantized import Use, observing
from r1jax.models.r1 import R1
from r1jax.serve.export_gate import INT8, compare
from r1jax.serve.export_graph import Exported
from r1jax.serve.litert_worker import STEPS, storable
from r1jax.serve.quantize_budget import Option, choose
from r1jax.serve.quantize_report import MOST
from r1jax.serve.quantize_weights import SHARED, contracted, passing_on
from r1jax.tasks.task import Task
from r1jax.train.quantized import path_of, rows_of, weight_of, with_codes

CALIBRATION, MEASURED, CHECKED = 256, 32, 1024
"""Training cases by whose inputs weights are rounded, those of them whose outputs are compared with each weight rounded
alone, and others by whose calls it is seen whether all of it suffices."""
CHUNK = 64
"""Training cases that are run at once."""
DIFFERENT = 0.0005
"""Share of the `CHECKED` decisions that may differ: half of what the gate lets through, which has other cases."""
SHARES = (0.9, 0.95, 1.0, 1.03, 1.06, 1.1, 1.2, 1.4)
"""Bytes that the weights may take, as shares of what they take as int8: the least that keeps the calls."""
LARGEST_LOG_ODDS = 7.0
"""Log odds beyond which no threshold lies that is worth a bit: p = 0.999."""


BITS = {"int4": 4, "int8": 8, "fp16": 16}
"""Of a number."""
OTHERS = 0.1
"""Weight of an output on which no call hangs, beside those on which one does."""
LEAST_SPREAD = 1e-3
"""Least variance of an output shown one way, as a share of that over all ways: where nothing that differs is shown, as
payments without notes as their notes alone, it has none, and would outweigh all others."""
LEAST_FACTOR = 1e-3
"""Least factor of a column, as a share of the largest, by which codes are divided."""


class RoundingCases(NamedTuple):
    """What weights are rounded by: training cases, of which the gate has none.

    Those of validation would not do: each threshold lies midway between two of their scores.
    """

    train: Source
    """Their inputs, and what rounding does to their outputs, choose the codes."""
    checked: Exported
    """Others, with what the checkpoint says of them."""


class RoundedWeights(NamedTuple):
    """Weights of a file that is int8 for the most part."""

    params: Any
    """fp32 numbers, those of int8 and int4 weights codes times scales."""
    kinds: dict[str, str]
    """How each weight is stored that could be int8, by name: fp16, int8 or int4."""
    agreement: dict[str, Any]
    """Of the `checked` cases."""


def round_weights(
    cases: RoundingCases, task: Task, model: R1, params: Any, constants: list[np.ndarray]
) -> RoundedWeights:
    """Rounds the weights, each as far as it bears.

    Args:
      cases: What to round by.
      task: Of the config that is exported.
      model: Of fp32.
      params: Weights.
      constants: Numbers of the converted program, see `folded`.

    Returns:
      The first choice, by rising size, whose calls on the `checked` cases are the checkpoint's; if none is, the last.

    Raises:
      UserError: Even if all of them are int8, most bytes of the file are not.
    """
    checked = cases.checked

    def predict(params: Any, inputs: dict[str, Array]) -> dict[str, Array]:
        with dense_mixtures():
            return checked.graph(task, model, params)(inputs)

    uses, squares = inputs_squared(cases, predict, params)
    held = {path_of(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    tensors = {name: tensor_of(use, held[name]) for name, use in uses.items()}
    factors = {name: folded(tensor, constants) for name, tensor in tensors.items() if storable(tensor.shape)}
    rounded = {
        name: {kind: round_one(uses[name], held[name], squares.get(name), factor, kind) for kind in STEPS}
        for name, factor in factors.items()
        if factor is not None
    }
    sizes = {name: tensors[name].size for name in rounded}
    others = bytes_of_others(constants, sizes)
    share = int8_share(dict.fromkeys(rounded, "int8"), sizes, others)
    if share <= MOST:
        raise UserError(
            f"--weights int8: at most {share:.1%} of the bytes of the weights can be int8, so that the file could not "
            "be called that (vectors and small matrices stay fp32): export by --weights fp16"
        )
    run = jax.jit(predict)
    print(f"{len(rounded)} weights rounded: trying each alone, then how many bytes keep the calls", file=sys.stderr)
    found = storage_options(cases, run, params, rounded)
    int8 = sum(option.bytes for group in found.values() for option in group if option.rule == "int8")
    for share in SHARES:
        kinds = mostly_int8(found, math.ceil(int8 * share), sizes, others)
        if kinds is None:
            continue
        trial = with_codes(params, {name: rounded[name][kind].weight for name, kind in kinds.items() if kind in STEPS})
        agreement = compare(lambda inputs, trial=trial: jax.device_get(run(trial, inputs)), checked, INT8)
        made = agreement["decisions"]
        told = f"{made['same']} of {made['of']} decisions the same"
        print(f"weights of {share:g} times the bytes of int8: {told} on training cases", file=sys.stderr)
        if agreement["agrees"] and made["of"] - made["same"] <= DIFFERENT * made["of"]:
            break
    return RoundedWeights(trial, kinds, agreement)


def bytes_of_others(constants: list[np.ndarray], sizes: dict[str, int]) -> int:
    """Bytes of the numbers of a narrow file that belong to none of the weights that are rounded.

    Args:
      constants: Of the converted program.
      sizes: Numbers of each weight that may become codes, by name.

    Returns:
      Of vectors, small matrices and whatever else cannot be codes.
    """
    whole = sum(x.size * (2 if storable(x.shape) else 4) for x in constants)
    return max(0, whole - 2 * sum(sizes.values()))


def int8_share(kinds: dict[str, str], sizes: dict[str, int], others: int) -> float:
    """Share of int8 in the bytes of a file's numbers, without scales.

    Args:
      kinds: Of the weights that are rounded, by name.
      sizes: Numbers of each.
      others: Bytes of all others.

    Returns:
      0 to 1.
    """
    taken = {name: math.ceil(sizes[name] * BITS[kind] / 8) for name, kind in kinds.items()}
    return sum(size for name, size in taken.items() if kinds[name] == "int8") / max(1, others + sum(taken.values()))


def mostly_int8(
    found: dict[str, list[Option]], limit: int, sizes: dict[str, int], others: int
) -> dict[str, str] | None:
    """A kind of each weight, so that all fit, most of the bytes are int8, and outputs change little.

    Bytes of other kinds are charged with a price that is doubled until int8 is most of what is chosen; the choice is
    the best at its price, and at none where int8 is most anyway.

    Args:
      found: From `storage_options`.
      limit: Bytes of all of them.
      sizes: Numbers of each.
      others: Bytes of the numbers that are not chosen.

    Returns:
      Kinds by name; None if int8 cannot be most within the limit.
    """
    largest = max(option.change for group in found.values() for option in group)
    for price in (0.0, *(max(largest, 1e-12) * 2.0**step for step in range(-60, 11))):
        charged = {
            name: [o._replace(change=o.change + price * (0 if o.rule == "int8" else o.bytes)) for o in group]
            for name, group in found.items()
        }
        kinds = {name: option.rule for name, option in choose(charged, limit).items()}
        if int8_share(kinds, sizes, others) > MOST:
            return kinds
    return None


def calibration_inputs(cases: RoundingCases, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Training cases, in every way to show them: weights meet other inputs where something is missing."""
    count = min(count, len(cases.train))
    for first in range(0, count, CHUNK):
        inputs = cases.checked.inputs(cases.train.read_batch(np.arange(first, min(first + CHUNK, count))))
        shown = [cases.checked.hidden(inputs, way) for way in cases.checked.shown]
        yield {name: np.concatenate([one[name] for one in shown]) for name in inputs}


def inputs_squared(
    cases: RoundingCases, predict: Any, params: Any
) -> tuple[dict[str, Use], dict[str, Float[np.ndarray, "I I"]]]:
    """The weights that the exported graph multiplies by, and what they meet.

    Args:
      cases: What to round by.
      predict: From weights and inputs to outputs.
      params: Weights.

    Returns:
      Uses by name, and X^T X of those whose rows share their inputs X, summed over all calibration cases.
    """
    uses: dict[str, Use] = {}

    def squares(params: Any, inputs: dict[str, Array]) -> dict[str, Array]:
        found: dict[str, Array] = {}

        def note(use: Use) -> None:
            uses[use.name] = use._replace(inputs=None)
            if use.inputs is not None and use.role in SHARED:
                x = contracted(use)
                found[use.name] = found.get(use.name, 0.0) + x.T @ x

        with observing(note):
            predict(params, inputs)
        return found

    run, total = jax.jit(squares), dict[str, np.ndarray]()
    for inputs in calibration_inputs(cases, CALIBRATION):
        for name, square in run(params, inputs).items():
            total[name] = total.get(name, 0.0) + np.asarray(square, np.float64)
    return uses, total


class Codes(NamedTuple):
    """A weight that is codes times scales."""

    weight: Float[np.ndarray, "..."]
    """fp32, of the weight's shape."""
    channels: int
    """Numbers that are scales."""


def round_one(
    use: Use, weight: np.ndarray, square: Float[np.ndarray, "I I"] | None, factor: Float[np.ndarray, " I"], kind: str
) -> Codes:
    """Rounds one weight to codes of one scale a channel of the tensor that it becomes in the file.

    Args:
      use: What it is.
      weight: Its numbers.
      square: X^T X of its inputs; None where its rows do not share them, which then are rounded to nearest.
      factor: From `folded`.
      kind: int8 or int4.

    Returns:
      The codes that change outputs least, by GPTQ or to nearest; without inputs, the channels that change it least.
    """
    wide, steps = tensor_of(use, weight).astype(np.float64) * factor, STEPS[kind]
    if square is None:
        square = np.eye(wide.shape[-1])
        axes = [axis for axis, size in enumerate(wide.shape) if size > 1]  # one scale for all, the worker does not find
        choices = [(nearest(wide, axis, steps), wide.shape[axis]) for axis in axes]
    else:
        square = square / np.outer(factor, factor)
        choices = [(nearest(wide, 0, steps), len(wide)), (gptq_rows(wide, square, steps), len(wide))]
    best, channels = min(choices, key=lambda choice: float(np.sum(((choice[0] - wide) @ square) * (choice[0] - wide))))
    return Codes(weight_from(use, (best / factor).astype(np.float32)), channels)


def tensor_of(use: Use, weight: np.ndarray) -> np.ndarray:
    """A weight as the matrix that it is in the file, up to the order of a kernel's columns.

    Routed experts are two products with all of them side by side (`mix_experts_dense`).
    """
    if use.role != "experts":
        return np.asarray(rows_of(weight, use))
    if use.name.endswith("down_proj"):
        return np.swapaxes(weight, 0, 1).reshape(weight.shape[1], -1)
    return weight.reshape(-1, weight.shape[-1])


def weight_from(use: Use, tensor: np.ndarray) -> np.ndarray:
    """Undoes `tensor_of`."""
    if use.role != "experts":
        return np.asarray(weight_of(tensor, use))
    experts, *rest = use.shape
    if use.name.endswith("down_proj"):
        return np.swapaxes(tensor.reshape(rest[0], experts, rest[1]), 0, 1)
    return tensor.reshape(use.shape)


def folded(weight: np.ndarray, constants: list[np.ndarray]) -> Float[np.ndarray, " I"] | None:
    """What the converter has multiplied each column of a weight by: the weights of a norm before it, or ones.

    Args:
      weight: As in the file; something can be found where it has two axes.
      constants: Matrices of the converted program, in which the weight is with its columns multiplied.

    Returns:
      The factors, ones where there are none; None where one is too small for codes to be divided by it, so that the
      weight stays fp16.
    """
    ones = np.ones(weight.shape[-1])
    if weight.ndim != 2:
        return ones
    rows, columns = np.abs(weight).argmax(axis=0), np.arange(weight.shape[1])
    largest = weight[rows, columns].astype(np.float64)
    for held in constants:
        if held.shape == weight.shape:
            factor = np.where(largest == 0, 1.0, held[rows, columns] / np.where(largest == 0, 1.0, largest))
            close = np.allclose(held, weight * factor, rtol=1e-4, atol=1e-6 * np.abs(held).max())
            if close:
                return factor if np.abs(factor).min() > LEAST_FACTOR * np.abs(factor).max() else None
    return ones


def nearest(weight: Float[np.ndarray, "..."], axis: int, steps: int) -> Float[np.ndarray, "..."]:
    """The nearest codes times scales, one scale for each place along an axis."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    scale = np.maximum(np.abs(weight).max(axis=others, keepdims=True), np.finfo(np.float32).tiny) / steps
    return np.rint(weight / scale) * scale


def gptq_rows(
    weight: Float[np.ndarray, "O I"], square: Float[np.ndarray, "I I"], steps: int
) -> Float[np.ndarray, "O I"]:
    """Rounds column after column, later ones making good what earlier ones lost (GPTQ, Frantar et al. 2022).

    The largest number of a row keeps its code, the last one of either sign, by which the worker finds the scale again.

    Args:
      weight: Rows with a scale each.
      square: X^T X of their inputs.
      steps: The largest code.

    Returns:
      Codes times scales.
    """
    factor, rest, found = passing_on(square), weight.copy(), np.zeros(weight.shape)
    largest = np.maximum(np.abs(weight).max(axis=1), np.finfo(np.float32).tiny)
    scale, top = largest / steps, np.abs(weight) >= largest[:, None]
    for i in range(weight.shape[1]):
        codes = np.clip(np.rint(rest[:, i] / scale), -steps, steps)
        found[:, i] = np.where(top[:, i], np.sign(weight[:, i]) * steps, codes) * scale
        rest[:, i:] -= np.outer((rest[:, i] - found[:, i]) / factor[i, i], factor[i, i:])
    return found


def storage_options(
    cases: RoundingCases, run: Any, params: Any, rounded: dict[str, dict[str, Codes]]
) -> dict[str, list[Option]]:
    """What each weight takes as fp16, int8 and int4, and what that of it alone does to the outputs.

    Args:
      cases: What to round by.
      run: From weights and inputs to outputs.
      params: Weights.
      rounded: Codes by the weight's name, then by kind.

    Returns:
      Options by name. A change is the squared one over the variance, summed over outputs and ways to show a case: where
      outputs vary little, as without pictures, many cases lie near a threshold. Outputs on which calls hang count by
      their log odds, all others by `OTHERS`. The change of fp16, a hundredth of int8's or less, counts as none.
    """
    inputs, ways = next(calibration_inputs(cases, MEASURED)), len(cases.checked.shown)

    def outputs(params: Any) -> dict[str, Float[np.ndarray, "ways n *size"]]:
        found = {name: np.asarray(x, np.float64) for name, x in run(params, inputs).items() if x.dtype == np.float32}
        for name in cases.checked.decided:
            share = np.clip(found[name], 1e-12, 1 - 1e-12)
            found[name] = np.clip(np.log(share) - np.log1p(-share), -LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)
        return {name: x.reshape(ways, -1, *x.shape[1:]) for name, x in found.items()}

    def change(params: Any) -> float:
        total = 0.0
        for name, new in outputs(params).items():
            least = np.maximum(LEAST_SPREAD * exact[name].var(axis=(0, 1)), 1e-9)
            spread = np.maximum(exact[name].var(axis=1), least)
            share = 1.0 if name in cases.checked.decided else OTHERS
            total += share * float(np.sum(np.mean((new - exact[name]) ** 2, axis=1) / spread))
        return total

    exact, found = outputs(params), dict[str, list[Option]]()
    for name, kinds in rounded.items():
        size = next(iter(kinds.values())).weight.size
        found[name] = [Option("fp16", 2 * size, 0.0)]
        for kind, codes in kinds.items():
            taken = math.ceil(size * BITS[kind] / 8) + 4 * codes.channels
            found[name].append(Option(kind, taken, change(with_codes(params, {name: codes.weight}))))
    return found
