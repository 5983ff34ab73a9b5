"""The commands `r1jax data ...`: converts sources to Parquet, describes a data set, compares it with its sums."""

import ast
import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1jax.cli import load_arguments
from r1jax.config import Natural
from r1jax.data.card import CARD, read_card
from r1jax.data.files import Files
from r1jax.data.folder import FolderCases
from r1jax.data.formats import open_format
from r1jax.data.parquet import ParquetStore
from r1jax.data.parquet_cases import stored_rows, stored_schema
from r1jax.data.schema import Schema
from r1jax.data.shards import Origin, Rows, rows_of, write_shards
from r1jax.errors import UserError
from r1jax.serve.progress import progress

Format = Literal["auto", "cases", "images", "csv", "npz", "mhd", "nifti", "dicom", "audio", "series"]
CONVERT_HELP = """\
Writes a source as Parquet files with checksums, which training reads from a disk, HDFS or S3.
The same command again goes on where it was cut off.

Examples:
  r1jax data convert my_cases hdfs://namenode:8020/cases
  r1jax data convert pictures s3://bucket/pictures --format images
  r1jax data convert runs series --format series --options "time='timestamp'"
"""
INFO_HELP = """\
Describes the Parquet files below a path or URL: rows, columns, row groups, sizes, checksums.

Examples:
  r1jax data info hdfs://namenode:8020/cases
"""
VERIFY_HELP = """\
Reads all Parquet files below a path or URL and compares every byte with the sums of their card.

Examples:
  r1jax data verify hdfs://namenode:8020/cases
"""


@dataclass(frozen=True)
class Convert:
    """Arguments of `r1jax data convert`."""

    source: str
    """Folder or file to read."""
    output: str
    """Folder or URL to write to."""
    format: Format = "auto"
    """What the source is; auto takes a folder with .npz files for cases (docs/data.md), else looks at the names."""
    options: str = ""
    """Options of the reader of this format, such as "form='pixels'" (docs/formats.md)."""
    group_rows: Natural = 0
    """Rows of a row group, the unit of reading; 0 takes as many as make about 1 MiB, at most 512."""
    shard_rows: Natural = 0
    """Rows of a file; 0 takes as many as make about 128 MiB."""


@dataclass(frozen=True)
class Place:
    """Arguments of the commands that read a data set."""

    url: str
    """Folder, file or URL."""


def convert(words: list[str]) -> int:
    """Runs `r1jax data convert`.

    Args:
      words: The command line after it.

    Returns:
      The exit code.

    Raises:
      UserError: The source or the place to write to is not as it should be.
    """
    arguments = load_arguments(Convert, words, "r1jax data convert", CONVERT_HELP, ("source", "output"))
    schema, rows, total, name, fingerprint = _open(arguments.format, arguments.source, _options(arguments.options))
    origin = Origin(name, fingerprint, shlex.join(["r1jax", "data", "convert", *words]))
    with progress("rows", total) as steps:
        card = write_shards(
            arguments.output,
            schema,
            rows,
            total,
            origin,
            group_rows=arguments.group_rows or None,
            shard_rows=arguments.shard_rows or None,
            advance=steps.advance,
        )
    size = sum(shard.size for shard in card.shards)
    print(f"{arguments.output}: {card.rows} rows in {len(card.shards)} files, {size / 2**20:.1f} MiB")
    return 0


def _options(text: str) -> dict[str, Any]:
    """Reads `name=value, ...` with values that are literals; nothing in the text is executed."""
    try:
        call = ast.parse(f"_({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(item.arg is None for item in call.keywords):
            raise ValueError("names are missing")
        return {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}
    except (SyntaxError, ValueError, TypeError) as error:
        raise UserError(
            f"--options {text!r} cannot be read: write name=value, separated by commas, with words in quotes, such as"
            " time='timestamp'"
        ) from error


def _open(kind: Format, path: str, options: dict[str, Any]) -> tuple[Schema, Rows, int, str, str]:
    """Opens what is to be converted."""
    if kind == "auto" and not options and Path(path).is_dir() and any(Path(path).glob("*.npz")):
        kind = "cases"
    if kind == "cases":
        if options:
            raise UserError("--options are those of other formats: cases have none, leave it out")
        source = FolderCases.open(path, hold=False)
        schema, cases = stored_schema(source.cases), source.cases
        return schema, lambda start: stored_rows(cases, start), len(source), source.name, source.fingerprint
    other = open_format(kind, path, **options)
    return other.schema, rows_of(other), len(other), other.name, other.fingerprint


def info(words: list[str]) -> int:
    """Runs `r1jax data info`.

    Args:
      words: The command line after it.

    Returns:
      The exit code.

    Raises:
      UserError: There are no Parquet files, or they do not fit together.
    """
    url = load_arguments(Place, words, "r1jax data info", INFO_HELP, ("url",)).url
    store = ParquetStore.open(url)
    card = read_card(store.files)
    sizes = [part.size for part in store.parts]
    rows = [count for part in store.parts for count in part.rows]
    print(f"{url}: {len(store)} rows in {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")
    print(f"  {len(rows)} row groups of {min(rows, default=0)} to {max(rows, default=0)} rows")
    print(f"  fingerprint {store.fingerprint}")
    if card is not None:
        print(f"  made from {card.source} by: {card.command}")
    state = f"every byte ({CARD})" if card else "pages, as Parquet does it; r1jax data convert covers every byte"
    print(f"  checksums: {store.remarks[0] if store.remarks else state}")
    for field in store.schema.fields:
        shape = " x ".join("*" if size is None else str(size) for size in field.shape)
        print(f"  {field.name:20} {field.kind:9} {field.dtype or 'words':9} {shape}".rstrip())
    return 0


def verify(words: list[str]) -> int:
    """Runs `r1jax data verify`.

    Args:
      words: The command line after it.

    Returns:
      The exit code.

    Raises:
      UserError: A file is damaged, missing, or has no sums to compare with; names it.
    """
    url = load_arguments(Place, words, "r1jax data verify", VERIFY_HELP, ("url",)).url
    files = Files(url)
    card = read_card(files)
    if card is None:
        return _verify_pages(url)
    sizes = {item.name: item.size for item in files.listing()}
    wrong = []
    with progress("bytes", sum(shard.size for shard in card.shards)) as steps:
        for shard in card.shards:
            if sizes.get(shard.name) != shard.size:
                there = f"has {sizes[shard.name]} of {shard.size} bytes" if shard.name in sizes else "is missing"
                wrong.append(f"{shard.name} {there}")
            elif hashlib.sha256(files.read_all(shard.name)).hexdigest() != shard.sha256:
                wrong.append(f"{shard.name} holds other bytes")
            steps.advance(shard.size)
    if wrong:
        count = f"{len(wrong)} of {len(card.shards)} files are damaged"
        raise UserError(f"{url}: {count}: {'; '.join(wrong)}: copy them again")
    print(f"{url}: all {len(card.shards)} files are as they were written")
    return 0


def _verify_pages(url: str) -> int:
    """Reads all rows of files without a card: Parquet's own sums are compared, where they were written."""
    store = ParquetStore.open(url)
    with progress("row groups", len(store.groups)) as steps:
        for block in range(len(store.groups)):
            store.read_blocks([block])
            steps.advance()
    told = store.remarks[0] if store.remarks else "the sums of all pages are right"
    print(f"{url}: there is no {CARD}; all {len(store)} rows can be read; {told}")
    return 0
