"""What benchmarks/fusion.py runs op by op is the program that it compiles."""

from unittest import mock

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from benchmarks.fusion import REFERENCES, WAYS, _distinct, block_case, dispatch, op_by_op, operations, references, table
from configs import medical
from r1jax.models.decoder import DecoderLayer
from r1jax.models.r1 import R1
from r1jax.tasks.catalog import TASKS
from r1jax.train import eager
from r1jax.train.plan import example_batch


def mixed(x, n):
    """A loop, a branch, a while loop, a function with a derivative of its own, and a call."""
    x, _ = jax.lax.scan(lambda c, row: (jnp.sin(c) + row, None), x, jnp.ones((3, 4)))
    x = jax.lax.cond(jnp.sum(x) > 0, lambda x: x * 2.0, lambda x: x - 1.0, x)
    _, x = jax.lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, jnp.cos(c[1])), (n, x))
    return jax.nn.relu(x) + jax.jit(jnp.tanh)(x)


def test_op_by_op_gives_what_the_program_gives():
    x, n = jnp.linspace(-1.0, 1.0, 4), jnp.asarray(0)
    gradient = jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: jax.nn.relu(x) ** 2)(x)))
    np.testing.assert_allclose(op_by_op(jax.make_jaxpr(mixed)(x, n), x, n)()[0], mixed(x, n), rtol=1e-6)
    np.testing.assert_allclose(op_by_op(jax.make_jaxpr(gradient)(x), x)()[0], gradient(x), rtol=1e-6)


def test_every_operation_is_dispatched_by_itself():
    program = jax.make_jaxpr(lambda x: jax.jit(lambda y: jnp.sin(y) * 2.0)(x) + 1.0)(jnp.ones(3))
    seen, bind = set(), jax.extend.core.Primitive.bind
    note = lambda self, *inputs, **params: seen.add(self.name) or bind(self, *inputs, **params)  # noqa: E731
    with mock.patch.object(eager, "run", dispatch), mock.patch.object(jax.extend.core.Primitive, "bind", note):
        dispatch(program.jaxpr, program.consts, [jnp.ones(3)])
    assert seen >= {"sin", "mul", "add"} and not seen & {"jit", "pjit"}
    assert operations(program.jaxpr) == 4  # the call counts too
    assert len(_distinct(program.jaxpr)) == 3


def test_fast_paths_are_found_where_they_are_called():
    """Renaming one of them would compare a program with itself."""
    found = [getattr(module, name) for module, name, _ in REFERENCES]
    with references():
        assert [getattr(module, name) for module, name, _ in REFERENCES] == [reference for *_, reference in REFERENCES]
    assert [getattr(module, name) for module, name, _ in REFERENCES] == found
    function, arguments = block_case(tiny=True, backward=False)
    fast = jax.make_jaxpr(lambda *x: function(*x))(*arguments)  # each a new function, or the first would be found again
    with references():
        plain = jax.make_jaxpr(lambda *x: function(*x))(*arguments)
    assert operations(plain.jaxpr) != operations(fast.jaxpr)


def test_the_block_of_a_cpu_reads_what_a_training_step_gives_it():
    config, shapes = medical.get_config(), set()
    task = TASKS[config.task.name](config)
    inputs, _ = task.prepare(example_batch(task.source("train"), task, config.train.batch_size))

    def note(call, args, kwargs, context):
        if isinstance(context.module, DecoderLayer):
            shapes.add(args[0].shape)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(R1(config.model, task.heads).init, jax.random.key(0), inputs)
    _, (_, x) = block_case(tiny=False, backward=False)
    assert shapes == {x.shape}


def test_table_tells_how_much_less_time():
    row = {"operations": 1200, "milliseconds": dict(zip(WAYS, (100.0, 10.0, 4.0), strict=True))}
    told = table({"cases": {"training step": row, "block, forward": {"error": "killed"}}})
    assert "| training step | 1,200 | 100.00 | 10.00 | 90.0% | 4.00 | 96.0% |" in told
    assert "| block, forward | failed |" in told
