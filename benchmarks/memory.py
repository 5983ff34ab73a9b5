"""Memory and time of a training step by precision, recomputation and accumulation; loss curves of the precisions.

    python benchmarks/memory.py --output benchmarks/results/memory.json               on a GPU of 80 GB, minutes
    python benchmarks/memory.py --output memory.json --scale tiny                     on a CPU
    python benchmarks/memory.py --output memory.json --variants medical curve/fp32    some of it
    python benchmarks/memory.py --output memory.json --resume                         what memory.json still lacks

`medical` is configs/medical.py with wide encoders of 64^3 voxels, `language` a dense DeepSeek-V3 decoder of 1.03 B
weights on sequences of 2048; `curve/...` trains that decoder for 300 steps on the same small batches, and comes first:
while one trains, the others compile. Each variant runs in a process of its own; those that fail are told with their
error. Activations are the temporaries of the compiled step less one fp32 gradient for each weight: whatever else the
step needs besides state and batch (casts, the optimizer's numbers, work space) counts as activations, and where
activations make the peak, not all gradients are there yet, so that too much is subtracted from the largest: savings are
rather understated.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.children import SETTINGS, run_at_once, run_in_turn, tell, wait_for_turn  # noqa: E402
from benchmarks.common import jax_environment  # noqa: E402
from configs import language as language_config  # noqa: E402
from configs import medical as medical_config  # noqa: E402
from r1jax.config import Config, DataConfig, VisionConfig  # noqa: E402
from r1jax.models.r1 import R1  # noqa: E402
from r1jax.parallel.mesh import batch_sharding, make_mesh, shard_tree  # noqa: E402
from r1jax.parallel.platform import start_platform  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.train.step import NO_LIMIT, compile_step, init_state, state_shardings  # noqa: E402

GIB = 2**30
TAIL = 30
"""Last steps over which the losses of two curves are compared."""
WARMUP = 3
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {"model": {"precision": "fp32"}},
    "bf16": {"model": {"precision": "bf16"}},
    "attention": {"model": {"precision": "bf16", "remat": "attention"}},
    "minimal": {"model": {"precision": "bf16", "remat": "minimal"}},
    "full": {"model": {"precision": "bf16", "remat": "full"}},
    "offload": {"model": {"precision": "bf16", "remat": "offload"}},
    "accumulation": {"model": {"precision": "bf16"}, "train": {"accumulation": 4}},
    "moments": {"model": {"precision": "bf16"}, "train": {"moments_on": "host"}},
    "pure": {"model": {"precision": "bf16_pure"}},
    "pure full": {"model": {"precision": "bf16_pure", "remat": "full"}},
    "scan full": {"model": {"precision": "bf16", "remat": "full", "scan_layers": True}},
}
"""What each variant changes of its experiment."""
VARIANTS = (
    *(f"medical/{name}" for name in ("fp32", "bf16", "attention", "minimal", "full", "offload", "accumulation")),
    *(f"language/{name}" for name in CHANGES),
    *(f"curve/{name}" for name in ("fp32", "bf16", "pure")),
)


def medical(tiny: bool) -> Config:
    """The medical experiment, scaled up to some 40 GiB of activations in fp32."""
    config = medical_config.get_config()
    if tiny:
        return replace(config, train=replace(config.train, batch_size=8))
    decoder = replace(
        config.model.decoder,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        intermediate_size=2048,
        moe_intermediate_size=256,
    )
    volume = VisionConfig(
        size=(64, 64, 64), widths=(128, 256, 512), blocks=(2, 2, 2), layers=4, num_attention_heads=8, merge=2
    )
    model = replace(config.model, decoder=decoder, volume=volume)
    return replace(config, model=model, train=replace(config.train, batch_size=48))


def language(tiny: bool) -> Config:
    """A dense decoder of 1.03 B weights whose average is not kept: 12 bytes of state a weight in fp32."""
    config = language_config.get_config()
    small = {"hidden_size": 64, "num_hidden_layers": 3, "first_k_dense_replace": 3, "num_nextn_predict_layers": 0}
    large = {
        "vocab_size": 32768,
        "hidden_size": 2048,
        "num_hidden_layers": 14,
        "num_attention_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 8192,
        "first_k_dense_replace": 14,
    }
    decoder = replace(config.model.decoder, **(small if tiny else small | large))
    model = replace(config.model, decoder=decoder, text_tokens=64 if tiny else 2048)
    data = DataConfig(train_cases=64, val_cases=8, test_cases=8)
    return replace(config, model=model, data=data, train=replace(config.train, batch_size=4, ema=0.0))


def curve(tiny: bool) -> Config:
    """`language` on two short sequences a step, for as many steps as its curve has."""
    config, steps, length = language(tiny), *((40, 32) if tiny else (300, 1024))
    train = replace(
        config.train,
        steps=steps,
        batch_size=2,
        learning_rate=5e-3 if tiny else 3e-4,
        final_learning_rate=3e-5,
        warmup_steps=steps // 10,
    )
    data = replace(config.data, train_cases=2 * steps)
    return replace(config, model=replace(config.model, text_tokens=length), data=data, train=train)


EXPERIMENTS = {"medical": medical, "language": language, "curve": curve}


def config_of(variant: str, tiny: bool) -> Config:
    """The experiment before the slash with the changes after it."""
    experiment, _, change = variant.partition("/")
    config = EXPERIMENTS[experiment](tiny)
    return replace(config, **{part: replace(getattr(config, part), **new) for part, new in CHANGES[change].items()})


def compiled_figures(step: Any, state: Any) -> dict[str, int | None]:
    """What a compiled step needs, in bytes.

    Args:
      step: From `compile_step`.
      state: Shapes of the train state.
    """
    memory = step.memory_analysis()
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    gradients = 4 * sum(x.size for x in jax.tree.leaves(state.params))
    return {
        "weights": sum(x.size for x in jax.tree.leaves(state.params)),
        "state": size(state),
        "arguments": arguments,
        "temporaries": temporaries,
        "host_temporaries": getattr(memory, "host_temp_size_in_bytes", None),
        "needed": arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes + temporaries,
        "compiled_peak": getattr(memory, "peak_memory_in_bytes", None),
        "activations": max(temporaries - gradients, 0),
    }


def child(variant: str, tiny: bool, stage: str, steps: int) -> None:
    """Compiles a variant's step and, in stage "measure", trains some steps when it is its turn."""
    start_platform("auto")
    config = config_of(variant, tiny)
    task, mesh = TASKS[config.task.name](config), make_mesh(config.mesh)
    model, source, size = R1(config.model, task.heads), task.source("train"), config.train.batch_size
    read = lambda i: task.collate(source.read_batch(np.arange(i * size, (i + 1) * size)))  # noqa: E731
    batch = read(0)
    abstract = jax.eval_shape(lambda: init_state(config, model, task, batch))
    began = time.perf_counter()
    step = compile_step(config, model, task, mesh, batch)
    compiled = compiled_figures(step, abstract) | {
        "batch_size": size,
        "compile_seconds": time.perf_counter() - began,
    }
    init = jax.jit(lambda: init_state(config, model, task, batch), out_shardings=shard_tree(mesh, abstract))
    init = init.lower().compile()
    if stage == "compile":
        tell(compiled)
        return
    wait_for_turn()
    state = jax.block_until_ready(jax.device_put(init(), state_shardings(config, mesh, abstract)))
    where = batch_sharding(mesh)
    told: dict[str, Any] = {"peak_before": peak()}
    if variant.startswith("curve/"):
        told |= compiled  # it has no stage of its own for that: its time is not compared
        began, losses = time.perf_counter(), []
        for i in range(config.train.steps):
            state, metrics = step(state, jax.device_put(read(i), where), NO_LIMIT)
            losses.append(metrics["loss"])
        told |= {"losses": [float(x) for x in jax.device_get(losses)], "train_seconds": time.perf_counter() - began}
    else:
        placed, times = jax.device_put(batch, where), []
        for _ in range(WARMUP + steps):
            began = time.perf_counter()
            state, metrics = step(state, placed, NO_LIMIT)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - began)
        times = times[WARMUP:]
        told |= {"step_seconds": float(np.median(times)), "slowest": max(times), "fastest": min(times)}
        told["loss"] = float(metrics["loss"])
    tell(told | {"peak": peak()})


