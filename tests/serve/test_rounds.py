"""What a compiler makes of the loop of rounds."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.ops.quantize import dequantize, quantize
from r1jax.serve.rounds import narrow_until


def test_codes_are_widened_within_the_loop_and_not_before_it():
    """Before it, the floats of all weights would lie beside their codes for as long as an answer takes."""
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((96, 96)), jnp.float32)
    params = {"codes": quantize(weight, "int8"), "floats": jnp.ones(96)}

    def run(params, x):
        def body(carry):
            held = narrow_until(carry[0], params)
            return carry[0] + 1, jnp.tanh(dequantize(held["codes"]) @ carry[1] + held["floats"])

        return jax.lax.while_loop(lambda carry: carry[0] < 5, body, (jnp.int32(0), x))[1]

    compiled = jax.jit(run).lower(params, jnp.ones(96)).compile()
    entry = re.search(r"^ENTRY.*?^}", compiled.as_text(), re.DOTALL | re.MULTILINE)[0]
    assert "s8[96,96]" in entry and "f32[96,96]" not in entry
    expected = np.ones(96)
    for _ in range(5):
        expected = np.tanh(np.asarray(dequantize(params["codes"]), np.float64) @ expected + 1)
    np.testing.assert_allclose(compiled(params, jnp.ones(96)), expected, rtol=0, atol=1e-4)
