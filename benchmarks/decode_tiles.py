"""Tiles of the kernels of a decoding step on one GPU: each product of a layer and the reader of the cache by itself.

    python benchmarks/decode_tiles.py --output decode_tiles.json --limit 50
    python benchmarks/decode_tiles.py --output decode_tiles.json --scale tiny --samples 2

A product is a row times weights one after another, of which there are more than a cache holds, with the norm, SwiGLU or
sum that stands before or after it in the model (benchmarks/decode_step.py); `XLA` is what the compiler makes of it.
Tiles of products are words/warps, of attention heads/tokens/warps/stages/programs. All programs are compiled
side by side, then timed in turn; results are written after each.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from benchmarks.decode_step import PAGE, SCALES, Scale, copy_case, start, table
from benchmarks.h100 import environment
from benchmarks.h100_case import differ, normal, seconds
from r1jax.arguments import GenerationSettings
from r1jax.config import DecoderConfig
from r1jax.ops import latent_attention_kernel, row_products, row_products_kernel
from r1jax.ops.latent_attention import PagedLatents, mix_latents
from r1jax.ops.quantize import Quantized, dequantize, quantize

READ = 2**28
"""Bytes of weights that are read one after another: several times what an H200 caches."""
KINDS = ("bf16", "int8")
TILES = ((4096, 4), (8192, 8), (2048, 4), (4096, 8), (8192, 4), (2048, 2))
ATTENTION = ((16, 32, 4, 2, 396), (16, 64, 8, 2, 264), (16, 32, 4, 3, 396), (16, 32, 4, 2, 264), (16, 16, 4, 3, 396))


class Case(NamedTuple):
    """A program, and what it is held against."""

    name: str
    run: Callable[..., Any]
    arrays: tuple[Any, ...]
    read: float
    """Bytes."""
    count: int
    """Products."""
    exact: jax.Array
    """The first result."""


def product_cases(c: DecoderConfig, kind: str, rows: int = 1) -> Iterator[Case]:
    """Each product of a layer and the head with weights of a kind, by XLA and by tiles."""
    wide, inner = c.hidden_size, c.intermediate_size
    normed = {"gain": jnp.ones(wide), "eps": 1e-6}
    queries = c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    shapes: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
        "gate_up": ((2 * inner, wide), normed | {"paired": True}),
        "down": ((wide, inner), {"added": normal(0, rows, wide)}),
        "q_kv": ((queries + c.kv_lora_rank + c.qk_rope_head_dim, wide), normed),
        "head": ((c.vocab_size, wide), normed),
    }
    for name, (shape, settings) in shapes.items():
        x, weights = normal(1, rows, shape[1]), weights_of(kind, shape)
        plain = (dequantize(w) if isinstance(w, Quantized) else w for w in weights[:1])
        exact = row_products.row_product_reference(
            x.astype(jnp.float32), *(w.astype(jnp.float32) for w in plain), **settings
        )
        read = sum(part.nbytes for part in jax.tree.leaves(weights))
        ways = {"XLA": row_products.row_product_reference}
        for tile in TILES if row_products_kernel.fits(x, weights[0]) else ():
            ways["/".join(map(str, tile))] = functools.partial(
                row_products_kernel.rows_times_weight,
                tile=row_products_kernel.Tile(*tile),
                interpret=jax.default_backend() == "cpu",
            )
        for way, product in ways.items():
            label = f"product {kind} {name} {way}" + (f", {rows} rows" if rows > 1 else "")
            run = functools.partial(one_after_another, jax.jit(functools.partial(product, **settings)))
            yield Case(label, run, (x, weights), read, len(weights), exact)


def weights_of(kind: str, shape: tuple[int, int]) -> list[Any]:
    """Weights of a product, more than a cache holds where they are large."""
    size = shape[0] * shape[1] * (1 if kind == "int8" else 2)
    drawn = [normal(2 + i, *shape) * shape[1] ** -0.5 for i in range(max(2, READ // size) if shape[0] > 1024 else 2)]
    code = jax.jit(functools.partial(quantize, kind="int8", scale_dtype=jnp.bfloat16))
    return [code(w) for w in drawn] if kind == "int8" else drawn


def one_after_another(product: Callable[..., jax.Array], x: jax.Array, weights: list[Any]) -> list[jax.Array]:
    """Products whose row depends on the last result, as in a model, so that nothing runs side by side."""
    found = []
    for w in weights:
        found.append(product(x, w))
        x, _ = jax.lax.optimization_barrier((x, found[-1]))
    return found


def attention_cases(scale: Scale) -> Iterator[Case]:
    """The cache's reader of many rows, by XLA and by tiles."""
    config, rows = replace(scale.one, num_hidden_layers=1), scale.rows
    state = start(config, rows, scale.context, GenerationSettings(scale.tokens, page_size=PAGE))
    widths = config.kv_lora_rank, config.qk_rope_head_dim
    q, rope = (normal(9 + i, rows, 1, config.num_attention_heads, n) for i, n in enumerate(widths))
    positions, valid = state.length[:, None] - 1, jnp.ones((rows, 1), bool)
    arrays = q, rope, PagedLatents(state.cache.pages[0], state.cache.table)

    def by_kernel(tile: Any, q: jax.Array, rope: jax.Array, cache: PagedLatents) -> list[jax.Array]:
        limit = jnp.broadcast_to(positions, (rows, config.num_attention_heads))
        parts = latent_attention_kernel.attend_pages(
            *(q[:, 0], rope[:, 0], *cache, limit), scale=0.05, tile=tile, interpret=jax.default_backend() == "cpu"
        )
        return [latent_attention_kernel.join(parts)[:, None].astype(q.dtype)]

    def by_xla(q: jax.Array, rope: jax.Array, cache: PagedLatents) -> list[jax.Array]:
        return [mix_latents(q, rope, cache, positions, valid, scale=0.05)]

    exact, read = jax.jit(by_xla)(*arrays)[0], 2 * rows * scale.context * sum(widths)
    yield Case("attention XLA", by_xla, arrays, read, 1, exact)
    for tile in ATTENTION:
        run = functools.partial(by_kernel, latent_attention_kernel.Tile(*tile))
        yield Case(f"attention kernel {'/'.join(map(str, tile))}", run, arrays, read, 1, exact)


