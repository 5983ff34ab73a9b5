"""Products of few bits and the kernels that they are made of, for `low_bits.py`; not a command."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.h100_case import BF16, differ, normal, seconds
from r1jax.ops.quantize import Kind, Quantized, quantize
from r1jax.ops.quantized_dot import Gated, Scheme, input_codes, multiply, quantized_dot
from r1jax.ops.weight_only import weight_only_dot
from r1jax.ops.weight_only_kernel import Tile, row_times_codes

CACHE_BYTES = 2**28
"""Weights that are read one after another: several times what an H100 caches (50 MiB)."""
TILES = (
    (128, 256, 4, 8, 1, 1, 2),
    (128, 256, 4, 8, 1, 2, 2),
    (128, 256, 3, 8, 1, 2, 4),
    (128, 256, 4, 16, 1, 2, 2),
    (128, 256, 4, 8, 0, 2, 2),
    (256, 128, 4, 8, 1, 2, 2),
    (128, 256, 4, 4, 1, 1, 2),
    (128, 192, 4, 8, 1, 2, 4),
    (128, 128, 5, 8, 1, 2, 2),
)
"""Of `quantized_dot_hopper.Tiling`."""


def product_case(
    way: Callable[..., jax.Array], kind: Kind | None, shape: tuple[int, int, int], samples: int, *, gated: bool = False
) -> dict[str, Any]:
    """One product of the model: activations are rounded and sums are scaled within what is timed.

    Gated, it is that of `down_proj`, and silu(gate) * up is formed within the time too.
    """
    rows, wide, deep = shape
    x, w = inputs(rows, deep, gated), normal(2, wide, deep)
    some = formed(jax.tree.map(lambda part: part[:256].astype(jnp.float32), x))
    exact = jnp.einsum("RI,OI->RO", some, w.astype(jnp.float32), precision="highest")
    held = w if kind is None else quantize(w, kind, scale_dtype=BF16)
    lowered = jax.jit(way).lower(x, held)
    compiled = lowered.compile()
    taken, spread = seconds(lambda: compiled(x, held), samples)
    return {
        "ms": 1e3 * taken,
        "iqr_ms": 1e3 * spread,
        "tflops": 2 * rows * wide * deep / taken / 1e12,
        "error": differ(compiled(x, held)[:256], exact),
        "asked": re.findall(r"dot_general.*: \((.*)\)", lowered.as_text()),
        "products": products_of(compiled.as_text()),
    }


def inputs(rows: int, deep: int, gated: bool) -> jax.Array | Gated:
    """Activations, or the factors that they are the product of."""
    return Gated(normal(1, rows, deep), normal(3, rows, deep)) if gated else normal(1, rows, deep)


def formed(x: jax.Array | Gated) -> jax.Array:
    """What is multiplied."""
    return x.product() if isinstance(x, Gated) else x


def tile_case(kind: Kind, tiling: tuple[int, ...], shape: tuple[int, int, int], samples: int) -> dict[str, Any]:
    """The kernel alone, of codes that are there already; every number of its result is compared with XLA's."""
    from r1jax.ops.quantized_dot_hopper import Tiling, scaled_product

    rows, wide, deep = shape
    x, w = quantize(normal(1, rows, deep), kind), quantize(normal(2, wide, deep), kind, scale_dtype=BF16)
    arrays = x.values, w.values, x.scale[:, 0], w.scale[:, 0]
    compiled = jax.jit(lambda *arrays: scaled_product(*arrays, BF16, tiling=Tiling(*tiling))).lower(*arrays).compile()
    found = compiled(*arrays)
    taken, spread = seconds(lambda: compiled(*arrays), samples)
    return {
        "ms": 1e3 * taken,
        "iqr_ms": 1e3 * spread,
        "tflops": 2 * rows * wide * deep / taken / 1e12,
        "error": differ(found, jax.jit(multiply)(x, w)),
    }


