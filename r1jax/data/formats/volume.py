"""What MHD, NIfTI and DICOM volumes share: one orientation, spacing and position of every array."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped

from r1jax.data.formats.cases import CASE_ID, FileCases, file_cases
from r1jax.data.formats.files import MAX_BYTES
from r1jax.data.schema import Field
from r1jax.errors import UserError

SHEAR = 5e-3
"""Largest cosine between two axes of a grid whose spacing still says it all; a right angle has 0."""


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume lie, as its file stores them.

    Attributes:
      shape: Voxels along each axis of the stored array.
      dtype: NumPy's name of the type of the values that reading gives.
      affine: Takes a voxel's index in the stored array, and 1, to its place in mm, and 1; see `lps`.
    """

    shape: tuple[int, ...]
    dtype: str
    affine: Float[np.ndarray, "4 4"]

    def check(self, where: str) -> None:
        """Refuses a grid that is no box of voxels, or too large.

        Args:
          where: File, for the error message.

        Raises:
          UserError: Says what is wrong.
        """
        if len(self.shape) != 3 or any(size < 1 for size in self.shape):
            raise UserError(f"{where} has {list(self.shape)} voxels: a volume has three axes, none of them empty")
        size = int(np.prod(self.shape, dtype=object)) * np.dtype(self.dtype).itemsize
        if size > MAX_BYTES:
            raise UserError(f"{where} claims {list(self.shape)} voxels, {size} bytes, more than {MAX_BYTES}: crop it")
        axes = self.affine[:3, :3]
        with np.errstate(over="ignore", invalid="ignore"):
            spacing = np.linalg.norm(axes, axis=0)
        if not np.isfinite(self.affine).all() or not ((spacing > 1e-6) & (spacing < 1e6)).all():
            raise UserError(f"{where} has no finite, positive distance between voxels ({spacing} mm): repair it")
        cosines = (axes / spacing).T @ (axes / spacing) - np.eye(3)
        if np.abs(cosines).max() > SHEAR:
            raise UserError(f"{where} has axes that are not at right angles (gantry tilt?): resample it to a box first")

    def turn(self) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Finds how the stored axes become z, y, x.

        Returns:
          The stored axis of each, and whether it must be reversed, so that indices rise to the head, the back and the
          left of the patient as nearly as the grid allows.
        """
        axes = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        along = axes[::-1]  # rows z, y, x of the patient
        order = max(itertools.permutations(range(3)), key=lambda taken: sum(abs(along[k, taken[k]]) for k in range(3)))
        return order, tuple(bool(along[k, order[k]] < 0) for k in range(3))

    def lps(self) -> "Grid":
        """The same grid after `oriented`.

        Returns:
          Its affine takes (z, y, x, 1) to mm (x, y, z, 1) towards the patient's left, back (posterior) and head
          (superior): the world of DICOM and of MHD.
        """
        order, reverse = self.turn()
        affine = self.affine.copy()
        for k, axis in enumerate(order):
            column = self.affine[:3, axis]
            affine[:3, k] = -column if reverse[k] else column
            affine[:3, 3] += column * (self.shape[axis] - 1) if reverse[k] else 0.0
        return Grid(tuple(self.shape[axis] for axis in order), self.dtype, affine)

    def oriented(self, stored: Shaped[np.ndarray, "a b c"]) -> Shaped[np.ndarray, "Z Y X"]:
        """Turns the stored array.

        Args:
          stored: As in the file.

        Returns:
          The same values as [Z, Y, X].
        """
        order, reverse = self.turn()
        return stored.transpose(order)[tuple(slice(None, None, -1 if back else 1) for back in reverse)]


def volume_cases(
    root: Path,
    files: Sequence[str],
    what: str,
    case_id: Sequence[str],
    grids: Sequence[Grid],
    read: Callable[[int], Mapping[str, np.ndarray]],
    known: Sequence[tuple[Field, Sequence[str]]] = (),
) -> FileCases:
    """Puts a source of volumes together.

    Args:
      root: Folder of the data set.
      files: All files that are read.
      what: The format.
      case_id: One a volume.
      grids: As stored, checked.
      read: Reads the volume with this number; see `read_volume`.
      known: Further columns.

    Returns:
      `volume` [Z, Y, X] with the smallest type that holds the values of all files, `volume_spacing` float32 [3] in mm
      along z, y, x and `volume_affine` float64 [4, 4]; see `Grid.lps`.

    Raises:
      UserError: No type holds the values of all files.
    """
    turned = [grid.lps() for grid in grids]
    dtype = common_dtype([grid.dtype for grid in grids], root)
    sizes = [{grid.shape[axis] for grid in turned} for axis in range(3)]
    shape = tuple(size.pop() if len(size) == 1 else None for size in sizes)
    spacing = [np.linalg.norm(grid.affine[:3, :3], axis=0).astype(np.float32) for grid in turned]
    columns: list[tuple[Field, Sequence[str] | Sequence[np.ndarray]]] = [
        (CASE_ID, case_id),
        *known,
        (Field("volume_spacing", "number", "float32", (3,)), spacing),
        (Field("volume_affine", "number", "float64", (4, 4)), [grid.affine for grid in turned]),
    ]
    return file_cases(root, files, what, columns, [Field("volume", "volume", dtype, shape)], read)


def common_dtype(dtypes: Sequence[str], root: Path) -> str:
    """Finds the type for volumes of several types.

    Args:
      dtypes: Of the files.
      root: Folder, for the error message.

    Returns:
      The smallest that loses nothing.

    Raises:
      UserError: There is none: 64-bit whole numbers beside floats, or beside others of another sign.
    """
    found = np.result_type(*dtypes)
    wide = next((name for name in dtypes if np.dtype(name).kind in "iu" and np.dtype(name).itemsize == 8), None)
    if wide is not None and found.kind == "f":
        raise UserError(
            f"volumes in {root} are of types {sorted(set(dtypes))}, none of which holds all: save them alike"
        )
    return found.name


def read_volume(
    stored: Shaped[np.ndarray, "a b c"], grid: Grid, known: Grid, dtype: str, where: str
) -> dict[str, np.ndarray]:
    """Turns what was read from a file into the columns of its case.

    Args:
      stored: The array in the file.
      grid: What the header says now.
      known: What it said when the source was opened.
      dtype: Wanted type.
      where: File, for the error message.

    Returns:
      `volume`.

    Raises:
      UserError: The header has changed.
    """
    if (grid.shape, grid.dtype) != (known.shape, known.dtype) or not np.array_equal(grid.affine, known.affine):
        raise UserError(f"{where} has changed since it was opened: open the folder again")
    return {"volume": np.ascontiguousarray(grid.oriented(stored), dtype=dtype)}
