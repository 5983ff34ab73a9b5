"""What the JAX cases of h100.py share: their sizes, random arrays, distances and times."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
