"""What rounding costs: a medical and a language model in floats, quantized after training, and trained with rounding.

    python benchmarks/quantization.py --output benchmarks/results/quantization.json --seeds 0 1 2 3 4     hours on a CPU
    python benchmarks/quantization.py --output q.json --tiny --cases 64 --sequences 64                    minutes

Every seed (of weights and of the order of cases) trains five runs of equal length: one of floats, the control, and four
whose second half has rounded products (int8: with a scale a token, with running ranges, and with these for down_proj
too; and int4 weights). The first is quantized to each of the `AFTER` forms by `r1jax quantize`, the others by their own
rules. All are scored on the same generated test cases, none of which was trained on; each change is that against the
run of floats of its seed, its interval from resampling cases in pairs. A model that was trained with rounding is
another model, not the same one rounded: its change holds the noise of training too. Sizes are those of whole checkpoint
folders.

The file is written after every form, and a form that it has is not done again: a run that was cut off, or ends by
`--minutes`, goes on where it was. Seeds may run beside each other, each with a file of its own that `--rows` joins.
Words after `--` are overrides of train.py.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import jax_environment, train_run  # noqa: E402
from r1jax.__main__ import dispatch  # noqa: E402
from r1jax.config import MeshConfig  # noqa: E402
from r1jax.data.source import Source  # noqa: E402
from r1jax.models.r1 import R1  # noqa: E402
from r1jax.parallel.mesh import make_mesh  # noqa: E402
from r1jax.serve.evaluate import restore_served  # noqa: E402
from r1jax.serve.quantize_report import effect, score_of  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.train.checkpoint import Checkpoint  # noqa: E402
from r1jax.train.checkpoints import find_checkpoint  # noqa: E402
from r1jax.train.evaluation import Evaluator  # noqa: E402

FLOAT = "float"
AFTER = {
    "int8": ("--to", "int8"),
    "int8, static ranges": ("--to", "int8", "--activations", "static"),
    "fp8": ("--to", "fp8"),
    "int4 weights": ("--to", "int4"),
    "a fifth of fp32": ("--budget", "0.2"),
}
"""Forms made after training, and what `r1jax quantize` is told for each."""
TRAINED = {
    "int8, trained": ("int8",),
    "int8, running ranges, trained": ("int8_running",),
    "int8, all ranges running, trained": (".=int8:int8/running",),
    "int4 weights, trained": ("int4",),
}
"""Forms that were trained, with their `--quant`."""
FORMS = (FLOAT, *AFTER, *TRAINED)
TINY = ["--train.steps", "4", "--train.warmup_steps", "1", "--train.eval_every", "4", "--data.val_cases", "64"]

Outcomes = dict[str, np.ndarray]


class Kept:
    """A source that makes each batch once: all forms are scored on the same cases, which take long to make."""

    def __init__(self, source: Source) -> None:
        """Takes the source."""
        self.source, self.batches = source, {}
        self.name, self.fingerprint, self.schema = source.name, source.fingerprint, source.schema

    def __len__(self) -> int:
        """Cases."""
        return len(self.source)

    def read_batch(self, indices: np.ndarray) -> dict[str, Any]:
        """As of the source."""
        key = indices.tobytes()
        if key not in self.batches:
            self.batches[key] = self.source.read_batch(indices)
        return self.batches[key]


def predictions(checkpoint: Checkpoint, cases: int, kept: dict[str, Kept]) -> tuple[Any, Outcomes, Outcomes]:
    """Outcomes and targets of generated test cases in the mode that shows all.

    Args:
      checkpoint: Of floats or codes.
      cases: How many.
      kept: Test cases by task, filled here.

    Returns:
      Task, outcomes, targets.
    """
    config = checkpoint.config()
    config = replace(config, data=replace(config.data, test_cases=cases))
    task, mesh = TASKS[config.task.name](config), make_mesh(MeshConfig())
    model, mode = R1(config.model, task.heads), next(iter(task.modes()))
    if config.task.name not in kept:
        kept[config.task.name] = Kept(task.source("test"))
    source = kept[config.task.name]
    params = restore_served(checkpoint, config, model, task, mesh, source)
    found, targets, _ = Evaluator(model, task, mesh).predict(params, source, batch_size=64, modes=(mode,))
    return task, found[mode], targets


def agreement(task: Any, a: Outcomes, b: Outcomes, targets: Outcomes) -> float | None:
    """Share of the calls of binary findings that are the same, at the thresholds that the first model sets."""
    points = task.operating_points(a, targets)
    same = [(a[name] >= point["threshold"]) == (b[name] >= point["threshold"]) for name, point in points.items()]
    return float(np.mean(same)) if same else None


class Seed:
    """The runs of one seed of a config, made when they are asked for."""

    def __init__(self, name: str, seed: int, asked: argparse.Namespace, kept: dict[str, Kept]) -> None:
        """Takes the config's name, the command line and test cases by task."""
        self.asked, self.kept, self.work = asked, kept, Path(asked.work) / f"{name}{seed}"
        self.cases = asked.cases if name == "medical" else asked.sequences
        tiny = TINY if asked.tiny else []
        self.words = ["--config", f"configs/{name}.py", "--seed", str(seed), *tiny, *asked.overrides]
        self.floats: tuple[Any, Outcomes, Outcomes] | None = None

    def trained(self, form: str) -> Checkpoint:
        """The last checkpoint of the run of floats, or of one that ends with rounding."""
        rules = ["--quant", *TRAINED[form], "--train.quant_start", "0.5"] if form in TRAINED else []
        return train_run([*self.words, *rules], self.work / _folder(form), resume=True).checkpoint

    def measured(self, form: str) -> dict[str, Any]:
        """Score of a form, and its change against floats."""
        if self.floats is None:
            self.floats = predictions(self.trained(FLOAT), self.cases, self.kept)
        task, before, targets = self.floats
        if form == FLOAT:
            return {"score": task.score(task.figures(before, targets)), "cases": len(next(iter(targets.values())))}
        output = self.work / f"{_folder(form)}-codes"
        if not (output / "report" / "report.json").exists():
            shutil.rmtree(output, ignore_errors=True)  # what was cut off has no report
            made_from = self.trained(form if form in TRAINED else FLOAT).path
            words = [str(made_from), *AFTER.get(form, ()), "--output", str(output), "--resamples", "20"]
            dispatch(["quantize", *words])
        _, after, _ = predictions(find_checkpoint(output), self.cases, self.kept)
        found = effect(score_of(task), before, after, targets, self.asked.resamples)
        told = json.loads((output / "report" / "report.json").read_text())["sizes"]
        return {
            "score": found.after,
            "change": found.change,
            "low": found.low,
            "high": found.high,
            "agreement": agreement(task, before, after, targets),
            "smaller": told["fp32_bytes"] / told["file_bytes"],
        }


