"""Time of a training step on 1 and on N devices, along each mesh axis, and the bandwidth of the collectives.

    python benchmarks/scaling.py --devices 8 --output benchmarks/results/scaling.json           on GPUs of one host
    python benchmarks/scaling.py --devices 8 --scale tiny --output scaling.json                 on simulated CPU devices

The model is DeepSeek-V2-Lite with 4 of its 27 layers (`h100.py`). Strong scaling keeps the batch, weak scaling gives
each device as many cases as one device has. Efficiency is the speed by tokens over that of one device, per device.
Bandwidth is what each device sends in a ring, as NCCL's tests count it: 2 (N - 1) / N of the array's bytes for a sum,
(N - 1) / N for the others. Simulated devices share the processor: their times show that the script runs, no more.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment  # noqa: E402
from benchmarks.h100_train import V2_LITE, language_config, random_tokens  # noqa: E402
from r1jax.config import Config, MeshConfig  # noqa: E402
from r1jax.models.r1 import R1  # noqa: E402
from r1jax.parallel.mesh import batch_sharding, make_mesh, shard_tree  # noqa: E402
from r1jax.parallel.platform import start_platform  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.train.step import NO_LIMIT, compile_step, init_state  # noqa: E402

AXES = ("data", "fsdp", "tensor", "expert", "sequence")
WARMUP = 2


def config_of(scale: str, mesh: MeshConfig, factor: int) -> Config:
    """The experiment on a mesh, with `factor` times the cases of one device."""
    config = language_config(V2_LITE, scale, remat="minimal")
    if scale == "tiny":  # heads, experts and cases that eight devices can divide
        decoder = replace(config.model.decoder, num_attention_heads=8)
        config = replace(config, model=replace(config.model, decoder=decoder, precision="fp32"))
        config = replace(config, train=replace(config.train, batch_size=8))
    return replace(config, mesh=mesh, train=replace(config.train, batch_size=factor * config.train.batch_size))


def step_seconds(config: Config, devices: list[jax.Device], steps: int) -> dict[str, Any]:
    """Compiles and times the step.

    Args:
      config: The experiment; its mesh has as many places as there are devices.
      devices: Those it runs on.
      steps: Timed ones.

    Returns:
      Seconds of a step (median), tokens a second, cases a step.
    """
    task, mesh, batch = TASKS[config.task.name](config), make_mesh(config.mesh, devices), random_tokens(config)
    model = R1(config.model, task.heads)
    step = compile_step(config, model, task, mesh, batch)
    fresh = partial(init_state, config, model, task, batch)
    state = jax.jit(fresh, out_shardings=shard_tree(mesh, jax.eval_shape(fresh)))()
    placed, times = jax.device_put(batch, batch_sharding(mesh)), []
    for _ in range(WARMUP + steps):
        began = time.perf_counter()
        state, metrics = step(state, placed, NO_LIMIT)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
    median = statistics.median(times[WARMUP:])
    return {"seconds": median, "tokens_per_second": batch["text"].size / median, "cases": config.train.batch_size}


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
    ways: dict[str, tuple[Callable[[jax.Array], jax.Array], jax.Array, int]] = {
        "all_reduce": (lambda x: jax.lax.psum(x, "all"), whole, 2),
        "reduce_scatter": (lambda x: jax.lax.psum_scatter(x, "all", tiled=True), whole, 1),
        "all_gather": (lambda x: jax.lax.all_gather(x, "all", tiled=True), part, 1),
        "all_to_all": (lambda x: jax.lax.all_to_all(x, "all", 0, 0, tiled=True), whole, 1),
    }
    found = {}
    for name, (function, array, times_sent) in ways.items():
        spread = jax.shard_map(
            function, mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec("all"), check_vma=False
        )
        run, times = jax.jit(spread), []
        for _ in range(WARMUP + repeats):
            began = time.perf_counter()
            jax.block_until_ready(run(array))
            times.append(time.perf_counter() - began)
        found[name] = times_sent * (count - 1) / count * 4 * length / statistics.median(times[WARMUP:])
    return found


def table(report: dict[str, Any]) -> str:
    """Markdown: a row for each axis and kind of scaling, then the collectives."""
    one, count = report["one"], report["devices"]
    lines = [
        f"| {count} devices along | scaling | cases | ms a step | tokens/s | of one device, per device |",
        "|" + "---|" * 6,
        f"| none, 1 device | | {one['cases']} | {1e3 * one['seconds']:,.1f} | {one['tokens_per_second']:,.0f} | |",
    ]
    for name, row in report["steps"].items():
        axis, _, kind = name.partition(" ")
        if "error" in row:
            lines.append(f"| {axis} | {kind} | failed: {row['error'][:80]} | | | |")
            continue
        share = row["tokens_per_second"] / one["tokens_per_second"] / count
        speed = f"{1e3 * row['seconds']:,.1f} | {row['tokens_per_second']:,.0f}"
        lines.append(f"| {axis} | {kind} | {row['cases']} | {speed} | {share:.0%} |")
    lines += ["", "| collective | GB/s sent by each device |", "|---|---|"]
    lines += [f"| {name} | {rate / 1e9:,.2f} |" for name, rate in report["collectives"].items()]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, required=True, help="beside one; simulated where there is no GPU")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write, after each measurement")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=10, help="timed steps, and timed calls of each collective")
    args = parser.parse_args(arguments)
    if args.devices < 2:
        parser.error(f"--devices is {args.devices}: scaling needs at least 2")
    if not jax.config.jax_num_cpu_devices or jax.config.jax_num_cpu_devices < args.devices:
        jax.config.update("jax_num_cpu_devices", args.devices)
    start_platform("auto")
    devices = jax.devices()[: args.devices]
    if len(devices) < args.devices:
        parser.error(f"--devices is {args.devices}, and JAX finds {len(devices)}")
    report = jax_environment(argparse.Namespace(**vars(args), overrides=[]))
    report |= {"devices": args.devices, "steps": {}}

    def save() -> None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")

    report["collectives"] = collectives(devices, 2**18 if args.scale == "tiny" else 2**30, args.steps)
    report["one"] = step_seconds(config_of(args.scale, MeshConfig(data=1), 1), devices[:1], args.steps)
    save()
    for axis in args.axes:
        mesh = replace(MeshConfig(data=1), **{axis: args.devices})
        for kind, factor in (("strong", 1), ("weak", args.devices)):
            try:
                found = step_seconds(config_of(args.scale, mesh, factor), devices, args.steps)
            except (jax.errors.JaxRuntimeError, MemoryError) as error:  # one that does not fit ends no other
                found = {"error": " ".join(str(error).split())[:300]}
            report["steps"][f"{axis} {kind}"] = found
            print(f"{axis} {kind}: {found}", file=sys.stderr)
            save()
    print(table(report))


if __name__ == "__main__":
    main(sys.argv[1:])
