"""Where a training step of configs/medical.py spends its time on one GPU, and what its floor is.

    python benchmarks/medical_step.py --output benchmarks/results/medical_step.json
    python benchmarks/medical_step.py --output medical_step.json --tiny                   small, on a CPU

A variant is named by the overrides of train.py that make it, "" is the config as it is. Its compiled step is timed by
itself, with the same batch again and again: `ms` with the batch on the device, `fed_ms` with one in the host's memory,
as train.py has it. A trace of some steps says what the GPU does: kernels, pauses between them, and the time by part of
the model and of the step, and by kind of operation. `unknown` is what the trace does not connect with the program;
kernels of CUDA graphs often name the graph alone, and are then found by the names of fusions, or take the part of both
their neighbours (`by_neighbours`). With XLA_FLAGS=--xla_gpu_enable_command_buffer= there are no graphs.

Bounds of a step, each by a rate that the same run measures: `products`, FLOPs of the model and of Muon over that of a
large product of the same precision; `bytes`, the state read and written once and the batch read over that of a copy
(`accessed`: all that XLA says the program's operations read and write); `launches`, kernels over the time of one that
does next to nothing; `dispatch`, a program of the same arguments and results that computes nothing. The floor is the
larger one of products and bytes. `host` makes batches as train.py does, from new generated cases: in one thread, as the
config has it, and in `--workers` processes. Results are written after each case.
"""

import argparse
import functools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.common import jax_environment  # noqa: E402
from benchmarks.decode_step import copy_case  # noqa: E402
from benchmarks.h100_case import SCALES, normal, seconds  # noqa: E402
from benchmarks.medical_settings import command  # noqa: E402
from benchmarks.overhead import endless, fresh, idle_program, setting_of  # noqa: E402
from benchmarks.traces import Event, Instruction, Program, between_neighbours, device_events, kernels  # noqa: E402
from r1jax.cli import load_config  # noqa: E402
from r1jax.config import Config  # noqa: E402
from r1jax.parallel.mesh import make_mesh  # noqa: E402
from r1jax.parallel.platform import start_platform  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.train.flops import work_of  # noqa: E402
from r1jax.train.loop import open_batches  # noqa: E402
from r1jax.train.optimizer import decays  # noqa: E402
from r1jax.train.plan import UNTUNED  # noqa: E402
from r1jax.train.step import NO_LIMIT, compile_step  # noqa: E402

VARIANTS = ("", "model.precision=bf16", "model.precision=bf16 train.batch_size=256")
BLOCK = 0.06
"""Seconds of a sample: about ten steps of the config as it is, whose host waits for the device only then."""
TRACED = 5
"""Steps of a trace."""
CHAIN = 100
"""Operations of a chain, each of which waits for the one before."""
UNKNOWN = "unknown"
ROUNDS, PRODUCTS = 5, 3
"""Newton-Schulz rounds of Muon, and the products of each."""

# --- parts and kinds ------------------------------------------------------------------------------------------------

ENCODERS = {"volume": "volume encoder", "image": "image encoder", "table": "record encoder", "text": "text"}
OUTSIDE = {
    "scale_by_matched_muon": "Muon",
    "layer_metrics": "norms that are logged",
    "_average": "weight average",
    "_if_sound": "guard",
    "make_optimizer": "AdamW and clipping",
    "prepare": "preparation of the batch",
    "batch_gradients": "loss",
}
"""Parts of a step beside the model, by a function in which they are traced; the first that is found counts."""


def part_of(op_name: str, functions: Sequence[str] = ()) -> str | None:
    """Which part of the step an operation belongs to.

    Args:
      op_name: Its path, such as `jit(step)/transpose(jvp(R1))/R1._read/R1.encode/volume/merge_0/dot_general`.
      functions: Python functions in which it was traced.

    Returns:
      The part; of the model with `, backward` behind it where it is of the backward pass; None without any path.
    """
    path = op_name.split(";")[0].split("/")
    if "R1._read" in path:
        inside = [word for word in path[path.index("R1._read") + 1 :] if word != "R1.encode"]
        module = inside[0].split(".")[0] if inside else ""
        name = "heads" if module.startswith("head_") else ENCODERS.get(module, module)
        if name not in ("heads", "decoder", *ENCODERS.values()):
            name = "sequence of all modalities"
    elif len(path) == 1 and not functions:
        return None
    else:
        within = {word for function in functions for word in (function.split(".")[0], function.split(".")[-1])}
        other = "loss" if "jvp(" in op_name else "rest of the step"
        name = next((part for function, part in OUTSIDE.items() if function in within), other)
    return f"{name}, backward" if "transpose(jvp" in op_name else name


