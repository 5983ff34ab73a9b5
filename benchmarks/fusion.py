"""Latency of one operation after another, of one compiled program, and of one with this project's fast paths.

    python benchmarks/fusion.py --output benchmarks/results/fusion.json                   on whatever device there is
    python benchmarks/fusion.py --output fusion.json --cases "block, forward" --scale tiny

Cases are one mixture layer of the decoder, forward alone and with its gradients, and the whole training step of
configs/medical.py, optimizer and all. `op by op` walks through the traced program and dispatches each operation by
itself, as an eager framework does but without the time of Python code that an eager model would add; loops go turn by
turn. `jit` is the same program compiled, with the references of attention, grouped product and cross-entropy; `fast
paths` is what r1jax runs. Each case has a process of its own; figures are medians.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.children import SETTINGS, run_in_turn, tell, wait_for_turn  # noqa: E402
from benchmarks.common import jax_environment  # noqa: E402
from configs import medical as medical_config  # noqa: E402
from r1jax.config import Config, DecoderConfig  # noqa: E402
from r1jax.models import moe, remat  # noqa: E402
from r1jax.models.decoder import DecoderLayer  # noqa: E402
from r1jax.models.r1 import R1  # noqa: E402
from r1jax.ops.attention import dot_product_attention_reference  # noqa: E402
from r1jax.ops.grouped_matmul import grouped_matmul_reference  # noqa: E402
from r1jax.ops.linear_cross_entropy import linear_cross_entropy_reference  # noqa: E402
from r1jax.parallel.platform import start_platform  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.tasks.language import loss as language_loss  # noqa: E402
from r1jax.train import eager  # noqa: E402
from r1jax.train.flops import work_of  # noqa: E402
from r1jax.train.plan import example_batch  # noqa: E402
from r1jax.train.step import NO_LIMIT, init_state, make_step  # noqa: E402

CASES = ("block, forward", "block, forward and backward", "training step")
WAYS = ("op by op", "jit", "fast paths")
COMPILED = 5
"""Calls of a compiled program for each one op by op."""
REFERENCES = (
    (remat, "dot_product_attention", dot_product_attention_reference),
    (moe, "grouped_matmul", grouped_matmul_reference),
    (language_loss, "linear_cross_entropy", linear_cross_entropy_reference),
)
"""Where a fast path is called, and what it is held against."""


@contextmanager
def references() -> Iterator[None]:
    """Within it, what is traced calls the references."""
    with ExitStack() as stack:
        for module, name, reference in REFERENCES:
            stack.enter_context(mock.patch.object(module, name, reference))
        yield


def dispatch(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Runs a program one operation after the other, like `eager.run`, but checks nothing."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    last_use = {atom: i for i, op in enumerate(jaxpr.eqns) for atom in op.invars if not _literal(atom)}
    kept = {atom for atom in jaxpr.outvars if not _literal(atom)}
    read = lambda atom: atom.val if _literal(atom) else values[atom]  # noqa: E731
    for i, op in enumerate(jaxpr.eqns):
        inputs, inner = [read(atom) for atom in op.invars], eager.INNER.get(op.primitive.name)
        found = inner(op, inputs) if inner else op.primitive.bind(*inputs, **op.params)
        found = found if inner or op.primitive.multiple_results else [found]
        values.update(zip(op.outvars, found, strict=True))
        for atom in {a for a in op.invars if not _literal(a) and last_use[a] == i} - kept:
            values.pop(atom, None)  # or every activation would stay in memory
    return [read(atom) for atom in jaxpr.outvars]


def _literal(atom: Any) -> bool:
    return isinstance(atom, core.Literal)


def op_by_op(program: Any, *arguments: Any) -> Callable[[], list[Any]]:
    """A call that dispatches the operations of a traced function."""
    leaves = jax.tree.leaves(arguments)

    def run() -> list[Any]:
        with mock.patch.object(eager, "run", dispatch):  # by which the programs inside of operations are walked through
            return dispatch(program.jaxpr, program.consts, leaves)

    return run


def _distinct(jaxpr: Any) -> dict[str, Any]:
    """One operation of each kind and shape, those of inner programs too."""
    found: dict[str, Any] = {}
    for op in jaxpr.eqns:
        if op.primitive.name in eager.INNER:
            for inner in core.jaxprs_in_params(op.params):
                found |= _distinct(inner)
        else:
            found[f"{op.primitive} {[atom.aval for atom in op.invars]} {op.params}"] = op
    return found


def _run_on_zeros(op: Any) -> None:
    """Runs an operation for the sake of its compilation; one on random keys compiles when it is needed."""
    if not any(jnp.issubdtype(atom.aval.dtype, jax.dtypes.extended) for atom in op.invars):
        zeros = [x.val if _literal(x) else jnp.zeros(x.aval.shape, x.aval.dtype) for x in op.invars]
        jax.block_until_ready(op.primitive.bind(*zeros, **op.params))


def operations(jaxpr: Any) -> int:
    """Operations of a program, those of inner programs once each."""
    return sum(1 + sum(map(operations, core.jaxprs_in_params(op.params))) for op in jaxpr.eqns)


def decoder_shape(config: Config) -> tuple[int, int]:
    """Cases of a training step, and tokens of each in the decoder's sequence."""
    task, cases = TASKS[config.task.name](config), config.train.batch_size
    work = work_of(config.model, task, example_batch(task.source("train"), task, cases))
    return cases, work.tokens // cases


