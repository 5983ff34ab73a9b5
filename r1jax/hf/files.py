"""Safetensors files, read strictly: whatever does not add up is refused before a number is used."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from r1jax.errors import UserError
from r1jax.hf.config import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4}
BYTES |= {"U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
FP8 = "F8_E4M3"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    FP8: np.dtype(ml_dtypes.float8_e4m3fn),
}
"""What weights may be stored in."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Byte of the file where it starts."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * BYTES[self.dtype]

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Reads rows of the tensor, in the dtype that it is stored in.

        Args:
          start: First index of the first axis.
          stop: Index after the last.

        Returns:
          Array [stop - start, ...] in memory of its own.

        Raises:
          UserError: The file cannot be read or ended early.
        """
        rows = np.empty((stop - start, *self.shape[1:]), DTYPES[self.dtype])
        memory = memoryview(rows.reshape(-1).view(np.uint8))
        offset = self.begin + start * math.prod(self.shape[1:]) * rows.itemsize
        try:
            descriptor = os.open(self.file, os.O_RDONLY)
            try:
                while memory:
                    got = os.preadv(descriptor, [memory], offset)
                    if not got:
                        raise UserError(f"{self.file} ends amid the tensor {self.name!r}: download it again.")
                    memory, offset = memory[got:], offset + got
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"{self.file} cannot be read at the tensor {self.name!r}: {error.strerror}.") from None
        return rows


def open_folder(folder: Path) -> dict[str, Stored]:
    """Finds every tensor of a checkpoint and checks all headers against the files' lengths.

    Args:
      folder: Holds model.safetensors, or shards and model.safetensors.index.json.

    Returns:
      Tensors by name.

    Raises:
      UserError: Names the file and the tensor that are wrong.
    """
    index, single = folder / INDEX, folder / SINGLE
    if not index.exists():
        if not single.exists():
            raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}: give the folder of a checkpoint.")
        return read_header(single)
    where = _weight_map(index)
    files = sorted(set(where.values()))
    if single.exists() and SINGLE not in files:
        raise UserError(f"{folder} holds both {SINGLE} and an {INDEX} that does not name it: delete one of them.")
    found: dict[str, Stored] = {}
    for file in files:
        if not (folder / file).is_file():
            names = [name for name, place in where.items() if place == file]
            raise UserError(
                f"{folder / file} is missing, although {INDEX} puts {len(names)} tensors there, {names[0]!r} "
                "for one: download it."
            )
        for name, tensor in read_header(folder / file).items():
            if name in found:
                first = found[name].file.name
                raise UserError(f"{folder}: the tensor {name!r} is both in {first} and in {file}: delete one of them.")
            if where.get(name) != file:
                told = f"puts it in {where[name]}" if name in where else "does not name it"
                raise UserError(f"{folder / file} holds the tensor {name!r}, but {INDEX} {told}: download both again.")
            found[name] = tensor
    for name, file in where.items():
        if name not in found:
            raise UserError(f"{folder / file} lacks the tensor {name!r} that {INDEX} puts there: download it again.")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: weight_map is {where!r:.60}, but it must name the file of each tensor.")
    for name, file in where.items():
        if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file or "\0" in file:
            raise UserError(f"{index}: the file of {name!r} is {file!r:.60}, but it must be a name in the same folder.")
    return where


def read_header(file: Path) -> dict[str, Stored]:
    """Reads the header of a safetensors file and checks that its tensors fill the file without gap or overlap.

    Args:
      file: The file.

    Returns:
      Tensors by name.

    Raises:
      UserError: Names the file, the tensor and what is wrong.
    """
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise UserError(
                    f"{file} is no safetensors file or is cut off: its header of {length} bytes does not fit a file of "
                    f"{size} bytes; download it again."
                )
            text = opened.read(length)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its header is damaged ({str(error):.100}); download it again.") from None
    if not isinstance(header, dict):
        raise UserError(f"{file}: its header is {header!r:.60}, but it must be a JSON object; download it again.")
    header.pop("__metadata__", None)
    tensors = [_tensor(file, name, told, 8 + length) for name, told in header.items()]
    end = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.nbytes)):
        if tensor.begin != end:
            found = "overlaps the tensor before it" if tensor.begin < end else "leaves a gap before it"
            raise UserError(f"{file}: the tensor {tensor.name!r} {found}; the file is damaged, download it again.")
        end += tensor.nbytes
        if end > size:
            raise UserError(f"{file} is cut off: {size} bytes, but the tensor {tensor.name!r} ends at byte {end}.")
    if end != size:
        raise UserError(f"{file} has {size - end} bytes after its last tensor; the file is damaged, download it again.")
    return {tensor.name: tensor for tensor in tensors}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ."""
    if len(dict(pairs)) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return dict(pairs)


def _refused(file: Path, name: str, what: str) -> UserError:
    return UserError(f"{file}: the tensor {name!r} {what}; the file is damaged or of another format.")


def _tensor(file: Path, name: str, told: Any, data: int) -> Stored:
    """One entry of a header."""
    if not isinstance(told, dict) or set(told) != {"dtype", "shape", "data_offsets"}:
        raise _refused(file, name, f"is described as {told!r:.80} instead of by dtype, shape and data_offsets")
    dtype, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise _refused(file, name, f"has the dtype {dtype!r:.40}, which is unknown")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise _refused(file, name, f"has the shape {shape!r:.60}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise _refused(file, name, f"has the data_offsets {offsets!r:.60}")
    needed = math.prod(shape) * BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise _refused(file, name, f"has {offsets[1] - offsets[0]} bytes, but shape {shape} of {dtype} needs {needed}")
    return Stored(file, name, dtype, tuple(shape), data + offsets[0])
