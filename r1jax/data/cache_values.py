"""Keys and values of a shared cache: named by what they hold, and checked before they are believed."""

import hashlib
import struct
import zlib
from typing import Literal

import pyarrow as pa

from r1jax.data.blocks import BlockStore
from r1jax.data.schema import Schema
from r1jax.errors import UserError

NAMESPACE = "r1jax"
MAGIC = b"R1C1"
"""First bytes of a value; another encoding takes another number."""
HEAD = struct.Struct("<4sIQ")
"""Magic, CRC-32 over key and payload, length of the payload; 16 bytes, so that Arrow's buffers stay aligned."""


class NotStored(Exception):
    """A shared tier answers, but has no room (or no permission) for a value."""


def dataset_name(store: BlockStore) -> str:
    """Names what is cached: the rows, how they are cut into blocks, and the columns that are read.

    Args:
      store: The cold store.

    Returns:
      `<start of the fingerprint>.<hash of all of it>`, without colons.
    """
    told = hashlib.sha256(f"{store.fingerprint}\n{store.schema!r}\n".encode())
    told.update(store.starts.astype("<i8").tobytes())
    start = "".join(letter for letter in store.fingerprint[:16] if letter.isalnum())
    return f"{start}.{told.hexdigest()[:24]}"


def key_of(dataset: str, unit: Literal["group", "row"], number: int) -> bytes:
    """Names a value.

    Args:
      dataset: From `dataset_name`.
      unit: What the number counts.
      number: Of the block, or of the row.

    Returns:
      The key, below 128 bytes.
    """
    return f"{NAMESPACE}:{dataset}:{unit}:{number}".encode()


def seal(key: bytes, payload: bytes) -> bytes:
    """Wraps a payload so that damage and mix-ups are seen.

    Args:
      key: Under which it will be stored.
      payload: What is stored.

    Returns:
      Head and payload.
    """
    return HEAD.pack(MAGIC, _check(key, payload), len(payload)) + payload


def unseal(key: bytes, value: bytes) -> memoryview | None:
    """Takes the payload out of a value.

    Args:
      key: Under which it was found.
      value: What was found, by anybody's hand.

    Returns:
      The payload; None if it is cut, damaged, of another version or of another key.
    """
    if len(value) < HEAD.size:
        return None
    magic, check, length = HEAD.unpack_from(value)
    payload = memoryview(value)[HEAD.size :]
    sound = magic == MAGIC and length == len(payload) and check == _check(key, payload)
    return payload if sound else None


def _check(key: bytes, payload: bytes | memoryview) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<Q", len(payload)) + key))


class BlockCodec:
    """Rows of one schema as bytes: one Arrow message, without the schema, which the key stands for.

    Categories are kept as plain strings: a dictionary does not travel with a single message, and every block has
    another one.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema.arrow
        self.plain = pa.schema(
            field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
            for field in schema.arrow
        )

    def normalize(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Brings a batch of the cold store into the one form that every tier keeps.

        Args:
          batch: Has at least the columns of the schema.

        Returns:
          Exactly the columns of `plain`.

        Raises:
          UserError: A column is missing, or its type holds values that the schema's cannot.
        """
        columns = []
        for field in self.plain:
            if field.name not in batch.schema.names:
                raise UserError(f"column {field.name!r} is missing: there are {', '.join(batch.schema.names)}")
            column = batch.column(field.name)
            try:
                columns.append(column if column.type == field.type else column.cast(field.type))
            except pa.ArrowException as error:
                raise UserError(f"column {field.name!r} is {column.type}, not {field.type}: {error}") from error
        return pa.RecordBatch.from_arrays(columns, schema=self.plain)

    def encode(self, key: bytes, batch: pa.RecordBatch) -> bytes:
        """Turns rows into a value.

        Args:
          key: Under which it will be stored.
          batch: In the form of `normalize`; a slice writes its own rows only.

        Returns:
          The sealed bytes.
        """
        return seal(key, batch.serialize().to_pybytes())

    def decode(self, key: bytes, value: bytes, rows: int) -> pa.RecordBatch | None:
        """Turns a value back into rows.

        Args:
          key: Under which it was found.
          value: What was found.
          rows: How many rows there must be.

        Returns:
          The rows, in the value's own memory; None if this is no value of this key.
        """
        payload = unseal(key, value)
        if payload is None:
            return None
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(payload), self.plain)
            batch.validate(full=True)
        except (pa.ArrowException, OSError, EOFError, ValueError):
            return None  # sealed by hand or by another program: counted by the caller as rejected
        return batch if batch.num_rows == rows else None

    def finish(self, rows: pa.Table) -> pa.Table:
        """Gives kept rows the types that the schema declares.

        Args:
          rows: In the form of `normalize`.

        Returns:
          The same rows, categories as dictionaries.
        """
        return rows if self.plain == self.schema else rows.cast(self.schema)
