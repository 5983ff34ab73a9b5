"""Checkpoints that are complete or absent: written aside, sealed with a SHA-256 manifest, then renamed into place.

checkpoints/00000200/{state/, tokenizer/, config.json, meta.json, manifest.json}. Orbax stores the arrays but no
checksum of them, so a flipped bit would be read back unnoticed; the manifest is verified before every restore.
"""

import asyncio
import errno
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from r1jax.config import Config, differences
from r1jax.disk import flush, sha256
from r1jax.errors import UserError
from r1jax.fields import to_json
from r1jax.parallel.agree import from_first, is_first
from r1jax.train.checkpoint import MANIFEST, TOKENIZER, Checkpoint

MARGIN = 1.02
"""Room that a checkpoint takes, beside its arrays: their index, the tokenizer, whole blocks of the file system."""
FREE_TO_CHANGE = (
    "workdir",
    "platform",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.wandb",
    "train.accumulation",
    "train.memory_share",
    "train.moments_on",
    "train.hang_timeout",
    "train.spike_factor",
    "profile.",
    "data.cache.",
    "data.threads",
    "data.workers",
    "data.ahead",
    "data.plugins",
    "data.path",
    "data.mix",
    "data.split",
    "data.tokenizer",
    "train.init",
    "mesh.",
    "launch.",
    "debug.",
)
"""Fields that may differ when a run goes on: with other devices or parts the last bits may change, else nothing.

Data and plug-ins are compared by their hashes; the weights that a run started from are of the past.
"""


def write_sealed(
    final: Path,
    state: Any,
    config: Config,
    meta: dict[str, Any],
    tokenizer: Mapping[str, bytes] | None = None,
    write: Callable[[Path], None] | None = None,
) -> Checkpoint:
    """Writes a checkpoint aside, seals it and renames it into place; a failure leaves nothing.

    Several processes come here together, and each writes the arrays that it holds; the rest is done by process 0.

    Args:
      final: Where it shall be; nothing may be there, or an empty folder.
      state: Tree of arrays.
      config: The config that describes them.
      meta: JSON-able.
      tokenizer: Tokenizer files by name, kept byte for byte.
      write: Writes the arrays into a folder in another form than Orbax's; None is Orbax's.

    Returns:
      The published checkpoint.

    Raises:
      OSError: The disk is full or the folder cannot be written.
    """
    draft = final.with_name(f".draft-{final.name}")
    needed = sum(x.nbytes for x in jax.tree.leaves(state))
    try:
        from_first(lambda: _make_room(draft, needed))
        (write or functools.partial(_write_state, state))(draft.absolute())
        from_first(lambda: _seal(draft, final, config, meta, tokenizer or {}))
    except OSError:
        if is_first():
            shutil.rmtree(draft, ignore_errors=True)
        raise
    return Checkpoint(final)


def _write_state(state: Any, draft: Path) -> None:
    _write_arrays(draft / "state", state)


def _make_room(draft: Path, needed: int) -> None:
    """Makes an empty folder where so many bytes can be written."""
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    if shutil.disk_usage(draft).free < needed * MARGIN:  # asked first: Orbax fails late and with pages of tracebacks
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed / 2**20:,.1f} MiB are needed")


def _seal(draft: Path, final: Path, config: Config, meta: dict[str, Any], tokenizer: Mapping[str, bytes]) -> None:
    """Puts the rest beside the arrays, sums up every file, and publishes the checkpoint under its name."""
    (draft / "config.json").write_text(to_json(config))
    (draft / "meta.json").write_text(json.dumps(meta, indent=1))
    for name, content in tokenizer.items():
        (draft / TOKENIZER).mkdir(exist_ok=True)
        (draft / TOKENIZER / name).write_bytes(content)
    files = sorted(p for p in draft.rglob("*") if p.is_file())
    manifest = {str(p.relative_to(draft)): sha256(p) for p in files}
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*draft.rglob("*"), draft):
        flush(path)
    os.rename(draft, final)
    flush(final.parent)


