"""Op by op: the numbers of the compiled step; NaN, infinity, indices and shapes are located."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.errors import UserError
from r1jax.train import recover
from r1jax.train.eager import eager_step, run
from r1jax.train.run import open_run
from r1jax.train.step import NO_LIMIT
from tests.train.experiment import make_experiment, optax_promotes


@pytest.fixture(scope="module")
def tiny():
    """Without pictures: every operation of every shape is a program of its own here."""
    return make_experiment("--model.modalities", "table", "text", "--task.modality_dropout", "0")


@pytest.fixture(scope="module")
def step(tiny):
    with optax_promotes():
        eager = eager_step(tiny.config, tiny.model, tiny.task, tiny.batch)

    def take(state, batch):
        with optax_promotes():
            return eager(state, batch, NO_LIMIT)

    return take


@pytest.mark.slow
def test_equals_the_compiled_step(tiny, step):
    batch = jax.device_put(tiny.batches(1)[0])
    start = tiny.init()._replace(step=jnp.asarray(3, jnp.int32))
    (state, metrics), (again, figures) = step(jax.tree.map(jnp.copy, start), batch), tiny.step(start, batch, NO_LIMIT)
    assert metrics.keys() == figures.keys()
    for name, value in figures.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    pairs = zip(jax.tree_util.tree_leaves_with_path(again), jax.tree.leaves(state), strict=True)
    for (path, a), b in pairs:
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_names_the_module_in_which_a_number_stops_being_finite(tiny, step):
    state = tiny.init()
    poisoned = jax.tree.map(lambda x: x, state.params)
    poisoned["decoder"]["layers_0"]["self_attn"]["o_proj"]["weight"] *= 3e38
    with pytest.raises(UserError, match=r"step 1: .* made .* in .*layers_0.*, r1jax/(models|ops)/.*\.py:\d+"):
        step(state._replace(params=poisoned), jax.device_put(tiny.batches(1)[0]))


def test_names_a_batch_of_another_shape(tiny, step):
    batch = tiny.batches(1)[0]
    with pytest.raises(UserError, match=r"step 1: the batch's 'text' is int32\[8, 15\], but must be int32\[8, 16\]"):
        step(tiny.init(), batch | {"text": batch["text"][:, :-1]})
    with pytest.raises(UserError, match="the batch's 'more' is .*, but must be absent"):
        step(tiny.init(), batch | {"more": batch["text"]})


def test_refuses_a_rule_of_rounding_that_no_weight_follows(tiny, tmp_path):
    """As where the step is compiled."""
    quant = replace(tiny.config.model, quant=("o_prj=int8",))
    debug = replace(tiny.config.debug, eager=True)
    config = replace(tiny.config, workdir=str(tmp_path), model=quant, debug=debug)
    model = tiny.model.clone(config=quant)
    with tiny.traced_once(), open_run(config) as run, pytest.raises(UserError, match=r"'o_prj'.*did you mean"):
        recover.train(config, run, model, tiny.task, tiny.mesh, tiny.source, tiny.validation, tiny.batch)


def walk(function, *arguments):
    program = jax.make_jaxpr(function)(*arguments)
    return run(program.jaxpr, program.consts, arguments)


def test_finds_what_is_born_inside_loops_and_calls():
    x = jnp.asarray([3.0, 2.0, 1.0])
    falling = lambda carry, y: (carry - 1.0, jnp.log(carry) + y)  # noqa: E731
    with pytest.raises(
        UserError, match=r"log made infinity \(1 of 1 numbers\) of finite float32\[\] from 0 to 0; in .*py:"
    ):
        walk(lambda x: jax.lax.scan(falling, 2.0, x), x)
    with pytest.raises(UserError, match="sqrt made NaN"):
        walk(jax.jit(lambda x: jnp.sqrt(x - 2)), x)


def test_lets_pass_what_was_not_finite_before():
    x = jnp.asarray([1.0, jnp.nan, -jnp.inf])
    found = walk(lambda x: jnp.where(jnp.isnan(x), 0.0, jnp.exp(2 * x)), x)[0]
    np.testing.assert_allclose(found, [np.exp(2.0), 0, 0])


def test_refuses_indices_out_of_range():
    table, far = jnp.zeros((5, 2)), jnp.asarray([1, 5])
    with pytest.raises(UserError, match=r"gather reads at 1 to 5 along axis 0 of float32\[5, 2\], where 0 to 4 exist"):
        walk(lambda t, i: t[i], table, far)
    with pytest.raises(UserError, match="dynamic_slice reads at 4 to 4 along axis 0"):
        walk(lambda t, i: jax.lax.dynamic_slice(t, (i, 0), (2, 2)), table, 4)
    assert walk(lambda t, i: jnp.take(t, i, axis=0, mode="fill", fill_value=0), table, far)[0].shape == (2, 2)


def test_walks_through_control_flow():
    def everything(x):
        total = jax.lax.while_loop(lambda c: c < 10, lambda c: c + x[0], 0.0)
        y, rows = jax.lax.scan(lambda c, r: (c + r, c * r), total, x, reverse=True)
        return jax.lax.cond(y > 0, lambda: rows, lambda: -rows), jax.nn.relu(x), jax.checkpoint(jnp.sin)(x)

    x = jnp.asarray([1.5, -2.0, 4.0])
    for got, expected in zip(walk(everything, x), everything(x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
