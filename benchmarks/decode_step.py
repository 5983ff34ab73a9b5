"""A step of decoding over fused weights and over the modules, on one GPU: time, kernels, and what lies between them.

    python benchmarks/decode_step.py --output decode_step.json --limit 140
    python benchmarks/decode_step.py --output decode_step.json --scale tiny --samples 2 --cases one profile

`one` is a token at batch 1 of a dense decoder of 1 B weights behind a short context, `large` the same of 7.7 B (width,
depth, feed-forward and vocabulary of Llama 3's 8 B), `mixture` the same of V2-Lite cut to four layers, `many` 64 rows
behind 8,192 tokens, beside transformers. Both sides take the same weights and the same cache, and their logits are
compared first.
`profile` names the ten costliest kernels of a token and the pauses between kernels. `agree` holds both sides of the
mixture against fp32, for 8 rows. Results are written after each case; decode_tiles.py has single kernels.
"""

import argparse
import functools
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.h100 import environment  # noqa: E402
from benchmarks.h100_case import BF16, differ, normal, seconds  # noqa: E402
from benchmarks.low_bits import SCALES as LOW_BITS  # noqa: E402
from benchmarks.low_bits import decoder_config, reads  # noqa: E402
from benchmarks.traces import device_events, kernels  # noqa: E402
from r1jax.arguments import GenerationSettings  # noqa: E402
from r1jax.config import DecoderConfig  # noqa: E402
from r1jax.models.decoder import Decoder, LatentCache  # noqa: E402
from r1jax.models.decoding import decode as fused_decode  # noqa: E402
from r1jax.models.decoding import next_logits  # noqa: E402
from r1jax.models.quantized import rounding_by, uses  # noqa: E402
from r1jax.models.served import Served, fused  # noqa: E402
from r1jax.ops import row_products  # noqa: E402
from r1jax.ops.precision import exact_products  # noqa: E402
from r1jax.serve.rounds import State, run_rounds  # noqa: E402
from r1jax.train.quantized import nearest_codes, with_codes  # noqa: E402

PAGE = 64


class Scale(NamedTuple):
    """What is measured."""

    one: DecoderConfig
    """Of the case of one row."""
    behind: int
    """Its context."""
    answer: int
    """Its tokens."""
    large: DecoderConfig
    """Of the case of one row and more weights."""
    mixture: dict[str, Any]
    """What differs in the case of a mixture."""
    layers: int
    """Of the case of many rows, which is else the model of one."""
    rows: int
    context: int
    tokens: int
    copied: int


FULL, TINY = LOW_BITS["full"], LOW_BITS["tiny"]._replace(hidden=256, heads=16)
LARGE = FULL._replace(hidden=4096, wide=14336, layers=32, heads=32, vocabulary=128256)
SCALES = {
    "full": Scale(
        decoder_config(FULL),
        FULL.context,
        FULL.tokens,
        replace(decoder_config(LARGE), kv_lora_rank=512),
        {
            "vocab_size": 102400,
            "num_hidden_layers": 4,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
        },
        *(3, 64, 8192, 8, 2**31),
    ),
    "tiny": Scale(
        *(decoder_config(TINY), TINY.context, TINY.tokens, decoder_config(TINY._replace(layers=3))),
        *({"moe_intermediate_size": 64}, 1, 2, 128, 4, 2**20),
    ),
}


@functools.cache
def weights(config: DecoderConfig) -> Any:
    """Of a decoder, in bf16; norms and routers in fp32."""
    init = functools.partial(Decoder(config).init, method=reads)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    drawn = []
    for i, (path, x) in enumerate(leaves):
        wide = jnp.ones(x.shape) if len(x.shape) == 1 else normal(i, *x.shape) * x.shape[-1] ** -0.5
        router = any(part.key == "gate" for part in path)
        drawn.append(wide.astype(jnp.float32) if router else wide)
    return jax.tree.unflatten(tree, drawn)


def coded(config: DecoderConfig, quant: tuple[str, ...]) -> Any:
    """The weights, or their codes."""
    if not quant:
        return weights(config)
    found = uses(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32), method=reads)
    with rounding_by(quant):
        return with_codes(weights(config), nearest_codes(weights(config), found))


