"""NPZ: arrays whose first axis counts the cases, as columns."""

import functools
import threading
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r1jax.data.formats.cases import CASE_ID, FileCases, file_cases
from r1jax.data.formats.files import inside, list_files, plain_dtype
from r1jax.data.schema import Field
from r1jax.errors import UserError, nearest

SUFFIXES = (".npz",)
MAX_ARRAYS = 16 * 2**30
"""Bytes of all arrays of a file together: a small archive can claim any size."""
KINDS = ("volume", "image", "audio", "series", "table", "number", "text", "category")


def open_npz(
    path: str | Path, arrays: Sequence[str] | None = None, kinds: Mapping[str, str] | None = None
) -> FileCases:
    """Opens an `.npz` file as a source.

    Args:
      path: The file.
      arrays: Which arrays to read, all with one row a case; without it all.
      kinds: Kind by array where the one found is not wanted; see `docs/formats.md` for how it is found.

    Returns:
      One column an array, in memory from the first reading on; `case_id` is the array of this name, or the number of
      the row.

    Raises:
      UserError: The file is damaged or too large, an array holds Python objects or has another number of cases.
    """
    root, (name, *more) = list_files(path, SUFFIXES, "archive")
    if more:
        raise UserError(f"{path} holds {1 + len(more)} archives, {name!r} and {more[0]!r} among them: name one file")
    file = root / name
    heads = read_heads(file)
    for wanted in (*(arrays or ()), *(kinds or ())):
        if wanted not in heads:
            raise UserError(f"{file} has no array {wanted!r}{nearest(wanted, heads)}: it has {', '.join(heads)}")
    heads = {label: head for label, head in heads.items() if arrays is None or label in arrays}
    lengths = {label: shape[0] if shape else None for label, (shape, _) in heads.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        told = ", ".join(f"{label} {list(shape)}" for label, (shape, _) in heads.items())
        raise UserError(f"the arrays of {file} differ in their number of cases ({told}): name those to read in arrays")
    cases = next(iter(lengths.values()))
    fields = [
        _field(file, label, *head, (kinds or {}).get(label)) for label, head in heads.items() if label != "case_id"
    ]
    archive = Archive(root, name)
    ids = map(str, range(cases))
    if "case_id" in heads:
        if len(heads["case_id"][0]) != 1:
            raise UserError(f"array 'case_id' of {file} has several axes: give it one id a case")
        ids = map(str, archive.array("case_id").tolist())
    read = functools.partial(_read, archive, tuple(fields))
    return file_cases(root, [name], "npz", [(CASE_ID, list(ids))], fields, read)


def read_heads(file: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Reads the headers of all arrays of an archive.

    Args:
      file: The archive.

    Returns:
      Shape and dtype by name.

    Raises:
      UserError: It is damaged, or the arrays are too large.
    """
    heads: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                label = member.filename.removesuffix(".npy")
                if label in heads:
                    raise UserError(f"{file} holds {label!r} twice: write it again")
                with archive.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, _, dtype = read[version](stream)
                if any(size < 0 for size in shape):
                    raise ValueError(f"array {label!r} has shape {shape}")
                if dtype.hasobject:
                    raise UserError(f"array {label!r} of {file} holds Python objects: save it with a plain dtype")
                heads[label] = (shape, dtype)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}): check the file") from error
    except Exception as error:  # damaged bytes raise nearly anything: zlib, struct, tokenizer, key errors
        raise UserError(f"{file} is damaged or no .npz file ({error}): write or copy it again") from error
    if not heads:
        raise UserError(f"{file} holds no array: write it again")
    total = sum(int(np.prod(shape, dtype=object)) * dtype.itemsize for shape, dtype in heads.values())
    if total > MAX_ARRAYS:
        raise UserError(f"the arrays of {file} have {total} bytes, more than {MAX_ARRAYS}: split it")
    return heads


class Archive:
    """Arrays of one file, each read once a process when it is first asked for."""

    def __init__(self, root: Path, name: str) -> None:
        self._root, self._name = root, name
        self._arrays: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self._root, "name": self._name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"], state["name"])

    def array(self, label: str) -> np.ndarray:
        """Gives an array.

        Args:
          label: Its name.

        Returns:
          All of it, in the byte order of the machine.

        Raises:
          UserError: It is damaged, or gone.
        """
        with self._lock:
            if label not in self._arrays:
                self._arrays[label] = self._load(label)
            return self._arrays[label]

    def _load(self, label: str) -> np.ndarray:
        file = inside(self._root, self._name)
        try:
            with zipfile.ZipFile(file) as archive, archive.open(f"{label}.npy") as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
                if stream.read(1):  # to the end, where the checksum is compared
                    raise ValueError("bytes after the array")
            if array.dtype.kind == "S":
                array = np.char.decode(array, "utf-8")
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror or error}): check the file") from error
        except Exception as error:  # see read_heads
            raise UserError(f"array {label!r} of {file} is damaged ({error}): write or copy it again") from error
        return array.astype(array.dtype.newbyteorder("="), copy=False)


def _field(file: Path, label: str, shape: tuple[int, ...], dtype: np.dtype, kind: str | None) -> Field:
    """Declares a column: its kind is what the user says, or what name, rank and type suggest."""
    where = f"array {label!r} of {file}"
    if kind is not None and kind not in KINDS:
        raise UserError(f"{where} cannot be of kind {kind!r}: choose among {', '.join(KINDS)}")
    if dtype.kind in "US":
        if len(shape) != 1 or kind not in (None, "text", "category"):
            raise UserError(f"{where} holds words: give it one word a case and the kind text or category")
        return Field(label, kind or "category")  # type: ignore[arg-type]
    name = plain_dtype(dtype, where)
    row = () if shape[1:] == (1,) and kind is None else shape[1:]  # labels are often stored as [n, 1]
    if len(row) > 4 or 0 in row:
        raise UserError(f"{where} has shape {list(shape)}: a case has 0 to 4 axes, none of them empty")
    return Field(label, kind or _guess(label, row, name), name, row)  # type: ignore[arg-type]


def _guess(label: str, row: tuple[int, ...], dtype: str) -> str:
    """Chooses a kind by the name of the array if it says one that fits, else by the axes of a case."""
    ranks = {"volume": (3, 4), "image": (2, 3), "audio": (1, 2), "series": (1, 2), "table": (1,)}
    for kind, fitting in ranks.items():
        if kind in label.lower():
            return kind if len(row) in fitting else "number"
    if len(row) == 3:
        return "image" if row[-1] in (3, 4) else "volume"
    if len(row) == 2:
        return "series" if dtype.startswith("float") else "image"
    return {0: "number", 1: "table", 4: "volume"}[len(row)]


def _read(archive: Archive, fields: tuple[Field, ...], row: int) -> dict[str, np.ndarray | str]:
    found = {}
    for field in fields:
        value = archive.array(field.name)[row]
        found[field.name] = str(value) if not field.dtype else np.asarray(value).reshape(field.shape)
    return found
