"""What the loop around the compiled step costs: guard, telemetry, watch and saves, as a share of the step's time.

    python benchmarks/overhead.py --output benchmarks/results/overhead.json            steps of about 100 ms, on a GPU
    python benchmarks/overhead.py --output overhead.json --scale tiny --step-ms 0      small, on a CPU

One process trains a dense decoder with r1jax's own loop, telemetry, guard, heartbeat and log rows at their defaults,
and in turn as many steps of the bare compiled program, `--block` at a time. The loop's surplus is what it costs, where
waiting for a batch does not count. Then saves: how long the loop stands still for one, how long the thread beside it
writes and seals, and how much slower steps are meanwhile. Last, the step of configs/medical.py is replaced by a program
of the same arguments and results that computes nothing: what is left is dispatch and bookkeeping. Figures are medians
over blocks and saves.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment  # noqa: E402
from configs import language as language_config  # noqa: E402
from configs import medical as medical_config  # noqa: E402
from r1jax.config import Config, DataConfig, TrainConfig  # noqa: E402
from r1jax.data.source import Source  # noqa: E402
from r1jax.models.r1 import R1  # noqa: E402
from r1jax.parallel.mesh import batch_sharding, make_mesh, shard_tree  # noqa: E402
from r1jax.parallel.platform import start_platform  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.tasks.task import Task  # noqa: E402
from r1jax.telemetry import Telemetry  # noqa: E402
from r1jax.train.evaluation import Evaluator  # noqa: E402
from r1jax.train.loop import Loop  # noqa: E402
from r1jax.train.plan import example_batch  # noqa: E402
from r1jax.train.run import Run, describe, open_run, restore_or_init  # noqa: E402
from r1jax.train.step import NO_LIMIT, compile_step, init_state, make_step  # noqa: E402

FOREVER = 10**6
"""Steps that no measurement comes to."""
FIRST = 2
"""Blocks that do not count."""


class Enough(Exception):
    """The loop has done the steps that were to be measured."""


class Setting(NamedTuple):
    """What `train.py` would have made of a config."""

    config: Config
    task: Task
    model: R1
    mesh: Mesh
    source: Source
    batch: dict[str, jax.Array]


class Repeated:
    """A source that reads one batch, and gives it for every other: making cases takes no time from the loop."""

    def __init__(self, source: Source, batch_size: int) -> None:
        self.source, self.raw = source, source.read_batch(np.arange(batch_size))

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read_batch(self, indices: np.ndarray) -> dict[str, Any]:
        return {name: rows[: len(indices)] for name, rows in self.raw.items()}


@dataclass
class Blocks:
    """Takes the place of the compiled step in the loop: between the loop's blocks of steps it does bare ones."""

    step: Callable[..., Any]
    size: int
    count: int
    bare: list[float] = field(default_factory=list)
    """Seconds a step of each bare block."""
    looped: list[float] = field(default_factory=list)
    """Seconds a step of each block of the loop, from the first step's start to the start of what follows the last."""
    worked: list[float] = field(default_factory=list)
    """Seconds a step of each block of the loop in which the loop's thread had a processor: other programs of a busy
    machine do not count."""
    waited: float = 0.0
    """Seconds of this block in which the loop waited for a batch."""
    calls: int = 0
    began: float = 0.0
    thread_began: float = 0.0
    state: Any = None
    """The last one, once it was enough."""

    def __call__(self, state: Any, batch: Any, limit: Any) -> tuple[Any, dict[str, jax.Array]]:
        if self.calls % self.size == 0:
            jax.block_until_ready(state)
            if self.calls:
                self.worked.append((time.thread_time() - self.thread_began) / self.size)
                self.looped.append((time.perf_counter() - self.began - self.waited) / self.size)
            if self.calls == self.size * self.count:
                self.state = state
                raise Enough
            state = self._bare(state, batch, limit)
            self.began, self.thread_began, self.waited = time.perf_counter(), time.thread_time(), 0.0
        self.calls += 1
        return self.step(state, batch, limit)

    def _bare(self, state: Any, batch: Any, limit: Any) -> Any:
        began = time.perf_counter()
        for _ in range(self.size):
            state, metrics = self.step(state, batch, limit)
        jax.block_until_ready((state, metrics))
        self.bare.append((time.perf_counter() - began) / self.size)
        return state

    @contextmanager
    def waiting(self, _: Telemetry) -> Iterator[None]:
        """Takes the place of `Telemetry.waiting`."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def figures(self) -> dict[str, Any]:
        """Milliseconds a step, and the loop's surplus: the median of the differences of neighbours."""
        bare, looped = (1e3 * np.array(times)[FIRST:] for times in (self.bare, self.looped))
        return {
            "bare_ms": float(np.median(bare)),
            "loop_ms": float(np.median(looped)),
            "processor_ms": 1e3 * float(np.median(self.worked[FIRST:])),
            "processor_least_ms": 1e3 * min(self.worked[FIRST:]),
            "surplus_ms": float(np.median(looped - bare)),
            "surplus_quartiles_ms": np.quantile(looped - bare, [0.25, 0.75]).tolist(),
            "share": float(np.median(looped - bare) / np.median(bare)),
            "blocks": len(bare),
        }


