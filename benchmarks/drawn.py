"""Generated cases that are drawn once, by many processes, and read from files by all who need them.

python benchmarks/drawn.py FOLDER FIRST STRIDE     draws every so many chunks of the cases that `draw` has left there
"""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from r1jax.data.source import Source  # noqa: E402

CHUNK = 64
"""Cases that are drawn at once."""
SOURCE, STRINGS, DONE = "source.pickle", "strings.json", "drawn"


def place_of(source: Source, folder: Path) -> Path:
    """Where the cases of a source lie, which other cases never share."""
    return folder / source.fingerprint[:24]


def draw(source: Source, folder: Path, processes: int) -> Path:
    """Writes every case of a source, unless an earlier call has; what was cut off is drawn again.

    Args:
      source: The cases.
      folder: Cases of each source have a folder in it.
      processes: How many draw.

    Returns:
      The folder of these cases.

    Raises:
      RuntimeError: A process has failed; what it said is on stderr.
    """
    place = place_of(source, folder)
    if (place / DONE).exists():
        return place
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / SOURCE).write_bytes(pickle.dumps(source))
    for name, value in source.read_batch(np.arange(1)).items():
        if isinstance(value, np.ndarray):
            open_memmap(place / f"{name}.npy", "w+", value.dtype, (len(source), *value.shape[1:]))
    count = min(processes, -(-len(source) // CHUNK))
    words = [[sys.executable, __file__, str(place), str(i), str(count)] for i in range(count)]
    started = [subprocess.Popen(each) for each in words]
    try:
        failed = any([process.wait() for process in started])
    finally:  # an interruption too
        for process in started:
            process.kill()
            process.wait()
    if failed:
        raise RuntimeError(f"{source.name}: not all cases were drawn; what a process said stands above")
    parts = [json.loads((place / f"{i}.{STRINGS}").read_text()) for i in range(count)]
    chunks = [parts[k % count][k // count] for k in range(-(-len(source) // CHUNK))]
    strings = {name: [word for chunk in chunks for word in chunk[name]] for name in chunks[0]}
    (place / STRINGS).write_text(json.dumps(strings))
    (place / DONE).touch()
    return place


def draw_part(place: Path, first: int, stride: int) -> None:
    """Writes the arrays of every `stride`-th chunk in their place, and the strings of these chunks in a file."""
    source = pickle.loads((place / SOURCE).read_bytes())
    arrays = {path.stem: np.load(path, mmap_mode="r+") for path in place.glob("*.npy")}
    strings = []
    for start in range(first * CHUNK, len(source), stride * CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(source)))
        batch = source.read_batch(rows)
        for name, array in arrays.items():
            array[start : start + len(rows)] = batch.pop(name)
        strings.append(batch)
    (place / f"{first}.{STRINGS}").write_text(json.dumps(strings))


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


if __name__ == "__main__":
    draw_part(Path(sys.argv[1]), *map(int, sys.argv[2:]))
