"""Cases of h100.py that JAX runs: each is checked against fp32, then timed. A child process of h100.py calls it."""

import functools
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.h100_case import BF16, SCALES, Case, Sizes, differ, normal, seconds
from benchmarks.h100_experts import experts_case, grouped_cases, tiling_cases
from r1jax.ops import attention, linear_cross_entropy

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


# --- linear layer and cross-entropy ---------------------------------------------------------------------------------


def loss_case(
    s: Sizes,
    seed: int,
    chunk: int | None = None,
    smoothing: float = 0.1,
    reference: str | None = None,
    options: dict[str, Any] | None = None,
) -> Case:
    """Value and both gradients, with something subtracted from logits and options of XLA."""
    hidden = normal(seed, s.batch, s.tokens // s.batch, s.width)
    weight = normal(seed + 1, s.vocabulary, s.width, dtype=jnp.float32) * s.width**-0.5
    labels = jax.random.randint(jax.random.key(seed), hidden.shape[:2], 0, s.vocabulary)
    weights = jnp.ones(hidden.shape[:2], jnp.float32)

    def run(hidden, weight):
        return linear_cross_entropy.linear_cross_entropy(hidden, weight, labels, weights, smoothing, 1e-4, chunk)

    with mock.patch.object(linear_cross_entropy, "REFERENCE", reference):
        lowered = jax.jit(jax.value_and_grad(run, (0, 1))).lower(hidden, weight)
    compiled = lowered.compile(options)
    value, (to_hidden, to_weight) = compiled(hidden, weight)
    few = 8
    rows = jnp.concatenate([labels[0, :few], jnp.arange(few)])

    @jax.jit
    def exactly(hidden, weight, labels):
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
        expected = exactly(hidden, weight, labels)
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


def chunk_case(s: Sizes, seed: int, what: str) -> Case:
    """What is done with the logits of 2048 tokens, one after another."""
    tokens = min(linear_cross_entropy.CHUNK_ON_GPU, s.tokens)
    flops = 2 * tokens * s.width * s.vocabulary
    hidden, weight = normal(seed, 1, tokens, s.width), normal(seed + 1, s.vocabulary, s.width)
    part = linear_cross_entropy.Part(s.vocabulary)
    if what == "logits":
        return Case(flops, functools.partial(jax.jit(linear_cross_entropy._logits), hidden, weight), None)
    slope = normal(seed + 2, 1, tokens, s.vocabulary)
    if what == "powers":
        logits, reference = slope.astype(jnp.float32), jnp.zeros((1, tokens), jnp.float32)
        run = jax.jit(lambda logits, reference: linear_cross_entropy._powers_from(logits, reference, part, BF16))
        return Case(0, functools.partial(run, logits, reference), None, 6 * logits.size)
    if what == "states":
        into = jax.jit(functools.partial(jnp.einsum, "btV,VD->btD", preferred_element_type=jnp.float32))
        return Case(flops, functools.partial(into, slope, weight), None)
    held = [jnp.zeros((s.vocabulary, s.width), jnp.float32)]

    @functools.partial(jax.jit, donate_argnums=0)
    def add(to_weight, slope, hidden):
        return to_weight + jnp.einsum("btV,btD->VD", slope, hidden, preferred_element_type=jnp.float32)

    def once() -> jax.Array:
        held[0] = add(held[0], slope, hidden)
        return held[0]

    return Case(flops, once, None)


# --- the list -------------------------------------------------------------------------------------------------------


def cases() -> dict[str, Callable[[Sizes, int], Case]]:
    """Makers by name."""
    found = {"ceiling matmul": square_matmul, "ceiling copy": copy} | grouped_cases() | attention_cases()
    found["loss products alone"] = three_products
    found["loss ours"] = loss_case
    ways: dict[str, dict[str, Any]] = {
        "normaliser": {"reference": "normaliser"},
        "highest": {"reference": "highest"},
        "chunk 4096": {"chunk": 4096},
        "products of cuBLAS": {"options": {"xla_gpu_enable_triton_gemm": False}},
    }
    found |= {f"loss-way {name}": functools.partial(loss_case, **arguments) for name, arguments in ways.items()}
    for what in ("logits", "powers", "states", "weight"):
        found[f"chunk of the loss, {what}"] = functools.partial(chunk_case, what=what)
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
