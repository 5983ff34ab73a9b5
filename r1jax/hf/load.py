"""From a checkpoint folder to the decoder's parameters: every block of rows is read once and goes to its devices."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from r1jax.config import DecoderConfig
from r1jax.errors import UserError
from r1jax.hf.config import CONFIG_FILE, decoder_config, read_json
from r1jax.hf.files import DTYPES, FP8, Stored, open_folder
from r1jax.hf.match import match
from r1jax.hf.names import ROUTER_BIAS, Leaf, Piece, copies, layout, nest
from r1jax.hf.place import Box, Filling
from r1jax.hf.weights import Weight
from r1jax.parallel.mesh import shard_tree

Progress = Callable[[int, int], None]
log = logging.getLogger(__name__)


def read_config(folder: str | Path) -> DecoderConfig:
    """Reads the decoder that a checkpoint folder describes.

    Args:
      folder: Holds config.json and the weights.

    Returns:
      The decoder; without MTP where config.json promises it and the weights lack it, as `save_pretrained` leaves them
      (a warning of the logger `r1jax.hf.load` says so).

    Raises:
      UserError: A file is missing or damaged, or config.json has values that r1jax cannot honour.
    """
    folder = Path(folder)
    published = read_json(folder / CONFIG_FILE)
    config = decoder_config(published, str(folder / CONFIG_FILE))
    if config.num_nextn_predict_layers:
        prefix = f"model.layers.{config.num_hidden_layers}."
        if not any(name.startswith(prefix) for name in open_folder(folder)):
            config = replace(config, num_nextn_predict_layers=0)
            if "num_nextn_predict_layers" in published:
                log.warning("%s has no tensors of multi-token prediction: it is loaded without", folder)
    return config


def load_params(
    folder: str | Path,
    config: DecoderConfig,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Loads the weights into the sharding that training uses.

    Every byte of a tensor is read once (of those that MTP repeats, twice). Host memory beyond the arrays themselves
    stays below a few `weights.READ_BYTES`, whatever the size of a tensor, of an array or of a shard.

    Args:
      folder: Holds model.safetensors, or shards and their index.
      config: From `read_config`; with num_nextn_predict_layers 0 the MTP module is left out.
      mesh: Devices; None takes the first one.
      dtype: float32, bfloat16 or float16; None keeps each tensor's own (block fp8 becomes bfloat16). The router's bias
        is always float32, and a router weight stored in float32 stays so.
      progress: Called with bytes that are done and bytes of all parameters.

    Returns:
      The tree that `Decoder(config).apply({"params": tree}, ...)` takes.

    Raises:
      UserError: A file is damaged, or its tensors are not those of the config; lists them.
    """
    folder = Path(folder)
    tensors, leaves = open_folder(folder), layout(config)
    match(folder, tensors, config)
    _check_copies(folder, tensors, config)
    kinds = {leaf.path: _leaf_dtype(folder, leaf, tensors, dtype) for leaf in leaves}
    shardings = _shardings(leaves, mesh)
    total = sum(math.prod(leaf.shape) * kinds[leaf.path].itemsize for leaf in leaves)
    arrays, done = {}, 0
    for leaf in leaves:
        arrays[leaf.path] = _fill(leaf, kinds[leaf.path], shardings[leaf.path], tensors)
        done += arrays[leaf.path].nbytes
        if progress is not None:
            progress(done, total)
    return nest(arrays)


def _shardings(leaves: tuple[Leaf, ...], mesh: Mesh | None) -> dict[tuple[str, ...], jax.sharding.Sharding]:
    """Where each leaf lives."""
    if mesh is None:
        return dict.fromkeys((leaf.path for leaf in leaves), SingleDeviceSharding(jax.devices()[0]))
    return shard_tree(mesh, {leaf.path: jax.ShapeDtypeStruct(leaf.shape, np.float32) for leaf in leaves})


def _leaf_dtype(folder: Path, leaf: Leaf, tensors: dict[str, Stored], wanted: DTypeLike | None) -> np.dtype:
    """The dtype of a leaf in memory."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    stored = {tensors[piece.name].dtype for piece in leaf.pieces}
    kept = {bfloat16 if dtype == FP8 else DTYPES[dtype] for dtype in stored}
    if leaf.path[-1] == ROUTER_BIAS or (leaf.is_router and stored == {"F32"}):
        return np.dtype(np.float32)
    if wanted is not None:
        return np.dtype(wanted)
    if len(kept) > 1:
        raise UserError(f"{folder}: {leaf.pieces[0].name} and its like are stored as {sorted(stored)}: give one dtype.")
    return kept.pop()


def _fill(leaf: Leaf, dtype: np.dtype, sharding: jax.sharding.Sharding, tensors: dict[str, Stored]) -> jax.Array:
    """Reads a leaf; each block of rows goes to all devices that hold any of it."""
    filling = Filling(leaf.shape, dtype, sharding)
    for piece in leaf.pieces:
        weight, (expert, first) = Weight(tensors, piece.name), _corner(piece)
        rest = tuple((0, size) for size in piece.shape[1:])
        for rows in weight.blocks():
            place = (*expert, (first + rows.start, first + rows.stop), *rest)
            if filling.wants(place):
                values = weight.read(rows)
                filling.write(place, values[None] if expert else values)
    return filling.finish()


def _corner(piece: Piece) -> tuple[Box, int]:
    """The expert that a piece is of, if it is one's, as an axis of a box; and its first row there."""
    expert = tuple((where, where + 1) for where in piece.place if isinstance(where, int))
    return expert, next((where.start for where in piece.place if isinstance(where, slice)), 0)


def _check_copies(folder: Path, tensors: dict[str, Stored], config: DecoderConfig) -> None:
    """The MTP module shares embedding and head with the main model, so its copies of them must not differ."""
    for copy, main in copies(config).items():
        if copy not in tensors:
            continue
        one, other = Weight(tensors, copy), Weight(tensors, main)
        for rows in other.blocks():
            if not np.array_equal(one.read(rows).astype(np.float32), other.read(rows).astype(np.float32)):
                raise UserError(
                    f"{folder}: {copy} differs from {main}, but the decoder has one for both: load it with "
                    "num_nextn_predict_layers 0."
                )
