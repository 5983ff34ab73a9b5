"""Checks the columns of a case folder against the schema and brings them to the types of a source (docs/data.md)."""

from collections import Counter

import numpy as np
from jaxtyping import Bool, Float32, Int16, UInt8

from r1jax.data.folder_files import FLAGS, RANK, RECORD, Column
from r1jax.errors import UserError
from r1jax.tasks.medical.schema import FINDING

WINDOW_LOW, WINDOW_WIDTH = -1000.0, 1400.0
"""HU of grey value 0, and HU between the darkest and the brightest grey value."""
SPLIT_NUMBERS = {"0": "train", "1": "val", "2": "test"}
SPLIT_WORDS = {"training": "train", "validation": "val", "valid": "val", "testing": "test"}


def as_texts(column: Column) -> list[str]:
    """Turns a column of strings, UTF-8 bytes or whole numbers into stripped strings."""
    values = column.values
    if values.ndim != 1:
        raise UserError(f"{column.where()} has shape {list(values.shape)}: give one string or whole number per case")
    texts: list[str] = []
    for row, value in enumerate(values.tolist()):
        try:
            texts.append((value.decode() if isinstance(value, bytes) else str(value)).strip())
        except UnicodeDecodeError as error:
            raise UserError(f"{column.at(row)} is not UTF-8: save the array as strings") from error
    return texts


def as_case_ids(column: Column) -> list[str]:
    """Checks that names of cases are unique and can be names of report files."""
    names = as_texts(column)
    for row, name in enumerate(names):
        if not name or name in (".", "..") or not name.isprintable() or set(name) & set("/\\"):
            raise UserError(
                f"{column.at(row)} is {name!r}: a case needs a name of printable characters without slashes"
            )
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        second = [row for row, other in enumerate(names) if other == name][1]
        raise UserError(f"{column.at(second)} repeats the case {name!r}: give every case its own name")
    return names


def as_marks(column: Column) -> list[str]:
    """Turns split numbers or words into `train`, `val`, `test`, the empty string, or whatever else is written there."""
    marks = [SPLIT_NUMBERS.get(text, text.lower()) for text in as_texts(column)]
    return [SPLIT_WORDS.get(mark, mark) for mark in marks]


def as_numbers(column: Column, name: str) -> Float32[np.ndarray, "n ..."]:
    """Checks one finding, record field or has_* flag against the schema.

    Args:
      column: Values of all cases.
      name: Name of the finding, field or flag.

    Returns:
      float32 [n], or [n, 3] for a centre in mm; NaN where unknown.

    Raises:
      UserError: A value is no number or out of range.
    """
    values, kind = column.values, FINDING[name].kind if name in FINDING else ""
    shape = (len(values), 3) if kind == "vector" else (len(values),)
    if values.shape != shape:
        raise UserError(f"{column.where()} has shape {list(values.shape)}: {list(shape)} is needed")
    values = values.astype(np.float64)
    if name in RECORD:
        field = RECORD[name]
        good, allowed = (values >= field.low) & (values <= field.high), f"{field.low:g} to {field.high:g}"
    elif kind == "rating":
        levels = len(FINDING[name].levels)
        good, allowed = np.isin(values, np.arange(1, levels + 1)), f"whole numbers from 1 to {levels}"
    elif kind == "length":
        good, allowed = (values > 0) & (values < 1e4), "positive lengths in mm"
    elif kind == "vector":
        good, allowed = np.abs(values) < 1e4, "offsets in mm"
    else:
        good, allowed = np.isin(values, (0.0, 1.0)), "0 or 1"
    if name not in FLAGS:
        good |= np.isnan(values)
    if not good.all():
        row = int(np.argwhere(~good)[0, 0])
        value = values[row].tolist()
        raise UserError(
            f"{column.at(row)} is {value}: {name} takes {allowed}; correct it, or leave it empty if unknown"
        )
    return values.astype(np.float32)


