"""Folders of cases to test with, and what is asked of them."""

from pathlib import Path

import numpy as np
import pytest

from r1jax.data.folder import FolderCases
from r1jax.errors import UserError


def write(folder: Path, table: str | bytes | None = None, name: str = "cases.npz", **arrays) -> Path:
    """Writes one archive, and a table beside it."""
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / name, **arrays)
    if table is not None:
        (folder / "record.csv").write_bytes(table.encode() if isinstance(table, str) else table)
    return folder


def images(n: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 5, 7), np.uint8)


def read_all(folder: Path, **kwargs) -> dict:
    source = FolderCases.open(folder, **kwargs)
    return source.read_batch(np.arange(len(source)))


def refused(folder: Path, *words: str, **kwargs) -> str:
    """Opens a bad folder and checks that the one-sentence message holds all the words."""
    with pytest.raises(UserError) as caught:
        FolderCases.open(folder, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message
