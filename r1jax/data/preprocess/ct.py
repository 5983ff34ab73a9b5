"""Windowing of CT and resampling to one spacing."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Num, Shaped

from r1jax.data.plugins import Case, Preprocessor
from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError


@dataclass
class Window(Preprocessor):
    """Maps a range of Hounsfield units to 0..255; what lies outside is cut off.

    The medical task takes uint8 for the range -1000 to 400 HU: keep these for it.

    Attributes:
      low: HU that become 0.
      high: HU that become 255.
      field: Name of the picture.
    """

    low: float | int = -1000
    high: float | int = 400
    field: str = "volume"

    def __post_init__(self) -> None:
        """Refuses an empty range.

        Raises:
          UserError: `low` is not below `high`.
        """
        if not self.low < self.high:
            raise UserError(f"low is {self.low} and high is {self.high}, but low must be below high")

    def output(self, schema: Schema) -> Schema:
        """The picture becomes uint8.

        Raises:
          UserError: It is missing, or uint8 already.
        """
        before = _named(schema, self.field)
        if before.dtype == "uint8":
            raise UserError(f"{self.field!r} is uint8, windowed already: leave this step out")
        return Schema(tuple(replace(f, dtype="uint8") if f is before else f for f in schema.fields))

    def process(self, case: Case) -> Case:
        """Windows the picture of a case."""
        return {**case, self.field: window(case[self.field], self.low, self.high)}


@dataclass
class Resample(Preprocessor):
    """Resamples a picture to voxels of one size by linear interpolation; it then differs in size from case to case.

    Attributes:
      spacing: mm a voxel along each axis, or one number for all.
      size: Cut or padded about the middle to this many voxels, so that cases can be batched; none leaves them.
      field: Name of the picture; its spacing is `<field>_spacing`.
      fill: Value of padding, HU; 0 in windowed pictures.
    """

    spacing: float | int | tuple[float | int, ...]
    size: tuple[int, ...] | None = None
    field: str = "volume"
    fill: float | int = -1000
    largest: ClassVar[int] = 1 << 30
    """Voxels a picture may get: a wrong spacing must not fill the memory."""

    def output(self, schema: Schema) -> Schema:
        """The sizes are free, or those asked for.

        Raises:
          UserError: The picture or its spacing is missing.
        """
        before = _named(schema, self.field)
        _named(schema, f"{self.field}_spacing")
        shape = (None,) * len(before.shape) if self.size is None else self.size
        if len(shape) != len(before.shape):
            raise UserError(f"size has {len(shape)} numbers, but {self.field!r} has {len(before.shape)} axes")
        return Schema(tuple(replace(f, shape=shape) if f is before else f for f in schema.fields))

    def process(self, case: Case) -> Case:
        """Resamples the picture of a case.

        Raises:
          UserError: A spacing is not above 0, or the picture would be too large.
        """
        given, picture = np.asarray(case[f"{self.field}_spacing"], np.float64), case[self.field]
        wanted = np.broadcast_to(np.asarray(self.spacing, np.float64), given.shape)
        if not (np.isfinite(given).all() and (given > 0).all() and (wanted > 0).all()):
            raise UserError(f"spacing {given.tolist()} to {wanted.tolist()} mm: both must be above 0")
        if np.prod(np.ceil(np.array(picture.shape) * given / wanted)) > self.largest:
            raise UserError(f"{list(picture.shape)} voxels of {given.tolist()} mm are too many at {wanted.tolist()} mm")
        picture = resample(picture, given / wanted)
        if self.size is not None:
            picture = fit(picture, self.size, self.fill if picture.dtype.kind != "u" else 0)
        return {**case, self.field: picture, f"{self.field}_spacing": wanted.astype(np.float32)}


def window(hu: Num[np.ndarray, "..."], low: float | int, high: float | int) -> Num[np.ndarray, "..."]:
    """Maps low..high to 0..255.

    Args:
      hu: Hounsfield units.
      low: Becomes 0.
      high: Becomes 255.

    Returns:
      uint8, rounded to the nearest.
    """
    scaled = (hu.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def resample(picture: Shaped[np.ndarray, "..."], factors: Num[np.ndarray, " axes"]) -> Shaped[np.ndarray, "..."]:
    """Scales a picture by linear interpolation, axis by axis; voxel edges of the whole stay where they were.

    Args:
      picture: Any shape.
      factors: New over old number of voxels along each axis.

    Returns:
      The picture with round(n x factor) voxels an axis, at least 1, in its dtype; whole numbers are rounded. Nothing is
      smoothed before it is made smaller.
    """
    found = picture.astype(np.float32)
    for axis, (n, factor) in enumerate(zip(picture.shape, factors, strict=True)):
        count = max(1, round(n * float(factor)))
        if count == n and abs(factor - 1) < 1e-6:
            continue
        places = np.clip((np.arange(count) + 0.5) / factor - 0.5, 0, n - 1)  # middles of voxels
        low = np.minimum(places.astype(np.int64), max(n - 2, 0))
        share = (places - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(found.ndim)])
        above = np.take(found, np.minimum(low + 1, n - 1), axis=axis)
        found = np.take(found, low, axis=axis)
        found += (above - found) * share
    if picture.dtype.kind in "iu":
        limits = np.iinfo(picture.dtype)
        found = np.clip(np.rint(found), limits.min, limits.max)
    return found.astype(picture.dtype)


def fit(picture: Shaped[np.ndarray, "..."], size: tuple[int, ...], fill: float | int) -> Shaped[np.ndarray, "..."]:
    """Cuts or pads a picture about its middle.

    Args:
      picture: Any shape.
      size: Of the result.
      fill: Value of what is padded.

    Returns:
      The picture of the given size.
    """
    found = np.full(size, fill, picture.dtype)
    here, there = [], []
    for n, m in zip(picture.shape, size, strict=True):
        kept = min(n, m)
        here.append(slice((m - kept) // 2, (m - kept) // 2 + kept))
        there.append(slice((n - kept) // 2, (n - kept) // 2 + kept))
    found[tuple(here)] = picture[tuple(there)]
    return found


def _named(schema: Schema, name: str) -> Field:
    return schema.select([name]).fields[0]
