import json
import shutil

import numpy as np
import pytest

from r1jax.errors import UserError
from r1jax.hf import verify as verifying
from r1jax.hf.load import read_config
from r1jax.hf.names import nest
from r1jax.hf.verify import Report, Row, table, verify
from tests.hf.checkpoints import stored, write_folder


@pytest.fixture(scope="module")
def report(folders):
    return verify(folders["v2"])


def test_stored_references_hold(report, folders):
    """The plain tests' hold on DeepSeek-V2 and V3 as Hugging Face computes them."""
    compared = {row.name for row in report.rows}
    assert {"logits", "loss", "hidden_0", "hidden_2", "topk_idx_0", "topk_w_0", "leftpad_logits"} <= compared
    assert len([name for name in compared if name.startswith("grad/")]) == 26
    assert report.holds and not report.skipped, table(report)
    other = verify(folders["v3"])
    assert {"logits", "mtp_logits", "topk_idx_0", "topk_idx_1"} <= {row.name for row in other.rows}
    assert other.holds, table(other)


def test_every_difference_is_seen(folders, report, monkeypatch, tmp_path):
    """One number of each array is changed; exactly that array is reported."""
    published, tensors, arrays = stored("v2")
    folder = write_folder(tmp_path, published, tensors)
    computed = {}
    exact = verifying._exact
    monkeypatch.setattr(verifying, "_exact", lambda *args: computed.setdefault("rows", exact(*args)))
    changed = {}
    for name, value in arrays.items():
        value = value.copy()
        if name not in ("input_ids",):
            value.reshape(-1)[-1] += 1 if value.dtype == np.int32 else 1e-3 * max(np.abs(value).max(), 1)
        changed[name] = value
    np.savez(folder / "reference.npz", **changed)
    worse = verify(folder)
    assert {row.name for row in worse.rows if not row.holds} == arrays.keys() - {"input_ids"}
    assert "DIFFERS" in table(worse) and "grad/* (26, worst " in table(worse)


def test_nan_and_other_shapes_are_differences():
    assert not Row("x", float("nan"), 1.0).holds
    assert not verifying._row("x", np.zeros(3, np.float32), np.zeros(4, np.float32)).holds
    assert not verifying._count("x", np.zeros(3, np.int32), np.zeros(4, np.int32)).holds
    assert "DIFFERS" in table(Report("y", (Row("grad/a", float("nan"), 1e-4), Row("logits", 0.0, 0.0)), ("cache",)))


@pytest.mark.parametrize(("theirs", "holds"), [(3e-9, True), (1e-3, False), (np.nan, False)])
def test_a_gradient_of_rounding_alone_is_none(folders, theirs, holds):
    """A router that gives its one expert weight 1 has no gradient, and two roundings of 0 have nothing in common."""
    config = read_config(folders["v2"])
    named = dict(verifying.memory_names(config))
    router = next(name for name in named if name.endswith("gate.weight"))
    sizes = dict.fromkeys(named, 1.0) | {router: 2e-9}
    ours = nest({path: np.full(3, sizes[name], np.float32) for name, path in named.items()})
    reference = {f"grad/{name}": np.full(3, size, np.float32) for name, size in (sizes | {router: theirs}).items()}
    reference |= {f"gradnorm/{router}": np.float32(theirs)}
    rows = list(verifying._gradients(config, ours, reference))
    assert len(rows) == len(named) + 1
    assert [row.name for row in rows if not row.holds] == ([] if holds else [f"grad/{router}", f"gradnorm/{router}"])


def test_half_precision_is_held_by_divergence(tmp_path, folders):
    published, tensors, arrays = stored("v2")
    folder = write_folder(tmp_path, published | {"dtype": "bfloat16"}, tensors)
    logits = arrays["logits"] + 0.01 * np.random.default_rng(0).standard_normal(arrays["logits"].shape)
    np.savez(folder / "reference.npz", input_ids=arrays["input_ids"], logits=logits.astype(np.float32))
    (row,) = verify(folder).rows
    assert row.holds and 1e-5 < row.difference < 1e-3  # 0.01^2 / 2 nats
    np.savez(folder / "reference.npz", input_ids=arrays["input_ids"], logits=arrays["logits"][::-1])
    assert not verify(folder).holds


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"input_ids": np.full((1, 3), 40, np.int32)}, "input_ids go from 40 to 40, but the vocabulary has 40 tokens"),
        ({"input_ids": np.zeros(3, np.int32)}, "must hold input_ids"),
        ({"logits": None}, "must hold input_ids"),
        ({"logits": np.zeros((1, 3, 39), np.float32)}, r"must be whole numbers \[B, T\] and \[B, T, 40\]"),
        ({"input_ids": np.zeros((1, 3), np.float32)}, "input_ids are float32"),
        ({"input_ids": np.zeros((1, 0), np.int32)}, "must be whole numbers"),
        (b"PK\x03\x04", "cannot be read"),
    ],
)
def test_references_that_are_none(tmp_path, folders, change, told):
    folder = shutil.copytree(folders["v2"], tmp_path / "x")
    arrays = {"input_ids": np.zeros((1, 3), np.int32), "logits": np.zeros((1, 3, 40), np.float32)}
    if isinstance(change, bytes):
        (folder / "reference.npz").write_bytes(change)
    else:
        np.savez(folder / "reference.npz", **{n: v for n, v in (arrays | change).items() if v is not None})
    with pytest.raises(UserError, match=told):
        verify(folder)


def test_nothing_to_compare_with(tmp_path, monkeypatch):
    published, tensors, _ = stored("v2")
    folder = write_folder(tmp_path, published, tensors)
    monkeypatch.setattr(verifying.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="has no reference.npz and transformers is not installed"):
        verify(folder)
    assert json.loads((folder / "config.json").read_text()) == published
