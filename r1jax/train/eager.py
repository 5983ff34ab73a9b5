"""`--debug.eager`: the training step one operation after another, each result checked, errors located in the source.

The step is traced as ever, so that its gradients are there too, and then the program is walked through: every operation
runs by itself, every loop turn by turn. What would be an anonymous NaN at the end of a compiled step is found where it
was made, and an index that JAX would clamp in silence is refused.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

import r1jax
from r1jax.config import Config
from r1jax.errors import UserError
from r1jax.models.r1 import R1
from r1jax.tasks.task import Task
from r1jax.train.step import NO_LIMIT, Batch, TrainState, init_state, make_step

HOME = str(Path(r1jax.__file__).parent)
CLAMPED = ("CLIP", "PROMISE_IN_BOUNDS")
"""Modes in which a gather answers an index out of range with another place's number."""


def eager_step(config: Config, model: R1, task: Task, batch: Batch) -> Callable[..., Any]:
    """Takes the place of `compile_step`: the same step, op by op where its arrays are, and checked; many times slower.

    Args:
      config: The experiment.
      model: The model.
      task: The task.
      batch: Any collated batch (shapes).

    Returns:
      (state, batch, limit) -> (state, metrics), which raises UserError where numbers stop being finite, an index is
      out of range or a batch has another shape than the first.
    """
    abstract = jax.eval_shape(lambda: init_state(config, model, task, batch))
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    program, shapes = jax.make_jaxpr(make_step(config, model, task), return_shape=True)(abstract, like, NO_LIMIT)

    def step(state: TrainState, batch: Batch, limit: Any) -> tuple[TrainState, dict[str, Any]]:
        for name in like.keys() | batch.keys():
            expected, given = (_shape(tree.get(name)) for tree in (like, batch))
            if expected != given:
                raise UserError(f"step {int(state.step) + 1}: the batch's {name!r} is {given}, but must be {expected}")
        try:
            found = run(program.jaxpr, program.consts, jax.tree.leaves((state, batch, limit)))
        except UserError as error:
            raise UserError(f"step {int(state.step) + 1}: {error}") from None
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return step


def _shape(x: Any) -> str:
    return "absent" if x is None else f"{x.dtype}{list(x.shape)}"


