"""Rounded products on a mesh give what one device gives: a row's scale does not depend on where its parts lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.config import DecoderConfig
from r1jax.errors import UserError
from r1jax.models.moe import MoE
from r1jax.models.quantized import rounding_by, uses
from r1jax.ops.linear_cross_entropy import linear_cross_entropy
from r1jax.ops.quantized_dot import Ruled, Scheme, quantized_dot
from r1jax.train.quantized import nearest_codes, with_codes
from tests.parallel.test_spread_ops import close, draw, on, tiny_arrays_are_split  # noqa: F401

CONFIG = DecoderConfig(
    hidden_size=16, moe_intermediate_size=8, n_routed_experts=4, n_group=1, topk_group=1, initializer_range=0.3
)
MODEL = MoE(CONFIG, jnp.float32)
X, VALID = draw(8, 6, 16), jnp.ones((8, 6), bool)


def mixed(params, x):
    with rounding_by(("int8",)):
        return MODEL.apply({"params": params}, x, VALID)[0]


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), X, VALID)["params"]


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"expert": 4, "fsdp": 2}], ids=str)
def test_rounded_experts(sizes, params):
    slope = lambda params, x: jax.value_and_grad(lambda p: jnp.sum(mixed(p, x) ** 2))(params)  # noqa: E731
    close(on(sizes, slope, params, X)[0], jax.jit(slope)(params, X), 1e-5)


def test_stored_codes_of_experts(params):
    with rounding_by(("int8",)):
        codes = with_codes(params, nearest_codes(params, uses(MODEL.init, jax.random.key(0), X, VALID)))
    for sizes in ({"data": 8}, {"expert": 4, "data": 2}):
        close(on(sizes, mixed, codes, X)[0], jax.jit(mixed)(params, X))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"expert": 4, "fsdp": 2}], ids=str)
def test_gradients_of_experts_are_rounded_at_random(sizes, params):
    def loss(params, x, seed):
        return jnp.sum(MODEL.apply({"params": params}, x, VALID, rngs={"rounding": jax.random.key(seed)})[0] ** 2)

    def slope(params, x, seed):
        with rounding_by(("experts=int8:int8:int8",)):
            return jax.grad(loss)(params, x, seed)["experts"]

    drawn = [on(sizes, slope, params, X, jnp.uint32(seed))[0] for seed in (0, 1)]
    with rounding_by(("experts=int8:int8",)):
        exact = jax.jit(jax.grad(loss))(params, X, jnp.uint32(0))["experts"]
    for name, value in exact.items():
        one, other = ((tree[name] - value) / np.linalg.norm(value) for tree in drawn)
        assert max(np.linalg.norm(one), np.linalg.norm(other)) < 0.03
        assert np.linalg.norm(one - other) > 0.001


def test_experts_whose_width_is_divided_are_refused(params):
    with pytest.raises(UserError, match=r'mesh\.tensor divides their width.*add "experts=float"'):
        on({"tensor": 8}, mixed, params, X)


@pytest.mark.parametrize("sizes", [{"tensor": 4, "fsdp": 2}, {"fsdp": 8}], ids=str)
def test_a_rounded_head_whose_vocabulary_is_divided(sizes):
    hidden, weight, scheme = draw(8, 6, 16), draw(24, 16, seed=1), Scheme("int8", "int8")
    labels = jnp.asarray(np.random.default_rng(2).integers(0, 24, (8, 6)), jnp.int32)

    def slope(hidden, weight):
        loss = lambda h, w: linear_cross_entropy(h, Ruled(w, scheme), labels, jnp.ones((8, 6)))  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, weight)

    close(on(sizes, slope, hidden, weight)[0], jax.jit(slope)(hidden, weight), 1e-5)


def test_a_row_that_is_divided_has_one_scale():
    x, w = draw(8, 16), draw(8, 16, seed=1)
    run = lambda x, w: quantized_dot(x, w, Scheme("int8", "int8"))  # noqa: E731
    close(on({"tensor": 8}, run, x, w)[0], jax.jit(run)(x, w))
