"""Speed of few bits on one GPU: decoding, batch inference and single products of a decoder of 1 B weights.

    python benchmarks/low_bits.py --output benchmarks/results/low_bits.json
    python benchmarks/low_bits.py --output low_bits.json --scale tiny --samples 3

A dense DeepSeek-V3 with random weights. `decode` is one token a step behind a context, `batch` the forward pass of many
rows, both through the decoder that `r1jax generate` and `eval.py` run; `product` is one product of its size, with the
rounding of activations and the scales; `swiglu` is silu(gate) * up and its product with `down_proj`, `apart` where it
is written before it is rounded; `tile` is what the kernel for Hopper makes of codes, cut in one way or another;
`rounding` is that of activations alone and `gating` that of silu(gate) * up, `0` without its ring of shared memory;
`vector` is a row times a weight, over more weights than a cache holds. Cases called XLA are what the kernels take the
place of. Each kind has a child process of its own, which takes its variants in turn; results are written after each
case.
"""

import argparse
import functools
import json
import os
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
from benchmarks.low_bits_products import kernel_cases, product_cases, products_of, vector_cases  # noqa: E402
from r1jax.arguments import GenerationSettings  # noqa: E402
from r1jax.config import DecoderConfig  # noqa: E402
from r1jax.models.decoder import Decoder, LatentCache  # noqa: E402
from r1jax.models.quantized import rounding_by, uses  # noqa: E402
from r1jax.ops import quantized_dot as quantized  # noqa: E402
from r1jax.ops.latent_attention import empty_pages  # noqa: E402
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


def cases(s: Sizes, samples: int) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Child, name and function of each case, the most important ones first."""
    rows = s.rows * s.length
    yield from vector_cases(s.hidden, s.wide, samples)
    for name, quant, cache in (
        ("bf16", (), "float"),
        ("int8_weights", ("int8_weights",), "float"),
        ("int4", ("int4",), "float"),
        ("int8_weights, int8 cache", ("int8_weights",), "int8"),
    ):
        yield "decode", f"decode {name}", functools.partial(decode_case, s, quant, cache, samples)
    for name, quant, by_xla in (
        ("bf16", (), False),
        ("int8", ("int8",), False),
        ("fp8", ("fp8",), False),
        ("int8 XLA", ("int8",), True),
    ):
        yield "batch", f"batch {name}", functools.partial(batch_case, s, quant, by_xla, samples)
    yield from product_cases(rows, s.hidden, s.wide, s.vocabulary, samples)
    yield from kernel_cases(rows, s.hidden, s.wide, samples)


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
    result = environment() | {"sizes": SCALES[args.scale]._asdict(), "goals": GOALS, "results": rows}

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
