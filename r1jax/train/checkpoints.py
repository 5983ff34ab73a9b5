"""Checkpoints that are complete or absent: written aside, sealed with a SHA-256 manifest, then renamed into place.

checkpoints/00000200/{state/, config.json, meta.json, manifest.json}. Orbax stores the arrays but no checksum of them,
so a flipped bit would be read back unnoticed; the manifest is verified before every restore.
"""

import asyncio
import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from r1jax.config import Config, differences, from_dict
from r1jax.disk import flush, sha256
from r1jax.errors import UserError
from r1jax.fields import to_json

MANIFEST = "manifest.json"
FREE_TO_CHANGE = (
    "workdir",
    "platform",
    "train.log_every",
    "train.save_every",
    "data.threads",
    "data.path",
    "data.split",
    "data.tokenizer",
    "train.init",
    "mesh.",
    "debug.",
)
"""Fields that may differ when a run goes on: with other devices the last bits may change, with the rest nothing does.

Data is compared by its fingerprint; the weights that a run started from are of the past.
"""


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        """Steps done when it was written."""
        return int(self.path.name)

    def config(self) -> Config:
        """The config it was trained with."""
        return from_dict(_read_json(self.path / "config.json"), str(self.path / "config.json"))

    def meta(self) -> dict[str, Any]:
        """Validation figures, operating points, data and versions."""
        return _read_json(self.path / "meta.json")

    def digest(self) -> str:
        """SHA-256 (hex) of the manifest, and so of every byte of the checkpoint."""
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    def verify(self) -> None:
        """Compares every file with the manifest.

        Raises:
          UserError: A file is missing, truncated or altered.
        """
        manifest = _read_json(self.path / MANIFEST)
        for name, expected in manifest.items():
            file = self.path / name
            if not file.is_file():
                raise UserError(f"checkpoint {self.path} is damaged: {name} is missing; use another checkpoint")
            if sha256(file) != expected:
                raise UserError(
                    f"checkpoint {self.path} is damaged: {name} is not what was written (truncated or altered); "
                    "use another checkpoint"
                )

    def restore(self, abstract: Any) -> Any:
        """Verifies and reads the state.

        Args:
          abstract: Tree of `jax.ShapeDtypeStruct` with shardings, of the shapes that the config gives.

        Returns:
          The state, on the devices of the shardings.

        Raises:
          UserError: The checkpoint is damaged, or its arrays are not those of the model.
        """
        self.verify()
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                return checkpointer.restore((self.path / "state").absolute(), abstract)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"checkpoint {self.path} was written by r1jax {self.meta()['versions']['r1jax']} with a model of other "
                "arrays: use that version, or train anew in another --workdir"
            ) from error

    def restore_decoder(self) -> dict[str, Any]:
        """Verifies the checkpoint and reads its decoder alone: the averaged weights where there are some.

        Returns:
          Parameters of the decoder as NumPy arrays, in the dtypes that they are stored in.

        Raises:
          UserError: The checkpoint is damaged or holds no decoder.
        """
        self.verify()
        path = (self.path / "state").absolute()
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path).item_metadata.tree
            group = next((g for g in ("ema", "params") if "decoder" in (stored.get(g) or {})), None)
            if group is None:
                raise UserError(f"checkpoint {self.path} holds no decoder: give one that r1jax has trained or imported")
            wanted = {group: {"decoder": stored[group]["decoder"]}}
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
            how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
            asked = ocp.args.PyTreeRestore(item=abstract, restore_args=how, partial_restore=True)
            return checkpointer.restore(path, args=asked)[group]["decoder"]


