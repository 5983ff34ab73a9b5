"""Parts that are joined: the same numbers and gradients, and a barrier in programs for NVIDIA GPUs alone."""

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.ops.apart import held_apart


def joined(x):
    return jnp.concatenate(held_apart(jnp.mean(x, axis=1), jnp.max(x, axis=1)), axis=-1)


def test_parts_are_what_they_were():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 4)), jnp.float32)
    np.testing.assert_array_equal(jax.jit(joined)(x), np.concatenate([jnp.mean(x, 1), jnp.max(x, 1)], axis=-1))
    gradient = jax.grad(lambda x: jnp.sum(joined(x)[:, :4] ** 2))(x)
    np.testing.assert_allclose(gradient, jnp.broadcast_to(2 * jnp.mean(x, 1, keepdims=True) / 5, x.shape), rtol=1e-6)


def test_only_programs_for_nvidia_gpus_have_a_barrier():
    traced = jax.jit(joined).trace(jax.ShapeDtypeStruct((3, 5, 4), jnp.float32))
    programs = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda")}
    assert "optimization_barrier" in programs["cuda"] and "optimization_barrier" not in programs["cpu"]
