"""What a pipeline of four devices sends in a training step, beside tensor parallelism of four, and its idle turns.

    python benchmarks/pipeline.py --output benchmarks/results/pipeline.json                     on simulated CPU devices

The model is DeepSeek-V2-Lite, 16 sequences of 4096 tokens a step. Nothing is trained: bytes are read from the program
that the compiler makes, each exchange with the turns of its loop, by the ring algorithms of NCCL; the CPU's compiler
sends bf16 as fp32, here as there. With 25 of the 27 layers (`--layers`), four devices divide all that have experts; of
all 27, two would be left over, lie on every device in parts, and come together for use. Idle turns are counted in the
table of turns that the program looks up.
"""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment  # noqa: E402
from benchmarks.h100_train import V2_LITE, language_config, random_tokens  # noqa: E402
from r1jax.config import Config, MeshConfig  # noqa: E402
from r1jax.models.r1 import R1  # noqa: E402
from r1jax.ops.pipeline import Schedule  # noqa: E402
from r1jax.parallel.collectives import collectives  # noqa: E402
from r1jax.parallel.mesh import make_mesh  # noqa: E402
from r1jax.parallel.stages import schedule_on  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.train.step import compile_step  # noqa: E402

DEVICES = 4
MESHES = {
    "tensor": MeshConfig(data=1, tensor=DEVICES),
    "pipe": MeshConfig(data=1, pipe=DEVICES),
    "pipe, interleave 2": MeshConfig(data=1, pipe=DEVICES, interleave=2),
}
SCHEDULES = [
    Schedule(devices=4, rounds=1, microbatches=4),
    Schedule(devices=4, rounds=1, microbatches=16),
    Schedule(devices=4, rounds=2, microbatches=16),
    Schedule(devices=4, rounds=1, microbatches=32, hop=2),
    Schedule(devices=16, rounds=1, microbatches=64),
    Schedule(devices=16, rounds=3, microbatches=64),
]


def config_of(layers: int, mesh: MeshConfig, scale: str) -> Config:
    """The experiment on a mesh; everything that a layer makes is kept, so that tensor parallelism sends least."""
    config = language_config(V2_LITE, scale, remat="none")
    decoder = replace(config.model.decoder, num_hidden_layers=layers)
    if scale == "tiny":  # heads that four devices can divide
        decoder = replace(decoder, num_attention_heads=4)
    config = replace(config, model=replace(config.model, decoder=decoder, scan_layers=True), mesh=mesh)
    return replace(config, train=replace(config.train, batch_size=16))


def sent(config: Config) -> dict[str, Any]:
    """Bytes that a device sends in a step on average, in all and by kind of exchange and axes."""
    task, mesh, batch = TASKS[config.task.name](config), make_mesh(config.mesh), random_tokens(config)
    compiled = compile_step(config, R1(config.model, task.heads), task, mesh, batch)
    kinds: dict[str, float] = defaultdict(float)
    for one in collectives(compiled.as_text(), mesh):
        if not one.rare:
            kinds[f"{one.kind}, {' + '.join(one.axes)}"] += one.wire_bytes
    schedule = schedule_on(mesh, config)
    found = {"bytes": sum(kinds.values()), "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]))}
    return found | ({} if schedule is None else {"microbatches": schedule.microbatches, "ticks": schedule.ticks})


def idle(schedule: Schedule) -> dict[str, Any]:
    """Share of idle turns: counted, and by the formula."""
    devices, ticks = np.indices((schedule.devices, schedule.ticks))
    counted = 1 - float(np.mean(schedule.turn(devices, ticks).busy))
    p, v, m, hop = schedule.devices, schedule.rounds, schedule.microbatches, schedule.hop
    return {"devices": p, "interleave": v, "microbatches": m, "overlap": hop == 2} | {
        "idle": counted,
        "formula": hop * (p - 1) / (v * m + hop * (p - 1)),
    }


def table(report: dict[str, Any]) -> str:
    """Markdown: bytes of each mesh, then idle turns of each schedule."""
    lines = ["| layers | 4 devices along | MiB a device sends in a step | beside tensor |", "|---|---|---|---|"]
    for layers, meshes in report["sent"].items():
        for name, row in meshes.items():
            share = row["bytes"] / meshes["tensor"]["bytes"] - 1
            lines.append(f"| {layers} | {name} | {row['bytes'] / 2**20:,.0f} | {share:+.1%} |")
    lines += [
        "",
        "| devices | interleave | microbatches | overlap | idle turns | formula |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['devices']} | {row['interleave']} | {row['microbatches']} | {'yes' if row['overlap'] else 'no'} | "
        f"{row['idle']:.1%} | {row['formula']:.1%} |"
        for row in report["idle"]
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON to write, after each program")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--layers", nargs="+", type=int, default=[25])
    args = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    report = jax_environment(argparse.Namespace(**vars(args), overrides=[]))
    report |= {"idle": [idle(schedule) for schedule in SCHEDULES], "sent": {}}
    for layers in args.layers:
        report["sent"][str(layers)] = meshes = {}
        for name, mesh in MESHES.items():
            meshes[name] = sent(config_of(layers, mesh, args.scale))
            print(f"{layers} layers, {name}: {meshes[name]['bytes'] / 2**20:,.0f} MiB", file=sys.stderr)
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main(sys.argv[1:])
