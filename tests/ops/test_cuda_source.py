"""Tests of CUDA sources in JAX programs, as far as a CPU shows them."""

import ctypes
import re

import jax
import jax.numpy as jnp
import pytest

from r1jax.ops import cuda_source


def test_sizes_are_macros_before_the_files() -> None:
    text = cuda_source.source_of(["hopper.cu"], {"WARPS": 4, "CODES": True, "EPS": 1e-6})
    assert text.startswith("#define WARPS 4\n#define CODES true\n#define EPS (1e-06f)\n// What decode_layers.cu asks")


def test_without_nvrtc_it_is_told_what_to_install(monkeypatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    cuda_source._nvrtc.cache_clear()
    with pytest.raises(RuntimeError, match=r"NVRTC is not installed: pip install 'r1jax\[cuda13\]'"):
        cuda_source.compiled("no source")


def test_a_launch_tells_xla_the_kernel_its_size_and_what_it_writes_in_place() -> None:
    kernel = cuda_source.Launch("twice", '.version 8.3 // "a"\n', blocks=3, threads=64, shared=128)

    def run(x: jax.Array, y: jax.Array) -> list[jax.Array]:
        return cuda_source.launch(kernel, [jax.ShapeDtypeStruct(y.shape, y.dtype)], [x, y], {1: 0})

    text = jax.jit(run).trace(jnp.zeros(4), jnp.zeros(8)).lower(lowering_platforms=("cuda",)).as_text()
    assert "@__gpu$xla.gpu.ptx" in text and "operand_index = 1" in text
    for word in ("name = \\22twice\\22", "grid_x = 3 : i32", "block_x = 64 : i32", "shared_mem_bytes = 128 : i32"):
        assert word in text


@pytest.mark.parametrize(("told", "kept"), [("9.0", cuda_source.ISA), ("8.1", "8.1"), ("10.2", cuda_source.ISA)])
def test_no_newer_instructions_than_drivers_know_are_named(told: str, kept: str) -> None:
    assert re.sub(r"\.version (.*)", cuda_source._no_newer, f".version {told}") == f".version {kept}"
