"""DICOM: a folder a series; its slices are sorted, checked for gaps and stacked to a volume in HU."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from r1jax.data.formats.cases import FileCases
from r1jax.data.formats.dicom_slice import Slice, is_dicom, read_slice, read_values
from r1jax.data.formats.files import list_files
from r1jax.data.formats.volume import Grid, common_dtype, read_volume, volume_cases
from r1jax.data.schema import Field
from r1jax.errors import UserError

SUFFIXES = (".dcm", ".dicom", ".ima")
OTHERS = ("DICOMDIR", "LICENSE", "README", "VERSION")
"""Files without a suffix that lie beside slices and are none."""
UNEVEN = 0.1
"""How far a slice may lie from its place on an even grid, as a part of the distance; writers round positions."""


def open_dicom(path: str | Path) -> FileCases:
    """Opens a folder of DICOM series as a source, one case a folder that directly holds slices.

    Args:
      path: Folder of folders, or one series.

    Returns:
      The volumes in HU (CT) or rescaled values, see `volume_cases`, and `modality`. `case_id` is the folder's name
      relative to `path`. Names, dates and numbers of patients are never read from the files.

    Raises:
      UserError: A folder holds several series, or slices are missing, there twice, uneven or tilted; a file is damaged,
        of several frames, or packed in a way that needs a further package; or pydicom is missing.
    """
    root, names = list_files(path, ("",), "file")
    folders: dict[str, list[str]] = {}
    for name in names:
        if _is_slice(root, name):
            folders.setdefault(name.rpartition("/")[0], []).append(name)
    if not folders:
        raise UserError(f"{path} has no DICOM file (DICM at byte 128): give the folder that holds them")
    series = tuple(tuple(sort_slices([read_slice(root, name) for name in found], root)) for found in folders.values())
    grids = tuple(_grid(slices, root) for slices in series)
    dtype = common_dtype([grid.dtype for grid in grids], root)
    read = functools.partial(_read, root, series, grids, dtype)
    known = [(Field("modality", "category"), [slices[0].modality for slices in series])]
    files = [found.file for slices in series for found in slices]
    return volume_cases(root, files, "dicom", [folder or root.name for folder in folders], grids, read, known)


def _is_slice(root: Path, name: str) -> bool:
    last = name.rpartition("/")[2]
    if last in OTHERS:
        return False
    if is_dicom(root, name):
        return True
    if last.lower().endswith(SUFFIXES) or "." not in last:
        raise UserError(f"{root / name} is damaged or no DICOM file (no DICM at byte 128): copy it again or remove it")
    return False


def sort_slices(slices: Sequence[Slice], root: Path) -> list[Slice]:
    """Sorts the slices of a series by their positions, and checks that they make a volume.

    Args:
      slices: In any order.
      root: Folder of the data set, for error messages.

    Returns:
      The slices along their normal.

    Raises:
      UserError: Names the files that do not fit together.
    """
    first = slices[0]
    for other in slices[1:]:
        _check_alike(first, other, root)
    if len(slices) == 1:
        raise UserError(f"{root / first.file} is alone in its folder: a volume has two slices or more")
    ordered = sorted(slices, key=lambda found: float(found.position @ first.normal))
    places = np.array([found.position for found in ordered])
    along = places @ first.normal
    steps = np.diff(along)
    for before, after, step in zip(ordered, ordered[1:], steps, strict=False):
        if step < 1e-3 or before.instance == after.instance:
            pair = f"{root / before.file} and {root / after.file}"
            raise UserError(f"{pair} lie at the same place ({step:.4f} mm apart): remove the one that is there twice")
    usual = float(np.median(steps))
    wide = int(steps.argmax())
    if steps[wide] > 1.5 * usual:
        pair = f"{root / ordered[wide].file} and {root / ordered[wide + 1].file}"
        raise UserError(
            f"slices are missing between {pair}: {steps[wide]:.3f} mm, elsewhere {usual:.3f} mm; export again"
        )
    even = np.linspace(along[0], along[-1], len(along))
    off = np.abs(along - even)
    if off.max() > UNEVEN * (even[1] - even[0]):
        where = f"{root / ordered[int(off.argmax())].file} lies {off.max():.3f} mm from its place"
        raise UserError(f"{where} on a grid of {even[1] - even[0]:.3f} mm: slices are uneven, resample the series")
    straight = places[0] + np.outer(along - along[0], first.normal)
    aside = np.abs(places - straight).max(axis=1)
    if aside.max() > min(first.spacing) / 2:
        worst = root / ordered[int(aside.argmax())].file
        raise UserError(f"{worst} is shifted by {aside.max():.3f} mm beside its series (gantry tilt): resample it")
    return ordered


def _check_alike(first: Slice, other: Slice, root: Path) -> None:
    """Refuses two slices that cannot be of one volume."""
    pair = f"{root / first.file} and {root / other.file}"
    if first.series != other.series:
        raise UserError(f"{pair} are of different series: give each series a folder of its own")
    if first.instance == other.instance:
        raise UserError(f"{pair} are the same slice: remove one of them")
    for name in ("shape", "modality", "bits"):
        if getattr(first, name) != getattr(other, name):
            values = f"{getattr(first, name)} and {getattr(other, name)}"
            raise UserError(f"{pair} differ in {name} ({values}): remove what is not of the volume (a localizer?)")
    for name, near in (("spacing", 1e-4), ("orientation", 1e-3)):
        if not np.allclose(getattr(first, name), getattr(other, name), rtol=near, atol=near):
            raise UserError(f"{pair} differ in {name}: remove what is not of the volume (a localizer?)")


def _grid(slices: Sequence[Slice], root: Path) -> Grid:
    """Grid of the array [slice, row, column]."""
    first, last = slices[0], slices[-1]
    affine = np.eye(4)
    affine[:3, 0] = (last.position - first.position) / (len(slices) - 1)
    affine[:3, 1] = first.orientation[1] * first.spacing[0]
    affine[:3, 2] = first.orientation[0] * first.spacing[1]
    affine[:3, 3] = first.position
    grid = Grid((len(slices), *first.shape), _dtype(slices), affine)
    grid.check(f"{root / first.file} (and its series)")
    return grid


def _dtype(slices: Sequence[Slice]) -> str:
    """The smallest of int16, int32 and float32 that holds every value that the headers allow."""
    if any(found.slope % 1 or found.intercept % 1 for found in slices):
        return "float32"
    _, stored, signed = slices[0].bits
    ends = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
    values = [found.slope * end + found.intercept for found in slices for end in ends]
    for name in ("int16", "int32"):
        if np.iinfo(name).min <= min(values) and max(values) <= np.iinfo(name).max:
            return name
    return "float64"


def _read(
    root: Path, series: tuple[tuple[Slice, ...], ...], grids: tuple[Grid, ...], dtype: str, row: int
) -> dict[str, np.ndarray]:
    slices, grid = series[row], grids[row]
    volume = np.empty(grid.shape, grid.dtype)
    for known, plane in zip(slices, volume, strict=True):
        plane[:] = read_values(root, known)
    return read_volume(volume, grid, grid, dtype, f"series of {root / slices[0].file}")
