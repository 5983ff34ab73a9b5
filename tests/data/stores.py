"""Cold stores in memory, for tests of what stands before them."""

import threading

import numpy as np
import pyarrow as pa

from r1jax.data.schema import Field, Schema

SCHEMA = Schema(
    (
        Field("id", "number", "int64"),
        Field("word", "text"),
        Field("kind", "category"),
        Field("slice", "image", "uint8", (3, 4)),
        Field("age", "number", "float32"),
    )
)


class MemoryStore:
    """Rows that tell their index in every column; blocks of given sizes."""

    def __init__(self, sizes, fingerprint="5eed", seed=0):
        self.schema = SCHEMA
        self.fingerprint = fingerprint
        self.starts = np.cumsum([0, *sizes])
        self.read: list[int] = []
        rng = np.random.default_rng(seed)
        rows = [
            {
                "id": index,
                "word": None if index % 7 == 0 else f"row {index} é中",
                "kind": f"kind {rng.integers(5)}",
                "slice": rng.integers(0, 256, (3, 4), dtype=np.uint8),
                "age": np.float32(rng.normal()),
            }
            for index in range(len(self))
        ]
        self.batch = SCHEMA.encode(rows)

    def __len__(self):
        return int(self.starts[-1])

    def read_blocks(self, blocks):
        self.read += blocks
        return [self.batch.slice(self.starts[b], self.starts[b + 1] - self.starts[b]) for b in blocks]


class SlowStore(MemoryStore):
    """Waits for `go` before it gives some blocks, or any."""

    def __init__(self, sizes, slow=None):
        super().__init__(sizes)
        self.slow = slow
        self.go = threading.Event()
        self.asked = threading.Semaphore(0)

    def read_blocks(self, blocks):
        self.asked.release()
        if self.slow is None or set(blocks) & set(self.slow):
            assert self.go.wait(200)
        return super().read_blocks(blocks)


def same(table: pa.Table, store: MemoryStore, indices) -> None:
    """Asserts that rows are those of the store."""
    indices = np.asarray(indices, np.int64)
    assert table.schema == SCHEMA.arrow
    found, truth = SCHEMA.decode(table), SCHEMA.decode(store.batch.take(pa.array(indices)))
    assert found.keys() == truth.keys()
    for name in truth:
        np.testing.assert_array_equal(found[name], truth[name], err_msg=name)