def rounding_case(
    kind: Kind, by_xla: bool, rows: int, deep: int, samples: int, *, gated: bool = False, stages: int | None = None
) -> dict[str, Any]:
    """Rows of activations become codes; reads and writes are those of one pass. Without stages, with the package's.

    They are compared with what XLA makes of rows that are written out, or it would leave out their rounding to bf16.
    """
    x = inputs(rows, deep, gated)

    def xla(x: jax.Array | Gated) -> tuple[jax.Array, jax.Array]:
        codes = quantize(formed(x), kind)
        return codes.values, codes.scale[:, 0]

    def ours(x: jax.Array | Gated) -> tuple[jax.Array, jax.Array]:
        from r1jax.ops.row_codes_hopper import gated_codes, row_codes

        asked = {} if stages is None else {"stages": stages}
        return gated_codes(*x, kind, **asked) if gated else row_codes(x, kind)

    compiled = jax.jit(xla if by_xla else ours).lower(x).compile()
    taken, spread = seconds(lambda: compiled(x), samples)
    values, scale = compiled(x)
    known = jax.jit(quantize, static_argnums=1)(jax.jit(formed)(x), kind)
    moved = sum(part.nbytes for part in jax.tree.leaves(x)) + values.nbytes
    return {
        "ms": 1e3 * taken,
        "iqr_ms": 1e3 * spread,
        "tb_per_s": moved / taken / 1e12,
        "other_codes": int(jnp.sum(values.astype(jnp.float32) != known.values.astype(jnp.float32))),
        "other_scales": int(jnp.sum(scale != known.scale[:, 0])),
    }


