"""Products of routed experts on one GPU: cases of h100.py, whose groups are as random routing makes them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.h100_case import Case, Sizes, differ, normal
from r1jax.models.moe import _swiglu
from r1jax.ops import grouped_matmul, grouped_matmul_hopper


class Routed(NamedTuple):
    """Rows of experts in a buffer of blocks."""

    sizes: np.ndarray
    """Rows of each expert."""
    block_expert: np.ndarray
    """E for a block after the last group."""
    blocks: np.ndarray
    """Of each expert."""
    real: np.ndarray
    """Whether a buffer row is a row of an expert."""


def routed(s: Sizes, equal: bool) -> Routed:
    """Sizes of groups as random routing makes them, with one expert left empty and one with a single row."""
    rng = np.random.default_rng(0)
    sizes = np.full(s.experts, s.rows // s.experts)
    if not equal:
        sizes = rng.multinomial(s.rows - 1, np.append(rng.dirichlet(np.full(s.experts - 2, 30.0)), [0, 0]))
        sizes[-1] = 1
        sizes = sizes[rng.permutation(s.experts)]
    blocks = -(-sizes // 128)
    total = s.rows // 128 if equal else s.rows // 128 + s.experts
    experts = np.repeat(np.arange(s.experts), blocks)
    block_expert = np.concatenate([experts, np.full(total - len(experts), s.experts)])
    real = np.zeros(total * 128, bool)
    for start, size in zip(np.cumsum(blocks) - blocks, sizes, strict=True):
        real[start * 128 : start * 128 + size] = True
    return Routed(sizes, block_expert.astype(np.int32), blocks, real)


def buffer(seed: int, groups: Routed, width: int) -> jax.Array:
    """Random rows, zero where a buffer row is empty."""
    return jnp.where(jnp.asarray(groups.real)[:, None], normal(seed, len(groups.real), width), 0)


def grouped_case(s: Sizes, seed: int, product: str, run: Callable[..., jax.Array], *, equal: bool = False) -> Case:
    """One of `forward`, `input` (gradient) and `weight` (gradient).

    `run` gets (x [P, inner], w [E, outer, inner], groups), (y [P, outer], w, groups) or (y, x, groups).
    """
    groups = routed(s, equal)
    x, y = buffer(seed, groups, s.inner), buffer(seed + 1, groups, s.outer)
    w = normal(seed + 2, s.experts, s.outer, s.inner)
    arrays = {"forward": (x, w), "input": (y, w), "weight": (y, x)}[product]
    call = jax.jit(lambda a, b: run(a, b, groups))
    found = call(*arrays)
    error = 0.0
    starts = np.cumsum(groups.blocks) - groups.blocks
    with jax.default_matmul_precision("highest"):
        full = [z.astype(jnp.float32) for z in (x, y)]
        # The largest group, the single row or another small one, one without rows, and one in the middle.
        for e in {int(np.argmax(groups.sizes)), *np.argsort(groups.sizes)[:2].tolist(), s.experts // 2}:
            rows = slice(int(starts[e]) * 128, int(starts[e] + groups.blocks[e]) * 128)
            if product == "weight":
                part, expected = found[e], full[1][rows].T @ full[0][rows]
                if not groups.sizes[e]:
                    error = max(error, 0.0 if not np.asarray(part, np.float32).any() else math.inf)
                    continue
            elif not groups.sizes[e]:
                continue
            else:
                weights = w[e].astype(jnp.float32)
                part = found[rows]
                expected = full[0][rows] @ weights.T if product == "forward" else full[1][rows] @ weights
                kept = jnp.asarray(groups.real[rows])[:, None]
                part, expected = part * kept, expected * kept
            error = max(error, differ(part, expected))
    return Case(2 * s.rows * s.inner * s.outer, functools.partial(call, *arrays), error)


def ours(product: str, **tiling: Any) -> Callable[..., jax.Array]:
    """The kernels of r1jax with a tiling."""
    cut = grouped_matmul_hopper.Tiling(**tiling)

    def run(a: jax.Array, b: jax.Array, groups: Routed) -> jax.Array:
        if product == "weight":
            first = jnp.asarray(np.concatenate([[0], np.cumsum(groups.blocks)]), jnp.int32)
            return grouped_matmul_hopper.blocks_times_blocks(a, b, first, block=128, tiling=cut)
        return grouped_matmul_hopper.blocks_times_weights(
            a, b, jnp.asarray(groups.block_expert), transposed=product == "forward", tiling=cut
        )

    return run


def bundled(product: str, **tiles: int) -> Callable[..., jax.Array]:
    """The kernels that come with JAX; they too read the padded groups."""

    def run(a: jax.Array, b: jax.Array, groups: Routed) -> jax.Array:
        from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
        from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

        sizes = jnp.asarray(groups.blocks * 128, jnp.int32)
        common = {"block_k": 64, "max_concurrent_steps": 4, "group_sizes": sizes} | tiles
        if product == "weight":
            return transposed_ragged_dot(a, b, **common)
        return ragged_dot(a, b, transpose_rhs=product == "forward", **common)

    return run


def dense(product: str) -> Callable[..., jax.Array]:
    """What cuBLAS makes of groups that are all of one size: a batch of products."""

    def run(a: jax.Array, b: jax.Array, groups: Routed) -> jax.Array:
        a = a.reshape(len(groups.sizes), -1, a.shape[-1])
        if product == "weight":
            return jnp.einsum("EpF,EpD->EFD", a, b.reshape(len(groups.sizes), -1, b.shape[-1]))
        out = jnp.einsum("EpD,EFD->EpF" if product == "forward" else "EpF,EFD->EpD", a, b)
        return out.reshape(-1, out.shape[-1])

    return run


def gathered(a: jax.Array, b: jax.Array, groups: Routed) -> jax.Array:
    """Weights copied for each block, as on a CPU."""
    expert = jnp.minimum(jnp.asarray(groups.block_expert), b.shape[0] - 1)
    return grouped_matmul.grouped_matmul(a, b, expert)


def experts_case(s: Sizes, seed: int, choices: int = 4) -> Case:
    """Routed experts as the model calls them, forward and backward, against the same without the kernels."""
    tokens = s.rows // choices
    x, pull = normal(seed, tokens, s.inner), normal(seed + 1, tokens, s.inner)
    gate_up = normal(seed + 2, s.experts, 2 * s.outer, s.inner) * s.inner**-0.5
    down = normal(seed + 3, s.experts, s.inner, s.outer) * s.outer**-0.5
    affinity = normal(seed + 4, tokens, s.experts, dtype=jnp.float32)
    weights, chosen = jax.lax.top_k(jax.nn.sigmoid(affinity), choices)

    def run(x, weights, gate_up, down):
        plan = grouped_matmul.plan_dispatch(chosen, s.experts)
        both = grouped_matmul.grouped_matmul(grouped_matmul.scatter_rows(x, plan), gate_up, plan.block_expert)
        hidden = _swiglu(both, grouped_matmul.scatter_choices(weights, plan))
        return grouped_matmul.sum_rows(grouped_matmul.grouped_matmul(hidden, down, plan.block_expert), plan)

    def both(*arrays):
        out, back = jax.vjp(run, *arrays[:-1])
        return out, *back(arrays[-1])

    arrays = (x, weights, gate_up, down, pull)
    with mock.patch.object(grouped_matmul, "_on_hopper", lambda *_: False):
        expected = jax.jit(lambda *a: both(*a))(*arrays)
    call = jax.jit(lambda *a: both(*a))
    error = max(differ(a, b) for a, b in zip(call(*arrays), expected, strict=True))
    return Case(3 * 2 * s.rows * 3 * s.inner * s.outer, functools.partial(call, *arrays), error)


def grouped_cases() -> dict[str, Callable[[Sizes, int], Case]]:
    found = {}
    for product in ("forward", "input", "weight"):
        make, name = functools.partial(grouped_case, product=product), f"grouped-{product}"
        found[f"{name} ours"] = functools.partial(make, run=ours(product))
        found[f"{name} ours, equal"] = functools.partial(make, run=ours(product), equal=True)
        tiles = {"block_m": 128, "block_n": 128, "grid_block_n": 8}
        found[f"{name} JAX 128 x 128"] = functools.partial(make, run=bundled(product, **tiles))
        found[f"{name} cuBLAS, equal"] = functools.partial(make, run=dense(product), equal=True)
    found["grouped-forward weights gathered"] = functools.partial(grouped_case, product="forward", run=gathered)
    return found


def tiling_cases() -> dict[str, Callable[[Sizes, int], Case]]:
    """Other tilings of our kernels; last, since they are worth the least."""
    found = {}
    for tiling in ({"split_rows": False}, {"columns": 128, "stages": 6}, {"band": 2}, {"stages": 3}):
        for product in ("forward", "input", "weight"):
            name = ", ".join(f"{k} {v}" for k, v in tiling.items())
            found[f"tiling-{product} {name}"] = functools.partial(
                grouped_case, product=product, run=ours(product, **tiling)
            )
    found["tiling-forward columns 176"] = functools.partial(
        grouped_case, product="forward", run=ours("forward", columns=176)
    )
    return found