def run(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a program operation by operation.

    Args:
      jaxpr: The program.
      consts: Values of its constants.
      arguments: Values of its inputs.

    Returns:
      Values of its outputs.

    Raises:
      UserError: An operation made NaN or infinity of finite numbers, or an index is out of range; says which and where.
    """
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]  # noqa: E731
    finite = {atom: _finite(x) for atom, x in values.items()}
    last_use = {atom: i for i, op in enumerate(jaxpr.eqns) for atom in op.invars if isinstance(atom, core.Var)}
    last_use |= {atom: len(jaxpr.eqns) for atom in jaxpr.outvars if isinstance(atom, core.Var)}
    for i, op in enumerate(jaxpr.eqns):
        inputs = [read(atom) for atom in op.invars]
        _check_indices(op, inputs)
        inner = INNER.get(op.primitive.name)
        outputs = inner(op, inputs) if inner else _bind(op, inputs)
        sound = [_finite(x) for x in outputs]
        whole = all(_finite(a.val) if isinstance(a, core.Literal) else finite[a] for a in op.invars)
        if not inner and whole and not all(sound):
            _report_birth(op, inputs, outputs)
        for atom, x, good in zip(op.outvars, outputs, sound, strict=True):
            values[atom], finite[atom] = x, good
        for atom in {a for a in (*op.invars, *op.outvars) if isinstance(a, core.Var) and last_use.get(a, i) <= i}:
            values.pop(atom, None)  # or every activation of the step would stay in memory
    return [read(atom) for atom in jaxpr.outvars]


def _bind(op: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
    found = op.primitive.bind(*inputs, **op.params)
    return found if op.primitive.multiple_results else [found]


def _call(name: str) -> Callable[..., list[Any]]:
    """An operation that only calls the program in one of its parameters."""

    def call(op: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
        return _run_closed(op.params[name], inputs)

    return call


def _run_closed(program: Any, inputs: Sequence[Any]) -> list[Any]:
    return run(getattr(program, "jaxpr", program), getattr(program, "consts", ()), inputs)


def _scan(op: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
    """Turn by turn; results of the turns are stacked."""
    params, body = op.params, getattr(op.params["jaxpr"], "jaxpr", op.params["jaxpr"])
    # JAX's versions keep the counts in different places; what has one axis more outside than inside is cut into turns.
    sliced = sum(np.ndim(x) > inside.aval.ndim for x, inside in zip(inputs, body.invars, strict=True))
    carried = sum(a.aval.ndim == inside.aval.ndim for a, inside in zip(op.outvars, body.outvars, strict=True))
    fixed = len(inputs) - sliced - carried
    consts, carry, rows = inputs[:fixed], inputs[fixed : fixed + carried], inputs[fixed + carried :]
    turns = range(params["length"])
    made = []
    for i in reversed(turns) if params["reverse"] else turns:
        found = _run_closed(params["jaxpr"], [*consts, *carry, *(x[i] for x in rows)])
        carry, made = found[:carried], [*made, found[carried:]]
    if params["reverse"]:
        made.reverse()
    return [*carry, *(jnp.stack(column) for column in zip(*made, strict=True))]


def _while(op: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
    params = op.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    tested, fixed, carry = inputs[:first], inputs[first:second], inputs[second:]
    while bool(_run_closed(params["cond_jaxpr"], [*tested, *carry])[0]):
        carry = _run_closed(params["body_jaxpr"], [*fixed, *carry])
    return carry


def _cond(op: core.JaxprEqn, inputs: list[Any]) -> list[Any]:
    branches = op.params["branches"]
    return _run_closed(branches[min(max(int(inputs[0]), 0), len(branches) - 1)], inputs[1:])


INNER: dict[str, Callable[[core.JaxprEqn, list[Any]], list[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **dict.fromkeys(("jit", "pjit", "closed_call", "checkpoint", "remat2"), _call("jaxpr")),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _call("call_jaxpr")),
}
"""Operations with a program inside, which is walked through as well."""


def _finite(x: Any) -> bool:
    """Whether no number is NaN or infinite; keys and whole numbers are none."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return True
    return bool(np.isfinite(np.asarray(x, np.float32)).all())


def _report_birth(op: core.JaxprEqn, inputs: list[Any], outputs: list[Any]) -> None:
    found = np.concatenate([np.ravel(np.asarray(x, np.float32)) for x in outputs if not _finite(x)])
    count, kind = int(np.sum(~np.isfinite(found))), "NaN" if np.isnan(found).any() else "infinity"
    given = ", ".join(_shape(x) + _range(x) for x in inputs)
    raise UserError(
        f"{op.primitive.name} made {kind} ({count} of {found.size} numbers) of finite {given}; {_where(op)}"
    )


def _range(x: Any) -> str:
    if jnp.issubdtype(jnp.result_type(x), jnp.floating) and np.size(x):
        numbers = np.asarray(x, np.float32)
        return f" from {numbers.min():g} to {numbers.max():g}"
    return ""


def _check_indices(op: core.JaxprEqn, inputs: list[Any]) -> None:
    """Refuses indices that lie outside an array, where JAX would take the nearest place instead."""
    if op.primitive.name == "gather" and op.params["mode"].name in CLAMPED:
        sizes = op.params["slice_sizes"]
        axes = op.params["dimension_numbers"].start_index_map
        places = np.asarray(inputs[1]).reshape(-1, len(axes)).T
    elif op.primitive.name == "dynamic_slice":
        sizes, axes = op.params["slice_sizes"], range(len(op.params["slice_sizes"]))
        places = [np.asarray(x) for x in inputs[1:]]
    else:
        return
    for axis, found in zip(axes, places, strict=True):
        last = inputs[0].shape[axis] - sizes[axis]
        if np.size(found) and (np.min(found) < 0 or np.max(found) > last):
            raise UserError(
                f"{op.primitive.name} reads at {np.min(found)} to {np.max(found)} along axis {axis} of "
                f"{_shape(inputs[0])}, where 0 to {last} exist; {_where(op)}"
            )


def _where(op: core.JaxprEqn) -> str:
    """Module and source line of an operation: the innermost line of r1jax, or else of anything."""
    frames = [(frame.file_name, frame.line_num) for frame in op.source_info.traceback.frames]
    own = [place for place in frames if place[0].startswith(HOME) and place[0] != __file__]
    file, line = (own or frames)[0]
    file = f"r1jax{file.removeprefix(HOME)}" if own else file
    return f"in {op.source_info.name_stack or 'the step'}, {file}:{line}"
