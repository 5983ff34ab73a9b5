"""A folder of cases in the documented format (docs/data.md) as a source: `.npz` arrays, and tables beside them."""

import dataclasses
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int64

from r1jax.config import CacheConfig
from r1jax.data.filesystem import is_remote
from r1jax.data.folder_cases import Cases, read_cases
from r1jax.data.folder_checks import unpack_mask
from r1jax.data.folder_files import RANK
from r1jax.data.parquet_cases import StoredPictures, is_parquet, open_cases, read_parquet_cases
from r1jax.data.schema import Schema
from r1jax.errors import UserError
from r1jax.tasks.medical.schema import case_schema

PARTS = ("train", "val", "test")
FOLD_STREAM = 0xF01D
"""Keeps the random numbers of the folds apart from those of other users of the same seed."""


@dataclass(frozen=True, eq=False)
class FolderCases:
    """One part (train, val, test or all) of a folder; a `Source`.

    Attributes:
      name: Folder, part, number of cases and what the format does not know, for people.
      fingerprint: sha256 over the bytes of the files, the same for all parts of a folder.
      schema: What a batch holds for sure.
      path: Folder or URL, as it was given.
      remarks: What a user should know of the files.
      ignored: Arrays and columns that the format does not know.
      splits: How many cases the folder marks with each split.
      cases: All cases of the folder.
      rows: Which of them this part holds.
    """

    name: str
    fingerprint: str
    schema: Schema
    path: str | Path
    remarks: tuple[str, ...]
    ignored: tuple[str, ...]
    splits: dict[str, int]
    cases: Cases
    rows: Int[np.ndarray, " B"]

    @classmethod
    def open(
        cls,
        path: str | Path,
        split: str = "all",
        fold: int | None = None,
        folds: int = 5,
        seed: int = 0,
        hold: bool = True,
        cache: CacheConfig = CacheConfig(),  # noqa: B008
    ) -> "FolderCases":
        """Reads a folder and chooses a part of it.

        Args:
          path: Folder with one or more `.npz` files, and `.csv` tables beside them; or a folder or URL of Parquet
            files that `r1jax data convert` made of such a folder.
          split: train, val, test, all, or any other mark that the folder's `split` holds.
          fold: Takes this fold as val and the others as train, instead of the folder's marks; cases marked test stay
            out of both. A folder without any mark is cut so by itself, with fold 0.
          folds: Number of folds.
          seed: Seed of the folds.
          hold: Keeps the pictures of `.npz` files in memory; without, whole archives are read again when they are
            asked for. Pictures of Parquet files are always read when they are asked for.
          cache: Tiers that pictures of Parquet files are read through; `.npz` files go through none, which is said.

        Returns:
          The chosen cases, in the order of the files.

        Raises:
          UserError: The folder or a value in it is not as docs/data.md says, or the part has no cases.
        """
        if is_parquet(path):
            cases, ignored, remarks, fingerprint = read_parquet_cases(str(path), cache)
        else:
            cases, ignored = read_cases(_list_files(Path(path)), hold)
            remarks, fingerprint = (), folder_fingerprint(path)
            if cache.url not in (None, "memory"):
                print(
                    f"note: data.cache.url is {cache.url!r}, but {path} holds .npz files, which go through no cache; "
                    "`r1jax data convert` makes Parquet files of them, which do",
                    file=sys.stderr,
                )
        layout = cases.pictures.layout
        everything = cls(
            name="",
            fingerprint=fingerprint,
            schema=case_schema(
                {name: layout[name] for name in RANK if name in layout},
                table=cases.table is not None,
                text=cases.text is not None,
            ),
            path=path,
            remarks=remarks,
            ignored=tuple(ignored),
            splits=dict(Counter(mark for mark in cases.marks if mark)),
            cases=cases,
            rows=np.arange(len(cases.case_id)),
        )
        return everything.part(split, fold, folds, seed)

    def part(self, split: str, fold: int | None = None, folds: int = 5, seed: int = 0) -> "FolderCases":
        """Chooses a part of the same folder, which shares its memory, its files and its cache.

        Args:
          split: As `open` takes it, and so the others.
          fold: Fold that is val.
          folds: Number of folds.
          seed: Seed of the folds.

        Returns:
          The chosen cases, in the order of the files.

        Raises:
          UserError: The part has no cases, or there is no such fold.
        """
        rows = _choose_rows(self.cases, self.path, split, fold, folds, seed)
        part = split if fold is None or split not in ("train", "val") else f"{split} (fold {fold} of {folds})"
        shown = str(self.path).rstrip("/") if is_remote(str(self.path)) else Path(self.path).resolve().name
        name = f"{shown}, {part}: {len(rows)} of {len(self.cases.case_id)} cases"
        if self.ignored:
            name += f"; not used: {', '.join(self.ignored)}"
        return dataclasses.replace(self, name="; ".join([name, *self.remarks]), rows=rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def starts(self) -> Int64[np.ndarray, " G_plus_1"] | None:
        """Where row groups of Parquet files begin among these cases, and the number of cases; None in a folder."""
        pictures = self.cases.pictures
        if not isinstance(pictures, StoredPictures):
            return None
        groups = np.searchsorted(pictures.rows.cold.starts, self.rows, side="right")
        return np.concatenate([[0], np.flatnonzero(np.diff(groups)) + 1, [len(self.rows)]]).astype(np.int64)

    def prefetch(self, indices: Int[np.ndarray, " B"]) -> None:
        """Brings what one later `read_batch` of Parquet files needs into the cache, in the background.

        Args:
          indices: The same as that call gets.
        """
        if isinstance(self.cases.pictures, StoredPictures) and self.cases.pictures.layout:
            self.cases.pictures.rows.prefetch(self.rows[indices])

    def counters(self) -> dict[str, float]:
        """What the cache of Parquet files has done in this process, for all parts; see `CacheCounters`."""
        if not isinstance(self.cases.pictures, StoredPictures):
            return {}
        return {name: float(value) for name, value in self.cases.pictures.rows.counters()._asdict().items()}

    def known_findings(self) -> frozenset[str]:
        """Findings whose answer is known in at least one case of this part."""
        return frozenset(name for name, values in self.cases.targets.items() if not np.isnan(values[self.rows]).all())

    def read_batch(self, indices: Int[np.ndarray, " B"]) -> dict[str, np.ndarray | list[str]]:
        """Reads raw cases; see `Source.read_batch`."""
        rows, cases = self.rows[indices], self.cases
        batch: dict[str, np.ndarray | list[str]] = {"case_id": [cases.case_id[row] for row in rows]}
        pictures = cases.pictures.read(rows)
        for name in RANK:
            if name in pictures:
                batch[name] = pictures[name]
                batch[f"{name}_spacing"] = cases.spacing[name][rows]
        if "mask" in pictures:
            batch["mask"] = unpack_mask(pictures["mask"], cases.shapes)
        for name, present in cases.has.items():
            batch[name] = present[rows]
        if cases.table is not None:
            batch["table"] = cases.table[rows]
        if cases.text is not None:
            batch["text"] = [cases.text[row] for row in rows]
        for name, values in cases.targets.items():
            batch[f"target.{name}"] = values[rows]
        return batch


def _list_files(folder: Path) -> list[Path]:
    """Lists the archives, then the tables, each by name; hidden files are left out."""
    try:
        if not folder.exists():
            raise UserError(f"there is no folder {folder}: give the folder that holds the .npz files")
        if not folder.is_dir():
            raise UserError(f"{folder} is a file: give the folder that holds it")
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({error.strerror}): check its name and permissions") from error
    archives = [path for path in files if path.suffix.lower() == ".npz"]
    if not archives:
        raise UserError(f"folder {folder} has no .npz file: write one as docs/data.md shows")
    return archives + [path for path in files if path.suffix.lower() == ".csv"]


def folder_fingerprint(folder: str | Path) -> str:
    """Hashes the files of a folder of cases, without reading the cases.

    Args:
      folder: As `FolderCases.open` takes it.

    Returns:
      sha256 (hex) over the hashes of the files, so that where one file ends and the next begins counts too.

    Raises:
      UserError: The folder cannot be read or has no `.npz` or Parquet file.
    """
    if is_parquet(folder):
        return open_cases(str(folder)).fingerprint
    total = hashlib.sha256()
    for path in _list_files(Path(folder)):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _choose_rows(
    cases: Cases, folder: str | Path, split: str, fold: int | None, folds: int, seed: int
) -> Int[np.ndarray, " B"]:
    """Finds the rows of a part of the folder; see `FolderCases.open`."""
    marks = np.array(cases.marks)
    marked = bool((marks != "").any())
    if split == "all":
        return np.arange(len(marks))
    if split == "test" and not np.isin(marks, PARTS).any():
        print(
            f"note: {folder} marks no case train, val or test, so that test takes all {len(marks)} of them;"
            " a model trained on this folder has seen some: score it on --data.split val",
            file=sys.stderr,
        )
        return np.arange(len(marks))
    if split in ("train", "val") and (fold is not None or not marked):
        pool = np.flatnonzero(np.isin(marks, ("", "train", "val")))
        groups = [(cases.groups[row], "" if cases.groups[row] else cases.case_id[row]) for row in pool]
        held_out = fold_numbers(groups, fold or 0, folds, seed, folder) == (fold or 0)
        return pool[held_out if split == "val" else ~held_out]
    rows = np.flatnonzero(marks == split)
    if not split or not len(rows):
        counts = ", ".join(f"{mark or 'no mark'} {count}" for mark, count in sorted(Counter(cases.marks).items()))
        raise UserError(
            f"{folder} has no case of split {split!r}: it has {counts}; choose one of these with --data.split, or all"
        )
    return rows


def fold_numbers(
    groups: Sequence[tuple[str, str]], fold: int, folds: int, seed: int, folder: str | Path
) -> Int[np.ndarray, " n"]:
    """Deals groups, in an order drawn from the seed, each to the fold that has fewest cases so far.

    Args:
      groups: Group of each case; cases of one group stay together.
      fold: Fold that will be held out, for the check.
      folds: Number of folds.
      seed: Seed of the order.
      folder: Where the cases come from, for the error message.

    Returns:
      Fold of each case, 0 to folds - 1.

    Raises:
      UserError: There is no such fold, or there are fewer groups than folds.
    """
    sizes = Counter(groups)
    if folds < 2 or not 0 <= fold < folds:
        raise UserError(f"data.fold is {fold} of data.folds {folds}: folds must be 2 or more, and fold 0 to folds - 1")
    if len(sizes) < folds:
        raise UserError(f"{folder} has {len(sizes)} cases or groups, too few for {folds} folds: lower data.folds")
    names = list(sizes)
    filled = [0] * folds
    chosen: dict[tuple[str, str], int] = {}
    for index in np.random.default_rng((seed, FOLD_STREAM)).permutation(len(names)):
        target = filled.index(min(filled))
        chosen[names[index]] = target
        filled[target] += sizes[names[index]]
    return np.array([chosen[group] for group in groups])