def compiled(cases: list[Case]) -> list[Callable[[], Any]]:
    """What gives each case's program, or raises what its compiler says; all are compiled side by side."""
    pool, found = ThreadPoolExecutor(), []
    for case in cases:
        try:
            found.append(pool.submit(jax.jit(case.run).lower(*case.arrays).compile).result)
        except Exception as error:  # a kernel that cannot be written down
            found.append(functools.partial(_raise, error))
    return found


def _raise(error: Exception) -> None:
    raise error


def timed(case: Case, program: Callable[..., Any], samples: int) -> dict[str, Any]:
    """Time of one of the products, what it reads in that time, and how far its result is from fp32."""
    taken, spread = seconds(lambda: program(*case.arrays), samples)
    return {
        "ms": 1e3 * taken / case.count,
        "iqr_ms": 1e3 * spread / case.count,
        "tb_per_s": case.read / taken / 1e12,
        "error": differ(program(*case.arrays)[0], case.exact),
    }


def all_cases(scale: Scale) -> Iterator[Case]:
    """The most important ones first."""
    for kind in KINDS:
        yield from product_cases(scale.one, kind)
    yield from attention_cases(scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="tiny: for a CPU, to try the script")
    parser.add_argument("--cases", nargs="+", default=[], help="only those whose names begin with one of these words")
    parser.add_argument("--samples", type=int, default=20, help="of each time")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which no other case is timed")
    args = parser.parse_args()
    began, rows, scale = time.monotonic(), [], SCALES[args.scale]
    result = environment() | {"results": rows}
    rows.append({"name": "ceiling copy"} | copy_case(scale.copied, args.samples))
    cases = [case for case in all_cases(scale) if not args.cases or case.name.startswith(tuple(args.cases))]
    for case, program in zip(cases, compiled(cases), strict=True):
        if time.monotonic() - began > args.limit:
            break
        try:
            row = timed(case, program(), args.samples)
        except Exception as error:  # whatever a compiler refuses is a result
            row = {"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        rows.append({"name": case.name} | row)
        result["seconds"] = time.monotonic() - began
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    print(f"{time.monotonic() - began:.0f} s; {result['hardware']}; {result['versions']}")


if __name__ == "__main__":
    main()
