"""Time of a training step on a mesh of one device, beside the same step without any mesh.

    python benchmarks/one_device.py --output benchmarks/results/one_device.json                          on a GPU
    python benchmarks/one_device.py --output one_device.json --scale tiny --platform cpu                 small

Three programs of one step: `plain` is `jax.jit` without a word about devices; `mesh` is what `train.py --mesh.fsdp 1`
compiles, whose arguments and results lie on a mesh; `spread` is besides traced as for many devices: activations are
constrained, and attention, experts, embedding and loss are those that run under `shard_map`. They take turns in blocks
of steps within one run, `plain` twice in each round: the ratio of the two says how much of a ratio is noise.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment  # noqa: E402
from benchmarks.h100_train import TINY, V2_LITE  # noqa: E402
from benchmarks.overhead import Setting, endless, fresh, setting_of  # noqa: E402
from configs import language, medical  # noqa: E402
from r1jax.config import Config, DataConfig, MeshConfig  # noqa: E402
from r1jax.ops.axes import Placement, placed  # noqa: E402
from r1jax.parallel.mesh import batch_sharding, shard_tree  # noqa: E402
from r1jax.parallel.platform import start_platform  # noqa: E402
from r1jax.train.step import NO_LIMIT, abstract_state, make_step  # noqa: E402

PROGRAMS = ("plain", "mesh", "spread")
TURNS = (*PROGRAMS, "plain again")
"""Blocks of a round; the last is the first program once more."""
WARMUP = 2
"""Rounds that do not count."""


def config_of(name: str, scale: str) -> Config:
    """`medical` as it is by default, or a decoder with experts on sequences of 2048."""
    small = scale == "tiny"
    if name == "medical":
        config = medical.get_config(smoke=True) if small else medical.get_config()
    else:
        config = language.get_config()
        sizes = {"vocab_size": 32768, "hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 4096}
        sizes |= {"num_hidden_layers": 4, "moe_intermediate_size": 512, "n_routed_experts": 16}
        decoder = replace(V2_LITE, **(TINY if small else sizes))
        length, batch = (32, 4) if small else (2048, 16)
        model = replace(config.model, decoder=decoder, text_tokens=length, precision="fp32" if small else "bf16")
        data = DataConfig(train_cases=64, val_cases=8, test_cases=8)
        config = replace(config, model=model, data=data, train=replace(config.train, batch_size=batch))
    return replace(endless(config, "nowhere"), mesh=MeshConfig(data=1, fsdp=1))


def lowered(setting: Setting, program: str) -> Any:
    """Traces the step for one of the programs."""
    config, task, model, mesh, _, batch = setting
    step = make_step(config, model, task)

    def spread(*arguments: Any) -> Any:
        whole = lambda path, shape: (PartitionSpec(), PartitionSpec())  # noqa: E731
        with placed(Placement(mesh, {}, whole, config.mesh.expert_capacity)):
            return step(*arguments)

    abstract = abstract_state(config, model, task, mesh, batch)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    if program == "plain":
        return jax.jit(step, donate_argnums=0).lower(abstract, like, NO_LIMIT)
    where, whole = shard_tree(mesh, abstract), jax.NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        spread if program == "spread" else step,
        in_shardings=(where, batch_sharding(mesh), whole),
        out_shardings=(where, whole),
        donate_argnums=0,
    ).lower(abstract, like, NO_LIMIT)


def measure(setting: Setting, block: int, rounds: int) -> dict[str, Any]:
    """Compiles the programs, and has them do blocks of steps in turn.

    Args:
      setting: What is trained, on a mesh of one device.
      block: Steps of a block.
      rounds: Counted ones.

    Returns:
      Of each program: milliseconds a step, instructions of the optimized program, the loss of the first step; of each
      ratio to `plain` within a round: median and quartiles.
    """
    traced = {program: lowered(setting, program) for program in PROGRAMS}
    with ThreadPoolExecutor(len(traced)) as pool:
        compiled = dict(zip(traced, pool.map(lambda one: one.compile(), traced.values()), strict=True))
    compiled["plain again"] = compiled["plain"]
    state, losses, times = fresh(setting), {}, {turn: [] for turn in TURNS}
    copied = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
    for program in PROGRAMS:  # each from the same state, whose memory it would take over
        losses[program] = float(compiled[program](copied(state), setting.batch, NO_LIMIT)[1]["loss"])
    for number in range(WARMUP + rounds):
        for turn in np.roll(TURNS, number).tolist():  # so that none is always the one after the other
            jax.block_until_ready(state)
            began = time.perf_counter()
            for _ in range(block):
                state, metrics = compiled[turn](state, setting.batch, NO_LIMIT)
            jax.block_until_ready((state, metrics))
            times[turn].append(1e3 * (time.perf_counter() - began) / block)
    counted = {turn: np.array(ms[WARMUP:]) for turn, ms in times.items()}
    programs = {
        program: {
            "ms": float(np.median(counted[program])),
            "instructions": compiled[program].as_text().count(" = "),
            "loss": losses[program],
        }
        for program in PROGRAMS
    }
    return {"programs": programs, "ratios": ratios(counted), "rounds": rounds, "block": block}


def ratios(counted: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Each turn's time over that of `plain` in the same round: median and quartiles."""
    found = {}
    for turn in TURNS[1:]:
        low, middle, high = np.quantile(counted[turn] / counted["plain"], [0.25, 0.5, 0.75]).tolist()
        found[turn] = {"median": middle, "quartiles": [low, high]}
    return found


def table(report: dict[str, Any]) -> str:
    """Markdown: a row for each program of each config."""
    lines = ["| | program | ms a step | to plain | quartiles | loss of the first step, to plain |", "|" + "---|" * 6]
    for name, row in report["configs"].items():
        plain = row["programs"]["plain"]
        for program, found in row["programs"].items():
            ratio = row["ratios"]["plain again" if program == "plain" else program]
            low, high = ratio["quartiles"]
            told = f"{ratio['median']:.4f}{' (with itself)' if program == 'plain' else ''} | {low:.4f} to {high:.4f}"
            apart = abs(found["loss"] / plain["loss"] - 1)
            lines.append(f"| {name} | {program} | {found['ms']:,.3f} | {told} | {apart:.0e} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON to write, after each config")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--platform", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--configs", nargs="+", choices=["language", "medical"], default=["language", "medical"])
    parser.add_argument("--block", type=int, default=5, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=16, help="counted rounds of four blocks")
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    start_platform(args.platform)
    report = jax_environment(argparse.Namespace(**vars(args), overrides=[])) | {"configs": {}}
    for name in args.configs:
        setting = setting_of(config_of(name, args.scale), jax.devices()[:1])
        report["configs"][name] = measure(setting, args.block, args.rounds)
        report["seconds"] = time.perf_counter() - began
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{report['seconds']:5.0f} s  {name}: {report['configs'][name]['ratios']}", file=sys.stderr)
    print(table(report))


if __name__ == "__main__":
    main(sys.argv[1:])