def part(program: Program, found: Instruction) -> str | None:
    """The part of an instruction; a fusion that has no path is of the part that most operations in it are of."""
    of = lambda one: part_of(one.op_name, program.functions(one.frame))  # noqa: E731
    own = of(found)
    if own is not None:
        return own
    inner = [name for one in program.inner(found) if (name := of(one)) is not None]
    copied = "copies of the state" if re.search(r"\(%?state_", found.text) else None  # XLA's own, for donated arrays
    return max(sorted(set(inner)), key=inner.count, default=copied)


ATTENTION = re.compile(r"fmha|flash|attention|sdpa|softmax_backward", re.IGNORECASE)
PRODUCT = re.compile(r"gemm|gemv|cublas|nvjet|cutlass|xmma|cudnn|\bdot|_dot|conv(?!ert)|wgrad|dgrad", re.IGNORECASE)
COPY = re.compile(r"copy|memcpy|memset|transpose", re.IGNORECASE)


def kind_of(name: str, found: Instruction | None, inner: Sequence[Instruction] = ()) -> str:
    """What kind of operation a kernel is.

    Args:
      name: Of the kernel.
      found: Its instruction, where it is known.
      inner: Instructions of the fusion that it is.
    """
    opcodes = {one.opcode for one in inner} | ({found.opcode} if found else set())
    target = re.search(r'custom_call_target="([^"]+)"', found.text) if found else None
    called = f"{name} {target[1] if target else ''}"
    if ATTENTION.search(called):
        return "attention kernels"
    if opcodes & {"dot", "convolution"} or PRODUCT.search(called):
        return "products and convolutions"
    if COPY.search(name) or (found is not None and found.opcode in ("copy", "copy-start", "transpose")):
        return "copies and transposes"
    if opcodes & {"reduce", "reduce-window"} or "reduce" in name:
        return "reductions"
    return "other fusions" if (found is not None and found.opcode == "fusion") or "fusion" in name else "other kernels"


def attributed(events: Sequence[Event], program: Program, steps: int) -> dict[str, Any]:
    """Where the time of the kernels goes.

    Args:
      events: In the order of time.
      program: What was traced.
      steps: How many.

    Returns:
      What `kernels` says, with the part before the name of each of the costliest, and microseconds a step by part and
      by kind; `by_neighbours` of them have the part of what runs before and after.
    """
    found = [program.instruction_of(event) for event in events]
    of = functools.cache(lambda name: part(program, program.instructions[name]))
    names = {id(one): name for name, one in program.instructions.items()}
    known = [of(names[id(one)]) if one else None for one in found]
    parts = between_neighbours(known)
    by_part: dict[str, float] = {}
    by_kind: dict[str, float] = {}
    guessed, labelled = 0.0, []
    for event, one, before, name in zip(events, found, known, parts, strict=True):
        us = (event.ended - event.began) / 1e3 / steps
        name, kind = name or UNKNOWN, kind_of(event.name, one, program.inner(one) if one else ())
        by_part[name] = by_part.get(name, 0.0) + us
        by_kind[kind] = by_kind.get(kind, 0.0) + us
        guessed += us if before is None and name != UNKNOWN else 0.0
        labelled.append(event._replace(name=f"{name}: {event.name}"))
    ranked = lambda sums: dict(sorted(sums.items(), key=lambda item: -item[1]))  # noqa: E731
    told = {"parts": ranked(by_part), "kinds": ranked(by_kind), "by_neighbours": guessed}
    return kernels(labelled, steps) | told


# --- a step ---------------------------------------------------------------------------------------------------------


class Stepping:
    """A compiled step that goes on from its own state, with the same batch."""

    def __init__(self, step: Any, state: Any, batch: dict[str, Any]) -> None:
        self.step, self.state, self.batch = step, state, batch
        self.metrics: Any = None

    def __call__(self) -> Any:
        self.state, self.metrics = self.step(self.state, self.batch, NO_LIMIT)
        return self.state, self.metrics


def config_of(variant: str, tiny: bool, workdir: str) -> Config:
    """The config of a variant, with weights that hardly move."""
    config = endless(load_config(command(variant, 0, [])).config, workdir)
    if not tiny:
        return config
    model, decoder = config.model, replace(config.model.decoder, num_hidden_layers=1, hidden_size=32)
    volume = replace(model.volume, size=(16, 16, 16), widths=(8, 8), blocks=(1, 1), layers=0)
    model = replace(model, modalities=("volume", "text"), decoder=decoder, volume=volume, text_tokens=16)
    train = replace(config.train, batch_size=min(config.train.batch_size, 4), muon=("^volume/projection",), rules=())
    task = replace(config.task, fields=("nodule_present",))
    return replace(config, model=model, train=train, task=task)


