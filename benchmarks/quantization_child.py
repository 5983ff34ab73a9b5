"""One form of one model of benchmarks/quantization.py, in a process of its own: trained, rounded and asked.

Its outcomes of the test cases, and what they should be, are left in a file that the parent judges.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Reordered, train_run  # noqa: E402
from benchmarks.drawn import DONE, Drawn, place_of  # noqa: E402
from r1jax.__main__ import dispatch  # noqa: E402
from r1jax.cli import load_config  # noqa: E402
from r1jax.config import Config, MeshConfig  # noqa: E402
from r1jax.data.synthetic import SyntheticCases  # noqa: E402
from r1jax.models.r1 import R1  # noqa: E402
from r1jax.parallel.mesh import make_mesh  # noqa: E402
from r1jax.serve.evaluate import restore_served  # noqa: E402
from r1jax.tasks.catalog import TASKS  # noqa: E402
from r1jax.tasks.medical import task as medical  # noqa: E402
from r1jax.train import checkpoints  # noqa: E402
from r1jax.train.checkpoint import Checkpoint  # noqa: E402
from r1jax.train.checkpoints import CheckpointFolder, find_checkpoint  # noqa: E402
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
BRANCHES = tuple(form for form, rules in TRAINED.items() if "running" not in rules[0])
"""Trained forms that go on from the run of floats at half of it; a running range is in the state from the start."""
FORMS = (FLOAT, *AFTER, *TRAINED)
TINY = ["--train.steps", "4", "--train.warmup_steps", "1", "--train.eval_every", "4"]
TINY += ["--data.train_cases", "128", "--data.val_cases", "64"]
BATCH = 64
"""Cases that are asked at once."""

Outcomes = dict[str, np.ndarray]


class Model(NamedTuple):
    """The runs of one seed of a config."""

    config: str
    seed: int
    work: Path
    """Folder of the runs of all models."""
    words: tuple[str, ...] = ()
    """Further overrides of train.py."""

    @property
    def folder(self) -> Path:
        """Of its runs."""
        return self.work / f"{self.config}{self.seed}"

    def command(self) -> list[str]:
        """What train.py is told, but for the form."""
        return ["--config", f"configs/{self.config}.py", "--seed", str(self.seed), *self.words]

    def made(self, form: str, cases: int) -> str:
        """What the outcomes of a form are made by."""
        return " ".join([*self.command(), form, *(["from half"] if form in BRANCHES else []), str(cases)])

    def run(self, form: str) -> Path:
        """Run folder of floats, or of a form that was trained."""
        return self.folder / folder_name(form if form in TRAINED else FLOAT)

    def codes(self, form: str) -> Path:
        """Checkpoint of a rounded form."""
        return self.folder / f"{folder_name(form)}-codes"

    def outcomes(self, form: str) -> Path:
        """File of what a form has answered."""
        return self.folder / f"{folder_name(form)}.npz"

    def trained(self, form: str) -> Checkpoint:
        """The last checkpoint of the run of floats, or of one that ends with rounding; trains where there is none."""
        half = -(-load_config(self.command()).config.train.steps // 2)
        words = [*self.command(), "--train.save_every", str(half), "--train.eval_every", str(half), "--train.keep", "2"]
        start = CheckpointFolder(self.run(FLOAT) / "checkpoints").at(half)
        if form not in TRAINED:  # a run that has ended, but without what others go on from, is made again
            return train_run(words, self.run(form), resume=start.path.is_dir()).checkpoint
        words += ["--quant", *TRAINED[form], "--train.quant_start", "0.5"]
        if form not in BRANCHES:
            return train_run(words, self.run(form), resume=True).checkpoint
        # A run goes on under its own rules alone; this one is a copy of another up to here.
        changed = (*checkpoints.FREE_TO_CHANGE, "model.quant", "train.quant_start")
        with mock.patch.object(checkpoints, "FREE_TO_CHANGE", changed):
            return train_run(words, self.run(form), resume=True, start=start).checkpoint

    def checkpoint(self, form: str) -> Checkpoint:
        """The form itself; makes what is missing."""
        if form == FLOAT:
            return self.trained(FLOAT)
        output = self.codes(form)
        if not (output / "report" / "report.json").exists():
            shutil.rmtree(output, ignore_errors=True)  # what was cut off has no report
            words = [str(self.trained(form).path), *AFTER.get(form, ()), "--output", str(output), "--resamples", "20"]
            dispatch(["quantize", *words])
        return find_checkpoint(output)

    def smaller(self, form: str) -> float:
        """How many times smaller than fp32 the whole checkpoint folder is."""
        told = json.loads((self.codes(form) / "report" / "report.json").read_text())["sizes"]
        return told["fp32_bytes"] / told["file_bytes"]


def folder_name(form: str) -> str:
    """A form's name as that of a folder."""
    return form.replace(",", "").replace(" ", "-")


