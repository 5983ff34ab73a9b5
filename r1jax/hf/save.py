"""From the decoder's parameters to a folder that `transformers` loads; it is there whole or not at all."""

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from r1jax.config import DecoderConfig
from r1jax.disk import flush
from r1jax.errors import UserError
from r1jax.hf.config import CONFIG_FILE, SPECIAL, published_config
from r1jax.hf.files import DTYPES, FP8, INDEX, SINGLE
from r1jax.hf.load import Progress
from r1jax.hf.names import Leaf, Piece, copies, layout

GENERATION_FILE = "generation_config.json"
SHARD_BYTES = 5_000_000_000  # as `save_pretrained`
Dtype = Literal["float32", "bfloat16", "float16"]
TAGS = {dtype: tag for tag, dtype in DTYPES.items() if tag != FP8}


@dataclass(frozen=True)
class Entry:
    """A tensor to write."""

    piece: Piece
    path: tuple[str, ...]
    """Leaf that it is part of."""
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.piece.shape) * self.dtype.itemsize


def save_params(
    folder: str | Path,
    config: DecoderConfig,
    params: dict[str, Any],
    *,
    dtype: Dtype | None = None,
    base: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    tokenizer: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes safetensors shards, their index, config.json and generation_config.json.

    Args:
      folder: Where to; it must not exist, or be empty.
      config: The decoder.
      params: Its parameters, as `Decoder.init` or `load_params` gives them, or anything with a shape and a dtype that
        NumPy can read, as `lazy_decoder` gives it; float32, bfloat16 or float16. Each array is brought to
        the host when its turn comes, and is gone before the next one.
      dtype: What to store them in; None keeps each array's own. The router's bias and a router weight in float32 stay
        in float32, as `transformers` keeps them.
      base: config.json that the decoder was imported from, or a part of it such as the numbers of special tokens; keys
        that r1jax does not use are kept. None is a decoder of bytes.
      generation: Content of generation_config.json; None names the special tokens only.
      tokenizer: Tokenizer files by name, written byte for byte.
      shard_bytes: Largest shard; a tensor that is larger has a shard of its own.
      progress: Called with bytes that are written and bytes of all.

    Raises:
      UserError: The folder is taken, the disk does not take the files, or Hugging Face has no such decoder.
    """
    folder = Path(folder)
    leaves = layout(config)
    arrays = _arrays(leaves, params)
    entries = _entries(leaves, config, arrays, None if dtype is None else np.dtype(dtype))
    name = dtype or arrays[("lm_head", "weight")].dtype.name
    published = published_config(config, name, base)
    if generation is None:
        generation = {"_from_model_config": True} | {k: v for k, v in published.items() if k in SPECIAL}
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not empty: choose another folder, or delete it.")
        draft = folder.absolute().with_name(f".{folder.absolute().name}.draft")
        shutil.rmtree(draft, ignore_errors=True)  # what a killed process left
        draft.mkdir(parents=True)
        try:
            needed = sum(entry.nbytes for entry in entries)
            if shutil.disk_usage(draft).free < needed:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed / 2**20:,.1f} MiB are needed")
            _write_shards(draft, _shards(entries, shard_bytes), arrays, progress)
            for file, content in ((CONFIG_FILE, published), (GENERATION_FILE, generation)):
                _write(draft / file, json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")
            for file, content in (tokenizer or {}).items():
                _write(draft / file, content)
            flush(draft)
            draft.rename(folder)
            flush(draft.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}): make room or name another."
        ) from error


def _arrays(leaves: tuple[Leaf, ...], params: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """Parameters by path, after a check that they are those of the decoder."""
    given = {tuple(p.key for p in path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    wrong = {"/".join(p) for p in given.keys() ^ shapes.keys()}
    wrong |= {"/".join(p) for p in given.keys() & shapes.keys() if given[p].shape != shapes[p]}
    wrong |= {"/".join(p) for p in given if np.dtype(given[p].dtype) not in TAGS}
    if wrong:
        raise UserError(f"these parameters are not those of the config: {', '.join(sorted(wrong)[:20])}.")
    for leaf in leaves:
        if not leaf.pieces and np.any(_on_host(given[leaf.path])):
            raise UserError(
                f"{'/'.join(leaf.path)} is not zero, but Hugging Face's deepseek_v2 has no such tensor: "
                "a softmax router must be trained with --train.router-bias-rate 0."
            )
    return given


def _entries(
    leaves: tuple[Leaf, ...], config: DecoderConfig, arrays: dict[tuple[str, ...], Any], dtype: np.dtype | None
) -> list[Entry]:
    """All tensors to write; copies of embedding and head stand with the MTP module, as published."""
    entries = []
    for leaf in leaves:
        stored = np.dtype(arrays[leaf.path].dtype)
        keep = dtype is None or (leaf.is_router and stored == np.float32)
        entries += [Entry(piece, leaf.path, stored if keep else dtype) for piece in leaf.pieces]
    named = {entry.piece.name: entry for entry in entries}
    for copy, main in copies(config).items():
        entry = named[main]
        entries.append(Entry(Piece(copy, entry.piece.shape), entry.path, entry.dtype))
    return entries


def _shards(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Entries by file, in order; within a file wide numbers come first, so that all are aligned."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def _write_shards(
    draft: Path, shards: list[list[Entry]], arrays: dict[tuple[str, ...], Any], progress: Progress | None
) -> None:
    """Writes the shards and the index that names them."""
    total, done, where = sum(entry.nbytes for shard in shards for entry in shard), 0, {}
    path, leaf = None, None
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= {entry.piece.name: file for entry in shard}
        with (draft / file).open("wb") as opened:
            opened.write(_header(shard))
            for entry in shard:
                if entry.path != path:
                    leaf = None  # gone before the next one comes
                    path, leaf = entry.path, _on_host(arrays[entry.path])
                opened.write(_bytes(entry, leaf[entry.piece.place]))
                done += entry.nbytes
                if progress is not None:
                    progress(done, total)
        flush(draft / file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    _write(draft / INDEX, json.dumps(index, indent=2).encode() + b"\n")


def _header(shard: list[Entry]) -> bytes:
    """Header of a safetensors file, padded so that the numbers are aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard:
        offsets = [end, end := end + entry.nbytes]
        shape = list(entry.piece.shape)
        header[entry.piece.name] = {"dtype": TAGS[entry.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(entry: Entry, values: np.ndarray) -> memoryview:
    """The numbers of a tensor as they stand in the file."""
    values = np.ascontiguousarray(values)
    if entry.dtype != values.dtype:
        with np.errstate(over="ignore"):
            cast = values.astype(np.float32).astype(entry.dtype)
        if entry.dtype == np.float16 and not np.isfinite(cast).all() and np.isfinite(values).all():
            raise UserError(f"{entry.piece.name} has numbers beyond the range of float16: export bfloat16.")
        values = cast
    return memoryview(values.reshape(-1).view(np.uint8))


def _on_host(array: Any) -> np.ndarray:
    """The numbers of a leaf; JAX would keep a copy of them beside the array as long as that lives."""
    if isinstance(array, jax.Array):
        parts = [shard.data for shard in array.addressable_shards]
        array = jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
    return np.asarray(array)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    flush(path)
