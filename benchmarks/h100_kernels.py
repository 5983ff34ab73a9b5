"""Cases of h100.py that JAX runs: each is checked against fp32, then timed. A child process of h100.py calls it."""

import functools
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from r1jax.models.moe import _swiglu
from r1jax.ops import attention, grouped_matmul, grouped_matmul_hopper, linear_cross_entropy

BF16 = jnp.bfloat16


class Sizes(NamedTuple):
    """Shapes of all cases."""

    square: int
    copied: int
    batch: int
    length: int
    heads: int
    key: int
    value: int
    rows: int
    experts: int
    inner: int
    outer: int
    tokens: int
    width: int
    vocabulary: int


SCALES = {
    "full": Sizes(8192, 2**31, 4, 4096, 16, 192, 128, 65536, 64, 2048, 1408, 32768, 2560, 128256),
    "tiny": Sizes(256, 2**20, 1, 256, 2, 24, 16, 512, 4, 128, 192, 64, 32, 512),
}


class Case(NamedTuple):
    """Something to time."""

    flops: float
    """Useful ones; 0 where bytes count."""
    run: Callable[[], Any]
    error: float | None
    """Largest relative error ||out - reference|| / ||reference|| of what was checked; None where nothing is."""
    moved: float = 0.0
    """Bytes read and written, where those count."""
    extra: int = 0
    """Bytes of temporaries and results of the compiled program."""


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def normal(seed: int, *shape: int, dtype: Any = BF16) -> jax.Array:
    return _draw(jax.random.key(seed), shape, dtype)


def differ(found: Any, expected: Any) -> float:
    """Relative distance of two arrays; NaN is infinite."""
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    return float(distance) if np.isfinite(distance) else math.inf


def seconds(run: Callable[[], Any], samples: int, least: float = 0.01) -> tuple[float, float]:
    """Median and interquartile range of the time of a call; a sample is as many calls as take `least` seconds."""
    jax.block_until_ready(run())
    began = time.perf_counter()
    jax.block_until_ready(run())
    calls = max(1, math.ceil(least / (time.perf_counter() - began)))
    taken = []
    for _ in range(samples):
        began = time.perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        taken.append((time.perf_counter() - began) / calls)
    low, middle, high = np.quantile(taken, [0.25, 0.5, 0.75])
    return float(middle), float(high - low)


# --- ceilings -------------------------------------------------------------------------------------------------------


def square_matmul(s: Sizes, seed: int) -> Case:
    a, b = normal(seed, s.square, s.square), normal(seed + 1, s.square, s.square)
    return Case(2 * s.square**3, functools.partial(jax.jit(jnp.matmul), a, b), None)


def copy(s: Sizes, seed: int) -> Case:
    x = normal(seed, s.copied // 2)
    return Case(0, functools.partial(jax.jit(jnp.negative), x), None, 2 * s.copied)


# --- attention ------------------------------------------------------------------------------------------------------


def attention_inputs(s: Sizes, seed: int, key: int, value: int) -> tuple[jax.Array, ...]:
    shape = (s.batch, s.length, s.heads)
    return tuple(normal(seed + i, *shape, width) for i, width in enumerate((key, key, value, value)))


def attention_case(
    s: Sizes,
    seed: int,
    attend: Callable[..., jax.Array],
    *,
    key: int | None = None,
    value: int | None = None,
    causal: bool = True,
    backward: bool = False,
    valid: Callable[[Sizes], np.ndarray] | None = None,
) -> Case:
    """Attention at full size, checked in one case and two heads against fp32.

    The backward pass has five products where the forward has two: with unequal widths (3 key + 2 value) to (key +
    value). A case with `backward` times forward and backward and counts both.
    """
    key, value = key or s.key, value or s.value
    q, k, v, pull = attention_inputs(s, seed, key, value)
    mask = None if valid is None else jnp.asarray(valid(s))
    run = functools.partial(attend, scale=key**-0.5, causal=causal, valid=mask)

    @jax.jit
    def forward(q, k, v):
        return run(q, k, v)

    @jax.jit
    def both(q, k, v, pull):
        out, back = jax.vjp(run, q, k, v)
        return out, *back(pull)

    def reference(q, k, v, pull):
        few = [x[-1:, :, :2].astype(jnp.float32) for x in (q, k, v, pull)]
        plain = functools.partial(
            attention.dot_product_attention_reference,
            scale=key**-0.5,
            causal=causal,
            valid=None if mask is None else mask[-1:],
        )
        with jax.default_matmul_precision("highest"):
            out, back = jax.vjp(plain, *few[:3])
            return out, *back(few[3])

    if mask is not None:  # nobody reads what does not exist, and nothing comes back from there
        pull = jnp.where(mask[:, :, None, None], pull, 0)
    seen = 1 if mask is None else mask[-1:, :, None, None].astype(jnp.float32)
    expected = jax.jit(reference)(q, k, v, pull)
    found = both(q, k, v, pull) if backward else (forward(q, k, v),)
    error = max(
        differ(a[-1:, :, :2] * seen, b * seen) if i == 0 else differ(a[-1:, :, :2], b)
        for i, (a, b) in enumerate(zip(found, expected, strict=False))
    )
    scores = s.batch * s.heads * s.length**2 / (2 if causal else 1)
    flops = 2 * scores * (key + value + (3 * key + 2 * value if backward else 0))
    return Case(
        flops, functools.partial(both, q, k, v, pull) if backward else functools.partial(forward, q, k, v), error
    )


def cudnn(
    q, k, v, *, scale: float, causal: bool, valid=None, layout: str = "BTNH", padding: bool = False, lengths=None
):
    """cuDNN through JAX's private call."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    kind = {
        (False, False): MaskType.NO_MASK,
        (True, False): MaskType.CAUSAL,
        (False, True): MaskType.PADDING,
        (True, True): MaskType.PADDING_CAUSAL,
    }[causal, padding]
    if padding and lengths is None:
        lengths = jnp.full(q.shape[0], q.shape[1], jnp.int32)
    sizes = {"q_seqlen": lengths, "kv_seqlen": lengths} if padding else {}
    return dot_product_attention(q, k, v, scale=scale, mask_type=kind, qkv_layout=layout, **sizes)


def cudnn_padded_value(q, k, v, *, scale: float, causal: bool, valid=None):
    """Values padded to the keys' width."""
    more = q.shape[-1] - v.shape[-1]
    wide = cudnn(q, k, jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, more))), scale=scale, causal=causal)
    return wide[..., : v.shape[-1]]