def write_sealed(final: Path, state: Any, config: Config, meta: dict[str, Any]) -> Checkpoint:
    """Writes a checkpoint aside, seals it and renames it into place; a failure leaves nothing.

    Args:
      final: Where it shall be; nothing may be there, or an empty folder.
      state: Tree of arrays.
      config: The config that describes them.
      meta: JSON-able.

    Returns:
      The published checkpoint.

    Raises:
      OSError: The disk is full or the folder cannot be written.
    """
    draft = final.with_name(f".draft-{final.name}")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        if shutil.disk_usage(draft).free < needed:  # asked first: Orbax fails late and with pages of tracebacks
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed / 2**20:,.1f} MiB are needed")
        _write_arrays(draft.absolute() / "state", state)
        (draft / "config.json").write_text(to_json(config))
        (draft / "meta.json").write_text(json.dumps(meta, indent=1))
        files = sorted(p for p in draft.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(draft)): sha256(p) for p in files}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*draft.rglob("*"), draft):
            flush(path)
        os.rename(draft, final)
        flush(final.parent)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return Checkpoint(final)


class CheckpointFolder:
    """The checkpoints of one run; the newest and the best are kept."""

    def __init__(self, path: Path) -> None:
        """Names the folder; it need not exist.

        Args:
          path: Usually workdir/checkpoints.
        """
        self.path = path

    def all(self) -> list[Checkpoint]:
        """Sealed checkpoints, oldest first; what a killed writer left is not among them."""
        found = [p for p in self.path.glob("[0-9]*") if p.name.isdigit()] if self.path.is_dir() else []
        return [Checkpoint(p) for p in sorted(found, key=lambda p: int(p.name))]

    def best(self) -> Checkpoint | None:
        """The checkpoint with the highest validation score, the newest where none was scored."""
        scores = [((c.meta()["validation"] or {}).get("score"), c.step, c) for c in self.all()]
        scored = [row for row in scores if row[0] is not None]
        if scored:
            return max(scored, key=lambda row: row[:2])[2]
        return self.all()[-1] if self.all() else None

    def save(self, step: int, state: Any, config: Config, meta: dict[str, Any]) -> Checkpoint:
        """Writes, seals and publishes a checkpoint, then removes what is neither newest nor best.

        Args:
          step: Steps done; one that exists already is left as it is.
          state: Tree of arrays.
          config: The resolved config.
          meta: JSON-able; "validation" holds the figures or None.

        Returns:
          The published checkpoint.

        Raises:
          UserError: The disk is full or the folder cannot be written; earlier checkpoints are untouched.
        """
        final = self.path / f"{step:08d}"
        if final.is_dir():
            return Checkpoint(final)
        try:
            write_sealed(final, state, config, meta)
        except OSError as error:
            raise UserError(
                f"checkpoint {final} could not be written ({error.strerror or error}); earlier checkpoints are "
                "untouched: make room or choose another --workdir, and run the same command again"
            ) from error
        self._prune()
        return Checkpoint(final)

    def _prune(self) -> None:
        best = self.best()
        for old in self.all()[:-1]:
            if best is not None and old.step != best.step:
                # Renamed first: a kill amid the removal must not leave half a checkpoint under a sound one's name.
                shutil.rmtree(old.path.rename(self.path / f".draft-{old.path.name}"))

    def set_aside(self, damaged: Checkpoint) -> Path:
        """Renames a damaged checkpoint, so that its step can be written anew and nobody takes it for the best.

        Args:
          damaged: One that `verify` refused.

        Returns:
          Where it lies now.
        """
        aside = self.path / f"damaged-{damaged.path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        return damaged.path.rename(aside)

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


def abstract_like(state: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a state with the shardings that it shall have."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def _write_arrays(path: Path, state: Any) -> None:
    """Has Orbax write the arrays; whatever it raises on a failed write is an OSError with the first line of it."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, state)
    # TensorStore reports a full disk as ValueError; what its threads leave behind also ends Orbax's event loops.
    except (Exception, asyncio.CancelledError, BaseExceptionGroup) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(errno.EIO, reason) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is incomplete; use another one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): the checkpoint is damaged; use another one") from None