def config_of(tiny: bool, batch_size: int, workdir: str) -> Config:
    """A dense decoder; in full, 130 M weights on sequences of 2048."""
    config = language_config.get_config()
    small = {"hidden_size": 32, "num_hidden_layers": 2, "first_k_dense_replace": 2, "num_nextn_predict_layers": 0}
    large = {
        "vocab_size": 8192,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 3072,
        "first_k_dense_replace": 12,
    }
    decoder = replace(config.model.decoder, **(small if tiny else small | large))
    precision = "fp32" if tiny else "bf16"
    model = replace(config.model, decoder=decoder, text_tokens=32 if tiny else 2048, precision=precision)
    train = replace(config.train, batch_size=batch_size)
    data = DataConfig(train_cases=max(256, 4 * batch_size), val_cases=8, test_cases=8)
    return endless(replace(config, model=model, data=data, train=train), workdir)


def endless(config: Config, workdir: str) -> Config:
    """The config with more steps than are measured, and without evaluation and saves of the loop's own.

    Weights hardly move: a batch that comes again and again would be learned by heart, until the guard sees outliers.
    """
    train = replace(config.train, steps=FOREVER, eval_every=FOREVER, save_every=FOREVER)
    train = replace(train, learning_rate=1e-9, final_learning_rate=1e-9)
    return replace(config, workdir=workdir, train=train)


def setting_of(config: Config, devices: Sequence[jax.Device] | None = None) -> Setting:
    """Task, model, mesh, source and example batch of a config, on all devices or on these."""
    task = TASKS[config.task.name](config)
    source = task.source("train")
    batch, repeated = example_batch(source, task, config.train.batch_size), Repeated(source, config.train.batch_size)
    return Setting(config, task, R1(config.model, task.heads), make_mesh(config.mesh, devices), repeated, batch)


def compiled(setting: Setting) -> Any:
    """The training step."""
    return compile_step(setting.config, setting.model, setting.task, setting.mesh, setting.batch)


def idle_step(setting: Setting) -> Any:
    """A compiled program with the step's arguments and results that computes nothing."""
    config, task, model, mesh, _, batch = setting
    state = jax.eval_shape(lambda: init_state(config, model, task, batch))
    _, metrics = jax.eval_shape(make_step(config, model, task), state, batch, NO_LIMIT)
    return idle_program(mesh, state, batch, metrics)


def idle_program(mesh: Mesh, state: Any, batch: Any, metrics: Any) -> Any:
    """The same, of a step by its arguments and metrics, or by their shapes."""
    where, whole = shard_tree(mesh, state), NamedSharding(mesh, PartitionSpec())
    zeros = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), metrics)

    def step(state: Any, batch: Any, limit: Any) -> Any:
        del batch, limit
        return state._replace(step=state.step + 1), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zeros)

    jitted = jax.jit(
        step, in_shardings=(where, batch_sharding(mesh), whole), out_shardings=(where, whole), donate_argnums=0
    )
    return jitted.lower(state, batch, NO_LIMIT).compile()


def sized(tiny: bool, workdir: str, target_ms: float) -> tuple[Setting, Any]:
    """A setting whose step takes about so long, by its batch, and the compiled step; 0 takes the batch as it is."""
    size = 8 if tiny else 16
    setting = setting_of(config_of(tiny, size, workdir))
    step = compiled(setting)
    if not target_ms:
        return setting, step
    took = 1e3 * bare_seconds(setting, step, 5)
    wanted = max(1, round(size * target_ms / took))
    print(f"batch {size}: {took:.1f} ms a step; {target_ms:g} ms are asked for", file=sys.stderr)
    if 0.7 < took / target_ms < 1.4:
        return setting, step
    setting = setting_of(config_of(tiny, wanted, workdir))
    return setting, compiled(setting)


def bare_seconds(setting: Setting, step: Any, steps: int) -> float:
    """Seconds of a step from a fresh state, after two that do not count."""
    state, times = fresh(setting), []
    for _ in range(2 + steps):
        began = time.perf_counter()
        state, metrics = step(state, setting.batch, NO_LIMIT)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:]))


def fresh(setting: Setting) -> Any:
    """A fresh state on the mesh."""
    config, task, model, mesh, _, batch = setting
    init = lambda: init_state(config, model, task, batch)  # noqa: E731
    return jax.jit(init, out_shardings=shard_tree(mesh, jax.eval_shape(init)))()