def muon_flops(config: Config, params: Any) -> float:
    """FLOPs of the Newton-Schulz iterations: x xT, its square, and their product with x, in each round."""
    total = 0.0
    taken = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(decays(params)), strict=True)
    for (path, x), matrix in taken:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not matrix or not any(re.search(pattern, name) for pattern in config.train.muon):
            continue
        # Experts are a matrix each, a kernel of [y, x, in, out] is one.
        count, shape = (x.shape[0], x.shape[1:]) if x.ndim == 3 else (1, (math.prod(x.shape[:-1]), x.shape[-1]))
        short, long = sorted(shape)
        total += count * ROUNDS * 2 * (short * short * long * (PRODUCTS - 1) + short**3)
    return total


def step_case(variant: str, tiny: bool, samples: int) -> dict[str, Any]:
    """Times, what the device does in that time, and what the step asks for."""
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(config_of(variant, tiny, folder), jax.devices()[:1])
    config, task, model, mesh, source, _ = setting
    on_host = task.collate(source.read_batch(np.arange(config.train.batch_size)))
    batch = {name: jnp.asarray(rows) for name, rows in on_host.items()}
    began = time.monotonic()
    step = compile_step(config, model, task, mesh, batch, UNTUNED if tiny else None)
    compiling = time.monotonic() - began
    bare = Stepping(step, fresh(setting), batch)
    taken, spread = seconds(bare, samples, BLOCK)
    cost = step.cost_analysis()
    row = {
        "batch_size": config.train.batch_size,
        "precision": config.model.precision,
        "ms": 1e3 * taken,
        "iqr_ms": 1e3 * spread,
        "examples_per_second": config.train.batch_size / taken,
        "compile_seconds": compiling,
        "model_flops": work_of(config.model, task, batch).flops,
        "muon_flops": muon_flops(config, bare.state.params),
        "xla_flops": cost.get("flops"),
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(bare.state)),
        "batch_bytes": sum(x.nbytes for x in batch.values()),
        "accessed_bytes": cost.get("bytes accessed"),
    }
    row |= traced(bare, Program(step.as_text()))
    fed = Stepping(step, bare.state, on_host)
    row["fed_ms"] = 1e3 * seconds(fed, samples, BLOCK)[0]
    idle = Stepping(idle_program(mesh, fed.state, batch, fed.metrics), fed.state, batch)
    row["dispatch_ms"] = 1e3 * seconds(idle, samples, BLOCK)[0]
    return row


def traced(stepping: Stepping, program: Program) -> dict[str, Any]:
    """Where the time of some steps goes, which the host sends one after another."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(TRACED):
                out = stepping()
            jax.block_until_ready(out)
        newest = max(Path(folder).rglob("*.xplane.pb"), key=os.path.getmtime)
        return attributed(device_events(newest), program, TRACED)


# --- rates ----------------------------------------------------------------------------------------------------------


def product_case(dtype: Any, tiny: bool, samples: int) -> dict[str, Any]:
    """A large product, as JAX multiplies this type where nobody asks for more: fp32 as TF32 on a GPU."""
    size = SCALES["tiny" if tiny else "full"].square
    a, b = (normal(seed, size, size, dtype=dtype) for seed in range(2))
    taken, spread = seconds(functools.partial(jax.jit(jnp.matmul), a, b), samples)
    return {"ms": 1e3 * taken, "iqr_ms": 1e3 * spread, "tflops": 2 * size**3 / taken / 1e12}


def sorted_again(x: jax.Array) -> jax.Array:
    """Sorts are never fused."""
    for _ in range(CHAIN):
        x = jnp.sort(x)
    return x


def added_behind_barriers(x: jax.Array) -> jax.Array:
    """Additions, which a compiler fuses if it drops barriers first."""
    for _ in range(CHAIN):
        x = jax.lax.optimization_barrier(x + 1)
    return x


def launch_case(samples: int) -> dict[str, Any]:
    """Time of a kernel that does next to nothing and waits for the one before, the least of two kinds of chains.

    A chain counts by the kernels that its compiled program has, where most of its operations are still there.
    """
    found, x = {}, jnp.arange(32, dtype=jnp.float32)
    for chain in (sorted_again, added_behind_barriers):
        compiled = jax.jit(chain).lower(x).compile()
        count = Program(compiled.as_text()).launches()
        taken, _ = seconds(functools.partial(compiled, x), samples)
        found[chain.__name__] = {"kernels": count, "us": 1e6 * taken, "us_each": 1e6 * taken / max(count, 1)}
    kept = [row["us_each"] for row in found.values() if row["kernels"] >= CHAIN // 2]
    if not kept:
        raise RuntimeError(f"the compiler has fused every chain: {found}")
    return {"us_each": min(kept), "chains": found}


def host_case(tiny: bool, workers: int) -> dict[str, Any]:
    """Milliseconds a case of making batches of new generated cases, in several ways."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of("", tiny, folder)
    ways = {"one thread": {"threads": 1}, "as it is": {}}
    if workers:
        ways[f"{workers} processes"] = {"workers": workers, "threads": 1}
    found = {}
    for name, fields in ways.items():
        one = replace(config, data=replace(config.data, **fields))
        found[name] = 1e3 * batch_seconds(one) / one.train.batch_size
    return {"ms_a_case": found, "cores": len(os.sched_getaffinity(0)), "as_it_is_threads": config.data.threads}


