"""Speed of decoding: absorbed against expanded attention, against transformers, and with speculation against without.

    python benchmarks/decode.py --output benchmarks/results/decode.json
    python benchmarks/decode.py --output decode.json --dtype bfloat16 --hidden 1024 --layers 8 --contexts 4096 65536

A small DeepSeek-V3 with random weights decodes behind a context that is put into the cache, the same into ours and into
that of transformers, whose weights are exported by r1jax and which has as many threads as suit it. All sides take turns
in one process; figures are medians, and what counts are their ratios. Speculation is measured twice: with weights that
learned a noisy permutation for a few seconds, so that MTP is mostly right, and with random ones, so that it is wrong:
the two ends of what it brings.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment  # noqa: E402
from r1jax.arguments import GenerationSettings  # noqa: E402
from r1jax.config import DecoderConfig, YarnConfig  # noqa: E402
from r1jax.hf.save import save_params  # noqa: E402
from r1jax.models import attention  # noqa: E402
from r1jax.models.decoder import Decoder, LatentCache  # noqa: E402
from r1jax.ops.latent_attention import latent_attention_reference  # noqa: E402
from r1jax.ops.losses import cross_entropy  # noqa: E402
from r1jax.serve.generate import Generator, cast_matrices  # noqa: E402
from r1jax.serve.prompts import lay_out  # noqa: E402
from r1jax.serve.rounds import State, run_rounds  # noqa: E402

PAGE = 64
NOISE = 0.1
"""Share of tokens of the learned language that do not follow the permutation."""


def config_of(args: argparse.Namespace) -> DecoderConfig:
    """A decoder of V3's proportions: a latent of 2 heads' keys, experts a quarter as wide as the model."""
    return DecoderConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        q_lora_rank=args.hidden // 2,
        kv_lora_rank=args.latent,
        qk_nope_head_dim=args.head,
        qk_rope_head_dim=args.head // 2,
        v_head_dim=args.head,
        intermediate_size=3 * args.hidden,
        moe_intermediate_size=args.hidden // 4,
        n_routed_experts=16,
        num_experts_per_tok=4,
        rope_scaling=YarnConfig(factor=40.0, original_max_position_embeddings=4096),
    )


def logits_of(decoder: Decoder, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Next-token logits and those of MTP."""
    positions, valid = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape), jnp.ones(tokens.shape, bool)
    hidden, _ = decoder(decoder.embed(tokens), positions, valid)
    states, _ = decoder.predict_second(hidden, jnp.roll(tokens, -1, axis=1), positions, valid)
    return decoder.logits(hidden), decoder.logits(states)


def random_params(config: DecoderConfig) -> Any:
    """Weights whose logits differ, so that greedy tokens are no ties."""
    wide = replace(config, initializer_range=0.06)
    return jax.jit(lambda key: Decoder(wide).init(key, jnp.zeros((1, 4), jnp.int32), method=logits_of)["params"])(
        jax.random.key(0)
    )


def learned_params(config: DecoderConfig, params: Any, steps: int) -> Any:
    """Trains on sequences that follow a permutation, with noise."""
    rng, follows = np.random.default_rng(0), np.random.default_rng(1).permutation(config.vocab_size)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            main, second = Decoder(config).apply({"params": params}, tokens, method=logits_of)
            return (
                cross_entropy(main[:, :-1], tokens[:, 1:]).mean() + cross_entropy(second[:, :-2], tokens[:, 2:]).mean()
            )

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in range(steps):
        tokens = rng.integers(0, config.vocab_size, (32, 32))
        for t in range(1, 32):
            follow = rng.random(32) > NOISE
            tokens[follow, t] = follows[tokens[follow, t - 1]]
        params, state, _ = step(params, state, jnp.asarray(tokens, jnp.int32))
    return params


def median_seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each run, which take turns; the first turn compiles and does not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            found[name].append(time.perf_counter() - began)
    return {name: float(np.median(seconds[1:])) for name, seconds in found.items()}