class CheckpointFolder:
    """The checkpoints of one run; the newest and the best are kept."""

    def __init__(self, path: Path, keep: int = 1) -> None:
        """Names the folder; it need not exist.

        Args:
          path: Usually workdir/checkpoints.
          keep: How many of the newest are kept, beside the best.
        """
        self.path, self.keep = path, keep

    def all(self) -> list[Checkpoint]:
        """Sealed checkpoints, oldest first; what a killed writer left is not among them."""
        found = [p for p in self.path.glob("[0-9]*") if p.name.isdigit()] if self.path.is_dir() else []
        return [Checkpoint(p) for p in sorted(found, key=lambda p: int(p.name))]

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of so many steps, whether it is there or not."""
        return Checkpoint(self.path / f"{step:08d}")

    def verify(
        self, seen: Callable[[], None] = lambda: None
    ) -> tuple[list[Checkpoint], list[tuple[Checkpoint, UserError]]]:
        """Compares every checkpoint with its manifest.

        Args:
          seen: Is called after each file.

        Returns:
          The sound ones, and the damaged ones with what is wrong; the newest first.
        """
        sound, damaged = [], []
        for checkpoint in reversed(self.all()):
            try:
                checkpoint.verify(seen=seen)
                sound.append(checkpoint)
            except UserError as error:
                damaged.append((checkpoint, error))
        return sound, damaged

    def best(self) -> Checkpoint | None:
        """The checkpoint with the highest validation score, the newest where none was scored."""
        scores = [((c.meta()["validation"] or {}).get("score"), c.step, c) for c in self.all()]
        scored = [row for row in scores if row[0] is not None]
        if scored:
            return max(scored, key=lambda row: row[:2])[2]
        return self.all()[-1] if self.all() else None

    def save(
        self,
        step: int,
        state: Any,
        config: Config,
        meta: dict[str, Any],
        tokenizer: Mapping[str, bytes] | None = None,
    ) -> Checkpoint:
        """Writes, seals and publishes a checkpoint, then removes what is neither among the newest nor the best.

        Args:
          step: Steps done; one that exists already is left as it is.
          state: Tree of arrays.
          config: The resolved config.
          meta: JSON-able; "validation" holds the figures or None.
          tokenizer: Tokenizer files by name.

        Returns:
          The published checkpoint.

        Raises:
          UserError: The disk is full or the folder cannot be written; earlier checkpoints are untouched.
        """
        final = self.at(step).path
        if from_first(final.is_dir):
            return Checkpoint(final)
        try:
            write_sealed(final, state, config, meta, tokenizer)
        except OSError as error:
            raise UserError(
                f"checkpoint {final} could not be written ({error.strerror or error}); earlier checkpoints are "
                "untouched: make room or choose another --workdir, and run the same command again"
            ) from error
        from_first(self._prune)
        return Checkpoint(final)

    def kept(self) -> list[Checkpoint]:
        """Those that stay after a save, oldest first; a kill before the removal leaves more."""
        found, best = self.all(), self.best()
        return [c for c in found[: -self.keep] if c == best] + found[-self.keep :]

    def _prune(self) -> None:
        kept = self.kept()
        for old in self.all():
            if old not in kept:
                # Renamed first: a kill amid the removal must not leave half a checkpoint under a sound one's name.
                shutil.rmtree(old.path.rename(self.path / f".draft-{old.path.name}"))

    def set_aside(self, checkpoint: Checkpoint, why: str = "damaged") -> Path:
        """Renames a checkpoint, so that its step can be written anew and nobody takes it for the newest or the best.

        Args:
          checkpoint: One that `verify` refused, or that the run has gone back behind.
          why: What its name starts with from now on; one that has that name already is removed.

        Returns:
          Where it lies now.
        """
        aside = self.path / f"{why}-{checkpoint.path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        return checkpoint.path.rename(aside)

    def clear_drafts(self) -> None:
        """Removes what killed writers left; only the process that holds the run's lock may call it."""
        for draft in self.path.glob(".draft-*"):
            shutil.rmtree(draft, ignore_errors=True)


def find_checkpoint(path: Path, flag: str = "--checkpoint") -> Checkpoint:
    """Finds the checkpoint that a user means: a run folder, its checkpoints folder, or one checkpoint.

    Args:
      path: As given on the command line.
      flag: What named it, for error messages.

    Returns:
      That checkpoint, or the best one of the run.

    Raises:
      UserError: There is none.
    """
    if not path.exists():
        raise UserError(f"{flag} {path} does not exist: give the folder of a run, for example runs/medical")
    if (path / MANIFEST).is_file():
        return Checkpoint(path)
    if path.name.isdigit() and (path / "state").is_dir():
        raise UserError(f"checkpoint {path} is damaged: {MANIFEST} is missing; use another checkpoint")
    for folder in (path / "checkpoints", path):
        best = CheckpointFolder(folder).best()
        if best is not None:
            return best
    raise UserError(f"{flag} {path} holds no checkpoint: train first, or give the folder of a run")


def check_same_run(stored: Config, config: Config, where: Path) -> None:
    """Refuses to go on with a run that was started with another config.

    Raises:
      UserError: Names the first field that differs, with both values.
    """
    changed = [row for row in differences(stored, config) if not row[0].startswith(FREE_TO_CHANGE)]
    if changed:
        name, old, new = changed[0]
        others = f" (and {len(changed) - 1} more fields)" if len(changed) > 1 else ""
        why = ", and the learning rate falls over just as many steps" if name == "train.steps" else ""
        raise UserError(
            f"{where} was trained with {name} {old!r}{why}, but this command says {new!r}{others}: "
            "choose another --workdir, or delete that folder to start anew"
        )


def _write_arrays(path: Path, state: Any) -> None:
    """Has Orbax write the arrays; whatever it raises on a failed write is an OSError with the first line of it.

    Copies on the host are limited to two gigabytes beyond the largest array; else Orbax would hold all at once.
    """
    largest = max((x.nbytes for x in jax.tree.leaves(state)), default=0)
    try:
        handler = ocp.StandardCheckpointHandler(save_concurrent_gb=2 + largest // 10**9)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=ocp.args.StandardSave(state))
    # TensorStore reports a full disk as ValueError; what its threads leave behind also ends Orbax's event loops.
    except (Exception, asyncio.CancelledError, BaseExceptionGroup) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(errno.EIO, reason) from error
