"""Kernels in CUDA C++ within a JAX program: NVRTC compiles the source, XLA loads what it gives and launches it.

Pallas is the first choice. What it cannot say in one launch, such as blocks that wait for each other while their next
weights are under way, is written in CUDA. NVRTC comes with `jax[cuda12]` and `jax[cuda13]`; no compiler is needed.
"""

import ctypes
import functools
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

FOLDER = Path(__file__).parent / "cuda"
ISA = "8.3"
"""PTX of CUDA 12.3, which has all that the sources ask for; a newer compiler names its own, which drivers refuse."""


class Launch(NamedTuple):
    """A kernel and how it is started."""

    name: str
    ptx: str
    blocks: int
    threads: int
    shared: int = 0
    """Bytes of shared memory beside what the source declares."""


def source_of(files: Sequence[str], sizes: Mapping[str, float | int | bool]) -> str:
    """One CUDA source.

    Args:
      files: Names in `r1jax/ops/cuda`, in the order in which they see each other.
      sizes: Macros, of which the files' arrays and loops are made.

    Returns:
      The text.
    """
    macros = [f"#define {name} {_literal(value)}" for name, value in sizes.items()]
    return "\n".join([*macros, *((FOLDER / name).read_text() for name in files)])


def _literal(value: float | int | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"({value!r}f)" if isinstance(value, float) else str(value)


@functools.cache
def compiled(source: str) -> str:
    """PTX of a CUDA source for Hopper GPUs.

    Args:
      source: The text.

    Returns:
      Text that XLA gives to the driver.

    Raises:
      RuntimeError: NVRTC is not installed or refuses the source.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"r1jax.cu", 0, None, None)
    # An exact division is a call, before which everything in registers is written to memory.
    words = [b"--gpu-architecture=compute_90a", b"--std=c++17", b"--prec-div=false"]
    words.append(b"--device-as-default-execution-space")
    failed = nvrtc.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
    log, text = (_told(nvrtc, program, what) for what in ("ProgramLog", "PTX"))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(f"NVRTC refuses the source of a kernel: {log}")
    return re.sub(r"^\.version (\d+\.\d+)$", _no_newer, text, count=1, flags=re.MULTILINE)


def _no_newer(found: re.Match) -> str:
    return f".version {min(found[1], ISA, key=float)}"


def _told(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    if getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)):
        return ""  # there is no PTX of what did not compile
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.value.decode()


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    found = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in found.submodule_search_locations or ()] if found else []
    wheels = sorted((str(p) for folder in folders for p in folder.glob("**/libnvrtc.so.1[23]")), reverse=True)
    for name in (*wheels, "libnvrtc.so.13", "libnvrtc.so.12", "/usr/local/cuda/lib64/libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError("NVRTC is not installed: pip install 'r1jax[cuda13]', or cuda12")


def launch(
    kernel: Launch, results: Sequence[jax.ShapeDtypeStruct], arrays: Sequence[Array], aliases: Mapping[int, int]
) -> list[Array]:
    """Launches a kernel, which gets the addresses of the arrays and then of the results.

    Args:
      kernel: What is launched.
      results: Their shapes.
      arrays: What it reads, and writes where a result is the same array.
      aliases: Which array each of some results is in the memory of, by places.

    Returns:
      The results.
    """
    text = kernel.ptx.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\0A").replace("\t", "\\09")
    numbers: dict[str, Any] = {"grid_x": kernel.blocks, "block_x": kernel.threads, "shared_mem_bytes": kernel.shared}
    numbers |= dict.fromkeys(("grid_y", "grid_z", "block_y", "block_z"), 1)
    config = ", ".join(f"{name} = {value} : i32" for name, value in numbers.items())
    call = jax.ffi.ffi_call(
        "__gpu$xla.gpu.ptx",
        list(results),
        input_output_aliases=dict(aliases),
        custom_call_api_version=2,
        legacy_backend_config=f'{{name = "{kernel.name}", kernel_type = "ptx", kernel_data = "{text}", {config}}}',
    )
    return call(*arrays)
