"""The guard of a run: which steps count, and where the data goes on after the run was rolled back.

A step whose loss or gradient is not finite, or whose loss stands out of the last logged ones, changes no weight (the
compiled step sees to that, from the limit that is computed here). Where many in a row are refused, it is not the batch:
the run goes back to its newest checkpoint and jumps over the batches since (PaLM did so by hand: Chowdhery et al. 2022,
section 5.1); where that does not help, to one before. Limits depend on the rows of metrics.jsonl and the number of the
step alone, and jumps are written down before anything goes on, so that a run that is killed meanwhile takes the same
way again.
"""

import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from r1jax.config import TrainConfig
from r1jax.disk import flush
from r1jax.errors import UserError

JUMPS = "jumps.json"
"""File of a run folder that lists its jumps."""
HISTORY = 32
"""Logged losses that a limit is taken from."""
ENOUGH = 8
"""Logged losses without which there is no limit: those of a fresh run fall too fast."""
SIGMA = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""
LEAST = 1.5
"""Times the median that a loss may always reach: late in a run the deviations are tiny."""
PATIENCE = 10
"""Refused steps in a row after which the run goes back."""
RETRIES = 3
"""Rollbacks to one checkpoint after which an older one is tried, or the run ends."""


AHEAD = 2
"""Steps from a logged loss to the first one whose limit it enters: the next step starts before the row is read."""


