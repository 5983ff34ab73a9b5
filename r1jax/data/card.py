"""The card of a data set, `dataset.json` beside its Parquet files: what they hold, whence, and sums over every byte."""

import base64
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt32

from r1jax.data.files import Files
from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError

CARD = "dataset.json"
UNFINISHED = "dataset.unfinished.json"
"""The same while the files are being written: where to go on after a crash."""
FORMAT = "r1jax data set 1"


@dataclass(frozen=True)
class Shard:
    """One Parquet file that r1jax wrote.

    Attributes:
      name: Of the file.
      rows: In it.
      groups: Row groups.
      size: Bytes.
      sha256: Of the file, in hex.
      footer: SHA-256 of its last bytes, from the footer's first on: read with every opening.
      chunks: CRC-32 of each column's bytes in each row group ([groups, columns], uint32, little-endian, base64): read
        with every row. Parquet's own sums leave out the heads of the pages.
    """

    name: str
    rows: int
    groups: int
    size: int
    sha256: str
    footer: str
    chunks: str

    def sums(self) -> UInt32[np.ndarray, "groups columns"]:
        """CRC-32 of each column in each row group."""
        return np.frombuffer(base64.b64decode(self.chunks), "<u4").reshape(self.groups, -1).astype(np.uint32)


@dataclass(frozen=True)
class Card:
    """What a data set is.

    Attributes:
      schema: Of a row.
      rows: In all files together; of an unfinished one those that there will be.
      group_rows: Rows of a row group, the unit of reading.
      shard_rows: Rows of a file.
      source: What it was made from, for people.
      source_fingerprint: Fingerprint of that.
      command: That made it.
      versions: Of the packages that wrote it.
      shards: The files, in order.
    """

    schema: Schema
    rows: int
    group_rows: int
    shard_rows: int
    source: str
    source_fingerprint: str
    command: str
    versions: dict[str, str]
    shards: tuple[Shard, ...] = ()

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over schema and files: the same wherever the files lie."""
        parts = [str(self.schema), *(f"{shard.name} {shard.sha256}" for shard in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def to_json(self) -> bytes:
        """The card as it is written."""
        told = {"format": FORMAT, "fingerprint": self.fingerprint} | dataclasses.asdict(self)
        told["schema"] = told["schema"]["fields"]
        return (json.dumps(told, indent=1) + "\n").encode()

    def describe(self) -> str:
        """The card as a page for people (Markdown)."""
        size = sum(shard.size for shard in self.shards)
        groups = sum(shard.groups for shard in self.shards)
        columns = [
            f"| {field.name} | {field.kind} | {field.dtype or 'words'} | {_shape(field)} |"
            for field in self.schema.fields
        ]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"# {self.source}",
            "",
            f"{self.rows} rows in {len(self.shards)} Parquet files, {groups} row groups of up to {self.group_rows}"
            f" rows, {size / 2**20:.1f} MiB. `{CARD}` holds sums over every byte; `r1jax data verify` compares them.",
            "",
            f"- made by `{self.command}` with {versions}",
            f"- source fingerprint {self.source_fingerprint}",
            f"- fingerprint {self.fingerprint}",
            "",
            "| column | kind | type | shape of one row |",
            "|---|---|---|---|",
            *columns,
            "",
            "Arrays are little-endian bytes in C order; an axis `*` differs from row to row, and then all sizes (int32)"
            " come first.",
        ]
        return "\n".join(lines) + "\n"


def _shape(field: Field) -> str:
    return " x ".join("*" if size is None else str(size) for size in field.shape) or "-"


def read_card(files: Files, name: str = CARD) -> Card | None:
    """Reads the card of a data set.

    Args:
      files: Where it lies.
      name: Of the card.

    Returns:
      The card, None where there is none.

    Raises:
      UserError: It is damaged, or of another version.
    """
    content = files.find(name)
    if content is None:
        return None
    try:
        told: dict[str, Any] = json.loads(content)
        made, fingerprint = told.pop("format"), told.pop("fingerprint")
        fields = tuple(Field(**field | {"shape": tuple(field["shape"])}) for field in told.pop("schema"))
        shards = tuple(Shard(**shard) for shard in told.pop("shards"))
        card = Card(**told, schema=Schema(fields), shards=shards)
        for shard in shards:
            shard.sums()
    except (ValueError, TypeError, KeyError, AttributeError, UserError) as error:
        raise UserError(
            f"{files.url}/{name} is damaged or none of r1jax ({type(error).__name__}: {error}): copy the data set"
            " again, or move that file away"
        ) from error
    if made != FORMAT or card.fingerprint != fingerprint:
        raise UserError(f"{files.url}/{name} is no {FORMAT} or was changed by hand: write the data set again")
    return card
