"""Products of experts in rounded numbers, block by block against single products, and what they hold at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.ops.grouped_matmul import plan_dispatch, scatter_rows
from r1jax.ops.grouped_quantized_dot import grouped_quantized_dot
from r1jax.ops.quantize import dequantize, quantize
from r1jax.ops.quantized_dot import Scheme, quantized_dot, weight_codes

RNG = np.random.default_rng(0)
INT8 = Scheme("int8", "int8")


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("scheme", [INT8, Scheme("int4", "int8", block=8), Scheme("fp8", "fp8")], ids=str)
def test_grouped_products_are_those_of_each_group(scheme):
    x, w = normal(10, 16), normal(4, 6, 16)
    plan = plan_dispatch(jnp.asarray(RNG.integers(0, 3, (10, 1)), jnp.int32), 4, block=4)
    rows = scatter_rows(x, plan)
    owner = np.minimum(np.asarray(plan.block_expert), 3)
    single = jax.jit(functools.partial(quantized_dot, scheme=scheme))
    grouped = jax.jit(functools.partial(grouped_quantized_dot, scheme=scheme))
    for weight in (w, weight_codes(w, scheme)):
        y = grouped(rows, weight, plan.block_expert)
        for i, expert in enumerate(owner):
            one = jax.tree.map(lambda part, expert=expert: part[expert], weight)
            alone = single(rows[4 * i : 4 * i + 4], one)
            np.testing.assert_allclose(y[4 * i : 4 * i + 4], alone, rtol=1e-6, atol=1e-6)
    to_w = jax.jit(jax.grad(lambda w: jnp.sum(grouped(rows, w, plan.block_expert) ** 2)))(w)
    assert not np.asarray(to_w[3]).any() and np.asarray(to_w[owner[0]]).any()


@pytest.mark.parametrize("gradients", [None, "int8"])
def test_grouped_products_of_many_blocks_need_few_matrices_at_once(gradients):
    scheme, key = Scheme("int8", "int8", gradients=gradients), jax.random.key(0) if gradients else None
    owner = jnp.asarray(RNG.integers(0, 3, 150), jnp.int32)  # no multiple of what is computed together
    x, w, g = normal(300, 64), normal(3, 32, 64), normal(300, 32)

    def slope(x, w):
        return jax.grad(lambda x, w: jnp.sum(grouped_quantized_dot(x, w, owner, scheme, key=key) * g), argnums=(0, 1))(
            x, w
        )

    run = jax.jit(slope).lower(x, w).compile()
    assert run.memory_analysis().temp_size_in_bytes < 150 * 32 * 64 * 4 / 2
    by_block = g.reshape(150, 2, 32)
    to_x = jnp.einsum("brO,bOI->brI", by_block, dequantize(weight_codes(w, scheme))[owner]).reshape(300, 64)
    to_w = (
        jnp.zeros(w.shape)
        .at[owner]
        .add(jnp.einsum("brO,brI->bOI", by_block, dequantize(quantize(x, "int8")).reshape(150, 2, 64)))
    )
    for found, exact in zip(run(x, w), (to_x, to_w), strict=True):
        error = jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)
        assert (0.001 < error < 0.03) if gradients else error < 1e-6
