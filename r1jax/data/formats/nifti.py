"""NIfTI: .nii and .nii.gz volumes; nibabel understands the header, the voxels are counted before they are unpacked."""

import functools
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from r1jax.data.formats.cases import FileCases
from r1jax.data.formats.files import list_files, plain_dtype, read_bytes
from r1jax.data.formats.volume import Grid, common_dtype, read_volume, volume_cases
from r1jax.errors import UserError

SUFFIXES = (".nii", ".nii.gz")
HEADER_BYTES = 540
"""Of NIfTI-2, the longer of the two."""
UNITS = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}
"""Lengths in mm; files that do not say are in mm by custom."""


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes:
      grid: Of the array as stored, [x, y, z].
      stored: Type in the file, with its byte order.
      offset: Bytes before the voxels.
      slope: Value = slope * stored + inter; None where they are the same.
      inter: See slope.
    """

    grid: Grid
    stored: str
    offset: int
    slope: float | None
    inter: float | None


def open_nifti(path: str | Path) -> FileCases:
    """Opens a folder of NIfTI volumes as a source.

    Args:
      path: The folder, or one file.

    Returns:
      The volumes; see `volume_cases`. Values that the header scales (slope and intercept) are float32, or float64 where
      the stored whole numbers have more than 16 bits.

    Raises:
      UserError: A file is damaged, says no orientation, has several volumes or colours; or nibabel is missing.
    """
    root, names = list_files(path, SUFFIXES, "NIfTI file")
    headers = tuple(_parse(_unpack(root, name, HEADER_BYTES), root / name) for name in names)
    grids = [header.grid for header in headers]
    dtype = common_dtype([grid.dtype for grid in grids], root)
    read = functools.partial(_read, root, tuple(names), headers, dtype)
    return volume_cases(root, names, "nifti", names, grids, read)


def _unpack(root: Path, name: str, limit: int) -> bytes:
    """Gives at most so many bytes of the unpacked file, and one more where there is one."""
    file, data = root / name, read_bytes(root, name, None if limit > HEADER_BYTES else 4 * HEADER_BYTES)
    if not name.lower().endswith(".gz"):
        return data[: limit + 1]
    stream = zlib.decompressobj(wbits=31)  # gzip, with its checksum
    try:
        found = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise UserError(f"{file} is damaged or not packed by gzip ({error}): write or copy it again") from error
    if limit > HEADER_BYTES and len(found) <= limit and (not stream.eof or stream.unused_data):
        raise UserError(f"{file} is cut short, or has bytes after its end: write or copy it again")
    return found


def _parse(head: bytes, file: Path) -> Header:
    """Has nibabel read the header, strictly."""
    try:
        import nibabel
    except ImportError as error:
        raise UserError(f"{file} needs nibabel: pip install 'r1jax[medical]'") from error
    try:
        kind = nibabel.Nifti2Header if head[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nibabel.Nifti1Header
        header = kind(head[: kind.template_dtype.itemsize], check=False)
        bits = int(header["bitpix"])  # which nibabel corrects
        quiet = logging.Logger("quiet", logging.CRITICAL)
        header.check_fix(logger=quiet, error_level=30)  # from 30 on, nibabel would repair by guessing
        if not int(header["qform_code"]) and not int(header["sform_code"]):
            raise UserError(
                f"{file} does not say how the patient lies (qform_code and sform_code are 0): set one, for example "
                "with image.set_sform(affine, 1) of nibabel"
            )
        return _header(header, bits, file)
    except UserError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything; the image library's own errors share no base
        raise UserError(f"{file} is damaged or no NIfTI file ({error}): write or copy it again") from error


def _header(header, bits: int, file: Path) -> Header:  # nibabel's headers, which may not be installed
    shape = tuple(int(size) for size in header.get_data_shape())
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        raise UserError(f"{file} has {list(shape)} voxels: give each volume a file of its own")
    stored = header.get_data_dtype()
    name = plain_dtype(stored, f"{file}: type of voxels")
    if bits != 8 * stored.itemsize:
        raise UserError(f"{file} says that voxels are {stored} of {bits} bits: write it again")
    slope, inter = header.get_slope_inter()
    if np.isinf([header["scl_slope"], header["scl_inter"]]).any():
        raise UserError(f"{file} scales its values with infinity: write it again")
    if slope is not None and (slope, inter) != (1.0, 0.0):
        name = "float32" if stored.itemsize <= 2 or stored.kind == "f" and stored.itemsize == 4 else "float64"
    else:
        slope = inter = None
    offset = float(header["vox_offset"])
    if offset != int(offset) or offset < header.template_dtype.itemsize:
        raise UserError(f"{file} says that voxels begin at byte {offset}, inside of its header: write it again")
    scale = UNITS.get(header.get_xyzt_units()[0])
    if scale is None:
        raise UserError(f"{file} measures lengths in {header.get_xyzt_units()[0]!r}: use mm")
    affine = np.diag([-scale, -scale, scale, 1.0]) @ np.asarray(header.get_best_affine(), np.float64)  # RAS to LPS
    grid = Grid(shape[:3], name, affine)
    grid.check(str(file))
    spacing, said = np.linalg.norm(affine[:3, :3], axis=0), scale * np.asarray(header.get_zooms()[:3], np.float64)
    if not np.allclose(spacing, said, rtol=1e-2):
        raise UserError(f"{file} says {said} mm between voxels, but its orientation {spacing}: write it again")
    return Header(grid, stored.str, int(offset), slope, inter)


def _read(
    root: Path, names: tuple[str, ...], headers: tuple[Header, ...], dtype: str, row: int
) -> dict[str, np.ndarray]:
    known, file = headers[row], root / names[row]
    wanted = known.offset + int(np.prod(known.grid.shape)) * np.dtype(known.stored).itemsize
    data = _unpack(root, names[row], max(wanted, HEADER_BYTES + 1))
    header = _parse(data[:HEADER_BYTES], file)
    if len(data) != wanted:
        more = "more" if len(data) > wanted else f"only {len(data)}"
        raise UserError(f"{file} says {wanted} bytes but has {more}: write or copy it again")
    values = np.frombuffer(data, header.stored, offset=header.offset).reshape(header.grid.shape, order="F")
    if header.slope is not None:
        values = (values.astype(np.float64) * header.slope + header.inter).astype(header.grid.dtype)
    return read_volume(values, header.grid, known.grid, dtype, str(file))
