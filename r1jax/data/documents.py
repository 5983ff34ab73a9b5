"""Documents of a user's text files: .txt and .jsonl, read strictly and split by a stated rule."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from r1jax.errors import UserError

SUFFIXES = (".txt", ".jsonl")
PARTS = ("train", "val", "test")
LONGEST = 16384
"""Characters of a document; a longer one is cut at line ends, so that a single book has documents to hold out."""
HELD_OUT = {"val": range(0, 5), "test": range(5, 10)}
"""Of 100 documents by their hash, where no file names its part."""


def read_documents(path: str, part: str) -> list[str]:
    """Reads the documents of one part.

    Files whose names start with train, val or test belong to that part, if there are such files; otherwise the SHA-256
    of each document decides: 5 of 100 for val, 5 for test.

    Args:
      path: A .txt or .jsonl file, or a folder of them.
      part: "train", "val", "test", or "all".

    Returns:
      Texts, none of them blank, in the order of the files' names and of their content.

    Raises:
      UserError: Nothing readable is there, a line is no JSON object with a "text", or the part is empty.
    """
    files = _files(Path(path))
    named = {file: next((p for p in PARTS if file.name.startswith(p)), None) for file in files}
    if any(named.values()):
        stray = next((file for file, its in named.items() if its is None), None)
        if stray is not None:
            raise UserError(
                f"{stray}: some files of {path} are named after a part (train, val, test) and this one is not: "
                "rename it or move it away"
            )
        found = [text for file in files if part in ("all", named[file]) for text in _read(file)]
        hint = f"add a file named {part}*.txt or {part}*.jsonl"
    else:
        found = [text for file in files for text in _read(file) if part in ("all", part_of(text))]
        hint = f"name files train*, val* and test*, since by hash none of its few documents falls into {part}"
    if not found:
        raise UserError(f"{path} has no text in its part {part!r}: {hint}")
    return found


def part_of(text: str) -> str:
    """The part of a document by its content alone, so that equal documents never meet across parts."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return next((part for part, numbers in HELD_OUT.items() if number in numbers), "train")


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"data.path {path} does not exist: give a .txt or .jsonl file, or a folder of them")
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or files[0].suffix not in SUFFIXES:
        raise UserError(f"data.path {path} is no .txt or .jsonl file and no folder of them: give one")
    return files


def _read(file: Path) -> Iterator[str]:
    """Texts of a file, cut to `LONGEST`."""
    try:
        content = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 ({error}): convert or remove it") from None
    texts = [content] if file.suffix == ".txt" else _lines(content, file)
    for text in texts:
        yield from (piece for piece in pieces(text) if piece.strip())


def _lines(content: str, file: Path) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number}: no JSON ({error.msg}): correct or remove the line") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f'{file}, line {number}: no object with a "text" of type string: correct the line')
        try:
            row["text"].encode()
        except UnicodeEncodeError:
            raise UserError(f"{file}, line {number}: the text holds half a surrogate pair: correct the line") from None
        yield row["text"]


def pieces(text: str) -> Iterator[str]:
    """Cuts a text into parts of at most `LONGEST` characters, at line ends where there are any."""
    start = 0
    while start < len(text):
        end = min(start + LONGEST, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