def batch_seconds(config: Config) -> float:
    """Seconds a batch, once those that were read ahead are used."""
    task, data = TASKS[config.task.name](config), config.data
    readers = data.threads * max(1, data.workers)
    batches = open_batches(config, task, make_mesh(config.mesh, jax.devices()[:1]), task.source("train"), 0)
    try:
        for _ in range(3 * readers):
            next(batches)
        began, count = time.perf_counter(), max(8, 4 * readers)
        for _ in range(count):
            next(batches)
        return (time.perf_counter() - began) / count
    finally:
        batches.close()


def cases(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and function of each case."""
    for name, dtype in (("fp32", jnp.float32), ("bf16", jnp.bfloat16)):
        yield f"ceiling matmul {name}", functools.partial(product_case, dtype, args.tiny, args.samples)
    copied = SCALES["tiny" if args.tiny else "full"].copied
    yield "ceiling copy", functools.partial(copy_case, copied, args.samples)
    yield "launch", functools.partial(launch_case, args.samples)
    for i, variant in enumerate(args.variants):
        yield f"step {variant}".strip(), functools.partial(step_case, variant, args.tiny, args.samples)
        if i == 0:
            yield "host", functools.partial(host_case, args.tiny, args.workers)


# --- bounds and tables ----------------------------------------------------------------------------------------------


def bounds(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds that a step takes at least, by what bounds it; what was not measured is left out."""
    rates = {one["name"]: one for one in rows if "refused" not in one}
    found = {}
    product = rates.get(f"ceiling matmul {'fp32' if row['precision'] == 'fp32' else 'bf16'}")
    if product:
        found["products"] = (row["model_flops"] + row["muon_flops"]) / product["tflops"] / 1e9
    if copy := rates.get("ceiling copy"):
        found["bytes"] = (2 * row["state_bytes"] + row["batch_bytes"]) / copy["tb_per_s"] / 1e9
        if row["accessed_bytes"]:
            found["accessed"] = row["accessed_bytes"] / copy["tb_per_s"] / 1e9
    if launch := rates.get("launch"):
        found["launches"] = row["kernels"] * launch["us_each"] / 1e3
    return found | {"dispatch": row["dispatch_ms"]}


def floor_of(found: dict[str, float]) -> float | None:
    """The larger one of products and bytes; None where neither is known."""
    return max((found[name] for name in ("products", "bytes") if name in found), default=None)


def markdown(report: dict[str, Any]) -> str:
    """The tables of benchmarks/README.md: steps and their bounds, parts, kinds, costliest kernels, and the host."""
    rows = [row for row in report["results"] if "refused" not in row]
    steps = [row for row in rows if row["name"].startswith("step")]
    titles = [f"`{variant}`" if (variant := row["name"][5:]) else "as it is" for row in steps]
    lines = [
        "| variant | batch | ms a step | ms, batch in host memory | examples/s | kernels | us in them | idle, us |"
    ]
    lines.append("|" + "---|" * 8)
    for title, row in zip(titles, steps, strict=True):
        lines.append(
            f"| {title} | {row['batch_size']} | {row['ms']:.3f} ± {row['iqr_ms'] / 2:.3f} | {row['fed_ms']:.3f} | "
            f"{row['examples_per_second']:,.0f} | {row['kernels']:,.0f} | {row['us']:,.0f} | {row['between_us']:,.0f} |"
        )
    names = ("products", "bytes", "accessed", "launches", "dispatch")
    lines += ["", f"| at least, ms (of it the step is x) | {' | '.join(names)} | floor |", "|" + "---|" * 7]
    for title, row in zip(titles, steps, strict=True):
        found = bounds(row, rows)
        told = [found.get(name) for name in names] + [floor_of(found)]
        cells = ["" if ms is None else f"{ms:.4f} ({row['ms'] / ms:,.1f}x)" for ms in told]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for key, word in (("parts", "part"), ("kinds", "kind")):
        lines += ["", *_shares(key, word, titles, steps)]
    guesses = [f"{row['by_neighbours']:,.0f}" for row in steps]
    lines += ["", f"Of these, us that have the part of what runs before and after: {', '.join(guesses) or 'none'}."]
    lines += ["", "| costliest kernels | us a step | calls |", "|---|---|---|"]
    for title, row in zip(titles, steps, strict=True):
        for one in row["costliest"]:
            lines.append(f"| {title}, {one['kernel'].replace('|', ' ')} | {one['us']:,.1f} | {one['calls']:.1f} |")
    host = next((row for row in rows if row["name"] == "host"), None)
    if host and steps:
        lines += ["", f"| batches made by the host ({host['cores']} cores) | ms a case | {' | '.join(titles)} |"]
        lines.append("|" + "---|" * (2 + len(steps)))
        for name, ms in host["ms_a_case"].items():
            name = f"{name}, {host['as_it_is_threads']} threads" if name == "as it is" else name
            cells = [f"{ms * row['batch_size']:.2f} ms, {ms * row['batch_size'] / row['ms']:.1f}x" for row in steps]
            lines.append(f"| {name} | {ms:.3f} | {' | '.join(cells)} |")
    rates = {row["name"]: row for row in rows}
    told = [f"{name} {rates[name]['tflops']:.1f} TFLOP/s" for name in rates if name.startswith("ceiling matmul")]
    told += [f"copy {rates['ceiling copy']['tb_per_s']:.3f} TB/s"] if "ceiling copy" in rates else []
    told += [f"{rates['launch']['us_each']:.2f} us a kernel of a chain"] if "launch" in rates else []
    lines += ["", f"Rates of this run: {', '.join(told) or 'none'}."]
    lines += [f"{row['name']}: {row['refused']}" for row in report["results"] if "refused" in row]
    return "\n".join(lines)


def _shares(key: str, word: str, titles: list[str], steps: list[dict[str, Any]]) -> list[str]:
    """A table of microseconds a step, and shares of all kernels' time."""
    lines = [f"| us in kernels a step, by {word} | {' | '.join(titles)} |", "|" + "---|" * (1 + len(titles))]
    every = {name: sum(row[key].get(name, 0.0) for row in steps) for row in steps for name in row[key]}
    for name in sorted(every, key=lambda name: -every[name]):
        cells = []
        for row in steps:
            us = row[key].get(name, 0.0)
            cells.append(f"{us:,.0f} ({us / (sum(row[key].values()) or 1.0):.1%})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="overrides, as 'a.b=1 c=2'")
    parser.add_argument("--samples", type=int, default=20, help="of each time")
    parser.add_argument("--workers", type=int, default=None, help="processes that make batches; by default one a core")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script on a CPU")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which no other case begins")
    args = parser.parse_args(arguments)
    if not args.output.absolute().parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.absolute().parent}; make it first")
    if args.workers is None:
        args.workers = 0 if args.tiny else len(os.sched_getaffinity(0))
    began, rows = time.monotonic(), []
    start_platform("auto")
    report = jax_environment(argparse.Namespace(**vars(args), overrides=[]))
    report |= {"xla_flags": os.environ.get("XLA_FLAGS", ""), "seconds": 0.0, "results": rows}
    for name, measure in cases(args):
        since = time.monotonic()
        if since - began > args.limit:
            break
        try:
            row = {"name": name} | measure()
        except Exception as error:  # what cannot be measured here is a result, and the others go on
            row = {"name": name, "refused": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        rows.append(row | {"seconds": time.monotonic() - since})
        report["seconds"] = time.monotonic() - began
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{report['seconds']:5.0f} s  {name} {row.get('refused', '')}", file=sys.stderr)
    print(f"{markdown(report)}\n\n{report['seconds']:.0f} s; {report['hardware']}; {report['versions']}")


if __name__ == "__main__":
    main(sys.argv[1:])
