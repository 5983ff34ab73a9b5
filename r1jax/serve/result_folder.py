"""A folder of results that is whole or not there: written aside, then swapped for the earlier one."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r1jax.errors import UserError

CONTENT = ("metrics.json", "index.html", "reports", "alerts.jsonl", "scores.parquet", "snapshot.json")


@contextmanager
def result_folder(path: Path) -> Iterator[Path]:
    """Gives a draft folder; it takes the place of `path` once the block is done, and is dropped if the block fails.

    Args:
      path: Where the results shall be; only an earlier result may be there.

    Yields:
      The folder to write into, beside `path`.

    Raises:
      UserError: Something else is there, another process writes there, or the disk does not take it.
    """
    try:
        _refuse_foreign(path)
        draft, earlier = (path.with_name(f".{path.name}.{kind}") for kind in ("draft", "earlier"))
        if earlier.is_dir() and not path.exists():
            earlier.rename(path)  # a kill came between the two renames below
        draft.mkdir(parents=True, exist_ok=True)
        with _locked(draft, path):
            try:
                _empty(draft)
                yield draft
                shutil.rmtree(earlier, ignore_errors=True)
                if path.exists():
                    path.rename(earlier)
                draft.rename(path)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
            shutil.rmtree(earlier, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the results cannot be written to {path} ({error.strerror or error}); an earlier result there is "
            "untouched: make room or choose another --output"
        ) from error


def _refuse_foreign(path: Path) -> None:
    """Refuses to replace anything that is not the result of an evaluation."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"--output {path} is not a folder: choose a new name or an earlier result")
    inside = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    reports = sorted((path / "reports").iterdir()) if "reports" in inside else []
    foreign = [name for name in inside if name not in CONTENT]
    foreign += [f"reports/{file.name}" for file in reports if file.suffix not in (".json", ".xml")]
    if foreign:
        raise UserError(
            f"--output {path} holds {foreign[0]!r}, which no evaluation wrote and which would be lost: "
            "choose another --output"
        )


@contextmanager
def _locked(draft: Path, path: Path) -> Iterator[None]:
    handle = os.open(draft, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing results to {path}: wait for it or choose another --output"
            ) from None
        yield
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    """Removes what a killed process left."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