def block_case(tiny: bool, backward: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A mixture layer of the decoder, and its arguments: in bf16 on a GPU, and that of configs/medical.py on a CPU."""
    config, (batch, length), dtype = DecoderConfig(), (2, 32), jnp.float32
    if not tiny and jax.default_backend() == "cpu":
        medical = medical_config.get_config()
        config, (batch, length) = medical.model.decoder, decoder_shape(medical)
    elif not tiny:
        (batch, length), dtype = (4, 1024), jnp.bfloat16
        config = replace(
            config,
            hidden_size=1024,
            num_attention_heads=8,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            moe_intermediate_size=512,
        )
    layer = DecoderLayer(config, dtype, 0.0, dense=False)
    x = jax.random.normal(jax.random.key(0), (batch, length, config.hidden_size), dtype)
    places = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    valid = jnp.ones((batch, length), bool)
    params = jax.jit(lambda: layer.init(jax.random.key(1), x, places, valid)["params"])()

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return layer.apply({"params": params}, x, places, valid)[0]

    def both(params: Any, x: jax.Array) -> Any:
        mean = lambda params, x: jnp.mean(jnp.square(forward(params, x).astype(jnp.float32)))  # noqa: E731
        return jax.value_and_grad(mean, argnums=(0, 1))(params, x)

    return both if backward else forward, (params, x)


def step_case(tiny: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The training step of configs/medical.py, and its arguments."""
    config = medical_config.get_config(smoke=tiny)
    task = TASKS[config.task.name](config)
    model, source = R1(config.model, task.heads), task.source("train")
    batch = task.collate(source.read_batch(np.arange(config.train.batch_size)))
    batch = jax.tree.map(jnp.asarray, batch)
    state = jax.jit(lambda: init_state(config, model, task, batch))()
    return make_step(config, model, task), (state, batch, jnp.asarray(NO_LIMIT))


def child(case: str, tiny: bool, repeats: int) -> None:
    """Measures one case in every way."""
    start_platform("auto")
    function, arguments = step_case(tiny) if case == CASES[2] else block_case(tiny, case == CASES[1])
    with references():
        program, plain = jax.make_jaxpr(function)(*arguments), jax.jit(function).lower(*arguments)
    fast = jax.jit(lambda *x: function(*x)).lower(*arguments)  # a new function, or the first would be found again
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # XLA compiles side by side: the large ones begin
        compiled = {way: pool.submit(lowered.compile) for way, lowered in zip(WAYS[1:], (plain, fast), strict=True)}
        list(pool.map(_run_on_zeros, _distinct(program.jaxpr).values()))
    runs: dict[str, Callable[[], Any]] = {WAYS[0]: op_by_op(program, *arguments)}
    runs |= {way: functools.partial(found.result(), *arguments) for way, found in compiled.items()}
    outputs = {name: jax.block_until_ready(run()) for name, run in runs.items()}  # compiles those on random keys
    wait_for_turn()
    times = _in_rounds(runs, repeats)
    tell(
        {
            "operations": operations(program.jaxpr),
            "milliseconds": {name: 1e3 * float(np.median(found)) for name, found in times.items()},
            "quartiles": {name: (1e3 * np.quantile(found, [0.25, 0.75])).tolist() for name, found in times.items()},
            "apart": {name: _apart(outputs["op by op"], outputs[name]) for name in WAYS[1:]},
        }
    )


def _in_rounds(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call; the ways take turns, that what else the machine does hits them alike."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range(1 if name == "op by op" else COMPILED):
                began = time.perf_counter()
                jax.block_until_ready(run())
                found[name].append(time.perf_counter() - began)
    return found


def _apart(reference: Any, other: Any) -> float:
    """Distance of the results of two ways, relative to their size."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(reference), jax.tree.leaves(other), strict=True)
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(a**2) for a, _ in pairs)))


def table(report: dict[str, Any]) -> str:
    """Milliseconds of each way in Markdown, and how much less than op by op."""
    lines = [
        "| | operations | op by op, ms | jit, ms | less | fast paths, ms | less |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, row in report["cases"].items():
        if "error" in row:
            lines.append(f"| {case} | failed |" + " |" * 5)
            continue
        slow, jit, fast = (row["milliseconds"][way] for way in WAYS)
        lines.append(
            f"| {case} | {row['operations']:,} | {slow:.2f} | {jit:.2f} | {1 - jit / slow:.1%} | {fast:.2f} | "
            f"{1 - fast / slow:.1%} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--repeats", type=int, default=8, help="timed calls op by op; five times as many compiled")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds that a case may take")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.child, args.scale == "tiny", args.repeats)
        return
    os.environ |= SETTINGS | os.environ  # this process asks for the device's name, and shall not take its memory
    began, cases = time.perf_counter(), dict[str, Any]()
    told = argparse.Namespace(**{k: v for k, v in vars(args).items() if k != "child"}, overrides=[])
    about = jax_environment(told)
    same = [__file__, "--output", str(args.output), "--scale", args.scale, "--repeats", str(args.repeats)]
    commands = {case: [*same, "--child", case] for case in args.cases}
    for case, found in run_in_turn(commands, ahead=0, timeout=args.timeout):
        cases[case] = found
        report = about | {"cases": cases, "seconds": time.perf_counter() - began}
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{report['seconds']:5.0f} s  {case}: {found.get('error', 'done')}", file=sys.stderr)
    print(f"{table(report)}\n\n{report['seconds']:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
