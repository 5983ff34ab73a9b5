"""Generated cases that are drawn once, by many processes, and read from files by all who need them."""

import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

from r1jax.data.source import Source

CHUNK = 64
"""Cases that a process draws before it asks for more."""
STRINGS, DONE = "strings.json", "drawn"


def place_of(source: Source, folder: Path) -> Path:
    """Where the cases of a source lie, which other cases never share."""
    return folder / source.fingerprint[:24]


def draw(source: Source, folder: Path, processes: int) -> Path:
    """Writes every case of a source, unless an earlier call has; what was cut off is drawn again.

    Args:
      source: The cases; it travels to the processes, so nothing should be drawn yet.
      folder: Cases of each source have a folder in it.
      processes: How many draw.

    Returns:
      The folder of these cases.
    """
    place = place_of(source, folder)
    if (place / DONE).exists():
        return place
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    chunks = [np.arange(first, min(first + CHUNK, len(source))) for first in range(0, len(source), CHUNK)]
    context, strings = multiprocessing.get_context("spawn"), dict[str, list[str]]()
    with ProcessPoolExecutor(processes, context, _begin, (source, place)) as pool:
        shapes = pool.submit(_shapes).result()
        for name, (dtype, shape) in shapes.items():
            open_memmap(place / f"{name}.npy", "w+", dtype, (len(source), *shape))
        for told in pool.map(_draw, chunks):  # in their order
            for name, words in told.items():
                strings.setdefault(name, []).extend(words)
    (place / STRINGS).write_text(json.dumps(strings))
    (place / DONE).touch()
    return place


_OPEN: dict[str, Any] = {}


def _begin(source: Source, place: Path) -> None:
    _OPEN.update(source=source, place=place)


def _shapes() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every array of a case."""
    first = _OPEN["source"].read_batch(np.arange(1))
    return {k: (v.dtype.str, v.shape[1:]) for k, v in first.items() if isinstance(v, np.ndarray)}


def _draw(rows: np.ndarray) -> dict[str, list[str]]:
    """Writes the arrays of some cases in their place, and gives their strings."""
    batch = _OPEN["source"].read_batch(rows)
    for name, value in batch.items():
        if isinstance(value, np.ndarray):
            np.load(_OPEN["place"] / f"{name}.npy", mmap_mode="r+")[rows[0] : rows[-1] + 1] = value
    return {k: v for k, v in batch.items() if not isinstance(v, np.ndarray)}


class Drawn:
    """A source that reads what `draw` has written; whatever else is asked of it, the source itself answers."""

    def __init__(self, source: Source, place: Path) -> None:
        """Opens the files.

        Args:
          source: The cases.
          place: From `draw`.
        """
        self.source = source
        self.arrays = {path.stem: np.load(path, mmap_mode="r") for path in place.glob("*.npy")}
        self.strings = json.loads((place / STRINGS).read_text())

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # unpickling asks before there is one
            raise AttributeError(name)
        return getattr(self.source, name)

    def read_batch(self, indices: np.ndarray) -> dict[str, np.ndarray | list[str]]:
        """Reads cases as `Source.read_batch` says."""
        batch: dict[str, np.ndarray | list[str]] = {k: np.asarray(v[indices]) for k, v in self.arrays.items()}
        return batch | {k: [v[int(i)] for i in indices] for k, v in self.strings.items()}