def primed(model: Decoder, settings: GenerationSettings, prompts: np.ndarray, latents: jax.Array) -> State:
    """A state that has read all of its prompts but the last token, with given latents in the cache.

    Args:
      model: Decoder.
      settings: Of the generation.
      prompts: Tokens [rows, length].
      latents: Entries [layers, rows, length - 1, width].

    Returns:
      The state.
    """
    rows = len(prompts)
    batch, pages = lay_out(list(prompts), None, None, model.config, settings)
    slots = batch.table[:, (np.arange(prompts.shape[1] - 1) // PAGE)] * PAGE + np.arange(prompts.shape[1] - 1) % PAGE

    @partial(jax.jit, donate_argnums=0)
    def filled(pool: jax.Array, entries: jax.Array) -> jax.Array:
        return pool.reshape(pages * PAGE, -1).at[slots].set(entries).reshape(pool.shape)

    empty = partial(jnp.zeros, (pages, PAGE, latents.shape[-1]), model.dtype)
    pools = tuple(filled(empty(), entries.astype(model.dtype)) for entries in latents)
    most, none = settings.max_new_tokens, jnp.zeros(rows, jnp.int32)
    return State(
        cache=LatentCache(pools, jnp.asarray(batch.table)),
        length=none + prompts.shape[1] - 1,
        feed=jnp.asarray(prompts[:, -1:], jnp.int32),
        tokens=jnp.zeros((rows, most), jnp.int32),
        logprobs=jnp.zeros((rows, most), jnp.float32),
        count=none,
        done=jnp.zeros(rows, bool),
        seen=None,
        drafted=none,
        accepted=none,
        key=jax.random.key(0),
        rows=none,
    )


def decode_contexts(args: argparse.Namespace, config: DecoderConfig, params: Any) -> list[dict[str, Any]]:
    """Milliseconds for a token of every row behind each context: absorbed, expanded, and transformers."""
    model, settings = Decoder(config, jnp.dtype(args.dtype)), GenerationSettings(args.tokens, page_size=PAGE)
    cast = cast_matrices(params, model.dtype)
    peer = transformers_model(config, params, args.dtype)
    rng, results = np.random.default_rng(2), []
    width = config.kv_lora_rank + config.qk_rope_head_dim
    for context in args.contexts:
        prompts = rng.integers(0, config.vocab_size, (args.rows, context))
        shape = (config.num_hidden_layers, args.rows, context - 1, width)
        latents = jax.random.normal(jax.random.key(context), shape, model.dtype)
        state = primed(model, settings, prompts, latents)
        absorbed = jax.jit(lambda state: run_rounds(model, settings, cast, state, args.tokens).tokens)
        expanded = jax.jit(lambda state: run_rounds(model, settings, cast, state, args.tokens).logprobs)
        expand = mock.patch.object(attention, "latent_attention", latent_attention_reference)

        def naive(expanded: Callable = expanded, expand: Any = expand, state: State = state) -> jax.Array:
            with expand:  # seen when the program is traced, at the first call
                return expanded(state)

        runs = {"absorbed": partial(absorbed, state), "expanded": naive}
        tokens = np.asarray(absorbed(state))
        if peer is not None:
            cache = transformers_cache(peer, config, latents)
            runs["transformers"] = lambda prompts=prompts, cache=cache: transformers_tokens(peer, prompts, cache, args)
            threads = faster_threads(runs["transformers"])
            same = float((runs["transformers"]() == tokens).all(1).mean())
        seconds = median_seconds(runs, args.repeats)
        row = {"context": context, "ms_per_token": {k: 1e3 * s / args.tokens for k, s in seconds.items()}}
        row["times_faster_than_expanded"] = seconds["expanded"] / seconds["absorbed"]
        row["cache_tb_per_s"] = latents.nbytes * args.tokens / seconds["absorbed"] / 1e12
        if peer is not None:
            row["torch_threads"] = threads
            row |= {
                "times_faster_than_transformers": seconds["transformers"] / seconds["absorbed"],
                "rows_with_the_same_tokens": same,
            }
        results.append(row)
    return results


def faster_threads(run: Callable[[], Any]) -> int:
    """Leaves torch with one thread or as many as it would take itself, whichever is faster here."""
    import torch

    found = {}
    for threads in (os.cpu_count() or 1, 1):
        torch.set_num_threads(threads)
        found[threads] = median_seconds({"run": run}, 1)["run"]
    torch.set_num_threads(min(found, key=found.get))
    return torch.get_num_threads()


def transformers_model(config: DecoderConfig, params: Any, dtype: str) -> Any:
    """The same weights in transformers, or None where it or torch is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    plain = {name: part for name, part in params.items() if name != "mtp"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_params(path, replace(config, num_nextn_predict_layers=0), plain, dtype=dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    return model.to("cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu")


def transformers_cache(model: Any, config: DecoderConfig, latents: jax.Array) -> Any:
    """A cache of transformers with the same latents and rotary keys, or what its older versions expand them to."""
    import torch
    import transformers

    cache = transformers.DynamicCache(config=model.config)
    for layer, entries in enumerate(latents):
        both = torch.tensor(np.asarray(entries, np.float32)[:, None]).to(model.device, model.dtype)
        latent, rotary = both.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        part = model.model.layers[layer].self_attn
        if not hasattr(part, "expand_kv"):
            with torch.no_grad():
                heads = part.kv_b_proj(latent[:, 0]).unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
            keys, latent_or_values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
            latent, rotary = torch.cat([keys, rotary.expand(*keys.shape[:-1], -1)], -1), latent_or_values
        cache.update(latent.contiguous(), rotary.contiguous(), layer)
    return cache


def transformers_tokens(model: Any, prompts: np.ndarray, cache: Any, args: argparse.Namespace) -> np.ndarray:
    """What `generate` goes on with."""
    import torch

    ids = torch.tensor(prompts, device=model.device)
    again = copy.copy(cache)  # its arrays are replaced, not written to, so that no array has to be copied in this time
    again.layers = [copy.copy(layer) for layer in cache.layers]
    told = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=again, **told)
    return found[:, prompts.shape[1] :].cpu().numpy()


def speculation(args: argparse.Namespace, config: DecoderConfig, params: Any) -> list[dict[str, Any]]:
    """Time of whole answers with and without speculation, and how often MTP was right."""
    settings = GenerationSettings(max_new_tokens=args.answer, page_size=PAGE)
    prompts = np.random.default_rng(3).integers(0, config.vocab_size, (args.batch, 16))
    results = []
    for name, weights in (("random", params), ("learned", learned_params(config, params, args.steps))):
        generator, faster = Generator(config, weights, dtype=jnp.dtype(args.dtype)), replace(settings, speculate=True)
        plain, two = generator.generate(prompts, settings), generator.generate(prompts, faster)
        seconds = median_seconds(
            {
                "plain": lambda generator=generator: generator.generate(prompts, settings),
                "speculative": lambda generator=generator, faster=faster: generator.generate(prompts, faster),
            },
            args.repeats,
        )
        results.append(
            {
                "weights": name,
                "acceptance": two.acceptance,
                "same_tokens": bool((plain.tokens == two.tokens).all()),
                "tokens_per_second": {k: args.batch * args.answer / s for k, s in seconds.items()},
                "times_faster": seconds["plain"] / seconds["speculative"],
            }
        )
    return results


def table(report: dict[str, Any]) -> str:
    """Both results in Markdown."""
    lines = [
        "| context | absorbed, ms a token | expanded is | transformers is | same tokens |",
        "|---|---|---|---|---|",
    ]
    for row in report["contexts"]:
        peer, same = row.get("times_faster_than_transformers"), row.get("rows_with_the_same_tokens")
        told = ("not installed", "") if peer is None else (f"{peer:.1f} x slower", f"{same:.0%} of the rows")
        lines.append(
            f"| {row['context']:,} | {row['ms_per_token']['absorbed']:.2f} | "
            f"{row['times_faster_than_expanded']:.1f} x slower | {told[0]} | {told[1]} |"
        )
    if report["speculation"]:
        lines += ["", "| weights | MTP right | plain, tokens/s | speculative | same tokens |", "|---|---|---|---|---|"]
    for row in report["speculation"]:
        lines.append(
            f"| {row['weights']} | {row['acceptance']:.0%} | {row['tokens_per_second']['plain']:,.0f} | "
            f"{row['times_faster']:.2f} x as fast | {'yes' if row['same_tokens'] else 'no'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--latent", type=int, default=128, help="width of the latent of keys and values")
    parser.add_argument("--head", type=int, default=64, help="width of a head without its rotary part")
    parser.add_argument("--rows", type=int, default=1, help="prompts behind a context")
    parser.add_argument("--tokens", type=int, default=8, help="tokens decoded behind a context")
    parser.add_argument("--answer", type=int, default=96, help="tokens of an answer, for speculation; 0 leaves it out")
    parser.add_argument("--batch", type=int, default=8, help="prompts at a time, for speculation")
    parser.add_argument("--steps", type=int, default=100, help="training steps of the learned weights")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    began = time.perf_counter()
    config = config_of(args)
    params = random_params(config)
    results = {"contexts": decode_contexts(args, config, params)}
    results["speculation"] = speculation(args, config, params) if args.answer else []
    result = jax_environment(argparse.Namespace(**vars(args), overrides=[]))
    del result["arguments"]["overrides"]
    for package in ("torch", "transformers"):
        try:
            result["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            result["versions"][package] = None
    result |= {"seconds": time.perf_counter() - began} | results
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
