"""The launch that runs all layers of a token, by itself on one Hopper GPU: its time, and where a layer's time goes.

    python benchmarks/decode_phases.py --output decode_phases.json
    python benchmarks/decode_phases.py --output decode_phases.json --macros "SLOTS=8" "LEAST_SPAN=32 PARTS=20"

The decoder is that of decode_step.py's case `one`. A token is the mean of --tokens in one program, each of which reads
what the one before gave. Times of phases are of a launch that notes the clocks of its multiprocessors: the median over
blocks of what lies between the end of one phase and of the next, in the middle layer; it holds the waiting for others.
Times of layers show what the first takes more, while the kernel itself is read. Clocks are taken for --megahertz; under
load they may be slower, and layers together then take less than the launch by them.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.decode_step import PAGE, SCALES, start, ways  # noqa: E402
from benchmarks.h100 import environment  # noqa: E402
from benchmarks.h100_case import BF16, normal, seconds  # noqa: E402
from r1jax.arguments import GenerationSettings  # noqa: E402
from r1jax.models.decoding import dense_layer, norms_of, turns  # noqa: E402
from r1jax.ops import decode_layers  # noqa: E402
from r1jax.ops.latent_attention import PagedLatents  # noqa: E402
from r1jax.ops.self_test import target  # noqa: E402

PHASES = ("queries", "absorbed", "attended", "expanded", "projected", "gate and up", "down")


class Case:
    """Layers and caches of one kind of weights, behind a context."""

    def __init__(self, quant: tuple[str, ...], tokens: int) -> None:
        scale = SCALES["full"]
        config, self.tokens = scale.one, tokens
        self.layers = [dense_layer(layer) for layer in ways(config, quant)["fused"].layers]
        state = start(config, 1, scale.behind, GenerationSettings(tokens, page_size=PAGE))
        self.pools, self.table = list(state.cache.pages), state.cache.table
        self.limit = state.length[0]
        self.turn = turns(config, state.length[:, None])
        self.x = normal(9, 1, config.hidden_size)
        self.sizes = decode_layers.sizes_of(self.layers[0], self.caches()[0], norms_of(config), len(self.layers))

    def caches(self, pools: Sequence[jax.Array] | None = None) -> list[PagedLatents]:
        return [PagedLatents(pool, self.table) for pool in pools or self.pools]

    def launch(self, layers: Any, x: jax.Array, pools: Sequence[jax.Array], sizes: decode_layers.Sizes) -> Any:
        """One token; weights are arguments of the program that this is traced in."""
        return decode_layers.launch(x, layers, self.caches(pools), self.limit, self.turn, sizes)

    def microseconds(self, sizes: decode_layers.Sizes, samples: int) -> tuple[float, float]:
        """Of a token, median and interquartile range."""

        def run(layers: Any, x: jax.Array, pools: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
            def token(_: int, held: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
                out, after, _ = self.launch(layers, held[0], held[1], sizes)
                return (out / 2 + held[0] / 2).astype(BF16), after

            return jax.lax.fori_loop(0, self.tokens, token, (x, pools))

        compiled = jax.jit(run, donate_argnums=2).lower(self.layers, self.x, self.pools).compile()
        taken, spread = seconds(functools.partial(self._again, compiled), samples)
        return 1e6 * taken / self.tokens, 1e6 * spread / self.tokens

    def _again(self, compiled: Any) -> jax.Array:
        out, self.pools = compiled(self.layers, self.x, self.pools)
        return out

    def phases(self, sizes: decode_layers.Sizes, megahertz: float) -> dict[str, Any]:
        """Where a launch's time goes, as `phases_of` says it."""
        sizes = sizes | {"TRACED": True}
        run = jax.jit(lambda layers, x, pools: self.launch(layers, x, pools, sizes)[2])
        for _ in range(3):
            words = np.asarray(run(self.layers, self.x, self.pools))
        return phases_of(words, len(self.layers), int(sizes["BLOCKS"]), megahertz)


def phases_of(words: np.ndarray, layers: int, blocks: int, megahertz: float) -> dict[str, Any]:
    """Microseconds of the middle layer's phases and of each layer, by the clocks that are the last of the words."""
    clocks = words[-(layers * len(PHASES) + 1) * blocks :].reshape(-1, blocks)
    between = np.diff(clocks, axis=0).reshape(layers, len(PHASES), blocks) / megahertz  # modulo 2^32, as clocks are
    middle = dict(zip(PHASES, np.median(between[layers // 2], axis=1).tolist(), strict=True))
    return {"phases_us": middle, "layers_us": np.median(between.sum(axis=1), axis=1).tolist()}


def markdown(report: dict) -> str:
    """The table of benchmarks/README.md."""
    lines = [
        f"| weights | macros | us | {' | '.join(PHASES)} | a layer |",
        "|---|---|---|" + "---|" * (len(PHASES) + 1),
    ]
    for row in report["results"]:
        macros = ", ".join(f"{name} {number}" for name, number in row["macros"].items())
        phases = " | ".join(f"{row['phases_us'][name]:.1f}" for name in PHASES)
        layer = f"{np.median(row['layers_us']):.1f}"
        lines.append(f"| {row['name']} | {macros} | {row['us']:.0f} ± {row['iqr_us'] / 2:.0f} | {phases} | {layer} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--macros", nargs="+", default=[], help="others to try, each NAME=NUMBER ..., as one word")
    parser.add_argument("--kinds", nargs="+", default=["bf16", "int8_weights"], choices=("bf16", "int8_weights"))
    parser.add_argument("--tokens", type=int, default=64, help="of a program")
    parser.add_argument("--samples", type=int, default=10, help="of each time")
    parser.add_argument("--megahertz", type=float, default=1980, help="of the multiprocessors' clock")
    args = parser.parse_args()
    if target().platform != "gpu" or target().compute_capability != "9.0":
        sys.exit("benchmarks/decode_phases.py: the kernel is for a Hopper GPU, which JAX does not find here.")
    tried = [{}] + [{name: int(n) for name, n in (pair.split("=") for pair in word.split())} for word in args.macros]
    result, rows, began = environment(), [], time.monotonic()
    result |= {"results": rows}
    for kind in args.kinds:
        case = Case(() if kind == "bf16" else (kind,), args.tokens)
        for changed in tried:
            sizes = decode_layers.with_ring(case.sizes | changed) | changed
            taken, spread = case.microseconds(sizes, args.samples)
            row = {"name": kind, "macros": changed, "us": taken, "iqr_us": spread}
            row |= case.phases(sizes, args.megahertz)
            rows.append(row)
            print(json.dumps(row), flush=True)
            result["seconds"] = time.monotonic() - began
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