def with_test_cases(config: Config, cases: int) -> Config:
    """The config with so many generated test cases."""
    return replace(config, data=replace(config.data, test_cases=cases))


def task_of(model: Model) -> Any:
    """The task, which scores what a model has answered."""
    config = load_config(model.command()).config
    return TASKS[config.task.name](config)


def read_drawn(folder: Path) -> None:
    """Has the medical task read the cases that lie in a folder from there; others it draws as ever."""

    def opened(*arguments: Any) -> SyntheticCases | Drawn:
        source = SyntheticCases(*arguments)
        place = place_of(source, folder)
        return Drawn(source, place) if (place / DONE).exists() else source

    medical.SyntheticCases = opened


def moved(found: Outcomes, shifted: Outcomes) -> float:
    """How much outcomes depend on the place of a case in its batch, which they should not.

    Args:
      found: Of all cases.
      shifted: Of the first ones, each a place earlier and the first of them last.

    Returns:
      Mean magnitude of the change over the deviation of all cases, of the outcome where that is largest.
    """
    worst = 0.0
    for name, value in found.items():
        change = np.abs(np.roll(value[: len(shifted[name])], -1, axis=0) - shifted[name])
        worst = max(worst, float(np.max(change.mean(axis=0) / np.maximum(value.std(axis=0), 1e-6))))
    return worst


def ask(checkpoint: Checkpoint, cases: int) -> tuple[Outcomes, Outcomes, float]:
    """Outcomes and targets of generated test cases in the mode that shows all.

    Args:
      checkpoint: Of floats or codes.
      cases: How many.

    Returns:
      Outcomes, targets, and how much outcomes depend on the place in the batch.
    """
    config = with_test_cases(checkpoint.config(), cases)
    task, mesh = TASKS[config.task.name](config), make_mesh(MeshConfig())
    model, mode, source = R1(config.model, task.heads), next(iter(task.modes())), task.source("test")
    params, evaluator = restore_served(checkpoint, config, model, task, mesh, source), Evaluator(model, task, mesh)
    found, targets, _ = evaluator.predict(params, source, batch_size=BATCH, modes=(mode,))
    few = np.roll(np.arange(min(BATCH, len(source))), -1)
    shifted, _, _ = evaluator.predict(params, Reordered(source, few), batch_size=BATCH, modes=(mode,))
    return found[mode], targets, moved(found[mode], shifted[mode])


def keep(file: Path, found: Outcomes, targets: Outcomes, made: str, moves: float) -> None:
    """Writes what was answered; a file that is there is whole.

    Args:
      file: Where.
      found: Outcomes.
      targets: What they should be.
      made: What they were made by.
      moves: From `moved`.
    """
    draft = file.with_suffix(".draft")
    named = {f"found.{k}": v for k, v in found.items()} | {f"target.{k}": v for k, v in targets.items()}
    with draft.open("wb") as stream:
        np.savez(stream, made=np.array(made), moved=np.array(moves), **named)
    os.replace(draft, file)


def is_kept(file: Path, made: str) -> bool:
    """Whether `keep` wrote this file, and what it holds was made by the same."""
    if not file.exists():
        return False
    with np.load(file) as told:
        return str(told["made"]) == made


def kept(file: Path) -> tuple[Outcomes, Outcomes, float]:
    """Outcomes, targets and what `moved` found, as `keep` wrote them."""
    with np.load(file) as told:
        found, targets = (
            {k.removeprefix(part): told[k] for k in told if k.startswith(part)} for part in ("found.", "target.")
        )
        return found, targets, float(told["moved"])


def main() -> None:
    """Leaves the outcomes of one form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--form", required=True, choices=FORMS)
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    model = Model(asked.config, asked.seed, asked.work, tuple(asked.overrides))
    read_drawn(asked.work / "cases")
    found, targets, moves = ask(model.checkpoint(asked.form), asked.cases)
    keep(model.outcomes(asked.form), found, targets, model.made(asked.form, asked.cases), moves)


if __name__ == "__main__":
    main()
