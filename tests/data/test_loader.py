"""The order of cases: a permutation each epoch, resumable at any step, whatever the threads."""

import time
from itertools import islice

import numpy as np
import pytest

from r1jax.data.loader import padded_batches, training_batches
from r1jax.data.schema import Field, Schema


class Numbers:
    """A source of which case i is the number i; even requests are slow, so that threads finish out of order."""

    name, fingerprint, schema = "numbers", "0", Schema((Field("table", "table", "int64"),))

    def __init__(self, count):
        self.count, self.requests = count, []

    def __len__(self):
        return self.count

    def read_batch(self, indices):
        self.requests.append(len(indices))
        time.sleep(0.002 * (1 + int(indices[0]) % 2))
        return {"case_id": [str(i) for i in indices], "table": np.asarray(indices)}


def collate(raw):
    return {"index": np.asarray(raw["table"])}


def batches(count, number, *, size=4, seed=0, start=0, threads=1, source=None):
    stream = training_batches(
        source or Numbers(count), collate, batch_size=size, seed=seed, start=start, threads=threads
    )
    return [batch["index"].tolist() for batch in islice(stream, number)]


@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, 4), (3, 4), (7, 7)])
def test_every_epoch_is_another_permutation(count, size):
    flat = sum(batches(count, 4 * count, size=size), [])
    epochs = [flat[i : i + count] for i in range(0, len(flat) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs[:4]}) > 1
    if count > 5:
        assert len({tuple(epoch) for epoch in epochs[:4]}) == 4


def test_order_depends_on_the_seed_only():
    assert batches(30, 9) == batches(30, 9) != batches(30, 9, seed=1)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("threads", [1, 4])
def test_resuming_gives_the_remaining_batches(start, threads):
    whole = batches(10, 12)
    assert batches(10, 12 - start, start=start, threads=threads) == whole[start:]


def test_a_batch_is_read_at_once():
    source = Numbers(20)
    batches(20, 3, size=5, source=source)
    assert set(source.requests) == {5}


@pytest.mark.parametrize(("count", "size"), [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_padded_batches_cover_every_case_once(count, size):
    seen = []
    for indices, batch, raw in padded_batches(Numbers(count), collate, batch_size=size):
        assert batch["index"].shape == (size,) and len(raw["case_id"]) == size
        assert batch["index"][: len(indices)].tolist() == indices.tolist()
        assert (batch["index"][len(indices) :] == indices[-1]).all()
        seen += indices.tolist()
    assert seen == list(range(count))
