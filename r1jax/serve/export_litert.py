"""From the graph to LiteRT: what its converter is asked."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from r1jax.models.moe import dense_mixtures
from r1jax.serve.export_device import Tool, ask, one_case_program, write_runner
from r1jax.serve.export_graph import Graph, GroupedCodes, Port

TOOL = Tool(
    "LiteRT converter", "litert-converter", ("litert-converter==0.5.0", "ai-edge-litert==2.3.0"), 600, "litert_worker"
)
"""Its interface is private, hence the exact versions."""
MODEL = "model.tflite"


class Written(NamedTuple):
    """An edge network on disk."""

    versions: dict[str, str]
    """Of the converter's packages."""
    outputs: dict[str, jax.ShapeDtypeStruct]
    """By name, for a batch of 1."""
    stored: dict[str, int]
    """Bytes of the weights by type, without their scales; {} of a file of fp32."""
    found: list[str]
    """Names of the given codes that the file has."""


def write_model(
    folder: Path,
    graph: Graph,
    wanted: dict[str, Port],
    *,
    narrow: bool,
    converter: Path,
    codes: dict[str, GroupedCodes] | None = None,
) -> Written:
    """Writes the edge network and its runner.

    Args:
      folder: Where to.
      graph: From `exported_graph`, in fp32.
      wanted: What it reads.
      narrow: Stores matrices that are codes times scales as int8, and others as fp16; otherwise all are fp32.
      converter: Python that has the converter.
      codes: Of a checkpoint that has some, by name: they are stored as they are, and no other weights as codes.

    Returns:
      What is known of the file.

    Raises:
      UserError: The converter is missing or fails.
    """
    told, outputs = _convert(graph, wanted, folder / MODEL, converter, narrow=narrow, codes=codes)
    write_runner(folder)
    return Written(told["versions"], outputs, told["stored"], told["found"])


def read_constants(graph: Graph, wanted: dict[str, Port], converter: Path) -> list[np.ndarray]:
    """The numbers of the edge network as the converter makes them, in fp32.

    Args:
      graph: From `exported_graph`, in fp32.
      wanted: What it reads.
      converter: Python that has the converter.

    Returns:
      Arrays, matrices and vectors.

    Raises:
      UserError: The converter is missing or fails.
    """
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "constants.npz"
        _convert(graph, wanted, Path(place) / MODEL, converter, constants=str(file))
        with np.load(file) as found:
            return list(found.values())


def _convert(
    graph: Graph,
    wanted: dict[str, Port],
    target: Path,
    converter: Path,
    *,
    narrow: bool = False,
    codes: dict[str, GroupedCodes] | None = None,
    constants: str | None = None,
) -> tuple[dict[str, Any], dict[str, jax.ShapeDtypeStruct]]:
    """Has the worker convert a graph for one case; what it says, and the outputs by name."""
    with dense_mixtures():
        program, outputs = one_case_program(graph, wanted)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "model.mlir"
        source.write_text(program.mlir_module())  # text: of serialized bytecode the converter dies
        given = None
        if codes is not None:
            given = str(Path(place) / "codes.npz")
            parts = {f"{name}.{part}": x for name, held in codes.items() for part, x in held._asdict().items()}
            np.savez(given, **parts)
        asked = {
            "do": "convert",
            "source": str(source),
            "target": str(target),
            "inputs": sorted(wanted),
            "outputs": sorted(outputs),
            "narrow": narrow,
            "codes": given,
            "constants": constants,
        }
        told = ask(TOOL, converter, asked)
    return told, outputs
