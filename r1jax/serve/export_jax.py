"""From the graph to one serialized program of JAX for CPU and CUDA, with a batch of any size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jax.errors import InconclusiveDimensionOperation

from r1jax.errors import UserError
from r1jax.serve.export_graph import Graph, Port
from r1jax.train.quantized import is_codes, path_of

MODEL = "model.jax"
PLATFORMS = ("cpu", "cuda")
LARGEST = 1024
"""Largest batch that is tried first."""


def write_model(folder: Path, graph: Graph, wanted: dict[str, Port]) -> tuple[int, dict[str, jax.core.ShapedArray]]:
    """Writes the program.

    Args:
      folder: Where to.
      graph: From `exported_graph`.
      wanted: What it reads.

    Returns:
      The largest batch, and the outputs by name.

    Raises:
      UserError: A package is missing.
    """
    try:
        import flatbuffers  # noqa: F401  # by which JAX writes and reads its programs
    except ImportError:
        raise UserError("the package flatbuffers is not installed: pip install 'r1jax[export]'") from None
    largest = LARGEST
    while (program := _program(graph, wanted, largest)) is None:
        largest //= 2
    (folder / MODEL).write_bytes(program.serialize())
    return largest, jax.tree.unflatten(program.out_tree, program.out_avals)


def _program(graph: Graph, wanted: dict[str, Port], largest: int) -> export.Exported | None:
    """The program for up to so many cases; None where what it does would depend on how many there are.

    Attention goes in blocks of queries where there are many scores: of few cases it is certain that there are not.
    """
    (batch,) = export.symbolic_shape("b", constraints=[f"b <= {largest}"])
    inputs = {name: jax.ShapeDtypeStruct((batch, *port.shape), np.dtype(port.dtype)) for name, port in wanted.items()}
    try:
        with jax.default_matmul_precision("highest"):  # a GPU would take TF32 for fp32, which agrees to 1e-3 only
            return export.export(jax.jit(graph, keep_unused=True), platforms=PLATFORMS)(inputs)
    except InconclusiveDimensionOperation:
        if largest == 1:
            raise
        return None


def weights_read(graph_of: Callable[[Any], Graph], params: Any, wanted: dict[str, Port]) -> set[str]:
    """The weights that a program holds: not those of the language head, say, of which no output is made.

    Args:
      graph_of: From weights to a graph.
      params: Floats and codes of whole bytes.
      wanted: What the graph reads.

    Returns:
      Their names.
    """
    names = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.tree.map(lambda _: path_of(path), x), params, is_leaf=is_codes
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    one = {name: jax.ShapeDtypeStruct((1, *port.shape), np.dtype(port.dtype)) for name, port in wanted.items()}
    program = export.export(jax.jit(lambda params, inputs: graph_of(params)(inputs)))(shapes, one)
    read = set(program.module_kept_var_idx)  # of all arguments, weights first
    return {name for place, name in enumerate(jax.tree.leaves(names)) if place in read}


def read_model(folder: Path, largest: int = LARGEST) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Reads what was written, as a process without r1jax does.

    Args:
      folder: Where it lies.
      largest: Its largest batch; of more cases so many are run at a time.

    Returns:
      Inputs to outputs, cases first.
    """
    call = jax.jit(export.deserialize(bytearray((folder / MODEL).read_bytes())).call)

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        count = len(next(iter(inputs.values())))
        starts = range(0, count, largest)
        parts = [call({name: x[first : first + largest] for name, x in inputs.items()}) for first in starts]
        return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}

    return run
