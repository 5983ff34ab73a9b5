"""Scores the same cases with the same weights in fp32 and in the types of the config, compiled in several ways.

    python benchmarks/precision_gap.py --checkpoint runs/fraud_handbook --output gap.json --cases 20000

For a model that scores worse in bf16 than in fp32: rounding moves every case a little, a wrong kernel some of them far.
Each way has a process of its own, as XLA's flags are read once. `verified` has XLA compare each of its Triton fusions
with what its older code generator makes of it, and is refused where they differ; it needs a GPU. A flag that this
version of XLA lacks refuses its way too. All cases are scored in their order and backwards: a case that scores
otherwise beside other cases has met a wrong kernel, whatever the precision.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.children import run_at_once, tell  # noqa: E402

WAYS = {
    "fp32": "",
    "as it is": "",
    "without kernels of ours and cuDNN's attention": "",
    "without Triton's products": "--xla_gpu_enable_triton_gemm=false",
    "without Triton's rewritten fusions": "--xla_gpu_experimental_enable_fusion_block_level_rewriter=false",
    "without Triton's fusions of other kinds": "--xla_gpu_experimental_enable_triton_heroless_priority_fusion=false",
    "without Triton's fusions around sums": "--xla_disable_hlo_passes=triton-softmax-rewriter",
    "rounded wherever the program says so": "--xla_allow_excess_precision=false",
    "verified": "--xla_gpu_verify_triton_fusion_numerics=true",
}
"""Flags of XLA for each way; the first is what the others are held against."""
FAR = 0.1
"""Change of a probability that is counted."""


def outcomes(asked: argparse.Namespace, way: str) -> dict[str, Any]:
    """What a way says of the first cases: score, and each case's outcomes."""
    from dataclasses import replace
    from unittest import mock

    from benchmarks.common import Reordered, jax_environment
    from r1jax.models.r1 import R1
    from r1jax.ops import attention, grouped_matmul
    from r1jax.parallel.mesh import make_mesh
    from r1jax.parallel.platform import start_platform
    from r1jax.serve.evaluate import restore_served
    from r1jax.tasks.catalog import TASKS
    from r1jax.train.checkpoints import find_checkpoint
    from r1jax.train.evaluation import Evaluator

    checkpoint = find_checkpoint(Path(asked.checkpoint))
    config = checkpoint.config()
    start_platform(config.platform)
    if asked.data:
        config = replace(config, data=replace(config.data, path=asked.data))
    if way == "fp32":
        config = replace(config, model=replace(config.model, precision="fp32"))
    task, mesh = TASKS[config.task.name](config), make_mesh(config.mesh)
    model, source = R1(config.model, task.heads), task.source("val")
    params, mode = restore_served(checkpoint, config, model, task, mesh, source), next(iter(task.modes()))
    plain = way.startswith("without kernels")
    with (
        mock.patch.object(attention, "is_fused", (lambda *_, **__: False) if plain else attention.is_fused),
        mock.patch.object(grouped_matmul, "_on_hopper", (lambda *_: False) if plain else grouped_matmul._on_hopper),
    ):
        evaluator, told = Evaluator(model, task, mesh), []
        for backwards in (False, True):
            order = np.arange(min(asked.cases, len(source)))
            cases = Reordered(source, order[::-1] if backwards else order)
            found, targets, _ = evaluator.predict(params, cases, batch_size=256, modes=(mode,))
            if not backwards:
                score = task.score(task.figures(found[mode], targets))  # none of one class alone
            said = {name: value for name, value in found[mode].items() if value.ndim == 1}
            told.append({name: value[::-1] if backwards else value for name, value in said.items()})
    return {
        "score": None if score is None else float(score),
        "said": {name: np.round(value, 7).tolist() for name, value in told[0].items()},
        "beside_others": max(float(np.abs(value - told[1][name]).max()) for name, value in told[0].items()),
        "environment": jax_environment(asked),
    }


def compare(ways: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How far each way is from the first.

    Args:
      ways: By name, what `outcomes` told, or {"error": why not}.

    Returns:
      A row each; changes are of all outcomes of all cases, `beside_others` is the largest from itself backwards.
    """
    base = ways.get(next(iter(WAYS)), {}).get("said")
    rows = []
    for name, told in ways.items():
        if "error" in told:
            rows.append({"way": name, "refused": told["error"]})
            continue
        row = {"way": name, "score": told["score"], "beside_others": told["beside_others"]}
        if base is not None:
            moved = np.abs(np.concatenate([np.subtract(told["said"][key], base[key]) for key in base]))
            row |= {"mean": float(moved.mean()), "largest": float(moved.max()), "far": int((moved > FAR).sum())}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| way | score | mean change | largest | over .1 | beside other cases |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "refused" in row:
            lines.append(f"| {row['way']} | refused: {row['refused'].splitlines()[-1][-120:]} | | | | |")
            continue
        changes = [f"{row['mean']:.1e}", f"{row['largest']:.1e}", str(row["far"])] if "mean" in row else [""] * 3
        score = "" if row["score"] is None else f"{row['score']:.4f}"
        lines.append(f"| {row['way']} | {score} | {' | '.join(changes)} | {row['beside_others']:.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder, or one checkpoint")
    parser.add_argument("--output", required=True, type=Path, help="JSON to write")
    parser.add_argument("--data", help="data.path, if not that of the training")
    parser.add_argument("--cases", type=int, default=20000, help="first cases of the validation part")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that each may take")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.overrides = []
    child = vars(asked).pop("child")
    if child is not None:
        del sys.argv[1:3]  # the command that is told is the parent's
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {WAYS[child]}".strip()
        tell(outcomes(asked, child))
        return
    commands = {way: [__file__, "--child", way, *sys.argv[1:]] for way in asked.ways}
    told: dict[str, dict[str, Any]] = {}
    for way, found in run_at_once(commands, jobs=asked.jobs, timeout=asked.timeout):
        told[way] = found
        environment = next((t["environment"] for t in told.values() if "environment" in t), {})
        rows = compare({name: told[name] for name in asked.ways if name in told})
        asked.output.write_text(json.dumps(environment | {"rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
