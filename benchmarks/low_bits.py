"""Speed of few bits on one GPU: decoding, batch inference and single products of a decoder of 1 B weights.

    python benchmarks/low_bits.py --output benchmarks/results/low_bits.json
    python benchmarks/low_bits.py --output low_bits.json --scale tiny --samples 3

A dense DeepSeek-V3 with random weights. `decode` is one token a step behind a context, `batch` the forward pass of many
rows, both through the decoder that `r1jax generate` and `eval.py` run; `product` is one product of its size, with the
rounding of activations and the scales; `swiglu` is silu(gate) * up and its product with `down_proj`, `apart` where it
is written before it is rounded; `tile` is what the kernel for Hopper makes of codes, cut in one way or another;
`rounding` is that of activations alone and `gating` that of silu(gate) * up, with the stages of the kernel; `vector` is
a row times a weight, over more weights than a cache holds. Cases called XLA are what the kernels take the place of.
Each kind has a child process of its own, which takes its variants in turn; results are written after each case.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks.children import follow  # noqa: E402
from benchmarks.h100_case import BF16, differ, normal, seconds  # noqa: E402
from r1jax.arguments import GenerationSettings  # noqa: E402
from r1jax.config import DecoderConfig  # noqa: E402
from r1jax.models.decoder import Decoder, LatentCache  # noqa: E402
from r1jax.models.quantized import rounding_by, uses  # noqa: E402
from r1jax.ops import quantized_dot as quantized  # noqa: E402
from r1jax.ops.latent_attention import empty_pages  # noqa: E402
from r1jax.ops.quantize import Kind, Quantized, quantize  # noqa: E402
from r1jax.ops.quantized_dot import Gated, Scheme, input_codes, multiply, quantized_dot  # noqa: E402
from r1jax.ops.weight_only import weight_only_dot  # noqa: E402
from r1jax.ops.weight_only_kernel import Tile, row_times_codes  # noqa: E402
from r1jax.serve.rounds import State, run_rounds  # noqa: E402
from r1jax.train.quantized import nearest_codes, with_codes  # noqa: E402

PATIENCE = 120.0
"""Seconds without a word after which a child is given up."""
PATIENCE_WITH_VARIANTS = 20.0
"""The same of a kernel's variants, which compile fast and of which one may hang."""
VARIANTS = ("tile", "gating", "rounding")
GOALS = {
    "decode int8_weights": 1.6,
    "product int8": 1.6,
    "product fp8": 1.6,
    "swiglu int8": 1.6,
    "swiglu fp8": 1.6,
    "batch int8": 1.3,
}
"""Times faster than bf16 that cases whose names begin so should be."""
CACHE_BYTES = 2**28
"""Weights that are read one after another: several times what an H100 caches (50 MiB)."""


class Sizes(NamedTuple):
    """What is measured."""

    hidden: int
    wide: int
    layers: int
    heads: int
    vocabulary: int
    context: int
    tokens: int
    rows: int
    length: int


SCALES = {
    "full": Sizes(2048, 8192, 16, 16, 32768, 512, 64, 8, 1024),
    "tiny": Sizes(64, 128, 2, 2, 256, 32, 4, 2, 16),
}


def decoder_config(s: Sizes) -> DecoderConfig:
    """Dense, of V2-Lite's attention."""
    return DecoderConfig(
        vocab_size=s.vocabulary,
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        q_lora_rank=None,
        kv_lora_rank=s.hidden // 4,
        qk_nope_head_dim=s.hidden // s.heads,
        qk_rope_head_dim=s.hidden // s.heads // 2,
        v_head_dim=s.hidden // s.heads,
        intermediate_size=s.wide,
        first_k_dense_replace=s.layers,
        num_nextn_predict_layers=0,
    )


def reads(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    """Logits of what follows each row."""
    positions, valid = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape), jnp.ones(tokens.shape, bool)
    return decoder.logits(decoder(decoder.embed(tokens), positions, valid)[0][:, -1:])


