"""Tells which format a folder or a file is of."""

from collections import Counter
from pathlib import Path

from r1jax.data.formats import audio, dicom, images, mhd, nifti, npz, tables
from r1jax.data.formats.files import list_files, read_bytes
from r1jax.errors import UserError

BY_SUFFIX = {
    "images": images.SUFFIXES,
    "csv": tables.SUFFIXES,
    "npz": npz.SUFFIXES,
    "mhd": mhd.SUFFIXES,
    "nifti": nifti.SUFFIXES,
    "dicom": dicom.SUFFIXES,
    "audio": audio.SUFFIXES,
}
BY_CONTENT = {
    "images": ((0, b"\x89PNG"), (0, b"\xff\xd8\xff"), (0, b"II*\0"), (0, b"MM\0*"), (0, b"BM")),
    "npz": ((0, b"PK\x03\x04"),),
    "mhd": ((0, b"ObjectType"), (0, b"NDims")),
    "nifti": ((344, b"n+1\0"), (4, b"n+2\0")),
    "dicom": ((128, b"DICM"),),
    "audio": ((8, b"WAVE"), (0, b"fLaC"), (0, b"ID3")),
}
"""Bytes at a place in the file."""


def recognise(path: str | Path) -> str:
    """Finds the format of a folder or a file.

    Args:
      path: What is to be opened.

    Returns:
      Name of the format. Tables beside other files belong to them; several tables with one header are series.

    Raises:
      UserError: There is none, or there are several.
    """
    root, names = list_files(path, ("",), "file")
    found = Counter(kind for name in names if (kind := _kind(root, name)) is not None)
    others = {kind: count for kind, count in found.items() if kind != "csv"}
    if len(others) > 1:
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        raise UserError(f"{path} holds files of several formats ({told}): name the one to read")
    if others:
        return next(iter(others))
    if not found:
        raise UserError(f"no file in {path} is of a format that r1jax reads: it reads {', '.join(BY_SUFFIX)}, series")
    heads = {read_bytes(root, name, 2**16).split(b"\n", 1)[0].strip() for name in names if _kind(root, name) == "csv"}
    if len(heads) > 1:
        raise UserError(f"{path} holds tables with different headers: name one file, or a format")
    return "csv" if found["csv"] == 1 else "series"


def _kind(root: Path, name: str) -> str | None:
    """Goes by the suffix, and where that says nothing, by the content."""
    for kind, suffixes in BY_SUFFIX.items():
        if name.lower().endswith(suffixes):
            return kind
    if "." in name.rpartition("/")[2]:
        return None
    head = read_bytes(root, name, 400)
    for kind, marks in BY_CONTENT.items():
        if any(head[place:].startswith(mark) for place, mark in marks):
            return kind
    return None
