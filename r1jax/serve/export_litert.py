"""From the graph to LiteRT: the converter's environment, and its process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipapp
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from r1jax import edge
from r1jax.edge.artefact import RUNNER
from r1jax.errors import UserError
from r1jax.models.moe import dense_mixtures
from r1jax.serve import litert_worker
from r1jax.serve.export_graph import Graph, GroupedCodes, Port

REQUIREMENTS = ("litert-converter==0.5.0", "ai-edge-litert==2.3.0")
"""What the converter's environment holds; its interface is private, hence the exact versions."""
MODEL = "model.tflite"
COMPLETE = "complete"
"""File in the converter's environment once all is installed: an interpreter alone may be what a crash left."""


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


def default_environment() -> Path:
    """Folder of the converter's environment where no other Python is named."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "r1jax" / "litert-converter"


def find_converter(named: str | None, install: bool) -> Path:
    """Finds the Python that has the converter.

    Args:
      named: Its interpreter, as the user named it; None takes that of `default_environment`.
      install: Makes that environment where it is missing.

    Returns:
      The interpreter.

    Raises:
      UserError: There is none, or it cannot be made.
    """
    if named is not None:
        if not Path(named).is_file():
            raise UserError(f"--converter {named} is no file: name the Python of an environment with the converter")
        return Path(named)
    home = default_environment()
    python = home / "bin" / "python"
    if (home / COMPLETE).is_file() and python.is_file():
        return python
    if not install:
        raise UserError(
            f"the LiteRT converter is not at {home}: add --install, which makes an environment of its own there "
            f"(600 MB: {', '.join(REQUIREMENTS)}), or name the Python of one by --converter"
        )
    _make_environment(home)
    return python


def _make_environment(home: Path) -> None:
    """Makes an environment with the converter, whole or not at all."""
    print(f"installing {', '.join(REQUIREMENTS)} into {home}", file=sys.stderr)
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "-q", *REQUIREMENTS]
    try:
        for command in ([sys.executable, "-m", "venv", "--clear", str(home)], pip):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = _last_line(done)
                raise UserError(f"the LiteRT converter cannot be installed ({why}): name one by --converter")
        (home / COMPLETE).touch()
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise


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
    with tempfile.TemporaryDirectory() as place:
        package = Path(place) / "package"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(edge.__file__).parent, package / "r1jax_edge", ignore=ignored)
        zipapp.create_archive(package, folder / RUNNER, main="r1jax_edge.__main__:main")
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
    one = {name: jax.ShapeDtypeStruct((1, *port.shape), np.dtype(port.dtype)) for name, port in wanted.items()}
    with dense_mixtures():
        # One platform: a program for several takes the platform's number as a further input.
        program = jax.export.export(jax.jit(graph, keep_unused=True), platforms=("cpu",))(one)
    outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
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
            "inputs": sorted(one),
            "outputs": sorted(outputs),
            "narrow": narrow,
            "codes": given,
            "constants": constants,
        }
        told = _work(converter, asked)
    return told, {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in outputs.items()}


def run_model(folder: Path, inputs: dict[str, np.ndarray], converter: Path) -> dict[str, np.ndarray]:
    """Has the written runner predict cases, in the converter's environment, which has LiteRT too.

    Args:
      folder: What was written.
      inputs: Cases first.
      converter: Python that has LiteRT.

    Returns:
      Its outputs, cases first.

    Raises:
      UserError: It fails.
    """
    with tempfile.TemporaryDirectory() as place:
        files = {name: str(Path(place) / f"{name}.npz") for name in ("inputs", "outputs")}
        np.savez(files["inputs"], **inputs)
        _work(converter, {"do": "run", "folder": str(folder.absolute()), "runner": RUNNER, **files})
        with np.load(files["outputs"]) as found:
            return dict(found)


def _work(converter: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Has the worker do one thing; gives what it says of it, and the versions of its packages."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as request:
        request.write(json.dumps(asked))
        request.flush()
        # Isolated: what r1jax's own environment says of paths holds for other packages.
        command = [str(converter), "-I", litert_worker.__file__, request.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise UserError(f"--converter {converter} cannot be run ({error.strerror}): name a Python") from None
    if done.returncode == litert_worker.MISSING:
        raise UserError(
            f"{converter} lacks a package of the LiteRT converter ({_last_line(done)}): install "
            f"{', '.join(REQUIREMENTS)} there, or leave --converter out and add --install"
        )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise UserError(f"the LiteRT converter crashed ({name}) at this model: nothing was exported; use --to jax")
    if done.returncode:
        raise UserError(f"the LiteRT converter refused this model ({_last_line(done)}): nothing was exported")
    return json.loads(done.stdout.splitlines()[-1])


def _last_line(done: subprocess.CompletedProcess) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else f"exit code {done.returncode}"
