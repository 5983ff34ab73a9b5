"""Readers of common file formats as sources (docs/formats.md)."""

import inspect
from pathlib import Path
from typing import Any

from r1jax.data.formats.audio import open_audio
from r1jax.data.formats.cases import FileCases
from r1jax.data.formats.dicom import open_dicom
from r1jax.data.formats.images import open_images
from r1jax.data.formats.mhd import open_mhd
from r1jax.data.formats.nifti import open_nifti
from r1jax.data.formats.npz import open_npz
from r1jax.data.formats.recognise import recognise
from r1jax.data.formats.series import open_series
from r1jax.data.formats.tables import open_table
from r1jax.errors import UserError, nearest

FORMATS = {
    "images": open_images,
    "csv": open_table,
    "npz": open_npz,
    "mhd": open_mhd,
    "nifti": open_nifti,
    "dicom": open_dicom,
    "audio": open_audio,
    "series": open_series,
}


def open_format(name: str, path: str | Path, **options: Any) -> FileCases:
    """Opens files of a format as a source.

    Args:
      name: One of `FORMATS`, or "auto": the one that suffixes and contents show.
      path: Folder or file.
      **options: Of the reader of this format, such as `form` of `open_images`.

    Returns:
      The cases.

    Raises:
      UserError: There is no such format or option, or the files are not as it wants them.
    """
    if name not in (*FORMATS, "auto"):
        raise UserError(f"there is no format {name!r}{nearest(name, FORMATS)}: choose among {', '.join(FORMATS)}, auto")
    reader = FORMATS[recognise(path) if name == "auto" else name]
    known = inspect.signature(reader).parameters.keys() - {"path"}
    for option in options.keys() - known:
        choice = ", ".join(sorted(known)) or "none"
        raise UserError(f"format {name} has no option {option!r}{nearest(option, known)}: it has {choice}")
    return reader(path, **options)
