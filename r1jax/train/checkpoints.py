"""Checkpoints that are complete or absent: written aside, sealed with a SHA-256 manifest, then renamed into place.

checkpoints/00000200/{state/, tokenizer/, config.json, meta.json, manifest.json}. Orbax stores the arrays but no
checksum of them, so a flipped bit would be read back unnoticed; the manifest is verified before every restore.
"""

import asyncio
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from r1jax.config import Config, differences, from_dict
from r1jax.disk import flush, sha256
from r1jax.errors import UserError
from r1jax.fields import to_json
from r1jax.parallel.agree import from_first, is_first
from r1jax.parallel.mesh import shard_tree
from r1jax.train.quantized import coded, holds_codes

MANIFEST = "manifest.json"
MARGIN = 1.02
"""Room that a checkpoint takes, beside its arrays: their index, the tokenizer, whole blocks of the file system."""
TOKENIZER = "tokenizer"
"""Folder of a checkpoint that holds the tokenizer files of its text, where that is not bytes."""
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


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint on disk."""

    path: Path

    @property
    def step(self) -> int:
        """Steps done when it was written; an import, whose folder has any name, says so within."""
        return int(self.path.name if self.path.name.isdigit() else self.meta()["step"])

    @property
    def imported(self) -> bool:
        """Whether it holds the weights of another program, which was trained on data that nobody knows."""
        return "data" not in self.meta()

    @property
    def quantized(self) -> bool:
        """Whether it holds the codes of a quantized model in the place of a state; only such a model reads them."""
        return (self.path / "quantized").is_dir()

    @property
    def adapts_codes(self) -> bool:
        """Whether it holds codes beside adapters of them, in a state that training goes on from."""
        return not self.quantized and holds_codes(self.config())

    def refuse_codes(self) -> None:
        """Refuses what would need the adapters merged.

        Raises:
          UserError: They adapt codes.
        """
        if self.adapts_codes:
            raise UserError(
                f"{self.path} holds adapters on codes (model.quant {' '.join(self.config().model.quant)}), and the sum "
                "would have to be rounded anew: eval.py and `r1jax generate` take it as it is; for anything else train "
                "the adapters without model.quant"
            )

    def config(self) -> Config:
        """The config it was trained with; fields that came after it was written have their defaults."""
        return from_dict(_read_json(self.path / "config.json"), str(self.path / "config.json"), stored=True)

    def meta(self) -> dict[str, Any]:
        """Validation figures, operating points, data and versions."""
        return _read_json(self.path / "meta.json")

    def digest(self) -> str:
        """SHA-256 (hex) of the manifest, and so of every byte of the checkpoint."""
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    def tokenizer(self) -> Path | None:
        """Finds the tokenizer of its text.

        Returns:
          The verified folder within the checkpoint; in one that has none, what its config names; None is bytes.

        Raises:
          UserError: A file is missing, truncated or altered.
        """
        if self.verify(f"{TOKENIZER}/"):
            return self.path / TOKENIZER
        named = self.config().data.tokenizer
        return None if named is None else Path(named)

    def verify(self, within: str = "", seen: Callable[[], None] = lambda: None) -> int:
        """Compares files with the manifest.

        Args:
          within: Only those whose names start so.
          seen: Is called after each file.

        Returns:
          How many they are.

        Raises:
          UserError: A file is missing, truncated or altered.
        """
        manifest = {k: v for k, v in _read_json(self.path / MANIFEST).items() if k.startswith(within)}
        for name, expected in manifest.items():
            file = self.path / name
            if not file.is_file():
                raise UserError(f"checkpoint {self.path} is damaged: {name} is missing; use another checkpoint")
            if sha256(file) != expected:
                raise UserError(
                    f"checkpoint {self.path} is damaged: {name} is not what was written (truncated or altered); "
                    "use another checkpoint"
                )
            seen()
        return len(manifest)

    def restore(self, abstract: Any, seen: Callable[[], None] = lambda: None) -> Any:
        """Verifies and reads the state.

        Args:
          abstract: Tree of `jax.ShapeDtypeStruct` with shardings, of the shapes that the config gives.
          seen: Is called after each file that is verified.

        Returns:
          The state, on the devices of the shardings.

        Raises:
          UserError: The checkpoint is damaged, or its arrays are not those of the model.
        """
        from_first(lambda: self.verify(seen=seen))
        return self.load(abstract)

    def load(self, abstract: Any) -> Any:
        """Reads the state of a checkpoint that has been verified; as `restore`."""
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                return checkpointer.restore((self.path / "state").absolute(), abstract)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"checkpoint {self.path} was written by r1jax {self.meta()['versions']['r1jax']} with a model of other "
                "arrays: use that version, or train anew in another --workdir"
            ) from error

    def stored(self) -> dict[str, Any]:
        """What the state holds: a tree of shapes and dtypes, the fields of tuples by their names.

        Raises:
          UserError: It is quantized, so that there is no state to go on from.
        """
        if self.quantized:
            raise UserError(
                f"{self.path} is quantized: eval.py, `r1jax generate` and adapters (--train.init with model.lora_rank) "
                "take it; for anything else give the checkpoint that it was made from"
            )
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.metadata((self.path / "state").absolute()).item_metadata.tree

    def read(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Reads a part of the state, without verifying it.

        Args:
          wanted: Tree of `jax.ShapeDtypeStruct`; arrays with a sharding go straight to its devices, in the dtype that
            is wanted, and the others become NumPy arrays.

        Returns:
          The arrays.
        """
        plain = ocp.RestoreArgs(restore_type=np.ndarray)
        how = jax.tree.map(
            lambda x: plain if x.sharding is None else ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), wanted
        )
        asked = ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore((self.path / "state").absolute(), args=asked)

    def find_decoder(self) -> tuple[str, dict[str, Any]]:
        """Verifies the checkpoint and looks for its decoder: the averaged weights where there are some.

        Returns:
          The group of the state that it lies in, and its tree of shapes and dtypes.

        Raises:
          UserError: The checkpoint is damaged or holds no decoder.
        """
        self.verify()
        stored = self.stored()
        group = next((g for g in ("ema", "params") if "decoder" in (stored.get(g) or {})), None)
        if group is None:
            raise UserError(f"checkpoint {self.path} holds no decoder: give one that r1jax has trained or imported")
        return group, stored[group]["decoder"]

    def restore_decoder(self, mesh: Mesh | None = None, dtype: DTypeLike | None = None) -> dict[str, Any]:
        """Verifies the checkpoint and reads its decoder alone: the averaged weights where there are some.

        Args:
          mesh: Devices to spread it over; None gives NumPy arrays.
          dtype: What to read arrays as on a mesh; None keeps what is stored, and a router in fp32 and codes stay so.

        Returns:
          Parameters of the decoder.

        Raises:
          UserError: The checkpoint is damaged or holds no decoder.
        """
        group, described = self.find_decoder()

        def shape(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
            router = any(getattr(part, "key", None) == "gate" for part in path) and x.dtype == np.float32
            codes = isinstance(path[-1], jax.tree_util.GetAttrKey)
            return jax.ShapeDtypeStruct(x.shape, x.dtype if dtype is None or router or codes else dtype)

        wanted = jax.tree_util.tree_map_with_path(shape, coded(described))
        if mesh is not None:
            wanted = abstract_like(wanted, shard_tree(mesh, wanted))
        return self.read({group: {"decoder": wanted}})[group]["decoder"]


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


def abstract_like(state: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a state with the shardings that it shall have."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is incomplete; use another one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): the checkpoint is damaged; use another one") from None