def as_spacing(column: Column, picture: str, cases: int) -> Float32[np.ndarray, "n k"]:
    """Checks voxel sizes and repeats one row for all cases.

    Args:
      column: [n, k], [1, k] or [k] in mm, in the picture's array order; [3] also serves an image, as (y, x) of it.
      picture: `image` or `volume`.
      cases: Number of cases.

    Returns:
      float32 [n, 2] for images and [n, 3] for volumes.

    Raises:
      UserError: Wrong shape, or a size that is not positive and finite.
    """
    axes, values = RANK[picture] - 1, column.values
    rows = np.atleast_2d(values)
    if rows.ndim != 2 or rows.shape[1] not in (axes, 3) or len(rows) not in (1, cases):
        raise UserError(
            f"{column.where()} has shape {list(values.shape)}: [{axes}] or [n, {axes}] in mm per pixel is needed"
        )
    rows = rows[:, -axes:].astype(np.float64)
    good = ((rows > 1e-3) & (rows < 1e3)).all(axis=1)
    if not good.all():
        row = int(np.argmin(good))
        raise UserError(f"{column.at(row)} is {rows[row].tolist()}: spacing must be positive and in mm; correct it")
    return np.broadcast_to(rows, (cases, axes)).astype(np.float32)


def hounsfield(grey: UInt8[np.ndarray, "..."]) -> Int16[np.ndarray, "..."]:
    """Maps grey values 0..255 of the window -1000..400 to HU, without a copy in floats."""
    return np.rint(WINDOW_LOW + np.arange(256) * (WINDOW_WIDTH / 255)).astype(np.int16)[grey]


def as_pictures(column: Column, case_ids: list[str]) -> UInt8[np.ndarray, "..."] | Int16[np.ndarray, "..."]:
    """Leaves uint8 and int16 pictures as they are; turns floats into int16 HU, one case at a time.

    Args:
      column: [n, H, W] or [n, Z, Y, X]; floats are grey values of the window if all of them lie in 0..1, else HU.
      case_ids: Names of the cases, for the error message.

    Returns:
      uint8 (window) or int16 (HU) array of the same shape.

    Raises:
      UserError: A value is not finite, or the floats are neither 0..1 nor HU.
    """
    if column.values.dtype.kind != "f":
        return column.values
    low, high = np.inf, -np.inf
    for row, case in enumerate(column.values):
        broken = case.size - int(np.count_nonzero(np.isfinite(case)))
        if broken:
            raise UserError(
                f"{column.at(row)} (case {case_ids[row]!r}) has {broken} values that are not finite (NaN or Inf):"
                " repair or leave out that case"
            )
        low, high = min(low, float(case.min())), max(high, float(case.max()))
    grey = low >= 0 and high <= 1
    if not grey and max(-low, high) < 20:  # e.g. standardised values: as HU they would be a flat grey, silently
        raise UserError(
            f"{column.where()} lies in {low:.4g}..{high:.4g}, neither 0..1 nor Hounsfield"
            " units: clip it to 0..1 or convert it"
        )
    pictures = np.empty(column.values.shape, np.int16)
    for row, case in enumerate(column.values):
        units = WINDOW_LOW + case.astype(np.float32) * WINDOW_WIDTH if grey else np.clip(case, -32768, 32767)
        pictures[row] = np.rint(units).astype(np.int16)
    return pictures


def check_mask(column: Column, shapes: list[tuple[int, ...]]) -> None:
    """Refuses a mask that is neither like one of the pictures nor its packed bits (np.packbits over axis 1)."""
    shape = column.values.shape[1:]
    packed = [(-(-int(np.prod(picture)) // 8),) for picture in shapes]
    plain = shape in shapes and column.values.dtype.kind in "biu"
    if not plain and not (shape in packed and column.values.dtype == np.uint8):
        wanted = " or ".join(str([len(column.values), *picture]) for picture in shapes) or "no mask without pictures"
        raise UserError(
            f"{column.where()} is {column.values.dtype} of shape {list(column.values.shape)}: {wanted}, or those bits"
            " packed by np.packbits, is needed"
        )


def unpack_mask(mask: np.ndarray, shapes: list[tuple[int, ...]]) -> Bool[np.ndarray, "B ..."]:
    """Gives masks the shape of the first picture that they fit.

    Args:
      mask: [B, Z, Y, X] or [B, Y, X], or packed bits [B, bytes].
      shapes: Sizes of one picture, volumes first.

    Returns:
      bool [B, Z, Y, X] or [B, Y, X].
    """
    if mask.shape[1:] in shapes:
        return mask != 0
    shape = next(shape for shape in shapes if -(-int(np.prod(shape)) // 8) == mask.shape[1])
    return np.unpackbits(mask, axis=1, count=int(np.prod(shape))).reshape(len(mask), *shape).astype(bool)
