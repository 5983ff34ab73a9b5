"""What rounding costs: a medical and a language model in floats, quantized after training, and trained with rounding.

    python benchmarks/quantization.py --output benchmarks/results/quantization.json --seeds 0 1 2 3 4 --jobs 16
    python benchmarks/quantization.py --output q.json --tiny --cases 64 --sequences 64          minutes on a CPU

Every seed (of weights and dropout; all see the same cases in the same order) trains five runs of equal length: one of
floats, the control, and four whose second half has rounded products (int8: with a scale a token, with running ranges,
and with these for down_proj too; and int4 weights). All but those with running ranges share the control's first half:
on a GPU two runs of one seed part before anything is rounded. The control is quantized to each of the `AFTER` forms by
`r1jax quantize`, the others by their own rules. All are scored on the same generated test cases, none of which was
trained on; each change is that against the run of floats of its seed, its interval from resampling cases in pairs. Some
cases are asked again in another place of their batch, which must change nothing: a compiled program may be wrong. A
model that was trained with rounding is another model, not the same one rounded: its change holds the noise of training
too. Sizes are those of whole checkpoint folders.

Cases are drawn once, by all cores, into the folder of the runs. Every form is a process, `--jobs` of them at once, on
the GPUs in turn; the first seed goes ahead, so that the others find its compiled training step. The file is written
after every form, and a form that it has is not done again: a run that was cut off, or ends by `--minutes`, goes on
where it was. Words after `--` are overrides of train.py.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.children import SETTINGS  # noqa: E402
from benchmarks.common import jax_environment  # noqa: E402
from benchmarks.drawn import draw  # noqa: E402
from benchmarks.lanes import run_lanes  # noqa: E402
from benchmarks.quantization_child import (  # noqa: E402
    AFTER,
    BRANCHES,
    FLOAT,
    FORMS,
    TINY,
    Model,
    Outcomes,
    folder_name,
    is_kept,
    kept,
    task_of,
    with_test_cases,
)
from r1jax.cli import load_config  # noqa: E402
from r1jax.serve.quantize_report import effect, score_of  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402


def agreement(task: Any, a: Outcomes, b: Outcomes, targets: Outcomes) -> float | None:
    """Share of the calls of binary findings that are the same, at the thresholds that the first model sets."""
    points = task.operating_points(a, targets)
    same = [(a[name] >= point["threshold"]) == (b[name] >= point["threshold"]) for name, point in points.items()]
    return float(np.mean(same)) if same else None


MOVED = 0.01
"""What `moved` may find of a program that is compiled right: rounding of sums in another order."""


class Unit(NamedTuple):
    """What has one row: a form of a model, and of how many cases."""

    model: Model
    form: str
    cases: int

    @property
    def name(self) -> str:
        """Of its process."""
        return f"{self.model.config}{self.model.seed}-{folder_name(self.form)}"

    def command(self) -> list[str]:
        """Words that start its process."""
        model, script = self.model, Path(__file__).with_name("quantization_child.py")
        words = [str(script), "--work", str(model.work), "--config", model.config, "--seed", str(model.seed)]
        return [*words, "--form", self.form, "--cases", str(self.cases), "--", *model.words]

    def answered(self, form: str | None = None) -> bool:
        """Whether the outcomes of this form, or of another one of the same model, are there."""
        form = form or self.form
        return is_kept(self.model.outcomes(form), self.model.made(form, self.cases))

    def compiled(self) -> bool:
        """Whether the training step is in the cache of compiled programs: a row of figures was logged."""
        rows = self.model.run(self.form) / "metrics.jsonl"
        return rows.exists() and rows.stat().st_size > 0


def judged(unit: Unit, resamples: int, every: int = 1) -> dict[str, Any]:
    """The row of a form that has answered, as has the run of floats of its seed.

    Args:
      unit: The form.
      resamples: Of the cases, for the interval of the change.
      every: Only the first of so many cases counts.

    Returns:
      Score, and change against floats.
    """
    task, (before, targets, _) = task_of(unit.model), _thinned(unit.model.outcomes(FLOAT), every)
    after, _, moved = _thinned(unit.model.outcomes(unit.form), every)
    row = {"config": unit.model.config, "seed": unit.model.seed, "form": unit.form}
    row |= {"cases": len(next(iter(targets.values()))), "moved": moved}
    if unit.form == FLOAT:
        return row | {"score": task.score(task.figures(before, targets))}
    found = effect(score_of(task), before, after, targets, resamples)
    return row | {
        "score": found.after,
        "floats": found.before,
        "change": found.change,
        "low": found.low,
        "high": found.high,
        "agreement": agreement(task, before, after, targets),
        "smaller": unit.model.smaller(unit.form),
    }


def _thinned(file: Path, every: int) -> tuple[Outcomes, Outcomes, float]:
    found, targets, moved = kept(file)
    return {k: v[::every] for k, v in found.items()}, {k: v[::every] for k, v in targets.items()}, moved


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
    heads = ["config", "form", "seeds", "cases", "change, points (95 %)", "largest loss in a seed's interval"]
    heads += ["same calls", "smaller"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
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
        cases = " or ".join(dict.fromkeys(f"{row['cases']:,}" for row in group))
        lines.append(f"| {name} | {form} | {len(group)} | {cases} | {told} |")
    for row in rows:
        if row.get("moved", 0) > MOVED:
            what = f"{row['config']}, seed {row['seed']}, {row['form']}"
            lines += ["", f"WRONG: {what}: outcomes move by {row['moved']:.1%} with the place of a case in its batch."]
    return "\n".join(lines)


def draw_cases(unit: Unit) -> None:
    """Draws the generated cases of the medical config, which are the same for all seeds, by all cores."""
    config = with_test_cases(load_config(unit.model.command()).config, unit.cases)
    task, cores = TASKS[config.task.name](config), len(os.sched_getaffinity(0))
    for split in ("train", "val", "test"):
        draw(task.source(split), unit.model.work / "cases", cores)


def _on_cpu() -> None:
    """Those who judge leave the GPUs alone."""
    jax.config.update("jax_platforms", "cpu")


class Measurement:
    """Rows on their way into the file."""

    def __init__(self, asked: argparse.Namespace) -> None:
        """Takes the command line; rows that the file has are kept."""
        self.asked, self.began = asked, time.monotonic()
        self.environment = jax_environment(asked)
        before = json.loads(asked.output.read_text()) if asked.output.exists() else {"rows": []}
        self.rows, self.kept = before["rows"], {key: x for key, x in before.items() if key not in self.environment}
        words = (*(TINY if asked.tiny else []), *asked.overrides)
        cases = {"medical": asked.cases, "language": asked.sequences}
        self.units: list[Unit] = []
        for name, seed, form in wanted(asked, self.rows):
            model = Model(name, seed, asked.work, words)
            control, unit = (Unit(model, which, cases[name]) for which in (FLOAT, form))
            # A file of rows may have come without the folder of its runs: then the run of floats is made again.
            self.units += [one for one in dict.fromkeys((control, unit)) if one not in self.units]
        self.first: dict[tuple[str, str], Unit] = {}
        for unit in self.units:
            self.first.setdefault((unit.model.config, unit.form), unit)
        self.ended: set[str] = set()

    def ready(self, unit: Unit) -> bool:
        """Whether a form may start: what it is made of is there, or the step that another seed compiles."""
        if time.monotonic() - self.began > 60 * self.asked.minutes:
            return False
        if unit.form in (*AFTER, *BRANCHES) and not unit.answered(FLOAT):
            return False
        if unit.form in AFTER:  # which weights are balanced differs by seed, and so do their programs
            return True
        ahead = self.first[unit.model.config, unit.form]
        return unit == ahead or ahead.name in self.ended or ahead.compiled()

    def run(self) -> list[str]:
        """Does all that has no row.

        Returns:
          Names of the processes that failed.
        """
        todo = {unit.name: unit for unit in self.units}
        left = {name: unit for name, unit in todo.items() if not unit.answered()}
        self.ended |= todo.keys() - left.keys()
        has = {(row["config"], row["seed"], row["form"]) for row in self.rows}
        answered = [
            unit
            for name, unit in todo.items()
            if name not in left and (unit.model.config, unit.model.seed, unit.form) not in has
        ]
        medical = [unit for unit in left.values() if unit.model.config == "medical"]
        if medical:
            draw_cases(medical[0])
        seconds, failed, gpus = {}, [], jax.device_count() if jax.default_backend() == "gpu" else 0
        lanes = run_lanes(
            {name: unit.command() for name, unit in left.items()},
            lambda name: self.ready(todo[name]),
            jobs=self.asked.jobs,
            gpus=gpus,
            logs=self.asked.work / "logs",
            ahead=frozenset(unit.name for unit in self.first.values()),
        )
        judges = max(1, min(self.asked.jobs, len(os.sched_getaffinity(0)) // 2))
        with ProcessPoolExecutor(judges, multiprocessing.get_context("spawn"), _on_cpu) as pool:
            judging: dict[Future[dict[str, Any]], Unit] = {}
            for ended in lanes:
                if ended is not None:
                    self.ended.add(ended.name)
                    seconds[ended.name] = ended.seconds
                    if ended.code:
                        failed.append(ended.name)
                    else:
                        answered.append(todo[ended.name])
                for unit in [unit for unit in answered if unit.answered(FLOAT)]:
                    answered.remove(unit)
                    judging[pool.submit(judged, unit, self.asked.resamples, self.asked.every)] = unit
                for future in [future for future in judging if future.done()]:
                    self.note(future.result(), seconds.get(judging.pop(future).name))
            for future, unit in judging.items():
                self.note(future.result(), seconds.get(unit.name))
        return failed

    def note(self, row: dict[str, Any], seconds: float | None) -> None:
        """Adds a row, the seconds of its process and where it ran, in the place of an earlier one; writes the file."""
        same = {key: row[key] for key in ("config", "seed", "form")}.items()
        self.rows = [other for other in self.rows if not same <= other.items()]
        self.rows.append(row | {"seconds": seconds, "hardware": self.environment["hardware"]})
        draft = self.asked.output.with_suffix(".draft")
        draft.write_text(json.dumps(self.environment | self.kept | {"rows": self.rows}, indent=1) + "\n")
        os.replace(draft, self.asked.output)


def main() -> int:
    """Does what the file has no row of, and writes each row when it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="JSON file; rows that it has are kept")
    parser.add_argument("--work", default=Path("runs/quantization"), type=Path, help="folder of the runs and the cases")
    parser.add_argument("--configs", nargs="+", default=["medical", "language"], choices=["medical", "language"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once; they share the GPUs")
    parser.add_argument("--cases", type=int, default=12288, help="generated test cases of the medical config")
    parser.add_argument("--sequences", type=int, default=2048, help="generated test sequences of the language config")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--every", type=int, default=1, help="only the first of so many test cases is judged")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no other form is begun")
    parser.add_argument("--tiny", action="store_true", help="four steps, to see that it runs")
    parser.add_argument("overrides", nargs="*", help="overrides of train.py, after --")
    asked = parser.parse_args()
    for name in ("jobs", "cases", "sequences", "resamples", "every"):
        if vars(asked)[name] < 1:
            parser.error(f"--{name} {vars(asked)[name]}: at least 1")
    if not asked.output.absolute().parent.is_dir():
        parser.error(f"--output {asked.output}: there is no folder {asked.output.absolute().parent}; make it first")
    if asked.output.exists():
        before = json.loads(asked.output.read_text())["arguments"]
        told = {name: vars(asked)[name] for name in ("cases", "sequences", "every", "tiny", "overrides")}
        if other := [name for name, value in told.items() if before.get(name, value) != value]:
            parser.error(
                f"--output {asked.output}: its rows were made with other {', '.join(other)}; name another file"
            )
    os.environ |= SETTINGS | os.environ  # the memory is the processes'
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the processes too
    measurement = Measurement(asked)
    failed = measurement.run()
    print(summary(measurement.rows))
    if failed:
        print(f"failed: {', '.join(failed)}; {asked.work / 'logs'} says why, and the same command tries again")
    elif left := list(wanted(asked, measurement.rows)):
        print(f"{asked.minutes:g} minutes are over: the same command goes on with {len(left)} forms")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