def start(config: DecoderConfig, rows: int, context: int, settings: GenerationSettings) -> State:
    """A state behind contexts of random latents."""
    none = jnp.zeros(rows, jnp.int32)
    each = -(-(context + settings.max_new_tokens) // PAGE)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    table = np.random.default_rng(0).permutation(rows * each).reshape(rows, each)
    return State(
        cache=LatentCache(
            tuple(normal(i, rows * each, PAGE, width) for i in range(config.num_hidden_layers)),
            jnp.asarray(table, jnp.int32),
        ),
        length=none + context,
        feed=none[:, None] + 7,
        tokens=jnp.zeros((rows, settings.max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((rows, settings.max_new_tokens), jnp.float32),
        count=none,
        done=none > 0,
        seen=None,
        drafted=none,
        accepted=none,
        key=jax.random.key(0),
        rows=none,
    )


def ways(config: DecoderConfig, quant: tuple[str, ...]) -> dict[str, Any]:
    """The weights of both sides."""
    params = coded(config, quant)
    return {"modules": params, "fused": fused(params, config, BF16)}


class Loop:
    """Compiled rounds that start from the same state again and again, in its own memory."""

    def __init__(
        self, config: DecoderConfig, quant: tuple[str, ...], params: Any, rows: int, context: int, tokens: int
    ) -> None:
        model, self.params = Decoder(config, BF16), params
        settings = GenerationSettings(tokens, page_size=PAGE)
        self.state = jax.tree.map(jnp.copy, start(config, rows, context, settings))

        def run(params: Any, state: State) -> State:
            with rounding_by(quant, ("decoder",)):
                end = run_rounds(model, settings, params, state, tokens)
            return end._replace(length=state.length, feed=state.feed, count=state.count * 0, done=state.count < 0)

        self.compiled = jax.jit(run, donate_argnums=1).lower(params, self.state).compile()

    def __call__(self) -> jax.Array:
        self.state = self.compiled(self.params, self.state)
        return self.state.tokens


def first_logits(config: DecoderConfig, quant: tuple[str, ...], rows: int, context: int) -> Callable[..., jax.Array]:
    """What gives the logits after one token of weights of either side, so that both can be compared.

    In fp32 it is the truth that both sides round, behind the same cache.
    """
    state = start(config, rows, context, GenerationSettings(4, page_size=PAGE))
    positions, valid = state.length[:, None], jnp.ones((rows, 1), bool)

    @functools.partial(jax.jit, static_argnums=2)
    def run(params: Any, cache: LatentCache, dtype: Any) -> jax.Array:
        model, held = Decoder(config, dtype), params.rest if isinstance(params, Served) else params
        cache = cache._replace(pages=tuple(pool.astype(dtype) for pool in cache.pages))
        with rounding_by(quant, ("decoder",)):
            apply = functools.partial(model.apply, {"params": held})
            x = apply(state.feed, method="embed")
            if isinstance(params, Served):
                x, _ = fused_decode(model.config, params, x, positions, valid, cache)
                return next_logits(model, params, x, held["norm"]["weight"])
            return apply(apply(x, positions, valid, cache, fresh=False, method="cached")[0], method="logits")

    def logits(params: Any, dtype: Any = BF16) -> jax.Array:
        with exact_products(dtype):
            return run(params, state.cache, dtype)

    return logits


def agree_case(config: DecoderConfig, rows: int, context: int) -> dict[str, Any]:
    """How far both sides of a mixture are from fp32 and from each other, as it is and with experts that are settled.

    Roundings decide between experts that score nearly alike, and other experts give other numbers. A bias that
    outweighs all scores leaves the experts' shares, and no choice.
    """
    logits = first_logits(config, (), rows, context)
    found: dict[str, Any] = {}
    for name, params in (("free", weights(config)), ("settled", settled(weights(config)))):
        exact = logits(jax.tree.map(lambda x: x.astype(jnp.float32), params), jnp.float32)
        modules, joined = logits(params), logits(fused(params, config, BF16))
        sides = {"modules": (modules, exact), "fused": (joined, exact), "apart": (joined, modules)}
        found |= {f"{name}_{side}": differ(*pair) for side, pair in sides.items()}
    return found


def settled(params: Any) -> Any:
    """The weights, with the same experts for all tokens of a layer."""

    def settle(path: Any, x: jax.Array) -> jax.Array:
        if path[-1].key != "e_score_correction_bias":
            return x
        return 8.0 * jax.random.permutation(jax.random.key(len(path[0].key)), len(x)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(settle, params)


def step_case(
    config: DecoderConfig, quant: tuple[str, ...], name: str, rows: int, context: int, tokens: int, samples: int
) -> dict[str, Any]:
    """Milliseconds a token of every row, and what its products and its attention read in that time."""
    both, told = ways(config, quant), {}
    if name == "fused":
        told["apart"] = differ(*map(first_logits(config, quant, rows, context), both.values()))
    loop = Loop(config, quant, both[name], rows, context, tokens)
    taken, spread = (x / tokens for x in seconds(loop, samples))
    read = bytes_read(config, both["modules"])
    cache = sum(pool.nbytes for pool in loop.state.cache.pages) * context // (loop.state.cache.table.shape[1] * PAGE)
    return {
        "ms": 1e3 * taken,
        "iqr_ms": 1e3 * spread,
        "weights_tb_per_s": read / taken / 1e12,
        "reads_tb_per_s": (read + cache) / taken / 1e12,
        "launches": launches(loop.compiled.as_text()),
    } | told


def bytes_read(config: DecoderConfig, params: Any) -> float:
    """What one token reads of the weights: all but the embeddings and the experts that it does not choose."""
    total = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        names = [getattr(part, "key", None) for part in path]
        share = config.num_experts_per_tok / config.n_routed_experts if "experts" in names else 1.0
        total += 0.0 if "embed_tokens" in names else share * x.nbytes
    return total


def launches(text: str) -> dict[str, int]:
    """What the body of the largest loop of a compiled program launches, by kind."""
    bodies = [
        re.search(rf"^%?{re.escape(name)} .*?^}}", text, re.DOTALL | re.MULTILINE)[0]
        for name in re.findall(r"body=%?([\w.\-]+)", text)
    ]
    found: dict[str, int] = {}
    for line in max(bodies, key=len, default="").splitlines():
        call = re.search(r" (fusion|custom-call|copy|dot|sort|scatter|gather|while|reduce)\(", line)
        if call:
            target = re.search(r'custom_call_target="([^"]+)"', line)
            kind = target[1] if target else call[1]
            found[kind] = found.get(kind, 0) + 1
    return found


def profile_case(config: DecoderConfig, name: str, context: int, tokens: int) -> dict[str, Any]:
    """The costliest kernels of a token at batch 1, and the pauses between kernels."""
    loop = Loop(config, (), ways(config, ())[name], 1, context, tokens)
    for _ in range(2):
        jax.block_until_ready(loop())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(loop())
        newest = max(Path(folder).rglob("*.xplane.pb"), key=os.path.getmtime)
        return kernels(device_events(newest), tokens)


def copy_case(copied: int, samples: int) -> dict[str, Any]:
    """Bytes that are read and written."""
    x = normal(0, copied // 2)
    taken, spread = seconds(functools.partial(jax.jit(jnp.negative), x), samples)
    return {"ms": 1e3 * taken, "iqr_ms": 1e3 * spread, "tb_per_s": 2 * copied / taken / 1e12}


def transformers_case(config: DecoderConfig, scale: Scale, samples: int) -> dict[str, Any]:
    """The same rows and weights in transformers, behind as many tokens."""
    from benchmarks import decode  # it needs more packages than the rest

    rows = scale.rows
    peer = decode.transformers_model(config, weights(config), "bfloat16")
    if peer is None:
        raise RuntimeError("torch or transformers is not installed")
    prompts = np.full((rows, scale.context + 1), 7)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    latents = [normal(i, rows, scale.context, width) for i in range(config.num_hidden_layers)]
    cache = decode.transformers_cache(peer, config, latents)
    args = argparse.Namespace(tokens=scale.tokens)
    taken, spread = seconds(lambda: decode.transformers_tokens(peer, prompts, cache, args), samples)
    return {"ms": 1e3 * taken / scale.tokens, "iqr_ms": 1e3 * spread / scale.tokens}


def cases(scale: Scale, samples: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and function of each case, the most important ones first."""
    one, few = scale.one, max(2, samples // 4)
    many = replace(one, num_hidden_layers=scale.layers, first_k_dense_replace=scale.layers)
    mixture = replace(one, first_k_dense_replace=1, n_group=1, topk_group=1, **scale.mixture)
    sides = ("fused", "modules")
    yield "ceiling copy", functools.partial(copy_case, scale.copied, samples)
    for name in sides:
        yield f"one bf16, {name}", functools.partial(step_case, one, (), name, 1, scale.behind, scale.answer, samples)
    for name in sides:
        yield f"profile one, {name}", functools.partial(profile_case, one, name, scale.behind, scale.answer)
    for name in sides:
        run = functools.partial(step_case, many, (), name, scale.rows, scale.context, scale.tokens, few)
        yield f"many bf16, {name}", run
    yield "many bf16, transformers", functools.partial(transformers_case, many, scale, 3)
    for name in sides:
        run = functools.partial(step_case, mixture, (), name, 1, scale.behind, scale.answer, few)
        yield f"mixture bf16, {name}", run
    yield "agree mixture", functools.partial(agree_case, mixture, row_products.MOST, scale.behind)
    yield "profile mixture, fused", functools.partial(profile_case, mixture, "fused", scale.behind, scale.answer)
    for name in sides:
        run = functools.partial(step_case, one, ("int8_weights",), name, 1, scale.behind, scale.answer, few)
        yield f"one int8_weights, {name}", run
    for quant in ((), ("int8_weights",)):  # last: the weights of both are kept
        run = functools.partial(step_case, scale.large, quant, "fused", 1, scale.behind, scale.answer, few)
        yield f"large {quant[0] if quant else 'bf16'}, fused", run


def table(rows: list[dict]) -> str:
    """One line a case; a share is of the copy of the same run."""
    ceiling = next((row["tb_per_s"] for row in rows if row["name"] == "ceiling copy"), None)
    lines = [f"{'case':44}{'ms':>9}{'TB/s':>7}{'of copy':>9}{'apart':>9}"]
    for row in rows:
        if "refused" in row:
            lines.append(f"{row['name']:44} {row['refused'][:140]}")
            continue
        if "costliest" in row:
            lines.append(
                f"{row['name']}: {row['us']:.0f} us in {row['kernels']:.0f} kernels, {row['between_us']:.0f} between"
            )
            lines += [f"    {k['us']:8.1f} us {k['calls']:6.1f} x {k['kernel']}" for k in row["costliest"]]
            lines += [f"    {us:8.1f} us pause after {name}" for name, us in row["pauses_after"].items()]
            continue
        if row["name"].startswith("agree"):
            told = (f"{k} {v:.1e}" for k, v in row.items() if k not in ("name", "seconds"))
            lines.append(f"{row['name']:44} {', '.join(told)}")
            continue
        rate = row.get("tb_per_s", row.get("reads_tb_per_s"))
        told = f"{rate:7.2f}" if rate else f"{'':7}"
        told += f"{rate / ceiling:9.1%}" if rate and ceiling else f"{'':9}"
        error = row.get("apart", row.get("error"))
        told += f"{error:9.1e}" if error is not None else ""
        told += f"  {row['launches']}" if "launches" in row else ""
        lines.append(f"{row['name']:44}{row['ms']:9.4f}{told}")
    return "\n".join(lines)


def markdown(report: dict) -> str:
    """The tables of benchmarks/README.md: steps, and the costliest kernels of a token."""
    rows = [row for row in report["results"] if "refused" not in row]
    copy = next(row["tb_per_s"] for row in rows if row["name"] == "ceiling copy")
    lines = ["| case | ms a token of all rows | reads, TB/s | of the copy | first logits apart | launches a token |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        if "ms" in row:
            rate = row.get("tb_per_s", row.get("reads_tb_per_s"))
            shown = ["", ""] if rate is None else [f"{rate:.2f}", f"{rate / copy:.0%}"]
            shown.append(f"{row['apart']:.1e}" if "apart" in row else "")
            shown.append(f"{sum(row['launches'].values())}" if "launches" in row else "")
            lines.append(f"| {row['name']} | {row['ms']:.3f} ± {row['iqr_ms'] / 2:.3f} | {' | '.join(shown)} |")
    lines += ["", "| profile | kernels | us in them | costliest, us |", "|---|---|---|---|"]
    for row in rows:
        if "costliest" in row:
            named = ", ".join(f"{k['calls']:.0f} x `{k['kernel']}` {k['us']:.0f}" for k in row["costliest"][:7])
            lines.append(
                f"| {row['name'].removeprefix('profile ')} | {row['kernels']:.0f} | {row['us']:.0f} | {named} |"
            )
    for row in rows:
        if row["name"].startswith("agree"):
            told = (f"{k.replace('_', ' ')} {v:.1e}" for k, v in row.items() if k not in ("name", "seconds"))
            lines += ["", f"{row['name']}: {', '.join(told)}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="tiny: for a CPU, to try the script")
    parser.add_argument("--cases", nargs="+", default=[], help="only those whose names begin with one of these words")
    parser.add_argument("--samples", type=int, default=20, help="of each time")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which no other case begins")
    args = parser.parse_args()
    began, rows = time.monotonic(), []
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")  # torch wants the rest
    if jax.config.jax_compilation_cache_dir is None:  # a profile is of a program that was timed before
        jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    result = environment() | {"results": rows}
    result["kernels"] = row_products.takes_triton()
    for name, measure in cases(SCALES[args.scale], args.samples):
        if args.cases and not name.startswith(tuple(args.cases)):
            continue
        since = time.monotonic()
        if since - began > args.limit:
            break
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".* is not used on this machine")  # that would be no result
                row = {"name": name} | measure()
        except Exception as error:  # whatever a compiler refuses is a result
            row = {"name": name, "refused": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        rows.append(row | {"seconds": time.monotonic() - since})
        result["seconds"] = time.monotonic() - began
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    print(f"{time.monotonic() - began:.0f} s; {result['hardware']}; kernels: {result['kernels']}; {result['versions']}")


if __name__ == "__main__":
    main()
