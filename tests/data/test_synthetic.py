"""The synthetic source: purity, contract of a source, ceilings, and no short cut to the answer."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from r1jax.data import synthetic
from r1jax.data.source import Source
from r1jax.data.synthetic import SyntheticCases
from r1jax.errors import UserError
from r1jax.tasks.medical.schema import FINDINGS, RECORD_FIELDS


def auc(score, positive):
    """Mann-Whitney form of the area under the ROC curve."""
    ranks = rankdata(score)
    positives = positive.sum()
    return (ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * (~positive).sum())


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, list):
            assert value == right[name]
        else:
            np.testing.assert_array_equal(value, right[name])


def take(batch, rows):
    return {k: [v[r] for r in rows] if isinstance(v, list) else v[rows] for k, v in batch.items()}


def test_case_depends_on_its_index_only():
    whole = SyntheticCases(3, 12, "train").read_batch(np.arange(12))
    rows = [7, 2, 11, 2]
    other = SyntheticCases(3, 5000, "train")
    other.read_batch(np.array([2, 4999]))
    assert_same(take(whole, rows), other.read_batch(np.array(rows)))


def test_threads_read_the_same_cases():
    whole = SyntheticCases(0, 16, "val").read_batch(np.arange(16))
    shared = SyntheticCases(0, 16, "val")
    orders = [np.random.default_rng(i).permutation(16) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for order, batch in zip(orders, pool.map(shared.read_batch, orders), strict=True):
            assert_same(take(whole, order), batch)


def test_parts_and_seeds_share_nothing():
    batches = [
        SyntheticCases(seed, 6, part).read_batch(np.arange(6)) for seed in (0, 1) for part in ("train", "val", "test")
    ]
    volumes = {volume.tobytes() for batch in batches for volume in batch["volume"]}
    assert len(volumes) == 36
    ids = {case_id for batch in batches[:3] for case_id in batch["case_id"]}
    assert len(ids) == 18 and "synthetic-test-000005" in ids


def test_caller_cannot_spoil_the_cache():
    source = SyntheticCases(0, 3, "train")
    first = source.read_batch(np.array([1]))
    first["volume"][:] = 0
    first["table"][:] = 0
    assert source.read_batch(np.array([1]))["volume"].any()
    assert source.read_batch(np.array([1]))["table"].any()


def test_batch_has_the_shape_of_a_source():
    source: Source = SyntheticCases(1, 40, "test", shape=(24, 32, 28))
    batch = source.read_batch(np.arange(40))
    assert len(source) == 40 and source.schema.modalities == {"volume", "table", "text"}
    assert "synthetic" in source.name and len(source.fingerprint) == 64
    assert batch["volume"].shape == (40, 24, 32, 28) and batch["volume"].dtype == np.int16
    assert batch["table"].shape == (40, len(RECORD_FIELDS)) and batch["table"].dtype == np.float32
    assert batch["volume_spacing"].dtype == np.float32
    for finding in FINDINGS:
        target = batch[f"target.{finding.name}"]
        assert target.dtype == np.float32
        assert target.shape == ((40, 3) if finding.kind == "vector" else (40,))
    assert source.masks(np.arange(2)).shape == (2, 24, 32, 28)
    expected = {"case_id", "volume", "volume_spacing", "table", "text"} | {f"target.{f.name}" for f in FINDINGS}
    assert set(batch) == expected


def test_targets_are_unknown_without_a_nodule():
    batch = SyntheticCases(0, 80, "train").read_batch(np.arange(80))
    present = batch["target.nodule_present"] == 1
    assert 0 < present.sum() < 80
    for finding in FINDINGS:
        if finding.name != "nodule_present":
            unknown = np.isnan(batch[f"target.{finding.name}"]).reshape(80, -1)
            np.testing.assert_array_equal(unknown, np.broadcast_to(~present[:, None], unknown.shape))


def test_masks_agree_with_targets():
    source = SyntheticCases(4, 60, "train")
    rows = np.arange(60)
    batch, masks = source.read_batch(rows), source.masks(rows)
    np.testing.assert_array_equal(masks.any(axis=(1, 2, 3)), batch["target.nodule_present"] == 1)
    for row in np.flatnonzero(batch["target.nodule_present"] == 1):
        spacing = batch["volume_spacing"][row]
        points = (np.argwhere(masks[row]) - 15.5) * spacing
        long_axis = batch["target.long_axis_mm"][row]
        assert np.linalg.norm(points.mean(axis=0) - batch["target.center_mm"][row]) < 0.5 + 0.06 * long_axis
        extent = 2 * np.sqrt(5 * np.linalg.eigvalsh(np.cov(points.T))[-1])
        assert 0.75 * long_axis - 0.5 < extent < 1.25 * long_axis + 0.5
        if batch["target.calcification"][row] < 6:
            assert batch["volume"][row][masks[row]].max() > 150


def test_no_trivial_score_finds_the_nodule():
    source = SyntheticCases(5, 300, "train")
    batch = source.read_batch(np.arange(300))
    present = batch["target.nodule_present"] == 1
    volume = batch["volume"].astype(np.float32)
    scores = {
        "mean": volume.mean(axis=(1, 2, 3)),
        "max": volume.max(axis=(1, 2, 3)),
        "spread": volume.std(axis=(1, 2, 3)),
        "share of soft tissue": (volume > -300).mean(axis=(1, 2, 3)),
        "spacing": batch["volume_spacing"].prod(axis=1),
        "bytes of text": np.array([len(text.encode()) for text in batch["text"]]),
        "missing numbers": np.isnan(batch["table"]).sum(axis=1),
    }
    for name, score in scores.items():
        assert 0.3 < auc(score, present) < 0.75, name
    # Vessels are there without a nodule too.
    assert np.quantile((volume[~present] > -500).mean(axis=(1, 2, 3)), 0.05) > 0.0004


def test_ceilings_leave_room_for_fusion():
    source = SyntheticCases(0, 8000, "test")
    ceiling = source.ceilings()
    print(ceiling)
    assert 0.935 < ceiling["both"] < 0.96
    assert 0.79 < ceiling["image"] < 0.835 and 0.79 < ceiling["record"] < 0.835
    assert ceiling["both"] > max(ceiling["image"], ceiling["record"]) + 0.08
    ill = np.array([row for row in range(1500) if source.patient(row).nodule])
    malignant = np.array([source.patient(int(row)).findings["malignancy"] == 1 for row in ill])
    # Knowing the missing numbers too can only help.
    certain = auc(source.true_probability(ill), malignant)
    assert SyntheticCases(0, 1500, "test").ceilings()["both"] < certain < 0.97


def test_image_ceiling_is_the_auc_of_the_image_terms():
    source = SyntheticCases(1, 600, "test")
    patients = [source.patient(i) for i in range(600) if source.patient(i).nodule]
    malignant = np.array([patient.findings["malignancy"] == 1 for patient in patients])
    assert source.ceilings()["image"] == pytest.approx(auc([p.terms[:4].sum() for p in patients], malignant), abs=1e-9)


def test_ceilings_of_one_case_are_unknown():
    assert all(np.isnan(value) for value in SyntheticCases(0, 1, "test").ceilings().values())


def test_fingerprint_names_the_cases():
    same = [SyntheticCases(0, 10, "train").fingerprint for _ in range(2)]
    others = [
        SyntheticCases(1, 10, "train"),
        SyntheticCases(0, 11, "train"),
        SyntheticCases(0, 10, "val"),
        SyntheticCases(0, 10, "train", (16, 32, 32)),
    ]
    assert len({*same, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0, 5, "tset"), "'test'"), ((0, 0, "train"), "size 0"), ((-1, 5, "train"), "seed -1")],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(UserError, match=words):
        SyntheticCases(*arguments)


@pytest.mark.parametrize("index", [-1, 4])
def test_index_outside(index):
    with pytest.raises(IndexError, match="of 4"):
        SyntheticCases(0, 4, "train").read_batch(np.array([index]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**40), index=st.integers(0, 10**6), part=st.sampled_from(["train", "val", "test"]))
def test_any_case_is_legal(seed, index, part):
    batch = SyntheticCases(seed, 10**6 + 1, part).read_batch(np.array([index]))
    volume, spacing = batch["volume"], batch["volume_spacing"][0]
    assert volume.dtype == np.int16 and volume.min() >= -1024 and volume.max() <= 2000
    assert volume.std() > 5
    assert 1.0 <= spacing[0] <= 2.0 and 0.8 <= spacing[1] == spacing[2] <= 1.4
    half_field = np.array(volume.shape[1:]) * spacing / 4
    center = batch["target.center_mm"][0]
    assert np.isnan(center).all() or (np.abs(center) <= half_field + 1e-4).all()
    assert batch["text"][0]
    for field, value in zip(RECORD_FIELDS, batch["table"][0], strict=True):
        assert np.isnan(value) or field.low <= value <= field.high


def test_memory_is_bounded_and_forgetting_changes_nothing(monkeypatch):
    monkeypatch.setattr(synthetic, "KEPT", 2)
    source = synthetic.SyntheticCases(3, 4, "train", (8, 8, 8))
    first, again = source.read_batch(np.arange(4)), source.read_batch(np.arange(4))
    np.testing.assert_array_equal(first["volume"], again["volume"])
    assert sorted(source._drawn) == [0, 1]