def loop_blocks(setting: Setting, run: Run, step: Any, size: int, count: int) -> Blocks:
    """Trains by r1jax's loop until so many blocks are measured."""
    config, task, model, mesh, source, batch = setting
    state, _ = restore_or_init(config, run, model, task, mesh, source, batch)
    blocks, evaluator = Blocks(step, size, FIRST + count), Evaluator(model, task, mesh, run.watch.beat)
    with mock.patch.object(Telemetry, "waiting", lambda telemetry: blocks.waiting(telemetry)):
        try:
            Loop(config, run, task, mesh, evaluator, blocks, state, source, source).fit()
        except Enough:
            return blocks
    raise AssertionError("the loop ended before it was measured")


def saves(setting: Setting, run: Run, step: Any, state: Any, blocks: Blocks, count: int) -> dict[str, Any]:
    """Saves a state as the loop does, and goes on with bare steps meanwhile.

    Returns:
      Bytes of a state, seconds for which a save holds up the steps (and the first one, for which memory of the host is
      taken), seconds until it is published, and milliseconds of a step meanwhile.
    """
    made = describe(setting.source, setting.task.pipeline)
    stood, published, meanwhile = [], [], []
    for i in range(count):
        jax.block_until_ready(state)
        began = time.perf_counter()
        meta = {"step": i + 1, "validation": None, **made}
        run.saver.save(i + 1, state, setting.config, meta, {}, say=print, then=lambda: None)
        stood.append(time.perf_counter() - began)
        while not done(run):
            began_step = time.perf_counter()
            state, metrics = step(state, setting.batch, NO_LIMIT)
            jax.block_until_ready((state, metrics))
            meanwhile.append(time.perf_counter() - began_step)
        published.append(time.perf_counter() - began)
        run.saver.wait()
    every = TrainConfig().save_every
    between = every * blocks.figures()["bare_ms"] / 1e3
    return {
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "stands_still_first_seconds": stood[0],
        "stands_still_seconds": float(np.median(stood[1:] or stood)),
        "published_after_seconds": float(np.median(published)),
        "step_meanwhile_ms": 1e3 * float(np.median(meanwhile)) if meanwhile else None,
        "save_every": every,
        "share": float(np.median(stood[1:] or stood)) / between,
    }


def done(run: Run) -> bool:
    """Whether the saver has nothing to write; it is asked for nothing else."""
    pending = run.saver._pending
    return pending is None or pending.done()


def table(report: dict[str, Any]) -> str:
    """Markdown: what the loop costs, then what a save does."""
    lines = [
        "| | bare step, ms | in the loop, ms | surplus, ms | share | processor time of the loop, ms | least |",
        "|" + "---|" * 7,
    ]
    for name in ("step", "no computation"):
        if name in report:
            row = report[name]
            share = f"{row['share']:.2%}" if name == "step" else ""
            lines.append(
                f"| {name} | {row['bare_ms']:.3f} | {row['loop_ms']:.3f} | {row['surplus_ms']:.3f} | {share} | "
                f"{row['processor_ms']:.3f} | {row['processor_least_ms']:.3f} |"
            )
    if "saves" in report:
        row = report["saves"]
        lines += [
            "",
            f"A save of {row['state_bytes'] / 1e9:.2f} GB holds up the steps for {row['stands_still_seconds']:.3f} s, "
            f"{row['share']:.1%} of {row['save_every']} steps (the default), and is published after "
            f"{row['published_after_seconds']:.1f} s.",
        ]
        if "stands_still_first_seconds" in row:
            lines[-1] += f" The first one holds them up for {row['stands_still_first_seconds']:.3f} s."
        if row["step_meanwhile_ms"] is not None:
            lines[-1] += f" A step takes {row['step_meanwhile_ms']:.1f} ms meanwhile."
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--step-ms", type=float, default=100.0, help="milliseconds a step; 0 takes what comes")
    parser.add_argument("--block", type=int, default=10, help="steps of a block, a multiple of train.log_every")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--saves", type=int, default=3)
    args = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    began = time.perf_counter()
    start_platform("auto")
    report = jax_environment(argparse.Namespace(**vars(args), overrides=[]))

    def save(name: str, figures: dict[str, Any]) -> None:
        report[name], report["seconds"] = figures, time.perf_counter() - began
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{report['seconds']:5.0f} s  {name}: {figures}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        setting, step = sized(args.scale == "tiny", f"{folder}/step", args.step_ms)
        report["batch_size"] = setting.config.train.batch_size
        with open_run(setting.config) as run:
            blocks = loop_blocks(setting, run, step, args.block, args.blocks)
            save("step", blocks.figures())
            save("saves", saves(setting, run, step, blocks.state, blocks, args.saves))
        blocks.state = None
        idle = setting_of(endless(medical_config.get_config(), f"{folder}/idle"))
        with open_run(idle.config) as run:
            save("no computation", loop_blocks(idle, run, idle_step(idle), args.block, args.blocks).figures())
    print(f"{table(report)}\n\n{report['seconds']:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
