"""What exports for devices share: the environment of a converter, its process, and the runner beside the model."""

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
from r1jax.serve import device_worker
from r1jax.serve.export_graph import Graph, Port

COMPLETE = "complete"
"""File in a converter's environment once all is installed: an interpreter alone may be what a crash left."""


class Tool(NamedTuple):
    """A converter in an environment of its own, which has what runs its files too."""

    name: str
    folder: str
    """Of its environment, in the cache of r1jax."""
    requirements: tuple[str, ...]
    """What the environment holds, in exact versions."""
    megabytes: int
    """That the environment takes."""
    worker: str
    """Module that knows it, beside device_worker.py."""

    @property
    def home(self) -> Path:
        """Folder of its environment where no other Python is named."""
        return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "r1jax" / self.folder


def find_converter(tool: Tool, named: str | None, install: bool) -> Path:
    """Finds the Python that has a converter.

    Args:
      tool: The converter.
      named: Its interpreter, as the user named it; None takes that of `tool.home`.
      install: Makes that environment where it is missing.

    Returns:
      The interpreter.

    Raises:
      UserError: There is none, or it cannot be made.
    """
    if named is not None:
        if not Path(named).is_file():
            raise UserError(f"--converter {named} is no file: name the Python of an environment with the {tool.name}")
        return Path(named)
    home = tool.home
    python = home / "bin" / "python"
    if (home / COMPLETE).is_file() and python.is_file():
        return python
    if not install:
        raise UserError(
            f"the {tool.name} is not at {home}: add --install, which makes an environment of its own there "
            f"({tool.megabytes} MB: {', '.join(tool.requirements)}), or name the Python of one by --converter"
        )
    _make_environment(tool)
    return python


def _make_environment(tool: Tool) -> None:
    """Makes an environment with the converter, whole or not at all."""
    home = tool.home
    print(f"installing {', '.join(tool.requirements)} into {home}", file=sys.stderr)
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "-q", *tool.requirements]
    try:
        for command in ([sys.executable, "-m", "venv", "--clear", str(home)], pip):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = _last_line(done)
                raise UserError(f"the {tool.name} cannot be installed ({why}): name one by --converter")
        (home / COMPLETE).touch()
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise


def one_case_program(
    graph: Graph, wanted: dict[str, Port]
) -> tuple[jax.export.Exported, dict[str, jax.ShapeDtypeStruct]]:
    """Traces a graph for one case.

    Args:
      graph: From `exported_graph`.
      wanted: What it reads.

    Returns:
      The program, whose inputs and outputs are in the order of their names, and its outputs by name.
    """
    one = {name: jax.ShapeDtypeStruct((1, *port.shape), np.dtype(port.dtype)) for name, port in wanted.items()}
    # One platform: a program for several takes the platform's number as a further input.
    program = jax.export.export(jax.jit(graph, keep_unused=True), platforms=("cpu",))(one)
    outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
    return program, {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in outputs.items()}


def write_runner(folder: Path) -> None:
    """Packs r1jax/edge into one file that Python runs."""
    with tempfile.TemporaryDirectory() as place:
        package = Path(place) / "package"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(edge.__file__).parent, package / "r1jax_edge", ignore=ignored)
        zipapp.create_archive(package, folder / RUNNER, main="r1jax_edge.__main__:main")


def run_model(folder: Path, inputs: dict[str, np.ndarray], tool: Tool, converter: Path) -> dict[str, np.ndarray]:
    """Has the written runner predict cases, in the converter's environment, which has the run time too.

    Args:
      folder: What was written.
      inputs: Cases first.
      tool: The converter.
      converter: Python that has it.

    Returns:
      Its outputs, cases first.

    Raises:
      UserError: It fails.
    """
    with tempfile.TemporaryDirectory() as place:
        files = {name: str(Path(place) / f"{name}.npz") for name in ("inputs", "outputs")}
        np.savez(files["inputs"], **inputs)
        ask(tool, converter, {"do": "run", "folder": str(folder.absolute()), "runner": RUNNER, **files})
        with np.load(files["outputs"]) as found:
            return dict(found)


def ask(tool: Tool, converter: Path, asked: dict[str, Any], what: str = "this model") -> dict[str, Any]:
    """Has the worker do one thing in the converter's environment.

    Args:
      tool: The converter.
      converter: Python that has it.
      asked: "do", and what that function of device_worker.py is asked.
      what: It is asked about, in the words of an error.

    Returns:
      What it says of it, and the "versions" of the converter's packages.

    Raises:
      UserError: A package is missing, or it fails.
    """
    asked = asked | {"converter": tool.worker, "packages": [line.split("==")[0] for line in tool.requirements]}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as request:
        request.write(json.dumps(asked))
        request.flush()
        # Isolated: what r1jax's own environment says of paths holds for other packages.
        command = [str(converter), "-I", device_worker.__file__, request.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise UserError(f"--converter {converter} cannot be run ({error.strerror}): name a Python") from None
    if done.returncode == device_worker.MISSING:
        raise UserError(
            f"{converter} lacks a package of the {tool.name} ({_last_line(done)}): install "
            f"{', '.join(tool.requirements)} there, or leave --converter out and add --install"
        )
    converts = asked["do"] == "convert"
    if done.returncode == -signal.SIGILL and not converts:
        raise UserError("this machine lacks instructions of --target-cpu (SIGILL): nothing was exported; name another")
    if done.returncode < 0:
        failed = f"the {tool.name} crashed at {what}" if converts else "the written model crashes its run time"
        name = signal.Signals(-done.returncode).name
        raise UserError(f"{failed} ({name}): nothing was exported; use --to jax")
    if done.returncode:
        failed = f"the {tool.name} refused {what}" if converts else "the written model does not run"
        raise UserError(f"{failed} ({_last_line(done)}): nothing was exported")
    return json.loads(done.stdout.splitlines()[-1])


def _last_line(done: subprocess.CompletedProcess) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else f"exit code {done.returncode}"
