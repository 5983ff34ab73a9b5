"""Lists, reads and sums up the files of a data set, and never leaves its folder."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from r1jax.errors import UserError

MAX_BYTES = 2**31 - 2**16
"""Largest file of one case, and largest decoded value of one: Arrow counts the bytes of a cell in 31 bits."""
HASHED_BYTES = 4 * 2**30
"""Up to so many bytes a data set is known by its contents; a larger one by the sizes and times of its files."""


def list_files(path: str | Path, suffixes: Sequence[str], what: str) -> tuple[Path, list[str]]:
    """Finds the files of a kind in a folder and the folders in it; hidden ones are left out.

    Args:
      path: A folder, or one file.
      suffixes: Ends of the names, lower case; "" takes every file.
      what: The kind, for the error message.

    Returns:
      The folder without links, and the names relative to it (with `/`), sorted.

    Raises:
      UserError: There is no such folder, no such file in it, or a link in it leads out.
    """
    top = Path(path)
    if top.is_file():
        root, names = top.resolve().parent, [top.resolve().name]
    elif top.is_dir():
        root = top.resolve()
        names = sorted(_walk(root))
    else:
        raise UserError(f"there is no folder or file {top}: check the path")
    found = [name for name in names if name.lower().endswith(tuple(suffixes))]
    if not found:
        raise UserError(f"{top} has no {what} ({', '.join(suffixes)}): give the folder that holds them")
    for name in found:
        inside(root, name)
    return root, found


def _walk(root: Path) -> list[str]:
    """Names of all regular files below a folder."""

    def fail(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror}): check its permissions") from error

    names = []
    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise UserError(f"{Path(folder) / name} is a link to a folder: put the folder itself there")
        for name in files:
            file = Path(folder) / name
            if name.startswith(".") or not (file.is_file() or file.is_symlink()):
                continue
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"the name of file {os.fsencode(file)!r} is not UTF-8: rename it") from error
            names.append(file.relative_to(root).as_posix())
    return names


def inside(root: Path, name: str) -> Path:
    """Finds a file by the name that a folder, a table or a header gives.

    Args:
      root: Folder of the data set, without links.
      name: Relative to it.

    Returns:
      The file.

    Raises:
      UserError: The name is absolute, or leads out of the folder, by itself or by a link; or it is of a folder or pipe.
    """
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a zero byte in the name
        raise UserError(f"{root / name!r} cannot be followed ({error}): put the file itself there") from error
    if Path(name).is_absolute() or not path.is_relative_to(root):
        raise UserError(f"{name!r} leads out of {root}: only files inside of the folder are read, copy it there")
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise UserError(f"{path} is no file: put one there")
    return path


def read_bytes(root: Path, name: str, limit: int | None = None) -> bytes:
    """Reads a file, or its beginning.

    Args:
      root: Folder of the data set.
      name: Of the file, relative to it.
      limit: How many bytes of it are wanted; None reads all.

    Returns:
      Its bytes.

    Raises:
      UserError: It cannot be read, or all of it is more than `MAX_BYTES`.
    """
    path = inside(root, name)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if limit is None and size > MAX_BYTES:
                raise UserError(f"{path} has {size} bytes, more than {MAX_BYTES}: split it")
            return file.read(size + 1 if limit is None else limit)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the file") from error


def file_size(root: Path, name: str) -> int:
    """Asks for the size of a file in bytes.

    Args:
      root: Folder of the data set.
      name: Of the file, relative to it.

    Returns:
      Bytes.

    Raises:
      UserError: There is no such file.
    """
    path = inside(root, name)
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the file") from error


def fingerprint(root: Path, names: Sequence[str], facts: str) -> tuple[str, str]:
    """Sums up what defines the cases: the files and how they are read.

    Args:
      root: Folder of the data set.
      names: Of all files that are read, relative to it.
      facts: How they are read.

    Returns:
      sha256 (hex), and a remark for the source's name: "", or that the contents were too many to be read.

    Raises:
      UserError: A file cannot be read.
    """
    total = hashlib.sha256(facts.encode())
    large = sum(file_size(root, name) for name in names) > HASHED_BYTES
    for name in sorted(names):
        path = inside(root, name)
        try:
            if large:
                known = path.stat()
                mark = f"{known.st_size} {known.st_mtime_ns}"
            else:
                with path.open("rb") as file:
                    mark = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}): check the file") from error
        total.update(f"\0{len(name.encode())} {name} {mark}".encode())
    return total.hexdigest(), "; known by the sizes and times of its files" if large else ""


def class_folders(root: Path, names: Sequence[str]) -> list[str] | None:
    """Takes the first folder of each name as its class.

    Args:
      root: Folder of the data set, for the error message.
      names: Relative to it.

    Returns:
      The class of each, or None where all lie in the folder itself.

    Raises:
      UserError: Some lie in folders and some beside them.
    """
    labels = [name.split("/")[0] if "/" in name else "" for name in names]
    if any(labels) and not all(labels):
        alone = names[labels.index("")]
        raise UserError(f"{root / alone} lies beside the folders of classes: move it into the folder of its class")
    return labels if any(labels) else None


def plain_dtype(dtype: np.dtype, where: str) -> str:
    """Names a type of numbers that a row may have.

    Args:
      dtype: As a file has it, of any byte order.
      where: File and field, for the error message.

    Returns:
      NumPy's name of it in the byte order of the machine.

    Raises:
      UserError: It is no plain number of at most 8 bytes.
    """
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise UserError(f"{where} is {dtype}: save it as whole numbers or floats of at most 64 bits")
    return dtype.newbyteorder("=").name