def vector_case(
    way: Callable[[jax.Array, Any], jax.Array], kind: str | None, shape: tuple[int, int], samples: int
) -> dict[str, Any]:
    """Microseconds of a row times a weight, in a program that takes many weights one after another."""
    wide, deep = shape
    size = wide * deep * (2 if kind is None else 1)
    count = max(2, CACHE_BYTES // size) if wide > 1024 else 2
    x, every = normal(1, 1, deep), [normal(2 + i, wide, deep) for i in range(count)]
    held = every if kind is None else [quantize(w, kind, scale_dtype=jnp.bfloat16) for w in every]
    exact = jnp.einsum("RI,OI->RO", x, every[0], preferred_element_type=jnp.float32)

    # The next row depends on the last result, as in a model, so that nothing runs side by side.
    def run(x: jax.Array, held: list[Any]) -> list[jax.Array]:
        found = []
        for w in held:
            found.append(way(x, w))
            x, _ = jax.lax.optimization_barrier((x, found[-1]))
        return found

    compiled = jax.jit(run).lower(x, held).compile()
    taken, spread = seconds(lambda: compiled(x, held), samples)
    return {
        "ms": 1e3 * taken / count,
        "iqr_ms": 1e3 * spread / count,
        "tb_per_s": size * count / taken / 1e12,
        "error": differ(compiled(x, held)[0], exact),
    }


def library_dot(x: jax.Array, w: Quantized) -> jax.Array:
    """What a library or XLA's own kernel makes of codes that are widened."""
    y = jnp.einsum("RI,OI->RO", x, w.values.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * w.scale[:, 0].astype(jnp.float32)[None]).astype(x.dtype)


def summed(x: jax.Array, w: jax.Array) -> jax.Array:
    """The same sum of floats that `weight_only_dot` forms of codes."""
    return jnp.sum(x.astype(jnp.float32)[:, None, :] * w.astype(jnp.float32)[None], axis=-1).astype(x.dtype)


def kernel_dot(x: jax.Array, w: Quantized, tile: Tile) -> jax.Array:
    """The kernel that `weight_only_dot` takes, with any tile."""
    return row_times_codes(x[0], w, tile=tile, interpret=jax.default_backend() == "cpu")[None]


def products_of(text: str) -> list[str]:
    """The kinds of products in a compiled program: type of the result, and what forms it, with how often."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        call = re.search(r'= \(?(\w+)\[.*custom_call_target="([^"]*(?:matmul|gemm|fmha|cudnn|mosaic)[^"]*)"', line)
        dot = re.search(r"= (\w+)\[[^=]*\bdot\(", line)
        if call or dot:
            name = f"{call[1]} {call[2]}" if call else f"{dot[1]} dot"
            found[name] = found.get(name, 0) + 1
    return [f"{count} x {name}" for name, count in sorted(found.items())]


def xla_dot(x: jax.Array, w: Quantized, kind: Kind) -> jax.Array:
    """`quantized_dot` where there is no kernel."""
    return multiply(input_codes(x, kind, w), w).astype(x.dtype)


def bf16_dot(x: jax.Array | Gated, w: jax.Array) -> jax.Array:
    return jnp.einsum("RI,OI->RO", formed(x), w)


def swiglu_rounded(x: Gated, w: Quantized, kind: Kind, apart: bool) -> jax.Array:
    """As in the model; apart, where the kernel that rounds is not told the factors, and reads their product."""
    return quantized_dot(x.product(), w, Scheme(kind, kind), gated=None if apart else x)


Cases = Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]
"""Child, name and function of each case."""


def vector_cases(hidden: int, wide: int, samples: int) -> Cases:
    """A row times a weight of both shapes."""
    ways: dict[str, tuple[Callable, str | None]] = {
        "bf16": (bf16_dot, None),
        "bf16 summed": (summed, None),
        "int8 ours": (weight_only_dot, "int8"),
        "int8 library": (library_dot, "int8"),
        "fp8 ours": (weight_only_dot, "fp8"),
    }
    for shape in ((wide, hidden), (hidden, wide)):
        size = "x".join(map(str, shape))
        for tile in (Tile(4, 1024, 4), Tile(2, 1024, 2), Tile(1, 2048, 2), Tile(4, 2048, 8), Tile(8, 512, 4)):
            fitted = tile._replace(depth=min(tile.depth, shape[1]))
            ways[f"int8 kernel {'/'.join(map(str, tile))}"] = functools.partial(kernel_dot, tile=fitted), "int8"
        for name, (way, kind) in ways.items():
            yield "vector", f"vector {name} {size}", functools.partial(vector_case, way, kind, shape, samples)


def product_cases(rows: int, hidden: int, wide: int, vocabulary: int, samples: int) -> Cases:
    """Products of a batch, as the model asks for them, and what XLA makes of them."""
    products: dict[str, tuple[Callable, Kind | None]] = {
        "bf16": (bf16_dot, None),
        "int8": (functools.partial(quantized_dot, scheme=Scheme("int8", "int8")), "int8"),
        "fp8": (functools.partial(quantized_dot, scheme=Scheme("fp8", "fp8")), "fp8"),
        "int8 XLA": (functools.partial(xla_dot, kind="int8"), "int8"),
        "fp8 XLA": (functools.partial(xla_dot, kind="fp8"), "fp8"),
    }
    for shape in ((wide, hidden), (hidden, wide), (hidden, hidden), (vocabulary, hidden)):
        for name, (way, kind) in products.items():
            run = functools.partial(product_case, way, kind, (rows, *shape), samples)
            yield "product", f"product {name} {shape[0]}x{shape[1]}", run
    gated = {"bf16": (bf16_dot, None)} | {
        f"{kind}{name}": (functools.partial(swiglu_rounded, kind=kind, apart=apart), kind)
        for kind in ("int8", "fp8")
        for name, apart in (("", False), (" apart", True))
    }
    for name, (way, kind) in gated.items():
        run = functools.partial(product_case, way, kind, (rows, hidden, wide), samples, gated=True)
        yield "swiglu", f"swiglu {name} {hidden}x{wide}", run


def kernel_cases(rows: int, hidden: int, wide: int, samples: int) -> Cases:
    """The kernels for Hopper by themselves, cut in one way or another."""
    for shape in ((wide, hidden), (hidden, wide)):
        size, whole = "x".join(map(str, shape)), (rows, *shape)
        yield "tile", f"tile bf16 {size}", functools.partial(product_case, bf16_dot, None, whole, samples)
        for kind, tiles in (("int8", TILES), ("fp8", TILES[:2])):
            for tiling in tiles:
                run = functools.partial(tile_case, kind, tiling, whole, samples)
                yield "tile", f"tile {kind} {'/'.join(map(str, tiling))} {size}", run
    for kind in ("int8", "fp8"):
        for name, by_xla, stages in (("", False, None), (" 0", False, 0), (" XLA", True, None)):
            run = functools.partial(rounding_case, kind, by_xla, rows, wide, samples, gated=True, stages=stages)
            yield "gating", f"gating {kind}{name} {wide}", run
    for deep in (hidden, wide):
        for kind in ("int8", "fp8"):
            for name, by_xla in (("", False), (" XLA", True)):
                run = functools.partial(rounding_case, kind, by_xla, rows, deep, samples)
                yield "rounding", f"rounding {kind}{name} {deep}", run
