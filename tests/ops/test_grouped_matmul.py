"""Dispatch to experts: any routing, in value and gradient, against a loop over tokens and plain indexing."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.ops import grouped_matmul as module
from r1jax.ops.grouped_matmul import (
    grouped_matmul,
    grouped_matmul_reference,
    plan_dispatch,
    scatter_choices,
    scatter_rows,
    sum_rows,
)

SHAPES = [
    (1, 1, 1, 1),
    (3, 2, 4, 4),
    (5, 3, 4, 2),
    (7, 1, 3, 4),
    (9, 2, 8, 3),
    (6, 4, 4, 8),
    (4, 3, 8, 1),
]  # T, K, E, block


@st.composite
def routings(draw):
    """Distinct experts of each token; some experts are often left empty, some get everything."""
    tokens, k, experts, block = draw(st.sampled_from(SHAPES))
    few = draw(st.integers(k, experts))  # only the first few experts are used
    rows = [draw(st.permutations(range(few)))[:k] for _ in range(tokens)]
    return np.array(rows, np.int32), experts, block


def routing(name):
    """Experts [T, K], E, block."""
    rng = np.random.default_rng(0)
    anything = np.stack([rng.permutation(6)[:3] for _ in range(11)])
    return {
        "any": (anything, 6, 4),
        "all to one expert": (np.full((9, 1), 2), 5, 4),
        "empty experts": (np.tile([[1, 6]], (7, 1)), 8, 4),
        "block larger than all": (anything[:2], 6, 128),
        "rows fill blocks exactly": (np.tile([[0, 3]], (8, 1)), 4, 4),
        "a row a block": (anything[:3], 20, 1),
    }[name]


NAMES = [
    "any",
    "all to one expert",
    "empty experts",
    "block larger than all",
    "rows fill blocks exactly",
    "a row a block",
]
plan_of = jax.jit(plan_dispatch, static_argnums=1, static_argnames="block")


@pytest.mark.once
@settings(max_examples=150)
@given(routings())
def test_every_choice_has_its_row_and_every_block_its_expert(case):
    experts, count, block = case
    plan = jax.tree.map(np.asarray, plan_of(jnp.asarray(experts), count, block=block))
    tokens, k = experts.shape
    rows = plan.block_expert.shape[0] * block
    assert plan.source.shape == plan.choice.shape == (rows,)
    assert len(set(plan.slot.ravel())) == tokens * k  # no two choices share a row
    for t in range(tokens):
        for j in range(k):
            row = plan.slot[t, j]
            assert plan.source[row] == t and plan.choice[row] == t * k + j
            assert plan.block_expert[row // block] == experts[t, j]
    empty = np.setdiff1d(np.arange(rows), plan.slot.ravel())
    assert (plan.source[empty] == tokens).all() and (plan.choice[empty] == tokens * k).all()
    loads = Counter(experts.ravel().tolist())
    assert plan.counts.tolist() == [loads[e] for e in range(count)]
    used = sum(-(-loads[e] // block) for e in range(count))
    assert (np.diff(plan.block_expert) >= 0).all() and plan.block_expert.min() >= 0
    assert (plan.block_expert[:used] < count).all() and (plan.block_expert[used:] == count).all()


@pytest.mark.once
@settings(max_examples=60)
@given(routings(), st.integers(0, 2**32 - 1))
def test_product_equals_loop_over_tokens(case, seed):
    experts, count, block = case
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((len(experts), 3)), rng.standard_normal((count, 2, 3))
    out = route_and_multiply(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(experts), block)
    expected = [[w[e] @ x[t] for e in chosen] for t, chosen in enumerate(experts)]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@jax.jit(static_argnums=3)
def route_and_multiply(x, w, experts, block):
    plan = plan_dispatch(experts, w.shape[0], block=block)
    return grouped_matmul(scatter_rows(x, plan), w, plan.block_expert)[plan.slot]


@pytest.mark.parametrize("name", NAMES)
def test_product_equals_the_reference_in_value_and_gradient(name):
    experts, count, block = routing(name)
    rng = np.random.default_rng(1)
    plan = plan_of(jnp.asarray(experts, jnp.int32), count, block=block)
    x = jnp.asarray(rng.standard_normal((plan.source.shape[0], 5)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((count, 4, 5)), jnp.float32)

    @jax.jit
    def both(x, w):
        results = []
        for product in (grouped_matmul, grouped_matmul_reference):
            out, back = jax.vjp(lambda x, w, f=product: f(x, w, plan.block_expert), x, w)
            results.append((out, *back(jnp.sin(out))))
        return results

    for fast, slow in zip(*both(x, w), strict=True):
        np.testing.assert_allclose(fast, slow, rtol=0, atol=2e-6 * (1 + np.abs(slow).max()))


@pytest.mark.parametrize("name", NAMES)
def test_all_moves_equal_plain_indexing_in_value_and_gradient(name):
    experts, count, block = routing(name)
    rng = np.random.default_rng(2)
    plan = plan_of(jnp.asarray(experts, jnp.int32), count, block=block)
    x = jnp.asarray(rng.standard_normal((len(experts), 5)), jnp.float32)
    y = jnp.asarray(rng.standard_normal((plan.source.shape[0], 5)), jnp.float32)

    def plain_scatter(x, plan):
        return jnp.concatenate([x, jnp.zeros((1, 5))])[plan.source]

    def plain_sum(y, plan):
        return sum(y[plan.slot[:, i]] for i in range(plan.slot.shape[1]))

    def plain_choices(weights, plan):
        return jnp.concatenate([weights.reshape(-1), jnp.zeros(1)])[plan.choice]

    weights = jnp.asarray(rng.standard_normal(experts.shape), jnp.float32)
    ways = ((scatter_rows, plain_scatter), (sum_rows, plain_sum), (scatter_choices, plain_choices))

    @jax.jit
    def compare(*arrays):
        pairs = []
        for (ours, plain), rows in zip(ways, arrays, strict=True):
            out, back = jax.vjp(lambda rows, f=ours: f(rows, plan), rows)
            expected, expected_back = jax.vjp(lambda rows, f=plain: f(rows, plan), rows)
            pull = (jnp.arange(float(expected.size)) % 7 - 3).reshape(expected.shape)  # sums of these are exact
            pairs += [(out, expected), (back(pull)[0], expected_back(pull)[0])]
        return pairs

    for ours, plain in compare(x, y, weights):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-6)


def test_gradient_of_the_whole_way_equals_that_of_the_loop():
    experts, count, block = routing("any")
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((len(experts), 5)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((count, 4, 5)), jnp.float32)
    chosen = jnp.asarray(experts, jnp.int32)

    def fast(x, w):
        return jnp.sum(jnp.sin(route_and_multiply(x, w, chosen, block)))

    def plain(x, w):
        return jnp.sum(jnp.sin(jnp.einsum("TD,TKFD->TKF", x, w[chosen])))

    ours, theirs = (jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w) for loss in (fast, plain))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_bf16_accumulates_in_fp32():
    """4096 products of which bf16 sums would lose most: 256 + 1 is 256 in bf16."""
    x = jnp.ones((1, 4096), jnp.bfloat16)
    out = grouped_matmul(x, jnp.ones((1, 1, 4096), jnp.bfloat16), jnp.zeros(1, jnp.int32))
    assert out.dtype == jnp.bfloat16 and out[0, 0] == 4096


def test_sums_of_bf16_rows_are_fp32():
    """256 + 1 + 1 + ... is 256 in bf16, one by one."""
    plan = plan_dispatch(jnp.arange(9)[None], 9, block=1)
    y = jnp.ones((9, 1), jnp.bfloat16).at[plan.slot[0, 0]].set(256)
    assert sum_rows(y, plan)[0, 0] == 264
    gradient = jax.vjp(lambda x: scatter_rows(x, plan), y[:1])[1](y)[0]
    assert gradient[0, 0] == 264


@pytest.mark.parametrize("name", NAMES)
def test_kernels_get_what_makes_their_gradients_right(name, monkeypatch):
    """The custom gradients, with loops over blocks in the place of the kernels."""
    experts, count, _ = routing(name)
    plan = plan_of(jnp.asarray(experts, jnp.int32), count, block=128)
    rng = np.random.default_rng(1)
    x = scatter_rows(jnp.asarray(rng.standard_normal((len(experts), 5)), jnp.float32), plan)
    w = jnp.asarray(rng.standard_normal((count, 4, 5)), jnp.float32)
    kernels = pytest.importorskip("r1jax.ops.grouped_matmul_hopper")

    def blocks_times_weights(x, w, block_expert, *, transposed, tiling):
        out = grouped_matmul_reference(x, w if transposed else jnp.swapaxes(w, 1, 2), block_expert)
        return jnp.where(jnp.repeat(block_expert < len(w), tiling.rows)[:, None], out, 0)

    def blocks_times_blocks(a, b, first_block, *, block, tiling):
        rows = jnp.arange(a.shape[0])[None]
        inside = (rows >= first_block[:-1, None] * block) & (rows < first_block[1:, None] * block)
        return jnp.einsum("EP,PM,PN->EMN", inside.astype(jnp.float32), a, b)

    monkeypatch.setattr(kernels, "blocks_times_weights", blocks_times_weights)
    monkeypatch.setattr(kernels, "blocks_times_blocks", blocks_times_blocks)

    @jax.jit
    def both(x, w):
        results = []
        for product in (module._hopper, grouped_matmul_reference):
            out, back = jax.vjp(lambda x, w, f=product: sum_rows(f(x, w, plan.block_expert), plan), x, w)
            results.append((out, *back(jnp.sin(out))))
        return results

    for fast, slow in zip(*both(x, w), strict=True):
        np.testing.assert_allclose(fast, slow, rtol=0, atol=2e-6 * (1 + np.abs(slow).max()))
