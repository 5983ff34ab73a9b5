"""Compares settings of the default run by what is learned of generated cases: nothing is chosen on its test set.

    python benchmarks/medical_settings.py --output benchmarks/results/medical_settings.json --seeds 0 1 2 --jobs 6 \\
        --variants "" "model.text_merge=1" "train.muon= train.rules="

A variant is named by the overrides of train.py that make it, with "," between the words of a list, and "" is the
default run itself; the first is what the others are held against. Each is trained by each seed, in a process of its
own, and its averaged weights after the last step are judged on `--cases` cases of the validation part: AUC of presence,
and of malignancy from picture and record and from each alone; `way` is how far malignancy has come from chance to what
is attainable. The cases are those of `data.seed` for all: cores draw them once, into the folder of the runs. Each
result is written as soon as it is there.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.children import compare, variant_options  # noqa: E402
from r1jax.config import Config  # noqa: E402
from r1jax.data.source import Source  # noqa: E402
from r1jax.errors import run_main  # noqa: E402
from r1jax.tasks.metrics import roc_auc  # noqa: E402

FIGURES = ("presence", "malignancy", "way", "image only", "record only")
BATCH = 256
"""Cases that are asked at once."""


def command(variant: str, seed: int, overrides: list[str]) -> list[str]:
    """What train.py is told."""
    words = [f"--{word}" for word in variant.split()]
    return ["--config", "configs/medical.py", "--seed", str(seed), *words, *overrides]


def judged_cases(config: Config, cases: int) -> Config:
    """The config with so many validation cases."""
    return replace(config, data=replace(config.data, val_cases=cases))


def draw_cases(args: argparse.Namespace) -> None:
    """Draws what all variants train on and are judged by, which training alone would draw at every reading."""
    from benchmarks.drawn import draw
    from r1jax.cli import load_config
    from r1jax.tasks.catalog import TASKS

    for variant in args.variants:
        config = load_config(command(variant, args.seeds[0], args.overrides)).config
        for source in (TASKS["medical"](config).source("train"), judged(config, args.cases)):
            draw(source, Path(args.workdir) / "cases", len(os.sched_getaffinity(0)))


def judged(config: Config, cases: int) -> Source:
    """The cases by which a variant is judged."""
    from r1jax.tasks.catalog import TASKS

    return TASKS["medical"](judged_cases(config, cases)).source("val")


def train_variant(variant: str, seed: int, args: argparse.Namespace) -> dict:
    """Trains and judges; in a process of its own."""
    from benchmarks.common import jax_environment, train_run
    from benchmarks.quantization_child import read_drawn
    from r1jax.models.r1 import R1
    from r1jax.parallel.mesh import make_mesh
    from r1jax.serve.evaluate import restore_served
    from r1jax.tasks.catalog import TASKS
    from r1jax.tasks.medical.modes import best_attainable
    from r1jax.train.evaluation import Evaluator

    read_drawn(Path(args.workdir) / "cases")
    name = "".join(letter if letter.isalnum() else "-" for letter in variant) or "default"
    run = train_run(command(variant, seed, args.overrides), Path(args.workdir) / f"{name}-{seed}")
    config = judged_cases(run.checkpoint.config(), args.cases)
    task, mesh = TASKS["medical"](config), make_mesh(config.mesh)
    model, source = R1(config.model, task.heads), task.source("val")
    params, modes = restore_served(run.checkpoint, config, model, task, mesh, source), tuple(task.modes())
    found, targets, _ = Evaluator(model, task, mesh).predict(params, source, batch_size=BATCH, modes=modes)

    def auc(mode: str, finding: str) -> float:
        known = ~np.isnan(targets[finding])
        return float(roc_auc(targets[finding][known], found[mode][finding][known]))

    best, malignancy = best_attainable(source)["both"]["malignancy"], auc("both", "malignancy")
    figures = (auc("both", "nodule_present"), malignancy, (malignancy - 0.5) / (best - 0.5))
    figures += tuple(auc(mode, "malignancy") for mode in ("image_only", "record_only"))
    told = {"variant": variant, "seed": seed, "steps": config.train.steps, "cases": config.data.train_cases}
    told |= {"seconds": run.seconds, "attainable": best, "figures": dict(zip(FIGURES, figures, strict=True))}
    return {"run": told, "environment": jax_environment(args)}


def table(report: dict) -> str:
    """Mean and standard deviation of each variant over its seeds, and what it gains over the first, seed by seed."""
    lines = [f"| setting | steps | seeds | {' | '.join(FIGURES)} | gain in malignancy |", "|---|" + "---|" * 8]
    by_name: dict[str, dict[int, dict]] = {}
    for run in report["runs"]:
        by_name.setdefault(run["variant"], {})[run["seed"]] = run
    first = next(iter(by_name.values()))
    for name, seeds in by_name.items():
        steps = next(iter(seeds.values()))["steps"]
        cells = [f"`{name}`" if name else "as it is", f"{steps:,}", str(len(seeds))]
        for figure in FIGURES:
            values = [run["figures"][figure] for run in seeds.values()]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}")
        both = sorted(seeds.keys() & first.keys())
        gains = [seeds[i]["figures"]["malignancy"] - first[i]["figures"]["malignancy"] for i in both]
        told = seeds is not first and len(gains) > 1
        cells.append(f"{np.mean(gains):+.4f} ± {np.std(gains, ddof=1) / len(gains) ** 0.5:.4f}" if told else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", report["note"]] if "note" in report else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    variant_options(parser, "overrides, as 'a.b=1 c=2'; '' changes nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", type=int, default=8192, help="validation cases that judge")
    parser.add_argument("--workdir", default="runs/benchmark-medical-settings")
    args = parser.parse_args()
    compare(args, __file__, "seed", args.seeds, train_variant, table, draw_cases)


if __name__ == "__main__":
    run_main(lambda _: main())
