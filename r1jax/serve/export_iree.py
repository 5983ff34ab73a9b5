"""From the graph to IREE: a program compiled for a kind of CPU, with loops, sorts and ragged products as they are."""

import platform
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax

from r1jax.errors import UserError
from r1jax.serve.export_device import Tool, ask, one_case_program, write_runner
from r1jax.serve.export_graph import Graph, Port

TOOL = Tool(
    "IREE compiler", "iree-compiler", ("iree-base-compiler==3.13.0", "iree-base-runtime==3.13.0"), 600, "iree_worker"
)
"""A file is of the version of its run time, hence the exact versions."""
MODEL = "model.vmfb"
USUAL = {"x86_64": "x86-64-v3", "aarch64": "generic"}
"""The CPU of each architecture where none is named: programs for x86-64 without AVX2 and FMA are many times slower."""
SMALL = """\
func.func @main(%x: tensor<1xf32>) -> tensor<1xf32> {
  %y = stablehlo.add %x, %x : tensor<1xf32>
  return %y : tensor<1xf32>
}
"""
"""A program that is compiled in less than a second."""
GENERIC = "generic"
"""The CPU whose programs run on every one of its architecture."""


class Target(NamedTuple):
    """What a program is compiled for."""

    triple: str | None
    """None is this machine's."""
    cpu: str

    @property
    def architecture(self) -> str:
        """Of its CPU."""
        return platform.machine() if self.triple is None else self.triple.partition("-")[0]

    @property
    def elsewhere(self) -> bool:
        """Whether this machine cannot run the program."""
        return self.architecture != platform.machine()

    @property
    def told(self) -> dict[str, str]:
        """What the card says of it."""
        return {"machine": self.triple or self.architecture, "cpu": self.cpu}


HERE = Target(None, GENERIC)


def target_of(triple: str | None, cpu: str | None) -> Target:
    """Reads what to compile for.

    Args:
      triple: --target-triple.
      cpu: --target-cpu; None is that of `USUAL`.

    Returns:
      The target.

    Raises:
      UserError: It is no such thing.
    """
    known = rf"({'|'.join(USUAL)})(-[a-z0-9_]+)?-linux(-[a-z0-9_]+)?"
    if triple is not None and not re.fullmatch(known, triple):
        raise UserError(f"--target-triple {triple} is no Linux on {' or '.join(USUAL)}: name one as aarch64-linux-gnu")
    # Of "host", which the compiler takes for this machine's, the card would not say what it is.
    if cpu is not None and (cpu == "host" or not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", cpu)):
        raise UserError(f"--target-cpu {cpu} is no name of a CPU: take {GENERIC}, or one as x86-64-v3 or cortex-a76")
    target = Target(triple, GENERIC)
    return target._replace(cpu=cpu or USUAL.get(target.architecture, GENERIC))


def check_target(target: Target, converter: Path) -> None:
    """Compiles a small program, so that a CPU that the compiler does not know is told before minutes are spent.

    Args:
      target: What to compile for.
      converter: Python that has the compiler.

    Raises:
      UserError: The compiler is missing, or does not know the CPU.
    """
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "small.mlir"
        source.write_text(SMALL)
        _compile(source, Path(place) / MODEL, target, converter, f"{target.told['machine']}, CPU {target.cpu}")


def write_model(
    folder: Path, graph: Graph, wanted: dict[str, Port], target: Target, converter: Path
) -> tuple[dict[str, str], dict[str, jax.ShapeDtypeStruct]]:
    """Writes the compiled program and its runner.

    Args:
      folder: Where to.
      graph: From `exported_graph`.
      wanted: What it reads.
      target: What to compile for.
      converter: Python that has the compiler.

    Returns:
      Versions of the compiler's packages, and the outputs by name, for a batch of 1.

    Raises:
      UserError: The compiler is missing or fails.
    """
    program, outputs = one_case_program(graph, wanted)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "model.mlir"
        source.write_bytes(program.mlir_module_serialized)
        versions = _compile(source, folder / MODEL, target, converter, "this model")
    write_runner(folder)
    return versions, outputs


def _compile(source: Path, file: Path, target: Target, converter: Path, what: str) -> dict[str, str]:
    """Has the worker compile a program of StableHLO; versions of the compiler's packages."""
    asked = {"do": "convert", "source": str(source), "target": str(file)}
    return ask(TOOL, converter, asked | target._asdict(), what)["versions"]
