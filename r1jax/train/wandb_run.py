"""The same figures at Weights & Biases, for those who have it: one run there for a run folder, over all its starts."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1jax.config import Config
from r1jax.disk import flush
from r1jax.errors import UserError
from r1jax.fields import to_dict

RECORD = "wandb.json"
"""File of a run folder that holds the id of its run there."""


def import_wandb(project: str) -> Any:
    """The package, which is no part of r1jax.

    Args:
      project: `train.wandb`.

    Raises:
      UserError: It is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"train.wandb is {project!r}, but wandb is not installed: pip install 'r1jax[wandb]', or leave it out"
        ) from error
    return wandb


class WandbRun:
    """Sends figures; what it does with them while there is no network is the package's own affair."""

    def __init__(self, workdir: Path, config: Config, project: str) -> None:
        """Starts the run there, or goes on with that of the folder.

        Args:
          workdir: Run folder; the package writes below it.
          config: The experiment.
          project: `train.wandb`.

        Raises:
          UserError: The package is not installed, or refuses (without a key, say).
        """
        wandb = import_wandb(project)
        record = workdir / RECORD
        if not record.exists():
            draft = record.with_suffix(".draft")
            draft.write_text(json.dumps({"id": uuid.uuid4().hex[:8]}) + "\n")
            flush(draft)
            os.replace(draft, record)
        known = json.loads(record.read_text())["id"]
        told = {"name": config.name, "config": to_dict(config), "dir": str(workdir)}
        try:
            self.run = wandb.init(project=project, id=known, resume="allow", **told)
        except wandb.Error as error:
            raise UserError(
                f"train.wandb is {project!r}, but wandb refuses ({error}): mend that, set WANDB_MODE=offline, or leave "
                "the field out"
            ) from error
        # Of the run's own step: theirs only rises, and ours falls where the run goes back.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float | list[float]]) -> None:
        """Sends a row.

        Args:
          step: Steps done.
          figures: Name to number, or to a list of numbers, which is not sent.
        """
        self.run.log({"step": step, **{k: v for k, v in figures.items() if not isinstance(v, list)}})

    def close(self) -> None:
        """Sends the rest."""
        self.run.finish()
