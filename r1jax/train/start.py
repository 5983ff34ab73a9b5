"""A fresh run that starts from the weights of a checkpoint: what fits is taken, the rest is freshly initialised."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from r1jax.config import ModelConfig
from r1jax.errors import UserError
from r1jax.train.checkpoints import Checkpoint, find_checkpoint
from r1jax.train.step import TrainState

RECORD = "init.json"
"""File of a run folder that says where its first weights came from."""
PASSED_ON = ("hugging_face",)
"""Entries of meta.json that belong to the weights: the published config.json, from which an export starts."""
NAMED = 6
"""Arrays that are named on the screen; the record has all."""


def start_from(path: str, state: TrainState, model: ModelConfig, workdir: Path) -> tuple[TrainState, list[str]]:
    """Puts the weights of a checkpoint into a fresh state, wherever path and shape are the same.

    Averaged weights are taken where the checkpoint has some; a checkpoint of weights alone will do. Moments of the
    optimizer and the step stay fresh.

    Args:
      path: Run folder, checkpoints folder, or one checkpoint.
      state: Fresh, on its devices.
      model: What the run trains.
      workdir: Run folder, for the record.

    Returns:
      The state, and lines to print.

    Raises:
      UserError: There is no such checkpoint, it is damaged, nothing of it fits, or its adapters would be lost.
    """
    checkpoint = find_checkpoint(Path(path), "--train.init")
    checkpoint.verify()
    made_with = checkpoint.config().model
    if made_with.lora_rank and (made_with.lora_rank, made_with.lora_alpha) != (model.lora_rank, model.lora_alpha):
        raise UserError(
            f"--train.init {path} was trained with adapters (model.lora_rank {made_with.lora_rank}, model.lora_alpha "
            f"{made_with.lora_alpha:g}): set both alike, or merge them by `r1jax hf export` and `r1jax hf import`"
        )
    group, stored = _stored(checkpoint)
    wanted = _flat(state.params)
    taken = [name for name, x in wanted.items() if name in stored and tuple(stored[name].shape) == x.shape]
    left = [name for name in wanted if name not in set(taken)]
    unused = [name for name in stored if name not in set(taken)]
    if not taken:
        raise UserError(
            f"--train.init {path}: none of the {len(stored)} arrays of {checkpoint.path} fits this model (the first is "
            f"{next(iter(stored), 'absent')}): take model.decoder from its config.json"
        )
    read = _read(checkpoint, group, {name: wanted[name] for name in taken})
    params = jax.tree_util.tree_map_with_path(lambda p, x: read.get(_name(p), x), state.params)
    record = {
        "path": path,
        "sha256": checkpoint.digest(),
        "weights": group,
        "taken": len(taken),
        "left": left,
        "unused": unused,
    }
    made = checkpoint.meta()
    passed_on = {name: made[name] for name in PASSED_ON if name in made}
    (workdir / RECORD).write_text(json.dumps({"init": record} | passed_on, indent=1))
    said = [f"starts from {checkpoint.path}: {len(taken)} of {len(wanted)} arrays taken"]
    said += [f"  freshly initialised: {_some(left)}"] if left else []
    said += [f"  not used: {_some(unused)}"] if unused else []
    return state._replace(
        params=params, ema=jax.tree.map(lambda x, old: jnp.array(x, old.dtype), params, state.ema)
    ), said


def start_record(workdir: Path) -> dict[str, Any]:
    """What the checkpoints of a run say of its first weights.

    Args:
      workdir: Run folder.

    Returns:
      "init", and what else that checkpoint passes on; nothing where the run started from random weights.
    """
    file = workdir / RECORD
    return json.loads(file.read_text()) if file.exists() else {}


def _stored(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """The group of arrays to take, and what it holds by dotted name."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata((checkpoint.path / "state").absolute()).item_metadata.tree
    group = next((name for name in ("ema", "params") if tree.get(name)), None)
    if group is None:
        raise UserError(f"--train.init: checkpoint {checkpoint.path} holds no weights: give another one")
    return group, _flat(tree[group])


def _read(checkpoint: Checkpoint, group: str, wanted: dict[str, Any]) -> dict[str, jax.Array]:
    """Reads some arrays of a checkpoint straight to their devices, in the dtype that is wanted."""
    asked: dict[str, Any] = {}
    for name, x in wanted.items():
        *path, last = name.split(".")
        inner = asked
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    item = {group: asked}
    how = ocp.checkpoint_utils.construct_restore_args(item)
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return _flat(checkpointer.restore((checkpoint.path / "state").absolute(), args=arguments)[group])


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _flat(tree: Any) -> dict[str, Any]:
    return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
