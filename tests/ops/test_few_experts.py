"""Routed experts of a few tokens against float64, by the kernels in JAX's own arithmetic and by copies of weights."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops import few_experts as module
from r1jax.ops import self_test
from r1jax.ops.few_experts import few_experts, few_experts_reference, takes_few_experts
from r1jax.ops.few_experts_kernel import fits, tile_of

RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return jnp.asarray(RNG.standard_normal(shape) * scale, jnp.float32)


@pytest.mark.parametrize("mix", [functools.partial(few_experts, interpret=True), few_experts_reference])
def test_each_choice_meets_its_expert_and_others_are_not_read(mix):
    x, added = normal(3, 128), normal(3, 128)
    gate_up, down = normal(5, 2 * 192, 128, scale=0.1), normal(5, 128, 192, scale=0.1)
    experts, shares = jnp.asarray([[4, 0], [1, 4], [0, 1]], jnp.int32), jnp.abs(normal(3, 2))
    assert fits(2, gate_up, down)
    want = np.array(added, np.float64)
    for t, (row, weights) in enumerate(zip(experts, np.float64(shares), strict=True)):
        for expert, share in zip(row, weights, strict=True):
            gate, up = np.split(np.float64(gate_up[expert]) @ np.float64(x[t]), 2)
            want[t] += share * np.float64(down[expert]) @ (gate / (1 + np.exp(-gate)) * up)
    unread = [w.at[2:4].set(jnp.nan) for w in (gate_up, down)]
    np.testing.assert_allclose(mix(x, experts, shares, *unread, added), want, rtol=0, atol=2e-5)


def test_tiles_are_as_large_for_narrow_experts():
    assert tile_of(2048, 2) == (2, 1024) and tile_of(1408, 6) == (8, 128) and tile_of(1408, 1) == (32, 128)
    assert fits(6, jnp.zeros((1, 2816, 2048), jnp.bfloat16), jnp.zeros((1, 2048, 1408), jnp.bfloat16))
    assert not fits(2, normal(2, 96, 32), normal(2, 32, 48))


def test_kernels_are_for_few_choices_and_floats_and_are_tried_first(monkeypatch):
    gate_up, down = (jnp.zeros(shape, jnp.bfloat16) for shape in ((4, 256, 128), (4, 128, 128)))
    assert not takes_few_experts(1, 2, gate_up, down)  # a CPU has no Triton
    monkeypatch.setattr(module, "takes_triton", lambda: True)
    monkeypatch.setattr(module, "few_experts", functools.partial(few_experts, interpret=True))
    module._kernels_agree.cache_clear()
    assert takes_few_experts(1, 2, gate_up, down) and takes_few_experts(module.CHOICES // 2, 2, gate_up, down)
    assert not takes_few_experts(module.CHOICES // 2 + 1, 2, gate_up, down)
    assert not takes_few_experts(1, 2, gate_up.astype(jnp.float32), down)
    module._kernels_agree.cache_clear()


def test_triton_is_taken_on_one_gpu_of_one_line_of_releases(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for platform, version, taken in (("gpu", (0, 11, 2), True), ("gpu", (0, 12, 0), False), ("cpu", (0, 11, 2), False)):
        monkeypatch.setattr(self_test, "target", lambda platform=platform: SimpleNamespace(platform=platform))
        monkeypatch.setattr(jax, "__version_info__", version)
        assert self_test.takes_triton() == taken
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert not self_test.takes_triton()