def cudnn_extra_column(q, k, v, *, scale: float, causal: bool, valid):
    """Keys that do not exist are pushed away by eight more columns of queries and keys."""
    away = jnp.where(valid, 0, -30000.0).astype(q.dtype)[:, :, None, None]
    shape = (*q.shape[:3], 8)
    first = jnp.arange(8) == 0
    q = jnp.concatenate([q, jnp.broadcast_to(jnp.where(first, 1, 0).astype(q.dtype), shape)], axis=-1)
    k = jnp.concatenate([k, jnp.broadcast_to(jnp.where(first, away, 0), shape)], axis=-1)
    return cudnn(q, k, v, scale=scale, causal=causal)


def cudnn_compacted(q, k, v, *, scale: float, causal: bool, valid):
    """Tokens that exist go to the front, in order, and results back."""
    order = jnp.argsort(~valid, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    lengths = jnp.maximum(jnp.sum(valid, axis=1, dtype=jnp.int32), 1)
    take = lambda x, index: jnp.take_along_axis(x, index[:, :, None, None], axis=1)  # noqa: E731
    q, k, v = (take(x, order) for x in (q, k, v))
    return take(cudnn(q, k, v, scale=scale, causal=causal, padding=True, lengths=lengths), back)


def holes(s: Sizes) -> np.ndarray:
    """A tenth of the places does not exist: some in front, some in the middle, some behind."""
    valid = np.ones((s.batch, s.length), bool)
    for start in (0, s.length // 2, s.length - s.length // 30):
        valid[:, start : start + s.length // 30] = False
    return valid


# --- grouped products -----------------------------------------------------------------------------------------------


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


# --- linear layer and cross-entropy ---------------------------------------------------------------------------------


def loss_case(s: Sizes, seed: int, chunk: int | None = None, smoothing: float = 0.1) -> Case:
    """Value and both gradients."""
    hidden = normal(seed, s.batch, s.tokens // s.batch, s.width)
    weight = normal(seed + 1, s.vocabulary, s.width, dtype=jnp.float32) * s.width**-0.5
    labels = jax.random.randint(jax.random.key(seed), hidden.shape[:2], 0, s.vocabulary)
    weights = jnp.ones(hidden.shape[:2], jnp.float32)

    def run(hidden, weight):
        return linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, weights, smoothing, 1e-4, chunk)

    compiled = jax.jit(jax.value_and_grad(run, (0, 1))).lower(hidden, weight).compile()
    value, (to_hidden, to_weight) = compiled(hidden, weight)
    few = 8
    rows = jnp.concatenate([labels[0, :few], jnp.arange(few)])

    @jax.jit
    def reference(hidden, weight, labels):
        exact = weight.astype(BF16).astype(jnp.float32)

        def normaliser(part):
            return jax.nn.logsumexp(part.astype(jnp.float32) @ exact.T, axis=-1)

        flat, right = hidden.reshape(-1, s.width), labels.reshape(-1)
        z = jax.lax.map(normaliser, flat.reshape(-1, min(512, s.tokens), s.width)).reshape(-1)
        flat = flat.astype(jnp.float32)

        def slope(logits, z, hits):
            target = (1 - smoothing) * hits + smoothing / s.vocabulary
            return jnp.exp(logits - z[:, None]) * (1 + 2e-4 * z)[:, None] - target

        some = slope(flat @ exact[rows].T, z, right[:, None] == rows[None])
        first = slope(flat[:few] @ exact.T, z[:few], jax.nn.one_hot(right[:few], s.vocabulary))
        label = jnp.sum(flat * exact[right], axis=-1)
        mean = flat @ jnp.mean(exact, axis=0)
        return jnp.sum(z - (1 - smoothing) * label - smoothing * mean + 1e-4 * z**2), first @ exact, some.T @ flat

    with jax.default_matmul_precision("highest"):
        expected = reference(hidden, weight, labels)
    assert abs(float(value - expected[0])) < 1e-4 * float(expected[0]), (value, expected[0])
    error = max(differ(to_hidden[0, :few], expected[1]), differ(to_weight[rows], expected[2]))
    del to_hidden, to_weight
    analysis = compiled.memory_analysis()
    extra = analysis.temp_size_in_bytes
    return Case(6 * s.tokens * s.width * s.vocabulary, functools.partial(compiled, hidden, weight), error, extra=extra)


def three_products(s: Sizes, seed: int) -> Case:
    """The products alone, with the result of the first in bf16."""
    hidden, weight = normal(seed, s.tokens, s.width), normal(seed + 1, s.vocabulary, s.width)
    first = jax.jit(lambda h, w: h @ w.T)
    second, third = jax.jit(jnp.matmul), jax.jit(lambda g, h: g.T @ h)
    slope = first(hidden, weight)

    def run() -> tuple[jax.Array, ...]:
        return first(hidden, weight), second(slope, weight), third(slope, hidden)

    return Case(6 * s.tokens * s.width * s.vocabulary, run, None)


# --- the list -------------------------------------------------------------------------------------------------------


def cases() -> dict[str, Callable[[Sizes, int], Case]]:
    """Makers by name."""
    found = {"ceiling matmul": square_matmul, "ceiling copy": copy} | grouped_cases() | attention_cases()
    found["loss products alone"] = three_products
    found["loss ours"] = loss_case
    found |= {f"loss-way chunk {n}": functools.partial(loss_case, chunk=n) for n in (2048, 4096)}
    found["experts ours, both"] = experts_case
    return found | tiling_cases()


def attention_cases() -> dict[str, Callable[[Sizes, int], Case]]:
    narrow = {"key": 128, "value": 128}
    ours = attention.dot_product_attention
    own: dict[str, dict[str, Any]] = {
        "causal": {"attend": ours},
        "causal, holes": {"attend": ours, "valid": holes},
        "bidirectional 128/128": {"attend": ours, "causal": False, **narrow},
    }
    kinds: dict[str, dict[str, Any]] = {
        "causal": {"attend": cudnn},
        "causal, lengths": {"attend": functools.partial(cudnn, padding=True)},
        "causal, value padded": {"attend": cudnn_padded_value},
        "causal, holes by a column": {"attend": cudnn_extra_column, "valid": holes},
        "causal, holes by order": {"attend": cudnn_compacted, "valid": holes},
        "causal 128/128": {"attend": cudnn, **narrow},
        "bidirectional 128/128": {"attend": cudnn, "causal": False, **narrow},
    }
    found = {
        f"attention-both ours {name}": functools.partial(attention_case, backward=True, **arguments)
        for name, arguments in own.items()
    }
    return found | {
        f"attention-{direction} cuDNN {name}": functools.partial(
            attention_case, backward=direction == "both", **arguments
        )
        for direction in ("forward", "both")
        for name, arguments in kinds.items()
        if direction == "both" or "holes" not in name and "padded" not in name
    }


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


def measure(name: str, scale: str, samples: int) -> dict[str, Any]:
    """Checks and times one case."""
    if jax.default_backend() == "cpu" and name.startswith(("grouped", "tiling")):  # to check the way, not to time it
        plgpu.set_gpu_interpret_mode()
    found, s = cases(), SCALES[scale]
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a kernel that is not used is no result
        case = found[name](s, seed=list(found).index(name) * 10)
    ready = time.perf_counter() - began
    median, spread = seconds(case.run, samples)
    row = {"name": name, "ms": 1e3 * median, "iqr_ms": 1e3 * spread, "error": case.error, "preparing_s": ready}
    if case.flops:
        row["tflops"] = case.flops / median / 1e12
    if case.moved:
        row["tb_per_s"] = case.moved / median / 1e12
    if case.extra:
        row["extra_gib"] = case.extra / 2**30
    return row
