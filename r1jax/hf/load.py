"""From a checkpoint folder to the decoder's parameters, shard by shard: the host never holds the model twice."""

import logging
import math
from collections.abc import Callable, Iterator
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
from r1jax.hf.config import CONFIG_FILE, FP8_BLOCK, decoder_config, read_json
from r1jax.hf.files import DTYPES, FP8, Stored, open_folder
from r1jax.hf.match import SCALE, match
from r1jax.hf.names import ROUTER_BIAS, Leaf, Piece, copies, layout, nest
from r1jax.parallel.mesh import shard_tree

READ_BYTES = 2**24
"""Bytes of a tensor that are read at a time."""
FP8_VALUES = np.arange(256, dtype=np.uint8).view(DTYPES[FP8]).astype(np.float32)
Progress = Callable[[int, int], None]
Box = tuple[tuple[int, int], ...]
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

    Host memory beyond the arrays themselves stays below the largest shard of one array plus a few READ_BYTES.

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
    """Reads a leaf, one shard after another, each onto all the devices that hold it."""
    places: dict[Box, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        box = tuple(s.indices(n)[:2] for s, n in zip(index or (), leaf.shape, strict=True))
        places.setdefault(box, []).append(device)
    shards = []
    for box, devices in places.items():
        buffer = np.zeros([stop - start for start, stop in box], dtype)
        for piece in leaf.pieces:
            _copy(piece, leaf.shape, box, buffer, tensors)
        shards += [jax.block_until_ready(jax.device_put(buffer, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _copy(piece: Piece, shape: tuple[int, ...], box: Box, buffer: np.ndarray, tensors: dict[str, Stored]) -> None:
    """Copies the part of a tensor on disk that lies within a shard into the shard."""
    place = [*piece.place, *([slice(None)] * (len(shape) - len(piece.place)))]
    source: list[slice] = []
    target: list[int | slice] = []
    for where, size, (start, stop) in zip(place, shape, box, strict=True):
        if isinstance(where, int):
            if not start <= where < stop:
                return
            target.append(where - start)
            continue
        first, last, _ = where.indices(size)
        low, high = max(first, start), min(last, stop)
        if low >= high:
            return
        source.append(slice(low - first, high - first))
        target.append(slice(low - start, high - start))
    tensor, part = tensors[piece.name], buffer[tuple(target)]
    for rows, values in read_blocks(tensor, tensors.get(piece.name + SCALE), *source):
        part[rows] = values


def read_blocks(
    tensor: Stored, scale: Stored | None, rows: slice, columns: slice = slice(None)
) -> Iterator[tuple[slice, np.ndarray]]:
    """Reads a part of a tensor a few megabytes at a time; block fp8 is dequantised exactly, in fp32.

    Args:
      tensor: A vector or matrix.
      scale: Its `weight_scale_inv`, where it is fp8.
      rows: Rows to read.
      columns: Columns of a matrix to keep.

    Yields:
      Places within `rows`, and the values there.
    """
    width = math.prod(tensor.shape[1:])
    step = max(READ_BYTES // max(width * (4 if scale else DTYPES[tensor.dtype].itemsize), 1), 1)
    factors = scale.read_rows(0, scale.shape[0]) if scale else None
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        values = tensor.read_rows(start, stop)
        if len(tensor.shape) > 1:
            values = values[:, columns]
        if factors is not None:
            row, column = np.arange(start, stop) // FP8_BLOCK, np.arange(width)[columns] // FP8_BLOCK
            values = FP8_VALUES[values.view(np.uint8)] * factors[row][:, column]
        yield slice(start - rows.start, stop - rows.start), values


def _check_copies(folder: Path, tensors: dict[str, Stored], config: DecoderConfig) -> None:
    """The MTP module shares embedding and head with the main model, so its copies of them must not differ."""
    for copy, main in copies(config).items():
        if copy not in tensors:
            continue
        rows, width = tensors[main].shape
        step = max(READ_BYTES // (4 * width), 1)
        for start in range(0, rows, step):  # of both at once, whatever their dtypes
            part = slice(start, min(start + step, rows))
            one, other = (
                np.concatenate([x.astype(np.float32) for _, x in read_blocks(tensors[n], tensors.get(n + SCALE), part)])
                for n in (copy, main)
            )
            if not np.array_equal(one, other):
                raise UserError(
                    f"{folder}: {copy} differs from {main}, but the decoder has one for both: load it with "
                    "num_nextn_predict_layers 0."
                )
