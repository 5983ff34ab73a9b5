"""Time of a training step on 1 and on N devices, along each mesh axis, and the bandwidth of the collectives.

    python benchmarks/scaling.py --devices 8 --output benchmarks/results/scaling.json           on GPUs of one host
    python benchmarks/scaling.py --devices 8 --scale tiny --output scaling.json                 on simulated CPU devices

The model has the widths of DeepSeek-V2-Lite, 16 of its 64 experts and 9 of its 27 layers, so that one device has room
for it and eight can divide its layers. Strong scaling keeps the batch, weak scaling gives each device as many cases as
one device has. Efficiency is the speed by tokens over that of one device, per device. Beside it stands what the
compiled step sends (`docs/parallel.md`), and how far the loss of the first step is from that of one device.
Bandwidth is what each device sends in a ring, as NCCL's tests count it: 2 (N - 1) / N of the array's bytes for a sum,
all of them for a permutation, (N - 1) / N for the others. Simulated devices share the processor: their times show that
the script runs, no more; bytes and losses are what they would be elsewhere, but for the CPU's compiler, which sends
bf16 as fp32 and sums gradients whole.

All programs are compiled first, several at once; half of `--limit` after the start no further one is begun, and at the
limit no measurement. The report names what was left out.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment  # noqa: E402
from benchmarks.h100_train import V2_LITE, language_config, random_tokens  # noqa: E402
from r1jax.config import Config, MeshConfig  # noqa: E402
from r1jax.errors import UserError  # noqa: E402
from r1jax.models.r1 import R1  # noqa: E402
from r1jax.parallel.collectives import collectives as exchanges  # noqa: E402
from r1jax.parallel.mesh import batch_sharding, check_batch, check_model, make_mesh, shard_tree  # noqa: E402
from r1jax.parallel.platform import start_platform  # noqa: E402
from r1jax.parallel.stages import into_stages, stages_on  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.train.step import NO_LIMIT, compile_step, init_state  # noqa: E402

AXES = ("data", "fsdp", "tensor", "expert", "sequence", "pipe")
WARMUP = 2


def config_of(scale: str, mesh: MeshConfig, factor: int) -> Config:
    """The experiment on a mesh, with `factor` times the cases of one device."""
    config = language_config(V2_LITE, scale, remat="minimal")
    # One dense layer and eight with experts, which are one program: it is compiled in the time of a layer.
    decoder = replace(config.model.decoder, num_hidden_layers=9, first_k_dense_replace=1)
    config = replace(config, model=replace(config.model, decoder=replace(decoder, n_routed_experts=16)))
    config = replace(config, model=replace(config.model, scan_layers=True))
    if scale == "tiny":  # heads and cases that eight devices can divide
        decoder = replace(config.model.decoder, num_attention_heads=8, vocab_size=264)
        config = replace(config, model=replace(config.model, decoder=decoder, text_tokens=32, precision="fp32"))
        config = replace(config, train=replace(config.train, batch_size=8))
    return replace(config, mesh=mesh, train=replace(config.train, batch_size=factor * config.train.batch_size))


class Ready(NamedTuple):
    """A step that is compiled, and how to begin."""

    config: Config
    mesh: Mesh
    step: Any
    fresh: Any
    """Compiled too; makes the weights, layer by layer."""


def compiled(config: Config, devices: list[jax.Device]) -> Ready:
    """Compiles the step of an experiment whose mesh has as many places as there are devices."""
    task, mesh, batch = TASKS[config.task.name](config), make_mesh(config.mesh, devices), random_tokens(config)
    check_model(mesh.shape, config.model)
    check_batch(mesh, config.train.batch_size)
    model = R1(config.model, task.heads)
    fresh = partial(init_state, config, model, task, batch)
    init = jax.jit(fresh, out_shardings=shard_tree(mesh, jax.eval_shape(fresh))).lower().compile()
    return Ready(config, mesh, compile_step(config, model, task, mesh, batch), init)


def step_seconds(ready: Ready, steps: int) -> dict[str, Any]:
    """Times the step.

    Args:
      ready: The step.
      steps: Timed ones.

    Returns:
      Seconds of a step (median and quartiles), tokens a second, cases a step, bytes that a device sends in a step on
      average, loss of the first step.
    """
    config, mesh, step, fresh = ready
    state = into_stages(fresh(), mesh, stages_on(mesh, config.mesh, config.model.decoder))
    batch = random_tokens(config)
    placed, times, losses = jax.device_put(batch, batch_sharding(mesh)), [], []
    for _ in range(WARMUP + steps):
        began = time.perf_counter()
        state, metrics = step(state, placed, NO_LIMIT)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
        losses.append(float(metrics["loss"]))
    low, median, high = statistics.quantiles(times[WARMUP:], n=4, method="inclusive")
    sent = sum(one.wire_bytes for one in exchanges(step.as_text(), mesh) if not one.rare)
    return {
        "seconds": median,
        "quartiles": [low, high],
        "tokens_per_second": batch["text"].size / median,
        "cases": config.train.batch_size,
        "sent_bytes": sent,
        "loss": losses[0],
    }


def collectives(devices: list[jax.Device], size: int, repeats: int) -> dict[str, float]:
    """Bytes a second that each device sends, of each collective.

    Args:
      devices: Along one axis.
      size: Bytes of the array that a device holds before a sum, or after a gather.
      repeats: Timed calls.
    """
    count = len(devices)
    mesh = Mesh(devices, ("all",))
    length = size // 4 // count**2 * count**2
    whole = jax.device_put(jnp.ones((count * length,), jnp.float32), NamedSharding(mesh, PartitionSpec("all")))
    part = jax.device_put(jnp.ones((length,), jnp.float32), NamedSharding(mesh, PartitionSpec("all")))
    around = [(i, (i + 1) % count) for i in range(count)]
    share = (count - 1) / count
    ways: dict[str, tuple[Callable[[jax.Array], jax.Array], jax.Array, float]] = {
        "all_reduce": (lambda x: jax.lax.psum(x, "all"), whole, 2 * share),
        "reduce_scatter": (lambda x: jax.lax.psum_scatter(x, "all", tiled=True), whole, share),
        "all_gather": (lambda x: jax.lax.all_gather(x, "all", tiled=True), part, share),
        "all_to_all": (lambda x: jax.lax.all_to_all(x, "all", 0, 0, tiled=True), whole, share),
        "collective_permute": (lambda x: jax.lax.ppermute(x, "all", around), whole, 1.0),
    }
    found = {}
    for name, (function, array, sent) in ways.items():
        spread = jax.shard_map(
            function, mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec("all"), check_vma=False
        )
        run, times = jax.jit(spread), []
        for _ in range(WARMUP + repeats):
            began = time.perf_counter()
            jax.block_until_ready(run(array))
            times.append(time.perf_counter() - began)
        found[name] = sent * 4 * length / statistics.median(times[WARMUP:])
    return found


def table(report: dict[str, Any]) -> str:
    """Markdown: a row for each axis and kind of scaling, then the collectives."""
    one, count = report["one"], report["devices"]
    lines = [
        f"| {count} devices along | scaling | cases | ms a step | tokens/s | of one device, per device | "
        "MiB a device sends | loss, to one device |",
        "|" + "---|" * 8,
        f"| none, 1 device | | {one['cases']} | {1e3 * one['seconds']:,.1f} | {one['tokens_per_second']:,.0f} | | | |",
    ]
    for name, row in report["steps"].items():
        axis, _, kind = name.partition(" ")
        if "error" in row:
            lines.append(f"| {axis} | {kind} | failed: {row['error'][:80]} | | | | | |")
            continue
        share = row["tokens_per_second"] / one["tokens_per_second"] / count
        speed = f"{1e3 * row['seconds']:,.1f} | {row['tokens_per_second']:,.0f}"
        apart = f"{abs(row['loss'] / one['loss'] - 1):.0e}" if kind == "strong" else ""  # else it has other cases
        sent = f"{row['sent_bytes'] / 2**20:,.1f}"
        lines.append(f"| {axis} | {kind} | {row['cases']} | {speed} | {share:.0%} | {sent} | {apart} |")
    lines += ["", "| collective | GB/s sent by each device |", "|---|---|"]
    lines += [f"| {name} | {rate / 1e9:,.2f} |" for name, rate in report["collectives"].items()]
    if report["simulated"]:
        lines += ["", "Simulated devices of one processor: times and rates mean nothing, bytes and losses do."]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, required=True, help="beside one; simulated where there is no GPU")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write, after each measurement")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=10, help="timed steps, and timed calls of each collective")
    parser.add_argument("--jobs", type=int, default=4, help="programs that are compiled at once")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for all")
    args = parser.parse_args(arguments)
    if args.devices < 2:
        parser.error(f"--devices is {args.devices}: scaling needs at least 2")
    began = time.perf_counter()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if not jax.config.jax_num_cpu_devices or jax.config.jax_num_cpu_devices < args.devices:
        jax.config.update("jax_num_cpu_devices", args.devices)
    start_platform("auto")
    devices = jax.devices()[: args.devices]
    if len(devices) < args.devices:
        parser.error(f"--devices is {args.devices}, and JAX finds {len(devices)}")
    report = jax_environment(argparse.Namespace(**vars(args), overrides=[]))
    report |= {"devices": args.devices, "simulated": devices[0].platform == "cpu", "steps": {}}

    def save() -> None:
        report["seconds"] = time.perf_counter() - began
        args.output.write_text(json.dumps(report, indent=1) + "\n")

    report["collectives"] = collectives(devices, 2**18 if args.scale == "tiny" else 2**30, args.steps)
    save()
    meshes = {axis: replace(MeshConfig(data=1), **{axis: args.devices}) for axis in args.axes}
    pool = ThreadPoolExecutor(args.jobs)
    one = pool.submit(compiled, config_of(args.scale, MeshConfig(data=1), 1), devices[:1])
    waiting = {
        f"{axis} {kind}": pool.submit(compiled, config_of(args.scale, mesh, factor), devices)
        for kind, factor in (("strong", 1), ("weak", args.devices))
        for axis, mesh in meshes.items()
    }
    wait(waiting.values(), timeout=began + args.limit / 2 - time.perf_counter())
    pool.shutdown(cancel_futures=True)  # once those are done that are begun: what is timed shall be alone
    report["one"] = step_seconds(one.result(), args.steps)
    for name, ready in waiting.items():
        report["steps"][name] = found = measured(ready, args.steps, began + args.limit - time.perf_counter())
        print(f"{name}: {found}", file=sys.stderr)
        save()
    print(table(report))


def measured(ready: Future[Ready], steps: int, left: float) -> dict[str, Any]:
    """`step_seconds`, or {"error": why not}; one that does not fit ends no other."""
    if left < 0 or ready.cancelled():
        return {"error": f"not {'compiled' if ready.cancelled() else 'measured'} within --limit"}
    try:
        return step_seconds(ready.result(), steps)
    except (jax.errors.JaxRuntimeError, MemoryError, UserError) as error:
        return {"error": " ".join(str(error).split())[:300]}


if __name__ == "__main__":
    main(sys.argv[1:])