def finished(row: dict[str, Any]) -> bool:
    """Whether a variant was measured, and not only compiled or begun."""
    return "error" not in row and ("step_seconds" in row or "losses" in row)


def peak() -> int | None:
    """Most bytes of the device that were ever in use; None on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def table(report: dict[str, Any]) -> str:
    """Markdown: memory and time of each variant, then the curves."""
    results, lines = report["variants"], []
    for experiment in ("medical", "language"):
        rows = {name.partition("/")[2]: r for name, r in results.items() if name.startswith(f"{experiment}/")}
        if not rows:
            continue
        lines += [
            f"| {experiment} | state | temporaries | activations | to fp32 | to bf16 | peak, measured | to fp32 | "
            "ms a step | to fp32 | to bf16 |",
            "|" + "---|" * 11,
        ]
        lines += [_row(name, row, rows) for name, row in rows.items()] + [""]
    curves = {name.partition("/")[2]: r for name, r in results.items() if "losses" in r}
    if curves:
        lines += ["| 300 steps | first loss | mean of the last 30 | less fp32's | s |", "|" + "---|" * 5]
        tails = {name: float(np.mean(row["losses"][-TAIL:])) for name, row in curves.items()}
        for name, row in curves.items():
            apart = f"{tails[name] - tails['fp32']:+.4f}" if "fp32" in tails else ""
            lines.append(
                f"| {name} | {row['losses'][0]:.3f} | {tails[name]:.4f} | {apart} | {row['train_seconds']:.0f} |"
            )
    return "\n".join(lines).rstrip()


def _row(name: str, row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    if "temporaries" not in row:
        words = row["error"]
        return f"| {name} | {'does not fit' if 'RESOURCE_EXHAUSTED' in words else 'failed'} |" + " |" * 9

    def size(key: str) -> str:
        return "" if row.get(key) is None else f"{row[key] / GIB:.2f}"

    def ratio(key: str, to: str) -> str:
        other = rows.get(to, {}).get(key)
        return f"{row[key] / other - 1:+.0%}" if other and row.get(key) is not None and to != name else ""

    failed = (
        "does not fit" if "RESOURCE_EXHAUSTED" in row.get("error", "") else "failed" if "error" in row else "not timed"
    )
    took = f"{1e3 * row['step_seconds']:.1f}" if "step_seconds" in row else failed
    cells = [
        *(name, size("state"), size("temporaries"), size("activations")),
        *(ratio("activations", "fp32"), ratio("activations", "bf16"), size("peak"), ratio("peak", "fp32")),
        *(took, ratio("step_seconds", "fp32"), ratio("step_seconds", "bf16")),
    ]
    return f"| {' | '.join(cells)} |"


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws the loss curves over each other; nothing where there are none."""
    curves = {name.partition("/")[2]: r["losses"] for name, r in report["variants"].items() if "losses" in r}
    if not curves:
        return
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "r1jax", "svg.fonttype": "none", "path.simplify": True}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for (name, losses), style in zip(curves.items(), ("-", "--", ":"), strict=False):
            axes.plot(np.arange(1, len(losses) + 1), np.round(losses, 4), style, label=name, linewidth=1.4)
        axes.set(xlabel="step", ylabel="loss, nats a token", yscale="log")
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON to write; the curves go beside it as SVG")
    parser.add_argument("--scale", choices=["full", "tiny"], default="full")
    parser.add_argument("--variants", nargs="+", default=[], help=f"names, or their beginnings: {', '.join(VARIANTS)}")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a variant")
    parser.add_argument("--jobs", type=int, default=6, help="processes that compile at once")
    parser.add_argument("--ahead", type=int, default=2, help="processes that get ready while one is measured")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds that a process may take")
    parser.add_argument("--resume", action="store_true", help="keep the variants that --output holds measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=["compile", "measure"], help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.child, args.scale == "tiny", args.stage, args.steps)
        return
    chosen = [name for name in VARIANTS if not args.variants or name.startswith(tuple(args.variants))]
    os.environ |= SETTINGS | os.environ  # this process asks for the device's name, and shall not take its memory
    began, before = time.perf_counter(), 0.0
    told = argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in ("child", "stage")}, overrides=[])
    about, results = jax_environment(told), dict[str, Any]()
    if args.resume and args.output.is_file():
        found = json.loads(args.output.read_text())
        if found["hardware"] != about["hardware"]:
            parser.error(f"{args.output} was measured on {found['hardware']}: choose another --output")
        results, before = found["variants"], found["seconds"]
        about["command"] = f"{found['command']}; {about['command']}"
    chosen = [name for name in chosen if not finished(results.get(name, {}))]
    results |= dict.fromkeys(chosen, {})

    def save(name: str, told: dict[str, Any], stage: str) -> None:
        results[name] = results[name] | told
        measured = {name: results[name] for name in VARIANTS if results.get(name)}
        report = about | {"variants": measured, "seconds": before + time.perf_counter() - began}
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        if "losses" in told:
            plot(report, args.output.with_suffix(".svg"))
        print(f"{report['seconds']:5.0f} s  {stage} {name}: {told.get('error', 'done')[-200:]}", file=sys.stderr)

    def words(names: list[str], stage: str) -> dict[str, list[str]]:
        same = [__file__, "--output", str(args.output), "--scale", args.scale, "--steps", str(args.steps)]
        return {name: [*same, "--child", name, "--stage", stage] for name in names if "error" not in results[name]}

    curves = [name for name in chosen if name.startswith("curve/")]
    timed = [name for name in chosen if name not in curves]
    for name, found in run_in_turn(words(curves, "measure"), ahead=args.jobs, timeout=args.timeout):
        save(name, found, "train")
    for name, found in run_at_once(words(timed, "compile"), jobs=args.jobs, timeout=args.timeout):
        save(name, found, "compile")
    for name, found in run_in_turn(words(timed, "measure"), ahead=args.ahead, timeout=args.timeout):
        save(name, found, "measure")
    report = json.loads(args.output.read_text())
    print(f"{table(report)}\n\n{report['seconds']:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