@functools.cache
def weights(s: Sizes) -> Any:
    """Of the decoder, in bf16."""
    init = functools.partial(Decoder(decoder_config(s)).init, method=reads)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    drawn = [
        jnp.ones(x.shape) if len(x.shape) == 1 else normal(i, *x.shape) * x.shape[-1] ** -0.5
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, drawn)


def served(s: Sizes, quant: tuple[str, ...]) -> Any:
    """The weights, or their codes."""
    if not quant:
        return weights(s)
    found = uses(Decoder(decoder_config(s)).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32), method=reads)
    with rounding_by(quant):
        codes = nearest_codes(weights(s), found)
    if quant == ("int4",):  # as a quantized checkpoint is loaded
        narrow = lambda c: c if c.scale.shape[-1] == 1 else c._replace(values=c.values.astype(jnp.int4))  # noqa: E731
        codes = {name: narrow(found) for name, found in codes.items()}
    return with_codes(weights(s), codes)


def decode_case(s: Sizes, quant: tuple[str, ...], cache: str, samples: int) -> dict[str, Any]:
    """Milliseconds a token at batch 1."""
    config, params = decoder_config(s), served(s, quant)
    model = Decoder(config, BF16)
    settings = GenerationSettings(s.tokens, page_size=64, cache=cache)
    pages = -(-(s.context + s.tokens) // 64)
    pool = empty_pages(cache, pages, 64, config.kv_lora_rank, config.qk_rope_head_dim, BF16)
    none = jnp.zeros(1, jnp.int32)
    state = State(
        cache=LatentCache((pool,) * s.layers, jnp.arange(pages, dtype=jnp.int32)[None]),
        length=none + s.context,
        feed=none[None] + 7,
        tokens=jnp.zeros((1, s.tokens), jnp.int32),
        logprobs=jnp.zeros((1, s.tokens), jnp.float32),
        count=none,
        done=none > 0,
        seen=None,
        drafted=none,
        accepted=none,
        key=jax.random.key(0),
        rows=none,
    )

    def run(params: Any, state: State) -> tuple[jax.Array, jax.Array]:
        with rounding_by(quant):
            end = run_rounds(model, settings, params, state, s.tokens)
        return end.tokens, end.logprobs

    compiled = jax.jit(run).lower(params, state).compile()
    taken, spread = seconds(lambda: compiled(params, state), samples)
    read = sum(x.nbytes for x in jax.tree.leaves(params)) - sum(
        x.nbytes for x in jax.tree.leaves(params["embed_tokens"])
    )
    a_token = taken / s.tokens
    memory = compiled.memory_analysis()
    return {
        "ms": 1e3 * a_token,
        "iqr_ms": 1e3 * spread / s.tokens,
        "tb_per_s": read / a_token / 1e12,
        "weights_mib": read / 2**20,
        "temporaries_mib": memory.temp_size_in_bytes / 2**20,
    }


@functools.cache
def forward(s: Sizes, quant: tuple[str, ...], by_xla: bool) -> tuple[Any, tuple[Any, jax.Array]]:
    """The compiled forward pass of a batch, and its arguments."""
    model, params = Decoder(decoder_config(s), BF16, prefix=True), served(s, quant)
    tokens = jax.random.randint(jax.random.key(1), (s.rows, s.length), 0, s.vocabulary)

    def run(params: Any, tokens: jax.Array) -> jax.Array:
        with rounding_by(quant):
            return model.apply({"params": params}, tokens, method=reads)

    jitted = jax.jit(run)
    if by_xla:
        with mock.patch.object(quantized, "_on_hopper", lambda x, codes: False):
            return jitted.lower(params, tokens).compile(), (params, tokens)
    return jitted.lower(params, tokens).compile(), (params, tokens)


def batch_case(s: Sizes, quant: tuple[str, ...], by_xla: bool, samples: int) -> dict[str, Any]:
    """Milliseconds of the forward pass of a batch."""
    (compiled, arguments), (plain, known) = forward(s, quant, by_xla), forward(s, (), False)
    taken, spread = seconds(lambda: compiled(*arguments), samples)
    return {
        "ms": 1e3 * taken,
        "iqr_ms": 1e3 * spread,
        "tokens_per_second": s.rows * s.length / taken,
        "error": differ(compiled(*arguments), plain(*known)),
        "products": products_of(compiled.as_text()),
    }


def product_case(
    way: Callable[[jax.Array, Any], jax.Array], kind: Kind | None, shape: tuple[int, int, int], samples: int
) -> dict[str, Any]:
    """One product of the model: activations are rounded and sums are scaled within what is timed."""
    rows, wide, deep = shape
    x, w = normal(1, rows, deep), normal(2, wide, deep)
    exact = jnp.einsum("RI,OI->RO", x[:256], w, preferred_element_type=jnp.float32)
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


def swiglu_case(
    way: Callable[[Gated, Any], jax.Array], kind: Kind | None, shape: tuple[int, int, int], samples: int
) -> dict[str, Any]:
    """SwiGLU behind its first two products: their product, its rounding and the last one."""
    rows, wide, deep = shape
    x, w = Gated(normal(1, rows, deep), normal(3, rows, deep)), normal(2, wide, deep)
    some = Gated(*(part[:256].astype(jnp.float32) for part in x)).product()
    exact = jnp.einsum("RI,OI->RO", some, w.astype(jnp.float32), precision="highest")
    held = w if kind is None else quantize(w, kind, scale_dtype=BF16)
    compiled = jax.jit(way).lower(x, held).compile()
    taken, spread = seconds(lambda: compiled(x, held), samples)
    return {
        "ms": 1e3 * taken,
        "iqr_ms": 1e3 * spread,
        "tflops": 2 * rows * wide * deep / taken / 1e12,
        "error": differ(compiled(x, held)[:256], exact),
        "products": products_of(compiled.as_text()),
    }


def rounding_case(
    kind: Kind, stages: int | None, rows: int, deep: int, samples: int, *, gated: bool = False
) -> dict[str, Any]:
    """Rows of activations become codes; reads and writes are those of one pass. Without stages, by XLA.

    They are compared with what XLA makes of rows that are written out, or it would leave out their rounding to bf16.
    """
    arrays = [normal(1 + 2 * i, rows, deep) for i in range(1 + gated)]

    def formed(*arrays: jax.Array) -> jax.Array:
        return Gated(*arrays).product() if gated else arrays[0]

    def xla(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = quantize(formed(*arrays), kind)
        return codes.values, codes.scale[:, 0]

    def ours(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        from r1jax.ops.row_codes_hopper import gated_codes, row_codes

        return (gated_codes if gated else row_codes)(*arrays, kind, stages=stages)

    compiled = jax.jit(xla if stages is None else ours).lower(*arrays).compile()
    taken, spread = seconds(lambda: compiled(*arrays), samples)
    values, scale = compiled(*arrays)
    known = jax.jit(quantize, static_argnums=1)(jax.jit(formed)(*arrays), kind)
    moved = sum(x.nbytes for x in arrays) + values.nbytes
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


def bf16_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("RI,OI->RO", x, w)


def swiglu_dot(x: Gated, w: jax.Array) -> jax.Array:
    return bf16_dot(x.product(), w)


def swiglu_rounded(x: Gated, w: Quantized, kind: Kind, apart: bool) -> jax.Array:
    """As in the model; apart, where the kernel that rounds is not told the factors, and reads their product."""
    return quantized_dot(x.product(), w, Scheme(kind, kind), gated=None if apart else x)


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


def cases(s: Sizes, samples: int) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Child, name and function of each case, the most important ones first."""
    shapes = [(s.wide, s.hidden), (s.hidden, s.wide), (s.hidden, s.hidden), (s.vocabulary, s.hidden)]
    ways: dict[str, tuple[Callable, str | None]] = {
        "bf16": (bf16_dot, None),
        "bf16 summed": (summed, None),
        "int8 ours": (weight_only_dot, "int8"),
        "int8 library": (library_dot, "int8"),
        "fp8 ours": (weight_only_dot, "fp8"),
    }
    for wide, deep in shapes[:2]:
        for tile in (Tile(4, 1024, 4), Tile(2, 1024, 2), Tile(1, 2048, 2), Tile(4, 2048, 8), Tile(8, 512, 4)):
            fitted = tile._replace(depth=min(tile.depth, deep))
            ways[f"int8 kernel {'/'.join(map(str, tile))}"] = functools.partial(kernel_dot, tile=fitted), "int8"
        for name, (way, kind) in ways.items():
            run = functools.partial(vector_case, way, kind, (wide, deep), samples)
            yield "vector", f"vector {name} {wide}x{deep}", run
    for name, quant, cache in (
        ("bf16", (), "float"),
        ("int8_weights", ("int8_weights",), "float"),
        ("int4", ("int4",), "float"),
        ("int8_weights, int8 cache", ("int8_weights",), "int8"),
    ):
        yield "decode", f"decode {name}", functools.partial(decode_case, s, quant, cache, samples)
    rows = s.rows * s.length
    for name, quant, by_xla in (
        ("bf16", (), False),
        ("int8", ("int8",), False),
        ("fp8", ("fp8",), False),
        ("int8 XLA", ("int8",), True),
    ):
        yield "batch", f"batch {name}", functools.partial(batch_case, s, quant, by_xla, samples)
    products: dict[str, tuple[Callable, Kind | None]] = {
        "bf16": (bf16_dot, None),
        "int8": (functools.partial(quantized_dot, scheme=Scheme("int8", "int8")), "int8"),
        "fp8": (functools.partial(quantized_dot, scheme=Scheme("fp8", "fp8")), "fp8"),
        "int8 XLA": (functools.partial(xla_dot, kind="int8"), "int8"),
        "fp8 XLA": (functools.partial(xla_dot, kind="fp8"), "fp8"),
    }
    for wide, deep in shapes:
        for name, (way, kind) in products.items():
            run = functools.partial(product_case, way, kind, (rows, wide, deep), samples)
            yield "product", f"product {name} {wide}x{deep}", run
    for wide, deep in shapes[:2]:
        plain = functools.partial(product_case, bf16_dot, None, (rows, wide, deep), samples)
        yield "tile", f"tile bf16 {wide}x{deep}", plain
        for kind, tiles in (("int8", TILES), ("fp8", TILES[:2])):
            for tiling in tiles:
                run = functools.partial(tile_case, kind, tiling, (rows, wide, deep), samples)
                yield "tile", f"tile {kind} {'/'.join(map(str, tiling))} {wide}x{deep}", run
    shape = rows, s.hidden, s.wide
    yield "swiglu", f"swiglu bf16 {s.hidden}x{s.wide}", functools.partial(swiglu_case, swiglu_dot, None, shape, samples)
    for kind in ("int8", "fp8"):
        for name, apart in (("", False), (" apart", True)):
            way = functools.partial(swiglu_rounded, kind=kind, apart=apart)
            run = functools.partial(swiglu_case, way, kind, shape, samples)
            yield "swiglu", f"swiglu {kind}{name} {s.hidden}x{s.wide}", run
    for kind in ("int8", "fp8"):
        for stages in (None, 0, 2, 3, 4):
            name = f"{kind} XLA" if stages is None else f"{kind} {stages}"
            run = functools.partial(rounding_case, kind, stages, rows, s.wide, samples, gated=True)
            yield "gating", f"gating {name} {s.wide}", run
    for deep in dict.fromkeys(deep for _, deep in shapes):
        for kind in ("int8", "fp8"):
            for stages in (None, 0, 2, 3):
                name = f"{kind} XLA" if stages is None else f"{kind} {stages}"
                run = functools.partial(rounding_case, kind, stages, rows, deep, samples)
                yield "rounding", f"rounding {name} {deep}", run


def child(args: argparse.Namespace) -> None:
    """Measures the cases that are named and prints a line of JSON before and after each."""
    for _, name, measure in cases(SCALES[args.scale], args.samples):
        if name not in args.names:
            continue
        print(json.dumps({"begin": name}), flush=True)
        began = time.monotonic()
        try:
            row = {"name": name} | measure()
        except Exception as error:  # whatever a compiler refuses is a result
            row = {"name": name, "refused": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(row | {"seconds": time.monotonic() - began}), flush=True)


def run_child(names: list[str], args: argparse.Namespace, note: Callable[[dict], None]) -> list[str]:
    """Runs cases in a child and notes their rows; returns those that are left after the one that ended it."""
    command = [sys.executable, __file__, "--child", "--scale", args.scale, "--samples", str(args.samples)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    process = subprocess.Popen(
        [*command, "--output", str(args.output), "--names", *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    patience = PATIENCE_WITH_VARIANTS if names[0].startswith(VARIANTS) else PATIENCE
    return follow(process, names, patience, args.end, note)


def times_bf16(row: dict, rows: list[dict]) -> float | None:
    """How many times as fast a case is as bf16 of the same kind, size and run; None where that was not measured."""
    kind, *_, size = row["name"].split()
    plain = f"{kind} bf16 {size}" if kind in ("product", "tile", "vector", "swiglu") else f"{kind} bf16"
    found = (other["ms"] for other in rows if other["name"] == plain and other.get("run") == row.get("run"))
    ms = next(found, None)
    return None if ms is None else ms / row["ms"]


def markdown(report: dict) -> str:
    """The table of benchmarks/README.md."""
    rows = [row for row in report["results"] if "refused" not in row]
    lines = [
        "| case | run | ms | times bf16 | TB/s | TFLOP/s | error | goal, times bf16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times, goals = times_bf16(row, rows), [g for name, g in GOALS.items() if row["name"].startswith(name)]
        cells = [
            row["name"],
            str(row.get("run", 1)),
            f"{row['ms']:.3f} ± {row['iqr_ms'] / 2:.3f}" if row["ms"] > 0.1 else f"{row['ms']:.4f}",
            f"{times:.2f}" if times else "",
            f"{row['tb_per_s']:.2f}" if "tb_per_s" in row else "",
            f"{row['tflops']:.0f}" if "tflops" in row else "",
            f"{row['error']:.1e}" if "error" in row else "",
            f"{goals[0]}" if goals and not {"XLA", "apart"} & set(row["name"].split()) else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", report["note"]] if "note" in report else [])])


def table(rows: list[dict]) -> str:
    """One line a case, beside bf16 of the same kind and size."""
    lines = [f"{'case':44}{'ms':>9}{'x bf16':>8}{'TB/s':>7}{'TFLOP/s':>9}{'error':>9}"]
    for row in rows:
        if "refused" in row:
            lines.append(f"{row['name']:44} {row['refused'][:140]}")
            continue
        faster = times_bf16(row, rows)
        times = f"{faster:8.2f}" if faster else f"{'':8}"
        rate = f"{row['tb_per_s']:7.2f}" if "tb_per_s" in row else f"{'':7}"
        flops = f"{row['tflops']:9.0f}" if "tflops" in row else f"{'':9}"
        error = f"{row['error']:9.1e}" if "error" in row else ""
        lines.append(f"{row['name']:44}{row['ms']:9.4f}{times}{rate}{flops}{error}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--cases", nargs="+", default=[], help="only those whose names begin with one of these words")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--limit", type=float, default=190, help="seconds after which it ends")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    from benchmarks.h100 import environment

    began, rows = time.monotonic(), []
    args.end = began + args.limit
    words = [re.sub(r".*/", "", word) for word in sys.argv[1:]]  # without the paths of this machine
    result = environment() | {"command": " ".join(["python benchmarks/low_bits.py", *words])}
    result |= {"sizes": SCALES[args.scale]._asdict(), "goals": GOALS, "results": rows}

    def note(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        args.output.write_text(json.dumps(result | {"seconds": time.monotonic() - began}, indent=1) + "\n")

    every = [(kind, name) for kind, name, _ in cases(SCALES[args.scale], args.samples)]
    for kind in dict.fromkeys(kind for kind, _ in every):
        left = [n for k, n in every if k == kind and (not args.cases or any(n.startswith(w) for w in args.cases))]
        while left and time.monotonic() < args.end:
            left = run_child(left, args, note)
    print(table(rows))
    print(f"{time.monotonic() - began:.0f} s; {result['hardware']}; {result['versions']}")


if __name__ == "__main__":
    main()