class RollBack(Exception):
    """The run shall go back to a checkpoint, and leave out the batches since."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason = step, reason


class Jump(NamedTuple):
    """Batches that are left out for good."""

    step: int
    """Steps done when they are jumped over."""
    batches: int
    """How many they are."""
    reason: str
    """What was seen there, for people."""


class Guard:
    """Sets the limit of the next steps, and counts those that were refused; it never makes the device wait."""

    def __init__(self, workdir: Path, factor: float, step: int, floats: int = 0) -> None:
        """Reads what the run has logged.

        Args:
          workdir: Run folder.
          factor: `train.spike_factor`.
          step: Steps done.
          floats: Steps whose losses say nothing of those after them (`float_steps`).
        """
        self.factor, self.floats = factor, floats
        self._losses = dict(list(logged_losses(workdir, step).items())[-HISTORY - AHEAD :])
        self.streak = 0
        """Refused steps in a row, up to the last `settle`."""
        self._pending: list[jax.Array] = []

    def limit(self, step: int) -> np.float32:
        """The limit of a step's loss; steps are asked for in their order."""
        first = self.floats + 1 if step > self.floats else 1
        return np.float32(loss_limit([x for at, x in self._losses.items() if first <= at <= step - AHEAD], self.factor))

    def note(self, refused: jax.Array) -> None:
        """Takes the flag of a step, without waiting for it."""
        self._pending.append(refused)

    def take(self) -> list[jax.Array]:
        """Gives away the flags since the last call, for `settle` once they are there."""
        flags, self._pending = self._pending, []
        return flags

    def settle(self, flags: Iterable[np.ndarray]) -> int:
        """Counts steps in their order.

        Args:
          flags: Of `take`, read from the devices.

        Returns:
          How many of them were refused.
        """
        refused = [bool(flag) for flag in flags]
        for flag in refused:
            self.streak = self.streak + 1 if flag else 0
        return sum(refused)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of a row of metrics.jsonl, and sets the limit of the steps from `step + AHEAD` on."""
        if not figures["refused"] and math.isfinite(figures["loss"]):  # as `logged_losses` finds them after a restart
            self._losses[step] = figures["loss"]
            if len(self._losses) > HISTORY + AHEAD:
                del self._losses[next(iter(self._losses))]


def float_steps(config: TrainConfig) -> int:
    """Steps at the start of a run whose products are of floats, before `train.quant_start`, as the step counts them."""
    start, steps = np.float32(config.quant_start), np.float32(config.steps)
    near = max(int(config.quant_start * config.steps) - 2, 0)
    return next(done for done in range(near, config.steps + 1) if np.float32(done) / steps >= start)


def looks(figures: Mapping[str, float], limit: np.float32) -> str:
    """Says what a refused step looked like.

    Args:
      figures: Of the step: loss and gradient_norm.
      limit: Of its loss.

    Returns:
      A few words.
    """
    said = f"a loss of {figures['loss']:.4g} and a gradient of norm {figures['gradient_norm']:.4g}"
    return said + (f", the limit of the loss {limit:.4g}" if math.isfinite(limit) else "")


def loss_limit(losses: Iterable[float], factor: float) -> float:
    """Loss above which a step is refused: far above the median of the last logged ones.

    Args:
      losses: Logged losses, oldest first.
      factor: Robust standard deviations above the median; 0 sets no limit.

    Returns:
      The limit in the unit of the loss; infinity where there is none, or none yet.
    """
    known = list(losses)[-HISTORY:]
    if not factor or len(known) < ENOUGH:
        return math.inf
    middle = statistics.median(known)
    deviation = SIGMA * statistics.median(abs(loss - middle) for loss in known)
    return middle + max(factor * deviation, (LEAST - 1) * abs(middle))


def logged_losses(workdir: Path, step: int) -> dict[int, float]:
    """Losses of the accepted steps that a run has logged.

    Args:
      workdir: Run folder; without metrics.jsonl there are none.
      step: Steps done; rows after it do not count, for a killed run wrote them.

    Returns:
      Losses by step, oldest first.
    """
    file = workdir / "metrics.jsonl"
    rows: dict[int, float] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a crash cut it short
            continue
        if row["step"] <= step and "loss" in row and not row.get("refused"):
            rows[row["step"]] = row["loss"]
    return dict(sorted(rows.items()))


def read_jumps(workdir: Path) -> tuple[Jump, ...]:
    """Jumps of a run, in the order in which they were made.

    Raises:
      UserError: The file is damaged.
    """
    file = workdir / JUMPS
    try:
        return tuple(Jump(int(j["step"]), int(j["batches"]), j["reason"]) for j in json.loads(file.read_text()))
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}), so that the order of the batches is unknown: bring it back, or choose "
            "another --workdir"
        ) from None


def way_back(steps: Collection[int], jumps: Iterable[Jump]) -> int | None:
    """Chooses the checkpoint to go back to.

    Args:
      steps: Those that are kept.
      jumps: All of the run.

    Returns:
      Steps of the newest that was not gone back to `RETRIES` times; None where there is none: then it is not the data.
    """
    tried = Counter(old.step for old in jumps)
    return max((step for step in steps if tried[step] < RETRIES), default=None)


def jump(workdir: Path, step: int, seen: int, reason: str) -> None:
    """Writes down that the run goes back, and leaves out the batches that it has read since.

    Args:
      workdir: Run folder.
      step: Steps that the checkpoint has done.
      seen: Steps done when the run was stopped.
      reason: What was seen.
    """
    before = read_jumps(workdir)
    left_out = batch_after(seen, before) - batch_after(step, before)
    jumps = (*before, Jump(step, left_out, reason))
    draft = workdir / f".draft-{JUMPS}"
    draft.write_text(json.dumps([j._asdict() for j in jumps], indent=1) + "\n")
    flush(draft)
    os.replace(draft, workdir / JUMPS)
    flush(workdir)


def in_force(jumps: Iterable[Jump]) -> tuple[Jump, ...]:
    """Jumps on the way that the run takes now: whoever goes back to a step takes back those that were made after it."""
    found: tuple[Jump, ...] = ()
    for made in jumps:
        found = (*(old for old in found if old.step <= made.step), made)
    return found


def batch_after(step: int, jumps: Iterable[Jump]) -> int:
    """Number of the batch that the next step reads.

    Args:
      step: Steps done.
      jumps: All of the run.

    Returns:
      The steps done, and all batches that were left out by then.
    """
    return step + sum(j.batches for j in in_force(jumps) if j.step <= step)