def _folder(form: str) -> str:
    return form.replace(",", "").replace(" ", "-")


def wanted(asked: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[tuple[str, int, str]]:
    """What has no row yet: config, seed and form, seed by seed."""
    done = {(row["config"], row["seed"], row["form"]) for row in rows}
    for name in asked.configs:
        for seed in asked.seeds:
            for form in FORMS:
                if form in asked.forms and (name, seed, form) not in done:
                    yield name, seed, form


def summary(rows: list[dict[str, Any]]) -> str:
    """Each form of each config over its seeds, as Markdown.

    Changes are in points: hundredths of the medical score, and of a nat for language. The interval of their mean is
    Student's over seeds; beside it stands the highest loss that a seed's own interval of cases allows.
    """
    lines = [
        "| config | form | seeds | change, points (95 %) | largest loss in a seed's interval | same calls | smaller |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, form in dict.fromkeys((row["config"], row["form"]) for row in rows if row["form"] != FLOAT):
        group = [row for row in rows if (row["config"], row["form"]) == (name, form)]
        change = 100 * np.array([row["change"] for row in group])
        spread = ""
        if len(group) > 1:
            half = stats.t.ppf(0.975, len(group) - 1) * change.std(ddof=1) / len(group) ** 0.5
            spread = f" ({change.mean() - half:+.3f} to {change.mean() + half:+.3f})"
        worst = max(-100 * row["low"] for row in group)
        same = [row["agreement"] for row in group if row["agreement"] is not None]
        calls, smaller = f"{np.mean(same):.2%}" if same else "", min(row["smaller"] for row in group)
        told = f"{change.mean():+.3f}{spread} | {worst:.3f} | {calls} | {smaller:.2f}x"
        lines.append(f"| {name} | {form} | {len(group)} | {told} |")
    return "\n".join(lines)


def main() -> None:
    """Does what the file has no row of, and writes each row when it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON file; rows that it has are kept")
    parser.add_argument(
        "--rows", type=Path, nargs="+", default=[], help="files of runs beside it, whose rows are joined"
    )
    parser.add_argument("--work", default="runs/quantization", help="folder of the runs; finished ones are kept")
    parser.add_argument("--configs", nargs="+", default=["medical", "language"], choices=["medical", "language"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--cases", type=int, default=12288, help="generated test cases of the medical config")
    parser.add_argument("--sequences", type=int, default=2048, help="generated test sequences of the language config")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no other form is begun")
    parser.add_argument("--tiny", action="store_true", help="four steps, to see that it runs")
    parser.add_argument("overrides", nargs="*", help="overrides of train.py, after --")
    asked = parser.parse_args()
    files = [file for file in (asked.output, *asked.rows) if file.exists()]
    told = [row for file in files for row in json.loads(file.read_text())["rows"]]
    rows = list({(row["config"], row["seed"], row["form"]): row for row in told}.values())
    began, seeds, kept = time.monotonic(), {}, {}
    for name, seed, form in wanted(asked, rows):
        if time.monotonic() - began > 60 * asked.minutes:
            print(f"{asked.minutes:g} minutes are over: the same command goes on with {name}, seed {seed}, {form}")
            break
        if (name, seed) not in seeds:
            seeds = {(name, seed): Seed(name, seed, asked, kept)}  # of the others nothing is kept in memory
        start = time.monotonic()
        row = {"config": name, "seed": seed, "form": form, **seeds[name, seed].measured(form)}
        rows.append(row | {"seconds": time.monotonic() - start})
        write(asked, rows)
    if asked.rows:
        write(asked, rows)
    print(summary(rows))


def write(asked: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Writes the rows, and where they were made."""
    told = argparse.Namespace(**vars(asked) | {"rows": [file.name for file in asked.rows]})
    asked.output.write_text(json.dumps(jax_environment(told) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
