"""A fresh run that starts from the weights of a checkpoint: what fits is taken, the rest is freshly initialised."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from r1jax.config import Config, ModelConfig
from r1jax.data.tokenizer_files import check_bytes, check_same
from r1jax.errors import UserError
from r1jax.train.checkpoint import Checkpoint
from r1jax.train.checkpoints import CheckpointFolder, find_checkpoint
from r1jax.train.quantized import FOLDER, is_codes, read_codes
from r1jax.train.step import TrainState

RECORD = "init.json"
"""File of a run folder that says where its first weights came from."""
PASSED_ON = ("hugging_face",)
"""Entries of meta.json that belong to the weights: the published config.json, from which an export starts."""
INPUTS = {"balance": "balanced inputs", "span": "static inputs"}
"""Parts of codes that say how the inputs of a weight are rounded."""
NAMED = 6
"""Arrays that are named on the screen; the record has all."""


def with_tokenizer(config: Config) -> Config:
    """Gives a language run the tokenizer of the weights that it goes on or starts from.

    Args:
      config: The experiment.

    Returns:
      The config, whose `data.tokenizer` names the files; None still is bytes.

    Raises:
      UserError: `data.tokenizer` names another tokenizer than that of the embeddings which the run starts from, or
        there is no checkpoint `train.init`.
    """
    given, init = config.data.tokenizer, config.train.init
    if config.task.name != "language":
        return config
    for own in reversed(CheckpointFolder(Path(config.workdir) / "checkpoints").all()):
        try:
            return config if given else _named(config, own.tokenizer())
        except UserError:
            continue  # `restore_or_init` sets a damaged one aside, says so, and goes on from an earlier one
    if init is None:
        return config
    checkpoint = find_checkpoint(Path(init), "--train.init")
    own = checkpoint.tokenizer()
    if given is None:
        if own is None and checkpoint.imported:
            size = checkpoint.config().model.decoder.vocab_size
            check_bytes(size, f"--train.init {init}", "name the model's own tokenizer by --data.tokenizer")
        return _named(config, own)
    # Embeddings of another size are freshly initialised, and then any tokenizer will do.
    taken = checkpoint.config().model.decoder.vocab_size == config.model.decoder.vocab_size
    if taken and (own is not None or not checkpoint.imported):
        check_same(Path(given), own, "data.tokenizer")
    return config


def _named(config: Config, tokenizer: Path | None) -> Config:
    return replace(config, data=replace(config.data, tokenizer=None if tokenizer is None else str(tokenizer)))


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
    _check_codes(path, checkpoint, state.params, model)
    _check_inputs(path, stored)
    wanted = _flat(state.params)
    taken = [name for name, x in wanted.items() if name in stored and tuple(stored[name].shape) == x.shape]
    left = [name for name in wanted if name not in set(taken)]
    unused = [name for name in stored if name not in set(taken)]
    if not taken:
        raise UserError(
            f"--train.init {path}: none of the {len(stored)} arrays of {checkpoint.path} fits this model (the first is "
            f"{next(iter(stored), 'absent')}): take model.decoder from its config.json"
        )
    if checkpoint.quantized:
        read = {name: jax.device_put(stored[name].astype(wanted[name].dtype), wanted[name].sharding) for name in taken}
    else:
        asked = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in wanted.items()}
        read = _flat(checkpoint.read({group: _nested({name: asked[name] for name in taken})})[group])
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
    ema = jax.tree.map(lambda x, old: jnp.array(x, old.dtype), params, state.ema) if state.ema else {}
    return state._replace(params=params, ema=ema), said


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
    """The group of arrays to take, and what it holds by dotted name: arrays of a quantized one, else descriptions."""
    if checkpoint.quantized:
        return "params", _flat(read_codes(checkpoint.path / FOLDER)[0])
    tree = checkpoint.stored()
    group = next((name for name in ("ema", "params") if tree.get(name)), None)
    if group is None:
        raise UserError(f"--train.init: checkpoint {checkpoint.path} holds no weights: give another one")
    return group, _flat(tree[group])


def made_of_codes(path: str) -> bool:
    """Whether the checkpoint that a run starts from holds codes, and not floats."""
    checkpoint = find_checkpoint(Path(path), "--train.init")
    return checkpoint.quantized or checkpoint.adapts_codes


def _check_codes(path: str, checkpoint: Checkpoint, params: Any, model: ModelConfig) -> None:
    """Refuses codes that the run would not hold, or would read by other rules than they were made by.

    Raises:
      UserError: Says what to set.
    """
    if not (checkpoint.quantized or checkpoint.adapts_codes):
        return
    held = any(map(is_codes, jax.tree.leaves(params, is_leaf=is_codes)))
    made = checkpoint.config().model.quant
    if not held or made != model.quant:
        raise UserError(
            f"--train.init {path} holds codes, which do not change: train adapters on them, by --quant "
            f"{shlex.join(made)} (as they were made), a --model.lora_rank above 0, and no --train.quant_start"
        )


def _check_inputs(path: str, stored: dict[str, Any]) -> None:
    """Refuses codes whose inputs are balanced or have one range: a run keeps neither, and products would be others.

    Raises:
      UserError: Names a weight and says how to quantize.
    """
    for name in stored:
        weight, _, part = name.rpartition(".")
        if part in INPUTS:
            raise UserError(
                f"--train.init {path} holds codes with {INPUTS[part]} ({weight}), which no run keeps: quantize that "
                "checkpoint again with --balance False and --activations token"
            )


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Undoes `_flat`."""
    tree: dict[str, Any] = {}
    for name, x in flat.items():
        *path, last = name.split(".")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = x
    return tree


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _flat(tree: Any) -> dict[str, Any]:
    return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
