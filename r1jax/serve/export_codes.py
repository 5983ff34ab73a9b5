"""The codes of a checkpoint in an exported model: those that it was trained or stored with, and no others."""

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.config import Config
from r1jax.data.source import Source
from r1jax.models.quantized import Use, rounding_by
from r1jax.models.r1 import R1
from r1jax.ops.quantize import block_length, dequantize, pack_int4
from r1jax.ops.quantized_dot import Scheme
from r1jax.serve.export_graph import GroupedCodes
from r1jax.serve.export_rounding import tensor_of
from r1jax.serve.litert_worker import STEPS
from r1jax.tasks.task import Task
from r1jax.train.plan import example_batch
from r1jax.train.quantized import is_codes, nearest_codes, path_of, schemes_of, weight_of, with_codes
from r1jax.train.ranges import split_ranges, with_ranges
from r1jax.train.step import weights_of


class OwnCodes(NamedTuple):
    """Weights of a checkpoint with `model.quant`."""

    params: Any
    """Codes in the place of every weight that a rule names, floats elsewhere."""
    chosen: dict[str, tuple[Use, Scheme]]
    """The ruled weights by name."""

    @property
    def kinds(self) -> dict[str, str]:
        """Kind of the codes of each weight: int8, int4, fp8 or affine8."""
        return {name: scheme.weights for name, (_, scheme) in self.chosen.items()}

    @property
    def activations(self) -> set[str]:
        """What inputs are rounded to, of all weights."""
        return {scheme.activations for _, scheme in self.chosen.values() if scheme.activations}

    @property
    def on_integers(self) -> set[str]:
        """Weights whose inputs are int8, which fp32 can hold."""
        return {name for name, (_, scheme) in self.chosen.items() if scheme.activations == "int8"}


def own_codes(config: Config, task: Task, params: Any, source: Source) -> OwnCodes | None:
    """The codes that a checkpoint computes with: stored ones as they are, and those that its floats are rounded to.

    Args:
      config: Of the checkpoint.
      task: Of that config.
      params: Weights to serve.
      source: Any cases; only their shapes matter.

    Returns:
      Codes, of running ranges those that training has met being the inputs' spans; None where nothing is rounded.
    """
    if not config.model.quant:
        return None
    floats = R1(dataclasses.replace(config.model, quant=()), task.heads)
    uses = weights_of(floats, task, example_batch(source, task, 1))
    with rounding_by(config.model.quant):
        chosen = schemes_of(uses)
        if not chosen:
            return None
        if any(map(is_codes, jax.tree.leaves(params, is_leaf=is_codes))):
            return OwnCodes(params, chosen)
        ranges, params = split_ranges(params)
        return OwnCodes(with_codes(params, with_ranges(nearest_codes(params, uses), ranges)), chosen)


def for_device(own: OwnCodes, quant: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """Weights for a run time that multiplies fp32 alone, and what rounds there.

    Args:
      own: From `own_codes`.
      quant: The checkpoint's `model.quant`.

    Returns:
      Weights, and the `model.quant` with which they are read: codes whose inputs are int8 stay codes, held in fp32,
      and all others become what they stand for.
    """
    stays = own.on_integers

    def wide(path: tuple[Any, ...], x: Any) -> Any:
        if not is_codes(x):
            return x
        name, codes = path_of(path), jax.tree.map(jnp.asarray, x)
        if name in stays:
            return codes._replace(values=codes.values.astype(jnp.float32))
        return weight_of(dequantize(codes), own.chosen[name][0])

    floats = "|".join(re.escape(name) for name in own.chosen if name not in stays)
    params = jax.tree_util.tree_map_with_path(wide, own.params, is_leaf=is_codes)
    return params, (*([f"^({floats})$=float"] if floats else []), *quant) if stays else ()


def in_groups(own: OwnCodes) -> dict[str, GroupedCodes]:
    """Codes as a device can hold them: those of 8 and 4 bits that are integers times scales.

    Args:
      own: From `own_codes`.

    Returns:
      By name, in the order in which the numbers of the weight lie in the file. An affine code, which is none times a
      scale, and fp8, which a device lacks, are left out.
    """
    held = {path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(own.params, is_leaf=is_codes)}
    found = {}
    for name, (use, scheme) in own.chosen.items():
        if scheme.weights not in STEPS:
            continue
        values, scale = (np.asarray(part) for part in held[name][:2])
        length, blocks = values.shape[-1], scale.shape[-1]
        step = block_length(length, blocks)
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, blocks * step - length)])
        if use.role == "experts" and name not in own.on_integers:  # see `mix_experts_dense`
            values, scale = tensor_of(use, values), tensor_of(use, scale)
        groups = values.reshape(-1, step).astype(np.int8)
        found[name] = GroupedCodes(scheme.weights, groups, scale.reshape(-1).astype(np.float32), length)
    return found


def code_sizes(own: OwnCodes, read: set[str]) -> dict[str, int]:
    """Bytes of the weights by type, without scales, as a program of JAX or IREE holds them.

    Args:
      own: From `own_codes`.
      read: Names of the weights that it holds.

    Returns:
      Bytes; those of floats as "fp32".
    """
    found = {"fp32": 0}
    for path, x in jax.tree_util.tree_leaves_with_path(own.params, is_leaf=is_codes):
        if path_of(path) not in read:
            continue
        if not is_codes(x):
            found["fp32"] += 4 * x.size
            continue
        kind = own.kinds[path_of(path)]
        found[kind] = found.get(kind, 0) + (len(pack_int4(np.asarray(x.values))) if kind == "int4" else x.values.size)
    return found


def activations_line(own: OwnCodes, to: str) -> str:
    """What an exported model does with the inputs of codes, for its card.

    Args:
      own: From `own_codes`.
      to: Its target.

    Returns:
      A few words.
    """
    if not own.activations:
        return "floats, as in the checkpoint"
    how = "; their codes are multiplied in fp32" if to == "litert" else ""
    return f"rounded as in the checkpoint{how}"
