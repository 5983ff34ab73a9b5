"""Joined and mixed sources: every case once, gaps that show, exact proportions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.config import DataConfig
from r1jax.data.compose import Joined, Mixed
from r1jax.data.loader import training_batches
from r1jax.data.order import open_order
from r1jax.data.pipeline import Preprocessed, open_pipeline
from r1jax.data.schema import Field, Schema
from r1jax.errors import UserError


class Cases:
    """Cases of words that are given."""

    def __init__(self, name, fields, rows):
        self.name, self.fingerprint, self.schema, self.rows = name, name, Schema(fields), rows

    def __len__(self):
        return len(self.rows)

    def read_batch(self, indices):
        chosen = [self.rows[i] for i in indices]
        batch = {}
        for field in self.schema.fields:
            values = [row[field.name] for row in chosen]
            batch[field.name] = values if not field.dtype else np.array(values, field.dtype).reshape(-1, *field.shape)
        return batch

    def counters(self):
        return {"reads": 1.0}


def images(keys):
    fields = (Field("case_id", "category"), Field("image", "image", "uint8", (2,)), Field("age", "number", "int32"))
    return Cases("images", fields, [{"case_id": k, "image": [len(k), i + 1], "age": i} for i, k in enumerate(keys)])


def records(keys):
    fields = (Field("case_id", "category"), Field("table", "table", "float32", (2,)), Field("note", "text"))
    return Cases("records", fields, [{"case_id": k, "table": [i, 1], "note": f"of {k}"} for i, k in enumerate(keys)])


def numbered(ids, name):
    fields = (Field("patient", "number", "int64"), Field(name, "number", "float32"))
    return Cases(name, fields, [{"patient": i, name: i / 2} for i in ids])


KEYS = st.lists(st.text("abc", min_size=1, max_size=3), unique=True, max_size=12)


@given(KEYS, KEYS, st.integers(0, 9))
def test_every_key_is_one_case_with_what_either_has(left, right, seed):
    joined = Joined(images(left), records(right), "case_id")
    assert len(joined) == len(set(left) | set(right))
    if not len(joined):
        return
    indices = np.random.default_rng(seed).permutation(np.tile(np.arange(len(joined)), 2))
    batch = joined.read_batch(indices)
    assert set(batch) == set(joined.schema.names)
    assert set(batch["case_id"]) == set(left) | set(right)
    for at, key in enumerate(batch["case_id"]):
        assert batch["has_image"][at] == (key in left)
        if key in left:
            assert batch["image"][at].tolist() == [len(key), left.index(key) + 1] and batch["age"][at] == left.index(
                key
            )
        else:
            assert not batch["image"][at].any() and np.isnan(batch["age"][at])
        if key in right:
            assert batch["table"][at].tolist() == [right.index(key), 1] and batch["note"][at] == f"of {key}"
        else:
            assert np.isnan(batch["table"][at]).all() and batch["note"][at] == ""


def test_a_join_says_how_many_are_alone():
    joined = Joined(images(["a", "b"]), records(["b", "c"]), "case_id")
    assert joined.name == "images with records by 'case_id' (2 of 3 cases in one alone)"
    assert joined.schema.modalities == {"image", "table", "text"} and joined.counters() == {"reads": 2.0}
    assert joined.fingerprint != Joined(records(["b", "c"]), images(["a", "b"]), "case_id").fingerprint


def test_whole_numbers_are_keys_too():
    joined = Joined(numbered([7, 3], "one"), numbered([3, 9], "two"), "patient")
    batch = joined.read_batch(np.array([2, 0, 1]))
    assert batch["patient"].tolist() == [9, 7, 3] and batch["patient"].dtype == np.int64
    np.testing.assert_array_equal(batch["two"], np.array([4.5, np.nan, 1.5], np.float32))


@pytest.mark.parametrize(
    ("left", "right", "key", "words"),
    [
        (images(["a", "b", "a"]), records(["a"]), "case_id", "'images' has 'case_id' 'a' more than once"),
        (
            images(["a"]),
            records(["x", "y", "y", "x", "z"]),
            "case_id",
            "'records' has 'case_id' 'x', 'y' more than once",
        ),
        (images(["a", ""]), records(["a"]), "case_id", "no 'case_id' in case 1"),
        (images(["a"]), records(["a"]), "name", "no column 'name'"),
        (records(["a"]), records(["a"]), "case_id", "'table' is used twice"),
        (records(["a"]), records(["a"]), "table", "a key is words or whole numbers"),
    ],
)
def test_what_cannot_be_joined_is_said(left, right, key, words):
    with pytest.raises(UserError, match=words):
        Joined(left, right, key)


def mixture(sizes, weights):
    return Mixed([numbered(range(100 * i, 100 * i + n), "x") for i, n in enumerate(sizes)], weights)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(1, 13),
    st.sampled_from([0, 3]),
)
def test_every_turn_has_exact_proportions_and_every_source_its_epochs(parts, size, seed):
    sizes, weights = zip(*parts, strict=True)
    source = mixture(sizes, weights)
    order = open_order(source, size, DataConfig(seed=seed))
    turn = sum(weights)
    rows = np.concatenate([order.batch(k) for k in range(-(-4 * turn * max(sizes) // size))])
    read = source.read_batch(rows)["patient"]
    owners = read // 100
    for begin in range(0, 2 * turn):
        assert np.bincount(owners[begin : begin + turn], minlength=len(sizes)).tolist() == list(weights)
    for i, n in enumerate(sizes):
        own = read[owners == i] - 100 * i
        for epoch in own[: len(own) // n * n].reshape(-1, n):
            assert sorted(epoch.tolist()) == list(range(n))


def collate(raw):
    return {"patient": raw["patient"]}


def test_a_mixture_is_read_by_the_loader_and_through_a_pipeline():
    source = Preprocessed(mixture([5, 9], [1, 3]), open_pipeline(""), 0)
    order = open_order(source, 8, DataConfig())
    batches = training_batches(source, collate, order, start=2, threads=2)
    first = next(batches)["patient"]
    batches.close()
    assert (first < 100).sum() == 2 and (first >= 100).sum() == 6
    assert first.tolist() == source.read_batch(order.batch(2))["patient"].tolist()


def test_words_of_a_mixture_stay_in_place():
    mixed = Mixed([records(["a", "b"]), records(["c"])], [1, 1])
    assert mixed.read_batch(np.array([2, 0, 1, 2]))["note"] == ["of c", "of a", "of b", "of c"]
    assert mixed.name == "1 x records + 1 x records" and len(mixed) == 3


def test_what_cannot_be_mixed_is_said():
    with pytest.raises(UserError, match="'records' has other fields than 'images'"):
        Mixed([images(["a"]), records(["a"])], [1, 1])
    with pytest.raises(UserError, match="1 sources are mixed by weights .1, 2.: give each one"):
        Mixed([images(["a"])], [1, 2])
    with pytest.raises(UserError, match="at least 1"):
        Mixed([images(["a"])], [0])
    with pytest.raises(UserError, match="'images' has no cases"):
        Mixed([images([])], [1])
    window = DataConfig(order="window")
    with pytest.raises(UserError, match="'x' has no row groups"):
        open_order(mixture([5, 5], [1, 1]), 4, window)
