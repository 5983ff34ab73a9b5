"""Cases of an .npz file as an exported model reads them (format: docs/data.md)."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .artefact import InputError

PICTURES = ("volume", "image")
Tree = dict[str, Any]


def read_cases(path: Path, card: Tree, texts: Tree) -> tuple[list[str], dict[str, np.ndarray], list[str] | None]:
    """Reads what the model needs of an .npz file.

    Args:
      path: The file.
      card: Of the artefact.
      texts: Of its reports; names the record's fields.

    Returns:
      Case ids; arrays of the card's inputs but the text, pictures in HU, with a leading axis of cases; texts.

    Raises:
      InputError: The file is damaged, or an array is not as docs/data.md says or as the artefact reads it.
    """
    arrays = read_arrays(path)
    names = [*PICTURES, "text", *(field["name"] for field in texts["record"])]
    count = next((len(arrays[name]) for name in names if name in arrays and arrays[name].ndim), 0)
    if not count:
        raise InputError(f"{path} has no cases: give it `volume`, `image`, `text` or record fields (docs/data.md)")
    for name in arrays.keys() & {*names, "case_id", "has_volume", "has_image"}:
        if arrays[name].shape[:1] != (count,):
            raise InputError(f"array {name!r} of {path} has shape {list(arrays[name].shape)}, not {count} cases")
    ids = _case_ids(path, arrays) if "case_id" in arrays else [str(row).zfill(6) for row in range(count)]
    wanted, found = card["inputs"], {}
    for name in PICTURES:
        if name in wanted:
            found |= _picture(path, name, arrays, count, wanted[name]["shape"])
    if "table" in wanted:
        columns = [_field(path, field, arrays, count) for field in texts["record"]]
        found["table"] = np.stack(columns, axis=1)
    return ids, found, _stripped(path, "text", arrays) if "text" in arrays else None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file.

    Raises:
      InputError: It is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # damaged archives raise nearly anything
        raise InputError(f"{path} cannot be read as .npz ({error}): write or copy it again") from None


def _picture(path: Path, name: str, arrays: dict[str, np.ndarray], count: int, shape: list[int]) -> dict:
    """One picture of all cases in HU, its spacing, and who has it."""
    axes = len(shape)
    if name not in arrays:
        empty = np.zeros((count, *shape), np.float32), np.ones((count, axes), np.float32), np.zeros(count, bool)
        return dict(zip((name, f"{name}_spacing", f"has_{name}"), empty, strict=True))
    pixels = arrays[name]
    if list(pixels.shape[1:]) != shape:
        raise InputError(f"{name} of {path} has size {list(pixels.shape[1:])}: the artefact reads {shape}")
    if pixels.dtype == np.uint8:
        pixels = pixels.astype(np.float32) * np.float32(1400 / 255) - np.float32(1000)
    elif pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        grey = low >= 0 and high <= 1
        if not np.isfinite(pixels).all() or (not grey and max(-low, high) < 20):
            raise InputError(f"{name} of {path} lies in {low:.4g}..{high:.4g}: neither 0..1 nor Hounsfield units")
        units = -1000.0 + pixels.astype(np.float32) * 1400.0 if grey else np.clip(pixels, -32768, 32767)
        pixels = np.rint(units)
    elif pixels.dtype != np.int16:
        raise InputError(f"{name} of {path} is {pixels.dtype}: use uint8 (window), int16 (HU) or floats")
    has = _numbers(path, f"has_{name}", arrays) if f"has_{name}" in arrays else np.ones(count)
    if not np.isin(has, (0, 1)).all():
        raise InputError(f"array 'has_{name}' of {path} holds other numbers than 0 and 1: correct it")
    spacing = _spacing(path, name, arrays, axes)
    if len(spacing) not in (1, count):
        raise InputError(f"the spacing of {name} in {path} has {len(spacing)} rows, not 1 or {count}: correct it")
    spacing = np.broadcast_to(spacing, (count, axes))
    return {name: pixels.astype(np.float32), f"{name}_spacing": spacing, f"has_{name}": has.astype(bool)}


def _spacing(path: Path, name: str, arrays: dict[str, np.ndarray], axes: int) -> np.ndarray:
    """Voxel sizes of a picture in mm: one row, or one a case."""
    rows = np.atleast_2d(arrays.get(f"{name}_spacing", arrays.get("spacing", np.ones(axes))))
    sized = rows.ndim == 2 and rows.shape[1] in (axes, 3) and rows.dtype.kind in "iuf"
    if not (sized and ((rows[:, -axes:] > 1e-3) & (rows[:, -axes:] < 1e3)).all()):
        raise InputError(f"the spacing of {name} in {path} is no list of {axes} sizes in mm: correct it")
    return rows[:, -axes:].astype(np.float32)


def _field(path: Path, field: Tree, arrays: dict[str, np.ndarray], count: int) -> np.ndarray:
    """One record field of all cases."""
    values = _numbers(path, field["name"], arrays) if field["name"] in arrays else np.full(count, np.nan)
    good = np.isnan(values) | ((values >= field["low"]) & (values <= field["high"]))
    if not good.all():
        raise InputError(
            f"array {field['name']!r} of {path} is {values[~good][0]} in row {int(np.argmin(good))}: it takes "
            f"{field['low']:g} to {field['high']:g}, or NaN if unknown"
        )
    return values.astype(np.float32)


def case_inputs(card: Tree, arrays: dict[str, np.ndarray], texts: list[str] | None, row: int) -> dict[str, np.ndarray]:
    """The inputs of one case: its rows, and the bytes of its text."""
    inputs = {name: np.asarray(values[row]) for name, values in arrays.items()}
    if "text" in card["inputs"]:
        inputs |= text_inputs(texts[row] if texts else "", card["inputs"]["text"]["shape"][0])
    return inputs


def text_inputs(text: str, length: int) -> dict[str, np.ndarray]:
    """The first bytes of a text, and how many it has."""
    encoded = text.encode("utf-8")
    kept = np.frombuffer(encoded[:length].ljust(length, b"\0"), np.uint8)
    return {"text": kept.astype(np.int32), "text_bytes": np.asarray(len(encoded), np.int32)}


def missing_of(card: Tree, inputs: dict[str, np.ndarray]) -> list[str]:
    """Modalities that the model reads and a case lacks."""
    has = {name: bool(inputs[f"has_{name}"]) for name in PICTURES if name in inputs}
    has |= {"table": not np.isnan(inputs["table"]).all()} if "table" in inputs else {}
    has |= {"text": bool(inputs["text_bytes"])} if "text" in inputs else {}
    return [name for name in card["modalities"] if not has[name]]


def points_of(card: Tree, missing: Iterable[str]) -> dict[str, Tree]:
    """Operating points of what a case has."""
    reads, points = card["modalities"], card["operating_points"]
    has = [name for name in reads if name not in set(missing)]
    pictures, record = bool({*has} & {*PICTURES}), bool({*has} - {*PICTURES})
    mode = "both" if pictures and record else "image_only" if pictures else "record_only"
    return points[mode] if mode in points else next(iter(points.values()), {})


def _numbers(path: Path, name: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """An array of one number a case."""
    values = arrays[name]
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        shape = list(values.shape)
        raise InputError(f"array {name!r} of {path} is {values.dtype} of shape {shape}: give one number per case")
    return values.astype(np.float64)


def strings_of(path: Path, name: str, arrays: dict[str, np.ndarray]) -> list[str]:
    """An array of one string, UTF-8 bytes or whole number a case, as they are."""
    values = arrays[name]
    if values.ndim != 1 or values.dtype.kind not in "SUiu":
        shape = list(values.shape)
        raise InputError(f"array {name!r} of {path} is {values.dtype} of shape {shape}: give one string per case")
    found: list[str] = []
    for row, value in enumerate(values.tolist()):
        try:
            raw = value if isinstance(value, bytes) else str(value).encode()
            found.append(raw.decode())
        except UnicodeError:
            raise InputError(f"array {name!r} of {path} is not UTF-8 in row {row}: save it as strings") from None
    return found


def _stripped(path: Path, name: str, arrays: dict[str, np.ndarray]) -> list[str]:
    return [value.strip() for value in strings_of(path, name, arrays)]


def _case_ids(path: Path, arrays: dict[str, np.ndarray]) -> list[str]:
    """Names of the cases, each its own, as r1jax takes them: reports are named by them."""
    names = _stripped(path, "case_id", arrays)
    for row, name in enumerate(names):
        if not name or name in (".", "..") or not name.isprintable() or set(name) & set("/\\"):
            raise InputError(
                f"array 'case_id' of {path} is {name!r} in row {row}: a case needs a name of printable characters "
                "without slashes"
            )
    refuse_twice(path, names)
    return names


def refuse_twice(path: Path, names: list[str]) -> None:
    """Refuses a case whose name another one has."""
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise InputError(f"array 'case_id' of {path} has {name!r} {times} times: give every case its own name")
