"""Cases of h100.py that PyTorch runs, the peers of h100_kernels.py at the same sizes. A child of h100.py calls it."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.h100_case import SCALES, Sizes
from benchmarks.h100_experts import Routed, routed

Run = Callable[[], Any]
Maker = Callable[[Sizes], tuple[float, Run, float | None]]
"""Useful operations, what to time, and the error found."""


def normal(*shape: int, gradient: bool = False):
    import torch

    x = torch.randn(shape, device="cuda", dtype=torch.float32).to(torch.bfloat16)
    return x.requires_grad_(gradient)


def differ(found, expected) -> float:
    distance = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
    return distance if math.isfinite(distance) else math.inf


def square_matmul(s: Sizes) -> tuple[float, Run, None]:
    a, b = normal(s.square, s.square), normal(s.square, s.square)
    return 2 * s.square**3, lambda: a @ b, None


def attention(s: Sizes, *, backend: str, backward: bool, key: int, value: int) -> tuple[float, Run, float]:
    """Causal; forward and backward are counted as in h100_kernels."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    shape = (s.batch, s.length, s.heads)
    # Made [B, T, N, H], as a projection leaves them.
    q, k, v = (normal(*shape, width).transpose(1, 2).requires_grad_(backward) for width in (key, key, value))
    pull = normal(*shape, value).transpose(1, 2)
    kind = getattr(SDPBackend, backend)

    def forward():
        with sdpa_kernel(kind):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    def both():
        return torch.autograd.grad(forward(), (q, k, v), pull)

    few = [x[-1:, :2].detach().float() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        expected = scaled_dot_product_attention(*few, is_causal=True)
    error = differ(forward()[-1:, :2].detach(), expected)
    scores = s.batch * s.heads * s.length**2 / 2
    flops = 2 * scores * (key + value + (3 * key + 2 * value if backward else 0))
    return flops, both if backward else forward, error


def grouped(s: Sizes, *, product: str, equal: bool) -> tuple[float, Run, float]:
    """torch's grouped products, on groups that are padded as ours are."""
    import torch

    groups: Routed = routed(s, equal)
    rows = int(groups.blocks.sum()) * 128
    real = torch.tensor(groups.real[:rows], device="cuda")[:, None]
    x, y = normal(rows, s.inner) * real, normal(rows, s.outer) * real
    w = normal(s.experts, s.outer, s.inner)
    ends = torch.tensor(np.cumsum(groups.blocks * 128), device="cuda", dtype=torch.int32)
    run = {
        "forward": lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=ends),
        "input": lambda: torch._grouped_mm(y, w, offs=ends),
        "weight": lambda: torch._grouped_mm(y.t(), x, offs=ends),
    }[product]
    found, e = run(), int(np.argmax(groups.sizes))
    stop = int(np.cumsum(groups.blocks)[e]) * 128
    part = slice(stop - int(groups.blocks[e]) * 128, stop)
    if product == "weight":
        error = differ(found[e], y[part].float().t() @ x[part].float())
    else:
        a, b = (x, w[e].t()) if product == "forward" else (y, w[e])
        error = differ(found[part], a[part].float() @ b.float())
    return 2 * s.rows * s.inner * s.outer, run, error


def three_products(s: Sizes) -> tuple[float, Run, None]:
    hidden, weight = normal(s.tokens, s.width), normal(s.vocabulary, s.width)
    slope = hidden @ weight.t()
    run = lambda: (hidden @ weight.t(), slope @ weight, slope.t() @ hidden)  # noqa: E731
    return 6 * s.tokens * s.width * s.vocabulary, run, None


CASES: dict[str, Maker] = {"ceiling torch matmul": square_matmul, "loss torch products alone": three_products}
for _backend, _name in (("CUDNN_ATTENTION", "cuDNN"), ("FLASH_ATTENTION", "flash")):
    for _backward, _direction in ((False, "forward"), (True, "both")):
        for _key, _value in ((192, 128), (128, 128)):
            CASES[f"attention-{_direction} torch {_name} {_key}/{_value}"] = functools.partial(
                attention, backend=_backend, backward=_backward, key=_key, value=_value
            )
for _product in ("forward", "input", "weight"):
    for _equal in (False, True):
        CASES[f"grouped-{_product} torch{', equal' if _equal else ''}"] = functools.partial(
            grouped, product=_product, equal=_equal
        )


def measure(name: str, scale: str, samples: int) -> dict[str, Any]:
    """Checks and times one case with events of the device."""
    import torch

    began = time.perf_counter()
    flops, run, error = CASES[name](SCALES[scale])
    ready = time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    taken, calls = [], 1
    for sample in range(-2, samples):
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        each = start.elapsed_time(end) / calls
        if sample < 0:
            calls = max(1, math.ceil(10 / each))
        else:
            taken.append(each)
    low, middle, high = np.quantile(taken, [0.25, 0.5, 0.75])
    torch.cuda.empty_cache()
    return {
        "name": name,
        "ms": float(middle),
        "iqr_ms": float(high - low),
        "error": error,
        "preparing_s": ready,
        "tflops": flops / middle / 1e9,
    }
